"""Losses of stage 1: closed forms, where gradients go, and the mistakes that others made."""

import json
import math
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from processes import fork
from torchvision.models.vgg import cfgs, make_layers

import train_vq
from minit2i import checkpoint, losses, train
from minit2i.losses import EPS, Discriminator, Objective, Perceptual, adaptive_weight, hinge, logit_laplace
from test_train import call, equal, pictures  # noqa: F401

ALONE = train.Processes("cpu")
CFG = train_vq.VQTrainConfig(out="", gan=0.8, gan_start=10, gan_ramp=20, gan_ch=8, gan_layers=2)


def random_vgg():
    torch.manual_seed(0)
    return Perceptual(make_layers(cfgs["D"]))


# --- reconstruction ---


@pytest.mark.parametrize("mu, ln_b", [(0.0, 0.0), (1.3, -1.5), (-2.0, -0.3)])
def test_logit_laplace_is_a_normalised_density(mu, ln_b):
    """Its integral over (0, 1) is 1; plain L1 on a logit, which some call log-Laplace, is no density there."""
    t = np.linspace(-12, 12, 2401)
    x = 1 / (1 + np.exp(-t))  # dx = x (1 - x) dt
    images = torch.from_numpy((x - EPS) / (1 - 2 * EPS) * 2 - 1).view(-1, 1, 1, 1, 1).expand(-1, 1, 3, 1, 1)
    maps = torch.tensor([mu] * 3 + [ln_b] * 3).view(1, 6, 1, 1)
    density = np.array([math.exp(-float(logit_laplace(maps, None, image))) for image in images])
    assert abs(np.trapezoid(density * x * (1 - x), t) - 1) < 1e-3


def test_logit_laplace_equals_the_formula_and_its_mean_is_the_picture():
    torch.manual_seed(0)
    image, maps = torch.rand(2, 3, 4, 4) * 2 - 1, torch.randn(2, 6, 4, 4)
    x = 0.8 * (image.double() + 1) / 2 + 0.1
    mu, b = maps[:, :3].double(), maps[:, 3:].double().exp()
    density = (-((x / (1 - x)).log() - mu).abs() / b).exp() / (2 * b * x * (1 - x))
    assert abs(float(logit_laplace(maps, None, image)) + float(density.log().mean())) < 1e-5
    sure = torch.cat([x.logit(), torch.full_like(x, -9.0)], 1)
    assert torch.allclose(losses.laplace_picture(sure), image, atol=1e-5)
    flat = logit_laplace(sure.requires_grad_(), None, image)
    assert flat.isfinite() and torch.autograd.grad(flat, sure)[0].isfinite().all()


def test_sums_of_reconstruction_losses():
    assert losses.parse_recon("l2+l1+l2") == {"l2": 2.0, "l1": 1.0}
    assert losses.parse_recon("l2 + 0.1*logit_laplace") == {"l2": 1.0, "logit_laplace": 0.1}
    for bad in ("l3", "", "x*l1", "l1+"):
        with pytest.raises(ValueError, match="use l1, l2, logit_laplace, or a sum"):
            losses.parse_recon(bad)
    a, b = torch.rand(2, 3, 4, 4), torch.rand(2, 3, 4, 4)
    objective = Objective(replace(CFG, recon="2*l1+l2", gan=0.0), ALONE, "fp32", (32, 32))
    loss, _ = objective(a, a, b, None, 0)
    assert torch.allclose(loss, 2 * (a - b).abs().mean() + (a - b).square().mean())


# --- perceptual ---


def test_perceptual_distance():
    """0 for the same picture, symmetric, of each picture by itself, with a gradient, and VGG stays as it is."""
    net = random_vgg()
    a, b = torch.rand(3, 3, 32, 32) * 2 - 1, torch.rand(3, 3, 32, 32) * 2 - 1
    d = net(a, b)
    assert d.shape == (3,) and d.min() > 0 and net(a, a).abs().max() == 0 and torch.allclose(net(b, a), d)
    assert torch.allclose(net(a[:1], b[:1]), d[:1], rtol=1e-4)
    (grad,) = torch.autograd.grad(net(a.requires_grad_(), b).mean(), a)
    assert grad.abs().sum() > 0 and not any(w.requires_grad for w in net.parameters())
    x = ((a[:1] + 1) / 2 - net.mean) / net.std  # the features are those before each pooling
    full, seen = make_layers(cfgs["D"]), []
    full.load_state_dict(net.features.state_dict(), strict=False)
    for layer in full:
        if isinstance(layer, torch.nn.MaxPool2d):
            seen.append(x.detach().clone())
        x = layer(x)
    assert len(seen) == 5 == len(net.AT) and [full[i + 1].__class__.__name__ for i in net.AT] == ["MaxPool2d"] * 5


def test_missing_vgg_weights_name_the_mend(tmp_path, monkeypatch):
    (tmp_path / "junk.pth").write_bytes(b"junk")
    torch.save({"other": torch.ones(3)}, tmp_path / "other.pth")
    for name in ("nowhere.pth", "junk.pth", "other.pth"):
        with pytest.raises(ValueError, match=f"{name} does not hold .*fetch https://.*vgg16.* --vgg, or use --percep"):
            losses.vgg_features(str(tmp_path / name))

    def offline(*args, **kw):
        raise OSError("no route to host")

    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", offline)
    with pytest.raises(ValueError, match="could not download .*no route to host.*--vgg"):
        losses.vgg_features()


def test_vgg_from_a_file(tmp_path):
    features = make_layers(cfgs["D"])
    torch.save({f"features.{k}": v for k, v in features.state_dict().items()}, tmp_path / "vgg.pth")
    assert losses.vgg_features(str(tmp_path / "vgg.pth"))[0].weight.equal(features[0].weight)


# --- adversarial ---


def test_patchgan_judges_patches_of_70_pixels_each_by_itself():
    net = Discriminator(8, 3)
    x = torch.rand(2, 3, 256, 256).requires_grad_()
    y = net(x)
    assert y.shape == (2, 1, 30, 30)
    convs = torch.nn.Sequential(*(m for m in net if isinstance(m, torch.nn.Conv2d)))
    (grad,) = torch.autograd.grad(convs(x)[0, 0, 15, 15], x)
    touched = grad[0].abs().sum(0)
    rows = touched.sum(1).nonzero()
    assert rows.max() - rows.min() + 1 == 70 and grad[1].abs().sum() == 0
    assert torch.allclose(net(x[:1]), y[:1], atol=1e-5), "a picture's verdict must not depend on the batch"


def test_any_number_of_channels_will_do():
    assert Discriminator(5, 2)(torch.rand(1, 3, 32, 32)).shape == (1, 1, 6, 6)


def test_hinge_has_a_margin_and_the_right_signs():
    sure, wrong = torch.full((4,), 2.0), torch.full((4,), -2.0)
    assert hinge(sure, wrong) == 0 and hinge(wrong, sure) == 3 and hinge(sure * 0, sure * 0) == 1


def test_the_two_players_gradients_stay_apart():
    """The classic mistakes: undetached fakes in the discriminator's loss, the generator's gradient in the discriminator."""
    objective = Objective(CFG, ALONE, "fp32", (32, 32))
    adversary = objective.adversary
    weight = torch.randn(3, requires_grad=True)
    image = torch.rand(2, 3, 32, 32)
    picture = image.flip(0) * weight.view(3, 1, 1)
    adversary.fool(picture).backward(retain_graph=True)
    assert weight.grad.abs().sum() > 0 and all(w.grad is None for w in adversary.net.parameters())
    weight.grad = None
    adversary.judge(image, picture, 1, True)
    assert (
        weight.grad is None
        and all(  # but the last bias: inside both margins real and fake pull it equally
            w.grad.abs().sum() > 0 for w in list(adversary.net.parameters())[:-1]
        )
    )
    before = float(adversary.fool(picture.detach()))
    for step in range(20):
        adversary.step(200 + step)
        adversary.judge(image, picture, 1, True)
    assert float(adversary.fool(picture.detach())) > before, "a taught discriminator finds the fakes less real"


def test_the_adaptive_weight_is_the_ratio_of_gradients():
    """Detached, clamped, safe where the adversarial gradient is zero, the same under float16's scaling."""
    w = torch.tensor([3.0, 4.0], requires_grad=True)
    lam = adaptive_weight(w.square().sum(), 2 * w.sum(), w)  # norms 10 and sqrt 8
    assert abs(float(lam) - 10 / math.sqrt(8)) < 1e-4 and not lam.requires_grad
    assert abs(float(adaptive_weight(w.square().sum(), 2 * w.sum(), w, scale=65536.0)) - float(lam)) < 1e-4
    assert adaptive_weight(w.square().sum(), 0 * w.sum(), w) == 1e4
    assert adaptive_weight(0 * w.sum(), 0 * w.sum(), w) == 0


def test_it_starts_late_and_is_ramped():
    """Not in play before gan_start; at gan_start the discriminator learns and the tokenizer does not feel it yet."""
    objective, weight = Objective(CFG, ALONE, "fp32", (32, 32)), torch.ones(3, requires_grad=True)
    image = torch.rand(2, 3, 32, 32)
    picture = (image + 0.3) * weight.view(3, 1, 1)
    plain = losses.l2(None, picture, image)

    def at(step):
        loss, log = objective(picture, picture, image, weight, step)
        return float(loss), log

    assert "gan_loss" not in at(9)[1] and not objective.playing(9) and objective.playing(10)
    assert at(9)[0] == at(10)[0] == float(plain)
    for step, share in ((20, 0.5), (30, 1.0), (500, 1.0)):
        loss, log = at(step)
        assert abs(loss - float(plain + 0.8 * share * log["gan_lambda"] * log["gan_loss"])) < 1e-5
    constant = Objective(replace(CFG, gan_adaptive=False, gan=0.1), ALONE, "fp32", (32, 32))
    loss, log = constant(picture, picture, image, weight, 30)
    assert "gan_lambda" not in log and torch.allclose(loss, plain + 0.1 * log["gan_loss"])


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(gan_start=10**6), "gan_start 1000000 is not before the last of 5000 steps"),
        (dict(gan_layers=5), "needs pictures of at least 96 pixels, not 32"),
        (dict(gan=-1.0), "gan -1.0 is less than 0"),
        (dict(gan_ch=0), "gan_ch 0 is less than 1"),
        (dict(recon="ssim"), "recon 'ssim' is not known"),
    ],
)
def test_losses_that_cannot_work_are_refused(change, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        Objective(replace(CFG, **change), ALONE, "fp32", (32, 32))


# --- in the training script ---

FLAGS = (
    "--stride 4 --ch 8 --n_res 1 --n_codes 32 --code_dim 8 --size 16 --batch_size 8 --workers 0 --log_every 1 "
    "--eval_size 8 --eval_every 100 --warmup 2 --gan 0.8 --gan_start 3 --gan_ramp 3 --gan_ch 8 --gan_layers 2 --steps 8"
).split()


def log_of(folder, *keys):
    return [[r[k] for k in keys] for r in train.read_log(folder / "log.jsonl") if all(k in r for k in keys)]


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_a_run_with_a_discriminator_resumes_with_bit_equal_losses(pictures, tmp_path, monkeypatch, precision):  # noqa: F811
    flags = ["--data", pictures, *FLAGS, "--precision", precision, "--recon", "l1+0.1*logit_laplace", "--accum", 2]
    call(train_vq, "--out", tmp_path / "whole", *flags)
    keys = "step", "loss", "disc_loss", "gan_loss", "gan_lambda", "recon"
    assert [row[0] for row in log_of(tmp_path / "whole", *keys)] == [4, 5, 6, 7, 8]
    assert np.isfinite(log_of(tmp_path / "whole", *keys)).all()

    class Stop:
        def __init__(self, processes, every):
            pass

        def asked(self, now):
            return now == 5

    with monkeypatch.context() as m:
        m.setattr(train, "Stop", Stop)
        call(train_vq, "--out", tmp_path / "cut", *flags)
    call(train_vq, "--resume", "--out", tmp_path / "cut")
    assert log_of(tmp_path / "cut", *keys) == log_of(tmp_path / "whole", *keys)
    for name in ("model.safetensors", "state/resume.safetensors"):
        assert equal(tmp_path / "cut" / name, tmp_path / "whole" / name)
    assert json.loads((tmp_path / "cut" / "config.json").read_text())["model"]["maps"] == 6
    names = checkpoint.load_tensors(tmp_path / "cut" / "model.safetensors")[0]
    assert not any("discriminator" in name for name in names), "only resuming needs it"


def test_two_processes_with_a_discriminator_equal_one(pictures, tmp_path):  # noqa: F811
    flags = ["--data", pictures, *FLAGS, "--precision", "fp32"]
    call(train_vq, "--out", tmp_path / "one", *flags)
    fork(2, call, train_vq, "--out", tmp_path / "two", *flags)
    for keys in (("loss", "recon", "grad_norm"), ("gan_loss", "disc_loss"), ("gan_lambda",)):
        one, two = (np.array(log_of(tmp_path / name, *keys)) for name in ("one", "two"))
        assert len(one) and np.allclose(one, two, rtol=5e-3, atol=1e-4), (keys, one, two)

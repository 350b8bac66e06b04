"""Losses of the tokenizer: closed forms, where gradients go, and the mistakes that others made."""

import json
import math
import re

import numpy as np
import pytest
import torch
from conftest import VQ_FLAGS
from processes import call, fork
from safetensors.torch import load_file
from torchvision.models.vgg import cfgs, make_layers

import train_vq
from minit2i import train
from minit2i.checkpoint import load_tensors
from minit2i.config import merge
from minit2i.papers import taming
from minit2i.papers.dalle import EPS, laplace_image, logit_laplace
from minit2i.papers.taming import PatchGAN, Perceptual, adaptive_weight, hinge, vgg_features
from minit2i.plot import read_log
from minit2i.tokenizer_losses import DISCRIMINATORS, PERCEPTUAL, Objective, output_of, parse_recon

CPU = torch.device("cpu")
SMALL = dict(discriminator="patch", gan=0.8, gan_start=10, gan_ramp=20, gan_ch=8, gan_layers=2)


def objective(**settings):
    """An Objective for images of 32 pixels, without a discriminator if none is set."""
    settings = dict(out="") | settings
    parts = [PERCEPTUAL[settings.get("perceptual", "none")], DISCRIMINATORS[settings.get("discriminator", "none")]]
    config = merge(train_vq.VQTrainConfig, *(part and part.Config for part in parts))
    return Objective(config(**settings), (32, 32), CPU)


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


def test_logit_laplace_equals_the_formula_and_its_median_is_the_image():
    image, maps = torch.rand(2, 3, 4, 4) * 2 - 1, torch.randn(2, 6, 4, 4)
    x = 0.8 * (image.double() + 1) / 2 + 0.1
    mu, b = maps[:, :3].double(), maps[:, 3:].double().exp()
    density = (-((x / (1 - x)).log() - mu).abs() / b).exp() / (2 * b * x * (1 - x))
    assert abs(float(logit_laplace(maps, None, image)) + float(density.log().mean())) < 1e-5
    sure = torch.cat([x.logit(), torch.full_like(x, -9.0)], 1)
    assert torch.allclose(laplace_image(sure), image, atol=1e-5)
    flat = logit_laplace(sure.requires_grad_(), None, image)
    assert flat.isfinite() and torch.autograd.grad(flat, sure)[0].isfinite().all()


def test_sums_of_reconstruction_losses():
    assert parse_recon("l2+l1+l2") == {"l2": 2.0, "l1": 1.0}
    assert parse_recon("l2 + 0.1*logit_laplace") == {"l2": 1.0, "logit_laplace": 0.1}
    assert output_of("l2+0.1*logit_laplace") == "logit_laplace" and output_of("l1") == "rgb"
    for bad in ("l3", "", "x*l1", "l1+"):
        with pytest.raises(ValueError, match="use l1, l2, logit_laplace, or a sum"):
            parse_recon(bad)
    a, b = torch.rand(2, 3, 4, 4), torch.rand(2, 3, 4, 4)
    loss, _ = objective(recon="2*l1+l2")(a, a, b, None, 0)
    assert torch.allclose(loss, 2 * (a - b).abs().mean() + (a - b).square().mean())


# --- perceptual ---


@pytest.fixture
def vgg(monkeypatch):
    """Perceptual with random weights."""
    torch.manual_seed(0)
    features = make_layers(cfgs["D"])
    monkeypatch.setattr(taming, "vgg_features", lambda path="": features)
    return Perceptual(Perceptual.Config(), (32, 32))


def test_perceptual_distance(vgg):
    """0 for equal images, symmetric, per image, with a gradient; VGG stays as it is."""
    a, b = torch.rand(3, 3, 32, 32) * 2 - 1, torch.rand(3, 3, 32, 32) * 2 - 1
    d = vgg(a, b)
    assert d.shape == (3,) and d.min() > 0 and vgg(a, a).abs().max() == 0 and torch.allclose(vgg(b, a), d)
    assert torch.allclose(vgg(a[:1], b[:1]), d[:1], rtol=1e-4)
    (grad,) = torch.autograd.grad(vgg(a.requires_grad_(), b).mean(), a)
    assert grad.abs().sum() > 0 and not any(w.requires_grad for w in vgg.parameters())
    x = ((a[:1] + 1) / 2 - vgg.mean) / vgg.std  # the features are those before each pooling
    full, seen = make_layers(cfgs["D"]), []
    full.load_state_dict(vgg.features.state_dict(), strict=False)
    for layer in full:
        if isinstance(layer, torch.nn.MaxPool2d):
            seen.append(x.detach().clone())
        x = layer(x)
    kinds = [full[i + 1].__class__.__name__ for i in vgg.LAYERS]
    assert len(seen) == 5 == len(vgg.LAYERS) and kinds == ["MaxPool2d"] * 5


def test_missing_vgg_weights_name_the_mend(tmp_path, monkeypatch):
    (tmp_path / "junk.pth").write_bytes(b"junk")
    torch.save({"other": torch.ones(3)}, tmp_path / "other.pth")
    for name in ("nowhere.pth", "junk.pth", "other.pth"):
        with pytest.raises(ValueError, match=f"{name} does not hold .*fetch https://.*vgg16.* --vgg, or use --percep"):
            vgg_features(str(tmp_path / name))

    def offline(*args, **kw):
        raise OSError("no route to host")

    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", offline)
    with pytest.raises(ValueError, match="could not download .*no route to host.*--vgg"):
        vgg_features()


def test_vgg_from_a_file(tmp_path):
    features = make_layers(cfgs["D"])
    torch.save({f"features.{k}": v for k, v in features.state_dict().items()}, tmp_path / "vgg.pth")
    assert vgg_features(str(tmp_path / "vgg.pth"))[0].weight.equal(features[0].weight)


# --- adversarial ---


def patchgan(ch, layers):
    return PatchGAN(PatchGAN.Config(gan_ch=ch, gan_layers=layers), (256, 256))


def test_patchgan_judges_patches_of_70_pixels_independently():
    net = patchgan(8, 3)
    x = torch.rand(2, 3, 256, 256).requires_grad_()
    y = net(x)
    assert y.shape == (2, 1, 30, 30)
    convs = torch.nn.Sequential(*(m for m in net if isinstance(m, torch.nn.Conv2d)))
    (grad,) = torch.autograd.grad(convs(x)[0, 0, 15, 15], x)
    touched = grad[0].abs().sum(0)
    rows = touched.sum(1).nonzero()
    assert rows.max() - rows.min() + 1 == 70 and grad[1].abs().sum() == 0
    assert torch.allclose(net(x[:1]), y[:1], atol=1e-5), "a verdict must not depend on the rest of the batch"


def test_patchgan_takes_any_number_of_channels():
    assert patchgan(5, 2)(torch.rand(1, 3, 32, 32)).shape == (1, 1, 6, 6)


def test_hinge_has_a_margin_and_the_right_signs():
    sure, wrong = torch.full((4,), 2.0), torch.full((4,), -2.0)
    assert hinge(sure, wrong) == 0 and hinge(wrong, sure) == 3 and hinge(sure * 0, sure * 0) == 1


@pytest.mark.parametrize("name", [name for name, kind in DISCRIMINATORS.items() if kind])
def test_the_two_players_gradients_stay_apart(name):
    """The classic mistakes: undetached fakes, and the generator's gradient in the discriminator."""
    adversary = objective(**SMALL | dict(discriminator=name)).adversary
    weight = torch.randn(3, requires_grad=True)
    target = torch.rand(2, 3, 32, 32)
    image = target.flip(0) * weight.view(3, 1, 1)
    adversary.generator_loss(image).backward(retain_graph=True)
    assert weight.grad.abs().sum() > 0 and all(w.grad is None for w in adversary.net.parameters())
    weight.grad = None
    adversary.discriminator_loss(image, target).backward()
    grads = [w.grad.abs().sum() for w in adversary.net.parameters()]
    assert weight.grad is None
    assert all(g > 0 for g in grads[:-1])  # the last bias: inside both margins real and fake images pull it equally
    before = float(adversary.generator_loss(image.detach()))
    optimizer = train.make_optimizer(adversary.net, adversary.cfg)
    for _ in range(20):
        optimizer.step(), optimizer.zero_grad()
        adversary.discriminator_loss(image, target).backward()
    after = float(adversary.generator_loss(image.detach()))
    assert after > before, "a trained discriminator finds the generated images less real"


def test_adaptive_weight_is_the_ratio_of_gradient_norms():
    """Detached, clamped, safe if the adversarial gradient is zero, the same under float16's loss scale."""
    w = torch.tensor([3.0, 4.0], requires_grad=True)
    lam = adaptive_weight(w.square().sum(), 2 * w.sum(), w)  # norms 10 and sqrt 8
    assert abs(float(lam) - 10 / math.sqrt(8)) < 1e-4 and not lam.requires_grad
    assert abs(float(adaptive_weight(w.square().sum(), 2 * w.sum(), w, scale=65536.0)) - float(lam)) < 1e-4
    assert adaptive_weight(w.square().sum(), 0 * w.sum(), w) == 1e4
    assert adaptive_weight(0 * w.sum(), 0 * w.sum(), w) == 0


def test_the_discriminator_starts_late_and_is_ramped_in():
    """Inactive before gan_start; at gan_start it learns and the tokenizer does not feel it yet."""
    adaptive, weight = objective(**SMALL), torch.ones(3, requires_grad=True)
    target = torch.rand(2, 3, 32, 32)
    image = (target + 0.3) * weight.view(3, 1, 1)
    plain = (image - target).square().mean().detach()

    def at(step):
        loss, log = adaptive(image, image, target, weight, step)
        return float(loss.detach()), log

    assert "gan_loss" not in at(9)[1] and not adaptive.adversary_at(9) and adaptive.adversary_at(10)
    assert at(9)[0] == at(10)[0] == float(plain)
    for step, share in ((20, 0.5), (30, 1.0), (500, 1.0)):
        loss, log = at(step)
        assert abs(loss - float(plain + 0.8 * share * log["gan_lambda"] * log["gan_loss"])) < 1e-5
    loss, log = objective(**SMALL | dict(gan_adaptive=False, gan=0.1))(image, image, target, weight, 30)
    assert "gan_lambda" not in log and torch.allclose(loss, plain + 0.1 * log["gan_loss"])
    assert objective().adversary_at(10**6) is None


@pytest.mark.parametrize(
    "settings, message",
    [
        (dict(gan_start=10**6), "gan_start 1000000 is not before the last of 5000 steps; use --gan_start 2500"),
        (dict(gan_layers=5), "needs images of at least 96 pixels, not 32"),
        (dict(gan=-1.0), "gan -1.0 is not a number of at least 0"),
        (dict(gan_ch=0), "gan_ch 0 is not a number of at least 1"),
        (dict(recon="ssim"), "recon 'ssim' is not known"),
    ],
)
def test_losses_that_cannot_work_are_refused(settings, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        objective(**SMALL | settings)


def test_perceptual_loss_refuses_small_images():
    with pytest.raises(ValueError, match="needs images of at least 16 pixels, not 8; use --perceptual none"):
        Perceptual(Perceptual.Config(), (8, 32))


# --- in the training script ---

GAN_FLAGS = (
    f"{VQ_FLAGS} --stride 4 --image_size 16 --discriminator patch --gan 0.8 --gan_start 3 --gan_ramp 3 --gan_ch 8 "
    "--gan_layers 2 --eval_every 100 --steps 8"
)


def log_of(folder, *keys):
    return [[r[k] for k in keys] for r in read_log(folder / "log.jsonl") if all(k in r for k in keys)]


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_a_run_with_a_discriminator_resumes_with_bit_equal_losses(images, tmp_path, monkeypatch, precision):
    flags = f"--data {images} {GAN_FLAGS} --precision {precision} --recon l1+0.1*logit_laplace --accum 2"
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    call(train_vq, f"--out {whole} {flags}")
    keys = "step", "loss", "disc_loss", "gan_loss", "gan_lambda", "recon"
    assert [row[0] for row in log_of(whole, *keys)] == [4, 5, 6, 7, 8] and np.isfinite(log_of(whole, *keys)).all()

    class StopAtStep5:
        def __init__(self, procs, every):
            pass

        def asked(self, step):
            return step == 5

    with monkeypatch.context() as m:
        m.setattr(train, "Stop", StopAtStep5)
        call(train_vq, f"--out {cut} {flags}")
    call(train_vq, f"--resume --out {cut}")
    assert log_of(cut, *keys) == log_of(whole, *keys)
    for name in ("model.safetensors", "state/resume.safetensors"):
        one, other = load_file(cut / name), load_file(whole / name)
        assert one.keys() == other.keys() and all(v.equal(other[k]) for k, v in one.items())
    assert json.loads((cut / "config.json").read_text())["model"]["output"] == "logit_laplace"
    names = load_tensors(cut / "model.safetensors")[0]
    assert not any("discriminator" in name for name in names), "only resuming needs it"


def test_two_ranks_with_a_discriminator_match_one(images, tmp_path):
    flags = f"--data {images} {GAN_FLAGS}"
    call(train_vq, f"--out {tmp_path / 'one'} {flags}")
    fork(2, call, train_vq, f"--out {tmp_path / 'two'} {flags}")
    for keys in (("loss", "recon", "grad_norm"), ("gan_loss", "disc_loss"), ("gan_lambda",)):
        one, two = (np.array(log_of(tmp_path / name, *keys)) for name in ("one", "two"))
        assert len(one) and np.allclose(one, two, rtol=5e-3, atol=1e-4), (keys, one, two)

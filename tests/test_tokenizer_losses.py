"""Losses of the tokenizer: closed forms, where gradients go, and the mistakes that others made."""

import json
import math
import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F
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
from minit2i.papers.parti import EqualConv, Halving, StyleGAN, deviation_map
from minit2i.papers.taming import PatchGAN, Perceptual, adaptive_weight, hinge, logistic, vgg_features
from minit2i.plot import read_log
from minit2i.tokenizer_losses import DISCRIMINATORS, PERCEPTUAL, Objective, output_of, parse_recon
from minit2i.vq import build_vq

CPU = torch.device("cpu")
SMALL = dict(discriminator="patch", gan=0.8, gan_start=10, gan_ramp=20, gan_ch=8, gan_layers=2)
STYLE = {k: v for k, v in SMALL.items() if k != "gan_layers"} | dict(discriminator="stylegan")
GAMES = {"patch": SMALL, "logistic": SMALL | dict(gan_loss="logistic"), "stylegan": STYLE}


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
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        vgg(a, b)
    assert {len(t) for t in kept if t.shape[2:] == (32, 32)} == {3}  # nothing of the true images
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


def test_logistic_loss_is_cross_entropy():
    """Of a classifier that says which is real; swapped arguments, a known mistake, would cost the right answer."""
    real, fake = torch.randn(2, 5)
    answers = torch.tensor([1.0] * 5 + [0.0] * 5)
    expected = F.binary_cross_entropy_with_logits(torch.cat([real, fake]), answers)
    assert torch.allclose(logistic(real, fake) / 2, expected)
    assert logistic(real + 20, fake - 20) < 1e-3
    assert math.isclose(float(logistic(real * 0, fake * 0)), 2 * math.log(2), rel_tol=1e-6)


@pytest.mark.parametrize("name", ["logistic", "stylegan"])
def test_the_logistic_generator_does_not_saturate(name):
    """-log p(fake) keeps its gradient where the discriminator is sure, where log(1 - p(fake)) has none."""
    net, sure = objective(**GAMES[name]).adversary.net, torch.full((4,), -30.0, requires_grad=True)
    loss = net.generator_loss(sure)
    (grad,) = torch.autograd.grad(loss, sure)
    assert math.isclose(float(loss.detach()), 30, rel_tol=1e-5) and torch.allclose(grad, torch.full((4,), -0.25))
    half = 2 if name == "logistic" else 1  # VQGAN's release halves
    assert math.isclose(float(net.discriminator_loss(sure.detach(), sure.detach())), 30 / half, rel_tol=1e-5)


@pytest.mark.parametrize("name", GAMES)
def test_the_two_players_gradients_stay_apart(name):
    """The classic mistakes: undetached fakes, and the generator's gradient in the discriminator."""
    adversary = objective(**GAMES[name]).adversary
    weight = torch.randn(3, requires_grad=True)
    target = torch.rand(2, 3, 32, 32)
    image = target.flip(0) * weight.view(3, 1, 1)
    adversary.generator_loss(image).backward(retain_graph=True)
    assert weight.grad.abs().sum() > 0 and all(w.grad is None for w in adversary.net.parameters())
    weight.grad = None
    adversary.discriminator_loss(image, target, 0)[0].backward()
    grads = [w.grad.abs().sum() for w in adversary.net.parameters()]
    assert weight.grad is None
    assert all(g > 0 for g in grads[:-1])  # the last bias: inside both margins real and fake images pull it equally
    before = float(adversary.generator_loss(image.detach()))
    optimizer = train.make_optimizer(adversary.net, adversary.cfg)
    for step in range(20):
        optimizer.step(), optimizer.zero_grad()
        adversary.discriminator_loss(image, target, step)[0].backward()
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
        (dict(gan_loss="wgan"), "gan_loss 'wgan' is not known; use one of hinge, logistic"),
        (dict(recon="ssim"), "recon 'ssim' is not known"),
    ],
)
def test_losses_that_cannot_work_are_refused(settings, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        objective(**SMALL | settings)


def test_perceptual_loss_refuses_small_images():
    with pytest.raises(ValueError, match="needs images of at least 16 pixels, not 8; use --perceptual none"):
        Perceptual(Perceptual.Config(), (8, 32))


def test_every_discriminator_is_tried():
    assert {settings["discriminator"] for settings in GAMES.values()} == {
        k for k, kind in DISCRIMINATORS.items() if kind
    }


# --- StyleGAN's discriminator ---


def stylegan(size=(32, 32), ch=8, r1=10.0):
    return StyleGAN(StyleGAN.Config(gan_ch=ch, gan_r1=r1), size)


def naive_halving(block, x):
    """A residual block with plain loops over the filter's 16 taps, stride by picking every second position."""

    def blurred(x, pad):
        taps, x = (1, 3, 3, 1), F.pad(x, (pad, pad, pad, pad))
        h, w = (n - 3 for n in x.shape[2:])
        return sum(taps[i] * taps[j] / 64 * x[..., i : i + h, j : j + w] for i in range(4) for j in range(4))

    def conv(layer, x, pad=0):
        w = layer.weight / math.sqrt(layer.weight[0].numel())
        return F.conv2d(F.pad(x, (pad,) * 4), w, layer.bias)

    def act(x):
        return math.sqrt(2) * torch.where(x > 0, x, 0.2 * x)

    y = conv(block.conv2, blurred(act(conv(block.conv1, x, 1)), 2))[..., ::2, ::2]
    return (act(y) + conv(block.skip, blurred(x, 1))[..., ::2, ::2]) / math.sqrt(2)


@pytest.mark.parametrize("size", [(8, 8), (7, 12), (9, 5)])
def test_halving_blurs_before_each_stride(size):
    block, x = Halving(3, 5).double(), torch.randn(2, 3, *size, dtype=torch.double)
    torch.nn.init.normal_(block.conv1.bias), torch.nn.init.normal_(block.conv2.bias)
    expected = naive_halving(block, x)
    assert expected.shape == (2, 5, size[0] // 2, size[1] // 2) and torch.allclose(block(x), expected)


def test_the_blur_removes_what_halving_would_alias():
    """A checkerboard becomes flat; without the filter every second position would make it all 1 or all -1."""
    rows, columns = torch.meshgrid(torch.arange(16), torch.arange(16), indexing="ij")
    checks = ((rows + columns) % 2 * 2 - 1.0).view(1, 1, 16, 16)
    block = Halving(1, 1)
    assert block.blur(checks, padding=1, stride=2)[..., 1:-1, 1:-1].abs().max() < 1e-6
    assert torch.allclose(block.blur(torch.ones(1, 1, 8, 8), padding=0), torch.ones(1, 1, 5, 5))
    assert "kernel" not in block.state_dict()


def test_equalised_learning_rate():
    """Weights of standard deviation 1 whatever the width, and outputs of standard deviation 1 too."""
    for a, k in ((3, 1), (64, 3), (256, 3)):
        layer, x = EqualConv(a, 64, k), torch.randn(4, a, 8, 8)
        assert abs(float(layer.weight.detach().std()) - 1) < 0.3 and layer.bias.abs().max() == 0
        assert abs(float(layer(x).detach().std()) - 1) < 0.3


def test_deviation_map_against_a_loop():
    """Groups of four neighbours; a group of equal images has none; N ranks match one."""
    x = torch.randn(8, 3, 2, 5, dtype=torch.double)
    y = deviation_map(x)
    assert y.shape == (8, 1, 2, 5)
    for first in (0, 4):
        places = [(c, i, j) for c in range(3) for i in range(2) for j in range(5)]
        mean = sum(float(x[(slice(first, first + 4), *p)].std(correction=0)) for p in places) / len(places)
        assert torch.allclose(y[first : first + 4], torch.full((4, 1, 2, 5), mean).float(), atol=1e-5)
    assert torch.cat([deviation_map(part) for part in x.chunk(2)]).equal(y)
    assert deviation_map(x[:1].expand(4, -1, -1, -1)).max() < 1e-3
    assert [len(deviation_map(x[:n]).unique()) for n in (1, 2, 3, 4, 5, 6, 8)] == [
        1,
        1,
        1,
        1,
        1,
        2,
        2,
    ]  # 5 alone: 0 each


def test_stylegan_sees_how_varied_a_batch_is():
    net, x = stylegan(), torch.rand(4, 3, 32, 32)
    alone = torch.cat([net(x[i : i + 1]) for i in range(4)])
    assert not torch.allclose(net(x), alone, atol=1e-4), "the deviation of a batch must reach the logits"
    torch.nn.init.zeros_(net.conv.weight.data[:, -1])
    alone = torch.cat([net(x[i : i + 1]) for i in range(4)])
    assert torch.allclose(net(x), alone, atol=1e-4), "by its own channel only"


@pytest.mark.parametrize("size, grid", [((8, 8), (4, 4)), ((64, 64), (4, 4)), ((48, 96), (6, 12)), ((37, 50), (4, 6))])
def test_stylegan_takes_any_size_down_to_8_pixels(size, grid):
    net = stylegan(size, ch=2)
    assert net(torch.rand(2, 3, *size)).shape == (2,) and net.dense.kernel_size == grid
    with pytest.raises(ValueError, match="--discriminator stylegan needs images of at least 8 pixels, not 7"):
        stylegan((7, 64))


def test_parameters_of_stylegan():
    """Counted by hand; and at 1,024 pixels as many as StyleGAN2's release reports for its config F."""
    widths = [16, 32, 64, 128]
    n = 3 * 16 + 16 + sum(9 * a * a + a + 9 * a * b + b + a * b for a, b in zip(widths, widths[1:]))
    n += 9 * 129 * 128 + 128 + 16 * 128 * 128 + 128 + 128 + 1
    assert sum(w.numel() for w in stylegan(ch=16).parameters()) == n
    with torch.device("meta"):
        assert sum(w.numel() for w in stylegan((1024, 1024), ch=32).parameters()) == 29_012_513


def test_r1_is_the_squared_gradient_of_real_logits():
    """Against finite differences of every pixel."""
    net, x, h = stylegan((8, 8), ch=2, r1=3.0).double(), torch.rand(2, 3, 8, 8, dtype=torch.double), 1e-5
    torch.nn.init.zeros_(net.conv.weight.data[:, -1])  # the deviation is computed in float32, too coarse for this
    steps = h * torch.eye(3 * 8 * 8, dtype=torch.double).view(-1, 1, 3, 8, 8)
    with torch.no_grad():
        up, down = (net((x + s * steps).flatten(0, 1)).view(-1, 2) for s in (1, -1))
    expected = 3.0 / 2 * ((up - down) / (2 * h)).square().sum(0).mean()
    assert torch.allclose(net.penalty(x), expected, rtol=1e-6)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.allclose(net.float().penalty(x.float()), expected.float(), rtol=1e-4), "in float32"


def test_r1_in_closed_form():
    """A logit a * |x|^2: its gradient is 2 a x, so R1 is 2 r1 a^2 |x|^2; and R1 itself has a gradient in a."""
    a, x = torch.tensor(0.7, requires_grad=True), torch.rand(4, 3, 8, 8)
    net = stylegan((8, 8), r1=5.0)
    net.forward = lambda images: a * images.square().sum((1, 2, 3))
    size = float(x.square().sum((1, 2, 3)).mean())
    loss = net.penalty(x)
    (grad,) = torch.autograd.grad(loss, a)
    assert math.isclose(float(loss.detach()), 2 * 5 * 0.7**2 * size, rel_tol=1e-5)
    assert math.isclose(float(grad), 4 * 5 * 0.7 * size, rel_tol=1e-5) and not x.requires_grad


def test_r1_comes_every_16_steps_times_16():
    adversary, (real, fake) = objective(**STYLE).adversary, torch.rand(2, 4, 3, 32, 32)
    plain, log = adversary.discriminator_loss(fake, real, 14)
    assert set(log) == {"disc_loss"} and plain == log["disc_loss"]
    for step in (15, 31):
        loss, log = adversary.discriminator_loss(fake, real, step)
        assert log["disc_loss"] == plain and log["disc_penalty"] > 0
        assert torch.allclose(loss, plain + 16 * adversary.net.penalty(real))
    loss, log = objective(**STYLE | dict(gan_r1=0.0)).adversary.discriminator_loss(fake, real, 15)
    assert set(log) == {"disc_loss"} and loss == log["disc_loss"]
    cfg = adversary.cfg
    assert (cfg.lr, cfg.beta1, cfg.clip, cfg.weight_decay) == (2e-3, 0, 0, 0) and cfg.beta2 == 0.99 ** (16 / 17)


def test_real_and_generated_images_are_compared_apart():
    """The deviation of a group of real images must not see generated ones, also in a batch that 4 does not divide."""
    adversary, real, fake = objective(**STYLE).adversary, torch.rand(2, 3, 32, 32), torch.rand(1, 3, 32, 32)
    fake = fake.repeat(2, 1, 1, 1)
    loss, _ = adversary.discriminator_loss(fake, real, 0)
    assert torch.allclose(loss, logistic(adversary.net(real), adversary.net(fake)))


# --- in the training script ---

GAN_FLAGS = (
    f"{VQ_FLAGS} --stride 4 --image_size 16 --discriminator patch --gan 0.8 --gan_start 3 --gan_ramp 3 --gan_ch 8 "
    "--gan_layers 2 --eval_every 100 --steps 8"
)
STYLE_FLAGS = GAN_FLAGS.replace("patch", "stylegan").replace("--gan_layers 2", "")


def log_of(folder, *keys):
    return [[r[k] for k in keys] for r in read_log(folder / "log.jsonl") if all(k in r for k in keys)]


@pytest.mark.parametrize("precision, game", [("fp32", GAN_FLAGS), ("fp16", GAN_FLAGS), ("fp16", STYLE_FLAGS)])
def test_a_run_with_a_discriminator_resumes_with_bit_equal_losses(images, tmp_path, monkeypatch, precision, game):
    monkeypatch.setattr(StyleGAN, "penalty_every", 4)
    flags = f"--data {images} {game} --precision {precision} --recon l1+0.1*logit_laplace --accum 2"
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    call(train_vq, f"--out {whole} {flags}")
    keys = ["step", "loss", "disc_loss", "gan_loss", "recon"] + (["gan_lambda"] if game == GAN_FLAGS else [])
    assert [row[0] for row in log_of(whole, *keys)] == [4, 5, 6, 7, 8] and np.isfinite(log_of(whole, *keys)).all()
    assert [row[0] for row in log_of(whole, "step", "disc_penalty")] == ([] if game == GAN_FLAGS else [4, 8])

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


@pytest.mark.parametrize("game", [GAN_FLAGS, STYLE_FLAGS])
def test_two_ranks_with_a_discriminator_match_one(images, tmp_path, monkeypatch, game):
    """Each has 4 images, a whole group for StyleGAN's deviation."""
    monkeypatch.setattr(StyleGAN, "penalty_every", 4)
    flags = f"--data {images} {game}"
    call(train_vq, f"--out {tmp_path / 'one'} {flags}")
    fork(2, call, train_vq, f"--out {tmp_path / 'two'} {flags}")
    own = ("gan_lambda",) if game == GAN_FLAGS else ("disc_penalty",)
    for keys in (("loss", "recon", "grad_norm"), ("gan_loss", "disc_loss"), own):
        one, two = (np.array(log_of(tmp_path / name, *keys)) for name in ("one", "two"))
        assert len(one) and np.allclose(one, two, rtol=5e-3, atol=1e-4), (keys, one, two)


WDSR = "--train upsampler --upsampler wdsr --sr_ch 8 --sr_blocks 1"
LOGISTIC = (
    "--recon l2 --perceptual vgg --perceptual_weight 0.1 --discriminator patch --gan_layers 2 --gan_loss logistic"
)


@pytest.mark.parametrize(
    "part, losses", [("--train decoder", "--recipe parti"), (WDSR, "--recipe parti"), (WDSR, LOGISTIC)]
)
def test_decoders_and_upsamplers_are_trained_with_all_three_losses(vq_run, images, tmp_path, monkeypatch, part, losses):
    """Parti sec. 2.1: l2, perceptual and adversarial; a narrow VGG of random weights here.  All of them are felt."""
    torch.manual_seed(0)
    narrow = make_layers([n if n == "M" else n // 16 for n in cfgs["D"]])
    monkeypatch.setattr(taming, "vgg_features", lambda path="": narrow)
    quick = "--steps 2 --lr 1e-2 --warmup 0 --batch_size 4 --workers 0 --log_every 1 --device cpu --precision fp32"
    game = "--gan 0.1 --gan_ch 4 --gan_start 0 --gan_ramp 1"
    call(train_vq, f"--data {images} {quick} --init {vq_run} {part} {losses} {game} --out {tmp_path / 'x'}")
    keys = ["loss", "recon", "perceptual", "gan_loss", "disc_loss"] + ["gan_lambda"] * (losses == LOGISTIC)
    rows = log_of(tmp_path / "x", *keys)
    assert len(rows) == 2 and np.isfinite(rows).all()
    loss, recon, perceptual, gan_loss, _, *balance = rows[1]  # after the ramp
    share = 0.1 * (balance[0] if balance else 1)
    assert share > 0 and math.isclose(loss, recon + 0.1 * perceptual + share * gan_loss, rel_tol=1e-3)
    one, other = (load_file(folder / "model.safetensors") for folder in (vq_run, tmp_path / "x"))
    changed = {k.split(".")[0] for k, v in other.items() if k not in one or not v.equal(one[k])}
    assert changed == {part.split()[1]}


def test_the_adaptive_weight_of_an_upsampler_is_at_its_last_layer():
    """The 5x5 convolution, which feels both losses from the first step: WDSR's other last convolution starts at zero."""
    settings = dict(upsampler="wdsr", upscale=2, sr_ch=4, sr_blocks=1, ch=4, n_res=1, n_codes=8, code_dim=4, stride=8)
    vq = build_vq(settings)
    assert vq.last_weight is vq.upsampler.skip.weight
    maps, _, _, _ = vq(torch.rand(2, 3, 16, 16))
    adaptive, target = objective(**SMALL), torch.rand(2, 3, 32, 32)
    _, log = adaptive(maps, vq.to_image(maps), target, vq.last_weight, 30)
    assert 0 < log["gan_lambda"] < 1e4

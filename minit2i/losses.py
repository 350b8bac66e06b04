"""What a tokenizer is trained for: reconstruction, perceptual and adversarial losses.

`Objective` puts them together; each loss is a function by itself.  All are means over the batch, in float32.

Shapes: B batch, H W picture; pictures are in [-1, 1].
"""

import math
from dataclasses import dataclass, replace
from typing import Annotated

import torch
import torch.nn as nn
import torch.nn.functional as F

from minit2i.parallel import processes, reduce_sum
from minit2i.train import make_optimizer, optimizer_step


@dataclass(frozen=True)
class LossConfig:
    """What the tokenizer is trained for."""

    recon: Annotated[str, "l1, l2, logit_laplace (DALL-E), or a sum of them as in l2+0.1*logit_laplace"] = "l2"
    perceptual: Annotated[float, "weight of the VGG perceptual loss (VQGAN: 1); 0: none"] = 0.0
    vgg: Annotated[str, "file of torchvision's VGG16 weights; empty: torchvision downloads them"] = ""
    gan: Annotated[float, "weight of the adversarial loss (VQGAN: 0.8); 0: no discriminator"] = 0.0
    gan_adaptive: Annotated[bool, "weigh it by VQGAN's ratio of gradients too"] = True
    gan_start: Annotated[int, "step at which the discriminator starts to learn"] = 2500
    gan_ramp: Annotated[int, "steps over which its weight then rises from 0"] = 1000
    gan_lr: Annotated[float, "the discriminator's peak learning rate"] = 2e-4
    gan_ch: Annotated[int, "the discriminator's channels at half resolution"] = 64
    gan_layers: Annotated[int, "the discriminator's halvings; 3 judge patches of 70x70 pixels"] = 3


# --- reconstruction ----------------------------------------------------------------------------------

EPS = 0.1  # DALL-E app. A.3: pixels in [0, 1] are mapped into [EPS, 1 - EPS]
LOWEST = -5.0  # of ln b: a scale of 0.007, half an 8-bit step.  Below, flat pictures would have an endless density


def l1(maps, picture, image):
    return (picture - image).abs().mean()


def l2(maps, picture, image):
    return (picture - image).square().mean()


def logit_laplace(maps, picture, image):
    """Negative log-likelihood per value under the logit-Laplace distribution, in nats.

    maps (B, 6, H, W) hold mu and ln b, image (B, 3, H, W) is in [-1, 1] and mapped by phi(x) = (1 - 2e) x + e from
    [0, 1].  Density 1 / (2 b x (1 - x)) exp(-|logit(x) - mu| / b).  DALL-E, arXiv:2102.12092 app. A.3.
    Our choice: ln b is at least LOWEST.
    """
    mu, ln_b = maps.float().chunk(2, 1)
    ln_b = ln_b.clamp_min(LOWEST)
    x = (1 - 2 * EPS) * (image.float() + 1) / 2 + EPS
    return ((x.logit() - mu).abs() * (-ln_b).exp() + ln_b + (2 * x * (1 - x)).log()).mean()


def laplace_picture(maps):
    """The picture phi^-1(sigmoid(mu)) of maps (B, 6, H, W) -> (B, 3, H, W), a little beyond [-1, 1] at most."""
    mu = maps.float().chunk(2, 1)[0]
    return 2 * (mu.sigmoid() - EPS) / (1 - 2 * EPS) - 1


RECON = {"l1": l1, "l2": l2, "logit_laplace": logit_laplace}


def parse_recon(text):
    """'l2+0.1*logit_laplace' -> {"l2": 1.0, "logit_laplace": 0.1}; ValueError for anything else."""
    terms = {}
    for term in text.split("+"):
        weight, _, name = term.rpartition("*")
        try:
            terms[name.strip()] = terms.get(name.strip(), 0) + float(weight or 1)
        except ValueError:
            name = ""
        if name.strip() not in RECON:
            raise ValueError(f"recon {text!r} is not known; use {', '.join(RECON)}, or a sum as l2+0.1*logit_laplace")
    return terms


# --- perceptual --------------------------------------------------------------------------------------


def vgg_features(path=""):
    """The convolutions of torchvision's VGG16, trained on ImageNet: from its file, or by torchvision's download.

    ValueError if neither can be had.
    """
    from torchvision.models import VGG16_Weights
    from torchvision.models.vgg import cfgs, make_layers

    features, source = make_layers(cfgs["D"]), VGG16_Weights.IMAGENET1K_V1
    try:
        if path:
            state = torch.load(path, map_location="cpu", weights_only=True)  # weights_only: it can run no code
        else:
            state = source.get_state_dict(progress=False)
        features.load_state_dict({k[9:]: v for k, v in state.items() if k.startswith("features.")})
    except Exception as e:  # a file may be wrong in many ways, a network too
        what = f"{path} does not hold them" if path else "torchvision could not download them"
        raise ValueError(
            f"--perceptual needs VGG16's weights, and {what} ({type(e).__name__}: {str(e).splitlines()[0][:100]}); "
            f"fetch {source.url} and name the file with --vgg, or use --perceptual 0"
        ) from e
    return features


class Perceptual(nn.Module):
    """Distance of two pictures in VGG16's features: a, b (B, 3, H, W) -> (B,).

    As LPIPS, arXiv:1801.03924 eq. 1: the last features before each of five poolings, normalised over channels, squared
    difference, mean over places.  Deviation: without its learned channel weights, which torchvision does not have.
    """

    AT = (3, 8, 15, 22, 29)  # relu1_2, 2_2, 3_3, 4_3, 5_3

    def __init__(self, features):
        super().__init__()
        self.features = features[: self.AT[-1] + 1].eval().requires_grad_(False)
        for m in self.features:
            if isinstance(m, nn.ReLU):
                m.inplace = False  # else the features kept here would change
        self.register_buffer("mean", torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1))
        self.register_buffer("std", torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1))

    def forward(self, a, b):
        x = ((torch.cat([a, b]) + 1) / 2 - self.mean) / self.std
        total = 0.0
        for i, layer in enumerate(self.features):
            x = layer(x)
            if i in self.AT:
                f, g = F.normalize(x.float(), dim=1, eps=1e-6).chunk(2)  # (B, C, h, w) each
                total = total + (f - g).square().sum(1).mean((1, 2))
        return total


# --- adversarial -------------------------------------------------------------------------------------


class Discriminator(nn.Sequential):
    """PatchGAN: (B, 3, H, W) -> one logit for each overlapping patch (B, 1, h, w), high for real.

    pix2pix, arXiv:1611.07004 app. 6.1.2.  Deviation: GroupNorm for BatchNorm, so that no picture's verdict depends
    on the others of its batch, and two processes equal one.
    """

    def __init__(self, ch=64, n_layers=3):
        layers, last = [nn.Conv2d(3, ch, 4, stride=2, padding=1), nn.LeakyReLU(0.2)], ch
        for i in range(1, n_layers + 1):
            w = ch * min(2**i, 8)
            layers += [nn.Conv2d(last, w, 4, stride=2 if i < n_layers else 1, padding=1, bias=False)]
            layers += [nn.GroupNorm(math.gcd(8, w), w), nn.LeakyReLU(0.2)]
            last = w
        super().__init__(*layers, nn.Conv2d(last, 1, 4, padding=1))


def hinge(real, fake):
    """The discriminator's loss from its logits.  Geometric GAN, arXiv:1705.02894; zero beyond the margin of 1."""
    return (F.relu(1 - real.float()).mean() + F.relu(1 + fake.float()).mean()) / 2


def ramp(step, start, length):
    """0 until `start`, then linearly up to 1."""
    return min(1.0, max(0.0, (step - start) / max(1, length)))


def adaptive_weight(recon, adversarial, weight, scale=1.0, delta=1e-6):
    """How much larger the reconstruction's gradient at the decoder's last weight is than the adversarial one's.

    Two losses that depend on the parameter `weight` -> lambda (), at most 1e4, without a gradient.
    VQGAN, arXiv:2012.09841 eq. 7, whose delta this is (its code has 1e-4).  The gradients are means over all processes;
    scale: the loss scaling of float16, undone here.
    """

    def norm(loss):
        (g,) = torch.autograd.grad(scale * loss, weight, retain_graph=True)
        return (reduce_sum(g.float() / scale) / processes()[1]).norm()

    return (norm(recon) / (norm(adversarial) + delta)).clamp(max=1e4).detach()


class Adversary:
    """A discriminator with its own optimizer and loss scaler; `parts` is what a checkpoint must keep."""

    def __init__(self, cfg, p, precision):
        self.cfg = replace(cfg, lr=cfg.gan_lr, beta1=0.5, beta2=0.9, weight_decay=0.0)  # as Taming's
        self.net = Discriminator(cfg.gan_ch, cfg.gan_layers).to(p.device)
        self.optimizer = make_optimizer(self.net, self.cfg)
        self.scaler = torch.amp.GradScaler(p.device.type, enabled=precision == "fp16")
        self.forward = nn.parallel.DistributedDataParallel(self.net) if p.world > 1 else self.net

    @property
    def parts(self):
        return self.net, self.optimizer, self.scaler

    def fool(self, picture):
        """The generator's loss: real logits are wanted.  Its gradient reaches the picture, not the discriminator."""
        frozen = {k: w.detach() for k, w in self.net.named_parameters()}
        return -torch.func.functional_call(self.net, frozen, (picture,)).float().mean()

    def judge(self, image, picture, n_parts, last):
        """Gather the discriminator's own gradient on real and made pictures; the latter's makers get none."""
        self.forward.require_backward_grad_sync = last
        loss = hinge(*self.forward(torch.cat([image, picture.detach()])).chunk(2))
        self.scaler.scale(loss / n_parts).backward()
        return loss.detach()

    def step(self, step):
        optimizer_step(self.net, self.optimizer, self.scaler, self.cfg, step)


# --- all together ------------------------------------------------------------------------------------


class Objective:
    """Weighted sum of the losses that cfg (LossConfig with TrainConfig) names; p is this train.Processes."""

    def __init__(self, cfg, p, precision, size):
        self.cfg, self.terms = cfg, parse_recon(cfg.recon)
        self.vgg, self.adversary = None, None
        for name in ("perceptual", "gan", "gan_ramp", "gan_start", "gan_layers", "gan_ch"):
            if getattr(cfg, name) < (name == "gan_ch"):
                raise ValueError(f"{name} {getattr(cfg, name)} is less than {int(name == 'gan_ch')}")
        if cfg.perceptual:
            if min(size) < 16:
                raise ValueError(
                    f"--perceptual needs pictures of at least 16 pixels, not {min(size)}; use --perceptual 0"
                )
            if not p.main:
                p.barrier()  # the first process downloads
            self.vgg = Perceptual(vgg_features(cfg.vgg)).to(p.device)
            if p.main:
                p.barrier()
        if cfg.gan:
            least = 3 * 2**cfg.gan_layers
            if min(size) < least:
                raise ValueError(
                    f"a discriminator of {cfg.gan_layers} layers needs pictures of at least {least} pixels, not "
                    f"{min(size)}; use a smaller --gan_layers"
                )
            if cfg.gan_start >= cfg.steps:
                raise ValueError(
                    f"--gan does nothing: gan_start {cfg.gan_start} is not before the last of {cfg.steps} steps; "
                    f"use --gan_start {cfg.steps // 2}"
                )
            self.adversary = Adversary(cfg, p, precision)

    @property
    def parts(self):
        """Name -> (module, optimizer, scaler) of what is trained beside the tokenizer."""
        return {"discriminator": self.adversary.parts} if self.adversary else {}

    def playing(self, step):
        """Whether the discriminator takes part in this step."""
        return bool(self.adversary) and step >= self.cfg.gan_start

    def __call__(self, maps, picture, image, weight, step, scale=1.0):
        """The decoder's maps and their picture, the true image, the decoder's last weight -> loss, {name: value}."""
        cfg = self.cfg
        with torch.autocast(image.device.type, enabled=False):
            loss = sum(w * RECON[name](maps.float(), picture, image) for name, w in self.terms.items())
        log = {"recon": loss}
        if self.vgg:
            log["perceptual"] = self.vgg(picture, image).mean()
            loss = loss + cfg.perceptual * log["perceptual"]
        if self.playing(step):
            log["gan_loss"] = self.adversary.fool(picture)
            share = cfg.gan * ramp(step, cfg.gan_start, cfg.gan_ramp)
            if cfg.gan_adaptive:
                log["gan_lambda"] = adaptive_weight(loss, log["gan_loss"], weight, scale)
                share = share * log["gan_lambda"]
            loss = loss + share * log["gan_loss"]
        return loss, {k: v.detach() for k, v in log.items()}

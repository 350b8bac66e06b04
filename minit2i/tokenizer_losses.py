"""The tokenizer's objective: a weighted sum of reconstruction, perceptual and adversarial losses.

`Objective` is that sum, `Adversary` the discriminator's side of it.  The losses themselves are registered: l1 and l2
in vq.py, logit_laplace in papers/dalle.py, vgg and patch in papers/taming.py, stylegan in papers/parti.py.  All are
means over the batch, in float32.

Shapes: B batch, H W image; images are in [-1, 1].
"""

from dataclasses import dataclass, replace
from typing import Annotated

import torch
from torch.nn.parallel import DistributedDataParallel

from minit2i.collectives import barrier, rank_and_world
from minit2i.config import Settings, at_least
from minit2i.vq import OUTPUTS, RECON_LOSSES

PERCEPTUAL = {"none": None}  # name -> module built as C(cfg, image_size): images a, b (B, 3, H, W) -> distances (B,)
DISCRIMINATORS = {"none": None}  # name -> module built as C(cfg, image_size): images -> logits; see Adversary
PARTS = {"perceptual": PERCEPTUAL, "discriminator": DISCRIMINATORS}  # fields of LossConfig that bring settings


@dataclass(frozen=True)
class LossConfig(Settings):
    """The tokenizer's losses."""

    group = "Loss"
    recon: Annotated[str, "l1, l2, logit_laplace (DALL-E), or a sum such as l2+0.1*logit_laplace"] = "l2"
    perceptual: Annotated[str, "perceptual loss"] = "none"
    discriminator: Annotated[str, "discriminator of the adversarial loss"] = "none"


@dataclass(frozen=True)
class AdversaryConfig(Settings):
    """Settings that all discriminators share; their Config inherits it."""

    gan: Annotated[float, "weight of the adversarial loss (VQGAN: 0.8)", at_least(0)] = 0.8
    gan_start: Annotated[int, "step at which the discriminator starts to learn", at_least(0)] = 2500
    gan_ramp: Annotated[int, "steps over which its weight then rises from 0", at_least(0)] = 1000
    gan_lr: Annotated[float, "the discriminator's peak learning rate", at_least(0)] = 2e-4


def parse_recon(text):
    """'l2+0.1*logit_laplace' -> {"l2": 1.0, "logit_laplace": 0.1}; ValueError for anything else."""
    terms = {}
    for term in text.split("+"):
        weight, _, name = (part.strip() for part in term.rpartition("*"))
        try:
            terms[name] = terms.get(name, 0) + float(weight or 1)
        except ValueError:
            name = ""
        if name not in RECON_LOSSES:
            raise ValueError(
                f"recon {text!r} is not known; use {', '.join(RECON_LOSSES)}, or a sum such as l2+0.1*logit_laplace"
            )
    return terms


def output_of(recon):
    """How the decoder's maps are read under a reconstruction loss: VQConfig.output."""
    return next((name for name in parse_recon(recon) if name in OUTPUTS), "rgb")


def ramp(step, start, length):
    """0 until `start`, then linearly up to 1."""
    return min(1.0, max(0.0, (step - start) / max(1, length)))


class Adversary:
    """A discriminator and the two losses of its game.  `cfg` is the config of its own AdamW.

    A discriminator is a module with discriminator_loss(real, fake) and generator_loss(fake) of logits; with
    balance(recon, gan, weight, scale), a factor on the generator's loss or None; with `optimizer`, settings of its
    AdamW; and with penalty(real), a loss on real images that is added every `penalty_every` steps (0: never).
    """

    def __init__(self, cfg, size, device):
        if cfg.gan_start >= cfg.steps:
            raise ValueError(
                f"--discriminator {cfg.discriminator} does nothing: gan_start {cfg.gan_start} is not before the "
                f"last of {cfg.steps} steps; use --gan_start {cfg.steps // 2}"
            )
        self.net = DISCRIMINATORS[cfg.discriminator](cfg, size).to(device)
        self.cfg = replace(cfg, lr=cfg.gan_lr, **self.net.optimizer)
        ddp = rank_and_world()[1] > 1
        self.forward = DistributedDataParallel(self.net, broadcast_buffers=False) if ddp else self.net

    def generator_loss(self, image):
        """image (B, 3, H, W) -> loss ().  Its gradient reaches the image, not the discriminator."""
        frozen = {k: w.detach() for k, w in self.net.named_parameters()}
        return self.net.generator_loss(torch.func.functional_call(self.net, frozen, (image,)))

    def discriminator_loss(self, image, target, step):
        """image and target (B, 3, H, W) -> loss (), {name: value}.  Its gradient reaches the discriminator alone.

        Real and generated images pass one after the other, because a discriminator may compare the images of a batch.
        The penalty is multiplied by its interval, which keeps its mean weight (StyleGAN2, arXiv:1912.04958 sec. 3.1).
        """
        loss = self.net.discriminator_loss(self.forward(target), self.forward(image.detach()))
        log, every = {"disc_loss": loss.detach()}, self.net.penalty_every
        if every and (step + 1) % every == 0:
            penalty = self.net.penalty(target)  # on the module itself: its gradient joins that of the two passes
            log["disc_penalty"], loss = penalty.detach(), loss + every * penalty
        return loss, log


class Objective:
    """The weighted sum of the losses that cfg names (LossConfig, its parts' settings, and TrainConfig).

    size (H, W): the images'.  ValueError for losses that are not known or cannot work at this size.
    """

    def __init__(self, cfg, size, device):
        self.cfg, self.terms = cfg, parse_recon(cfg.recon)
        perceptual, main = PERCEPTUAL[cfg.perceptual], rank_and_world()[0] == 0
        if not main:
            barrier()  # the first rank downloads weights
        self.perceptual = perceptual and perceptual(cfg, size).to(device)
        if main:
            barrier()
        self.adversary = Adversary(cfg, size, device) if DISCRIMINATORS[cfg.discriminator] else None

    def adversary_at(self, step):
        """The adversary if it takes part in this step, else None."""
        return self.adversary if self.adversary and step >= self.cfg.gan_start else None

    def __call__(self, maps, image, target, weight, step, scale=1.0):
        """The decoder's maps, the image they mean, the true image, the last weight -> loss (), {name: value}.

        scale: float16's loss scale.
        """
        cfg = self.cfg
        with torch.autocast(target.device.type, enabled=False):
            loss = sum(w * RECON_LOSSES[name](maps.float(), image, target) for name, w in self.terms.items())
        log = {"recon": loss}
        if self.perceptual:
            log["perceptual"] = self.perceptual(image, target).mean()
            loss = loss + cfg.perceptual_weight * log["perceptual"]
        if adversary := self.adversary_at(step):
            log["gan_loss"] = adversary.generator_loss(image)
            share = cfg.gan * ramp(step, cfg.gan_start, cfg.gan_ramp)
            balance = adversary.net.balance(loss, log["gan_loss"], weight, scale)
            if balance is not None:
                log["gan_lambda"], share = balance, share * balance
            loss = loss + share * log["gan_loss"]
        return loss, {k: v.detach() for k, v in log.items()}

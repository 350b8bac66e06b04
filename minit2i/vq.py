"""Stage 1: a tokenizer turns a picture into a grid of codes and back.

    image (B, 3, H, W) in [-1, 1] --encode--> codes (B, h, w) --decode--> image (B, 3, H, W)

VQ-VAE, van den Oord et al., arXiv:1711.00937, with the moving-average codebook of its appendix A.1.

    python -m minit2i.vq show --model out/vq --images path/to/pictures --out sheet.png

Shapes: B batch, H W picture, h w code grid, N = B*h*w latents, C code dimension, V codebook size.
"""

import math
from dataclasses import dataclass, replace
from itertools import combinations_with_replacement
from typing import Annotated

import torch
import torch.nn as nn
import torch.nn.functional as F
from einops import rearrange

from minit2i.backbones import BACKBONES, HALO, WDSR, is_local, reach, tiled
from minit2i.losses import laplace_picture
from minit2i.parallel import processes, reduce_sum


@dataclass(frozen=True)
class VQConfig:
    """What the tokenizer is; stored in its checkpoint."""

    stride: Annotated[int, "pixels per code in each direction", (2, 4, 8, 16, 32)] = 4
    backbone: Annotated[str, "encoder and decoder: vqvae, dvae, vqgan, movq or vit"] = "vqvae"
    ch: Annotated[int, "channels of the finest grid, more on coarser ones; vit: a quarter of its width"] = 64
    n_res: Annotated[int, "residual blocks per grid; vit: transformer blocks"] = 2
    patchwise: Annotated[bool, "vqvae: a code sees its own pixels only; easier to predict, harder to draw"] = False
    decoder: Annotated[str, "the backbone whose decoder is used; empty: the encoder's"] = ""
    decoder_ch: Annotated[int, "channels of the decoder; 0: --ch"] = 0
    decoder_n_res: Annotated[int, "residual blocks of the decoder; 0: --n_res"] = 0
    upscale: Annotated[int, "decoded pictures are that many times larger (see --super_resolution)", (1, 2, 4)] = 1
    sr_ch: Annotated[int, "channels of the super-resolution (Parti: 128)"] = 128
    sr_blocks: Annotated[int, "residual blocks of the super-resolution (Parti: 12)"] = 12
    maps: int = 3  # that the decoder gives: 3 are RGB, 6 the means and log-scales of logit-Laplace
    quantizer: Annotated[str, "how codes are learned (see QUANTIZERS)"] = "ema"
    n_codes: Annotated[int, "codebook size"] = 1024
    code_dim: Annotated[int, "channels of a code; not for fsq"] = 32
    l2_norm: Annotated[bool, "l2-normalise latents and codes (ViT-VQGAN, arXiv:2110.04627 sec. 3.2); not for fsq"] = (
        False
    )
    beta: Annotated[float, "weight of the commitment loss"] = 0.25
    decay: Annotated[float, "moving-average decay of the codebook"] = 0.99
    kl_weight: Annotated[float, "gumbel: final weight of the KL to even use (DALL-E)"] = 6.6
    kl_steps: Annotated[int, "gumbel: steps over which that weight rises from 0"] = 5000
    tau_steps: Annotated[int, "gumbel: steps over which the temperature falls from 1 to 1/16 (DALL-E: 150,000)"] = 5000
    free_steps: Annotated[
        int, "fixed: steps without quantization, after which k-means sets the codebook; with --init: none"
    ] = 200
    restart: Annotated[
        float, "ema, st: codes used less than this fraction of an even share are restarted; 0: never"
    ] = 0.1


# --- quantizers ------------------------------------------------------------------------------------


@torch.no_grad()
def nearest_code(z, codebook, most=2**22):
    """Index of the nearest codebook entry.

    z (N, C), codebook (V, C) -> codes (N,) in [0, V).  Computed in float32, `most` distances at a time; |z|^2 is
    the same for every code and left out.  VQ-VAE, arXiv:1711.00937 eq. 1.
    """
    with torch.autocast(z.device.type, enabled=False):
        z, codebook = z.float(), codebook.float()
        norm, rows = codebook.square().sum(1), max(1, most // len(codebook))
        codes = torch.empty(len(z), dtype=torch.long, device=z.device)
        distances = z.new_empty(min(rows, len(z)), len(codebook))  # one for all parts: new ones leave holes in the heap
        for part, out in zip(z.split(rows), codes.split(rows)):
            out.copy_(torch.addmm(norm, part, codebook.t(), alpha=-2, out=distances[: len(part)]).argmin(1))
        return codes


def pick_rows(z, index):
    """Rows `index` (M,) of the latents of all processes, z (n, C) on each -> (M, C), the same on each.

    Process r holds rows r*n ... (r+1)*n - 1; each fills in its own and the rest comes by summing.
    """
    first = processes()[0] * len(z)
    mine = (index >= first) & (index < first + len(z))
    rows = z[(index - first).clamp(0, len(z) - 1)] * mine[:, None]
    return reduce_sum(rows)


class Quantizer(nn.Module):
    """Nearest code, straight-through gradient; what all quantizers share.

    `forward` changes nothing; the training loop calls `start` once, at `first_step`, and `update` after each step.
    Both see the latents of all processes, so that two processes equal one with the doubled batch.
    """

    first_step = 0

    def __init__(self, cfg):
        super().__init__()
        self.cfg = cfg
        self.register_buffer("ema_count", torch.ones(cfg.n_codes))
        self.add_codebook(self.norm(torch.randn(cfg.n_codes, self.widths(cfg)[1])))

    @staticmethod
    def widths(cfg):
        """Channels of a latent, and of what a code stands for."""
        return cfg.code_dim, cfg.code_dim

    def add_codebook(self, codes):
        self.register_buffer("codebook", codes)

    def norm(self, z):
        return F.normalize(z.float(), dim=-1) if self.cfg.l2_norm else z.float()

    def forward(self, z, step=None):
        """z (N, C) -> z_q (N, C) with z's gradient, codes (N,), loss ().  step: of the training; None: use, not train."""
        z = self.norm(z)
        codes = nearest_code(z, self.norm(self.codebook))  # a learned one, or an average, leaves the sphere
        z_q = self.lookup(codes)
        return z + (z_q - z).detach(), codes, self.loss(z, z_q)

    def loss(self, z, z_q):
        """Commitment, VQ-VAE eq. 3: moves the latent to its code."""
        return self.cfg.beta * F.mse_loss(z, z_q.detach())

    def lookup(self, codes):
        """codes (...) -> latents (..., C)."""
        return self.norm(F.embedding(codes, self.codebook))

    def draw(self, z, codes, good, n, step):
        """n latents (n, C) of those of all processes: a pure function of z (N, C), codes (N,), good (N,) and the step.

        Good ones only, in proportion to the squared distance from their code, as k-means++ seeds its centres: evenly drawn ones
        would mostly be plain background, which has its codes.
        """
        rank, world = processes()
        weight = z.new_zeros(world, len(z))
        weight[rank] = (z - F.embedding(codes, self.codebook)).square().sum(1) * good + 1e-12 * good
        weight = reduce_sum(weight).flatten().cpu()
        if not weight.any():  # a whole batch overflowed: the codes stay
            return F.embedding(torch.arange(n, device=z.device), self.codebook)
        index = weight.multinomial(n, replacement=True, generator=torch.Generator().manual_seed(step))
        return pick_rows(z, index.to(z.device))

    def count(self, codes, good):
        """How many good latents of all processes chose each code: codes (N,), good (N,) 1 or 0 -> (V,)."""
        return reduce_sum(torch.zeros_like(self.ema_count).index_add_(0, codes, good))

    def sums(self, z, codes):
        """Sum of the latents of all processes that chose each code: z (N, C), codes (N,) -> (V, C)."""
        return reduce_sum(torch.zeros_like(self.codebook).index_add_(0, codes, z))

    def finite(self, z):
        """Latents (N, C) as the codebook sees them, and which are good (N,), 1 or 0: the others become zero.

        A step that overflows in float16 is skipped; it must not reach the codebook.
        """
        z = self.norm(z)
        good = z.isfinite().all(1)
        return torch.where(good[:, None], z, 0), good.float()

    @torch.no_grad()
    def start(self, z, iterations=10):
        """k-means on z (N, C); a centre that nothing chooses moves to a latent far from all."""
        (z, good), v = self.finite(z), len(self.codebook)
        self.codebook.copy_(reduce_sum(z.sum(0)) / reduce_sum(good.sum()).clamp_min(1))  # all at the mean
        self.codebook.copy_(self.draw(z, torch.zeros_like(good, dtype=torch.long), good, v, step=0))
        for i in range(iterations):
            codes = nearest_code(z, self.codebook)
            count = self.count(codes, good)
            fresh = self.draw(z, codes, good, v, i)
            centre = torch.where(count[:, None] > 0, self.sums(z, codes) / count.clamp_min(1)[:, None], fresh)
            self.place(count.new_ones(v, dtype=torch.bool), self.norm(centre), count.clamp_min(1))

    def place(self, which, codes, count):
        """Put the codes `which` (V,) at the rows of codes (V, C), as if used `count` times a step."""
        self.codebook.copy_(torch.where(which[:, None], codes, self.codebook))
        self.ema_count.copy_(torch.where(which, count, self.ema_count))

    @torch.no_grad()
    def update(self, z, codes, step):
        """Count the codes (for the log), and let the codebook learn.

        z (N, C), codes (N,); step: the training step, which seeds the restarts.
        """
        z, good = self.finite(z)
        self.ema_count.lerp_(self.count(codes, good), 1 - self.cfg.decay)
        self.learn(z, codes, good, step)

    def learn(self, z, codes, good, step):
        """Move the codebook; here: not at all."""

    def restart(self, z, codes, good, step):
        """Codes that few choose move to latents that are far from all.  Jukebox, arXiv:2005.00341 sec. 3.1."""
        share = self.ema_count.mean()  # what each code would get if all were used alike
        dead = self.ema_count < self.cfg.restart * share
        trial = 2 * self.cfg.restart * share  # one that nothing chooses is dead again after 69 steps at decay 0.99
        self.place(dead, self.draw(z, codes, good, len(dead), step), trial)


class FixedQuantizer(Quantizer):
    """The codebook stays where k-means puts it after --free_steps; until then latents pass as they are.

    CogView, arXiv:2105.13290 sec. 2.2: the codebook need not learn if it starts well.  How it does is our choice: the
    codes that k-means finds for an encoder that has learned nothing yet are soon left behind.
    """

    @property
    def first_step(self):
        return self.cfg.free_steps

    def forward(self, z, step=None):
        z_q, codes, loss = super().forward(z, step)
        free = step is not None and step < self.first_step
        return (self.norm(z), codes, 0 * loss) if free else (z_q, codes, loss)


class EMAQuantizer(Quantizer):
    """The codebook is a moving average of the latents that chose each code.  VQ-VAE appendix A.1."""

    def __init__(self, cfg):
        super().__init__(cfg)
        self.register_buffer("ema_sum", self.codebook.clone())

    def learn(self, z, codes, good, step):
        self.ema_sum.lerp_(self.sums(z, codes), 1 - self.cfg.decay)
        mean = self.ema_sum / self.ema_count.clamp_min(1e-6)[:, None]
        self.codebook.copy_(torch.where(self.ema_count[:, None] > 1e-6, self.norm(mean), self.codebook))
        self.restart(z, codes, good, step)

    def place(self, which, codes, count):
        super().place(which, codes, count)
        self.ema_sum.copy_(torch.where(which[:, None], codes * self.ema_count[:, None], self.ema_sum))


class STQuantizer(Quantizer):
    """The codebook learns by gradient: VQ-VAE eq. 3, second term, not weighted by beta."""

    def add_codebook(self, codes):
        self.codebook = nn.Parameter(codes)

    def loss(self, z, z_q):
        return F.mse_loss(z_q, z.detach()) + super().loss(z, z_q)

    def learn(self, z, codes, good, step):
        self.restart(z, codes, good, step)


class GumbelQuantizer(Quantizer):
    """DALL-E's relaxation: the encoder gives a logit for each code, the decoder a mixture of the codes.

    The mixture is a Gumbel-softmax sample while training (step given), and the likeliest code else.  Temperature
    1 -> 1/16 and KL weight 0 -> 6.6, both on cosine schedules; the KL to the uniform distribution, in nats, is
    summed over a picture's codes and divided by its 3 H W values as DALL-E divides the whole bound, which is
    1 / (3 stride^2) a code.  arXiv:2102.12092 sec. 2.1 and appendix A.2.  Our choice: the first batch sets the logits to
    mean 0 for each code and variance 1, as else few codes begin ahead and the others never learn.
    """

    def __init__(self, cfg):
        super().__init__(cfg)
        self.register_buffer("shift", torch.zeros(cfg.n_codes))
        self.register_buffer("scale", torch.ones(()))
        self.register_load_state_dict_pre_hook(self.fill_in)

    @staticmethod
    def fill_in(quantizer, state, prefix, *_):
        """Let a checkpoint without shift and scale keep its logits as they are."""
        for name in ("shift", "scale"):
            state.setdefault(prefix + name, getattr(quantizer, name))

    @staticmethod
    def widths(cfg):
        return cfg.n_codes, cfg.code_dim

    def add_codebook(self, codes):
        self.codebook = nn.Parameter(codes)

    def forward(self, z, step=None):
        logits = (z.float() - self.shift) * self.scale  # (N, V)
        codes = logits.argmax(1)
        if step is None:
            return self.lookup(codes), codes, logits.new_zeros(())
        cfg = self.cfg
        log_p = logits.log_softmax(1)
        kl = (log_p.exp() * (log_p + math.log(cfg.n_codes))).sum(1).mean()
        soft = F.gumbel_softmax(logits, cosine(step, cfg.tau_steps, 1.0, 1 / 16))
        weight = cosine(step, cfg.kl_steps, 0.0, cfg.kl_weight) / (3 * cfg.stride**2)
        return soft @ self.norm(self.codebook), codes, weight * kl

    @torch.no_grad()
    def start(self, z):
        good = z.isfinite().all(1, keepdim=True)
        z, n = torch.where(good, z.float(), self.shift), reduce_sum(good.sum()).clamp_min(1)
        self.shift.copy_(reduce_sum(z.sum(0)) / n)
        variance = reduce_sum(((z - self.shift).square() * good).sum()) / (n * z.shape[1])
        self.scale.copy_(variance.clamp_min(1e-12).rsqrt())


class FSQQuantizer(Quantizer):
    """Finite scalar quantization: each of a few channels is rounded to its levels; no codebook is learned.

    arXiv:2309.15505 sec. 3.1 and appendix A.1.  A code is the number whose mixed-radix digits are the levels.
    """

    @staticmethod
    def widths(cfg):
        return (len(fsq_levels(cfg.n_codes)),) * 2

    def add_codebook(self, codes):
        if self.cfg.l2_norm:
            raise ValueError("fsq rounds each channel by itself; leave out --l2_norm")
        levels = fsq_levels(self.cfg.n_codes)
        digits = torch.cartesian_prod(*(torch.arange(n) for n in levels)).view(-1, len(levels))  # (V, C)
        half = torch.tensor([n // 2 for n in levels])
        self.register_buffer("codebook", (digits - half) / half, persistent=False)

    def forward(self, z, step=None):
        levels = torch.tensor(fsq_levels(self.cfg.n_codes), device=z.device)
        half = (levels - 1) * (1 + 1e-3) / 2
        offset = torch.where(levels % 2 == 0, 0.5, 0.0)
        z = (z.float() + (offset / half).atanh()).tanh() * half - offset  # (N, C), rounds to -n//2 ... (n-1)//2
        digits = z + (z.round() - z).detach()
        place = torch.tensor([math.prod(levels[i + 1 :].tolist()) for i in range(len(levels))], device=z.device)
        codes = ((digits.detach() + levels // 2) * place).sum(1).round().long()
        return digits / (levels // 2), codes, z.new_zeros(())

    def start(self, z):
        """Nothing to do: the codes are where they are."""


def fsq_levels(n_codes):
    """Numbers from 5 to 16 (arXiv:2309.15505 sec. 4.1: not below 5) whose product is n_codes, as many as can be."""
    for n in range(7, 0, -1):
        for levels in combinations_with_replacement(range(5, 17), n):
            if math.prod(levels) == n_codes:
                return levels
    raise ValueError(f"n_codes {n_codes} is no product of numbers from 5 to 16, as fsq needs; use 512, 1000 or 1024")


def cosine(step, steps, first, last):
    """From `first` to `last` over `steps`, along half a cosine."""
    return last + (first - last) * (1 + math.cos(math.pi * min(1, step / max(1, steps)))) / 2


QUANTIZERS = {
    "ema": EMAQuantizer,
    "st": STQuantizer,
    "fixed": FixedQuantizer,
    "gumbel": GumbelQuantizer,
    "fsq": FSQQuantizer,
}


# --- the model ------------------------------------------------------------------------------------------


class VQ(nn.Module):
    """The tokenizer: encoder, quantizer, decoder, and perhaps a super-resolution of what it decodes."""

    def __init__(self, cfg):
        super().__init__()
        decoder = cfg.decoder or cfg.backbone
        for name, value, known in (
            ("quantizer", cfg.quantizer, QUANTIZERS),
            ("backbone", cfg.backbone, BACKBONES),
            ("decoder", decoder, BACKBONES),
        ):
            if value not in known:
                raise ValueError(f"{name} {value!r} is not known; use one of {', '.join(known)}")
        for name in ("ch", "n_codes", "code_dim", "sr_ch"):
            if getattr(cfg, name) < 1:
                raise ValueError(f"{name} {getattr(cfg, name)} is less than 1")
        if cfg.patchwise and cfg.backbone != "vqvae":
            raise ValueError(f"--patchwise is for the vqvae backbone, not for {cfg.backbone}; leave it out")
        self.cfg = cfg
        wide, narrow = QUANTIZERS[cfg.quantizer].widths(cfg)
        decoder_cfg = replace(cfg, ch=cfg.decoder_ch or cfg.ch, n_res=cfg.decoder_n_res or cfg.n_res)
        self.encoder = BACKBONES[cfg.backbone][0](cfg, wide)
        self.decoder = BACKBONES[decoder][1](decoder_cfg, narrow)
        self.quantizer = QUANTIZERS[cfg.quantizer](cfg)
        self.upsampler = WDSR(cfg.upscale, cfg.sr_ch, cfg.sr_blocks) if cfg.upscale > 1 else None

    def grid(self, height, width):
        """Codes (h, w) of a picture of height x width pixels; ValueError if the stride does not divide it."""
        s = self.cfg.stride
        for name, value in (("height", height), ("width", width)):
            if value % s or value < s:
                lo = max(s, value // s * s)
                raise ValueError(
                    f"image {name} {value} is not a multiple of the tokenizer's stride {s}; use {lo} or {lo + s}"
                )
        return height // s, width // s

    def latents(self, image):
        """image (B, 3, H, W) in [-1, 1] -> latents (B, h, w, C), before quantization."""
        self.grid(*image.shape[-2:])
        return rearrange(self.encoder(image), "b c h w -> b h w c")

    def render(self, z_q):
        """Latents (B, C, h, w) -> what is trained: the decoder's maps (B, 3 or 6, H, W), or the enlarged picture."""
        maps = self.decoder(z_q)
        return maps if self.upsampler is None else self.upsampler(self.picture(maps).clamp(-1, 1).to(maps.dtype))

    def picture(self, maps):
        """What `render` gives -> the picture (B, 3, H, W), float32, not clamped."""
        return maps.float() if maps.shape[1] == 3 else laplace_picture(maps)

    def forward(self, image, step=None):
        """Training pass: image (B, 3, H, W) -> what `render` gives, latents (N, C), codes (N,), quantizer loss."""
        z = self.latents(image)  # (B, h, w, C)
        flat = rearrange(z, "b h w c -> (b h w) c")
        z_q, codes, loss = self.quantizer(flat, step)
        z_q = rearrange(z_q, "(b h w) c -> b c h w", b=z.shape[0], h=z.shape[1])
        return self.render(z_q), flat.detach(), codes, loss

    @torch.no_grad()
    def encode(self, image, tile=0):
        """image (B, 3, H, W) in [-1, 1] -> codes (B, h, w); tile: see `tiled`."""

        def whole(image):
            z = self.latents(image)
            _, codes, _ = self.quantizer(rearrange(z, "b h w c -> (b h w) c"))
            return codes.view(z.shape[:3])

        halo = reach(self.encoder) / self.cfg.stride if is_local(self.encoder) else HALO
        return tiled(whole, image, self.grid(*image.shape[-2:]), tile, halo, self.cfg.stride, 1)

    @torch.no_grad()
    def decode(self, codes, tile=0):
        """codes (B, h, w) -> image (B, 3, H, W), clamped to [-1, 1]; H = h * stride * upscale; tile: see `tiled`."""

        def whole(codes):
            z_q = rearrange(self.quantizer.lookup(codes), "b h w c -> b c h w")
            return self.picture(self.render(z_q.to(self.dtype))).clamp(-1, 1)

        s, halo = self.cfg.stride, HALO
        if is_local(self.decoder):
            halo = reach(self.decoder, s) / s + (reach(self.upsampler) / s if self.upsampler else 0)
        return tiled(whole, codes, codes.shape[1:], tile, halo, 1, s * self.cfg.upscale)

    @property
    def last_weight(self):
        """The last weight before the picture, where the adaptive weight of losses.py compares gradients."""
        net = self.upsampler.skip if self.upsampler else self.decoder
        return [w for w in net.parameters() if w.dim() > 1][-1]

    @property
    def dtype(self):
        return next(self.parameters()).dtype


def main():
    from minit2i.compare import show_command  # what draws knows what is drawn, not the other way round

    show_command()


if __name__ == "__main__":
    from minit2i.train import run

    run(main)

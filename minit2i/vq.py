"""Stage 1: a tokenizer turns a picture into a grid of codes and back.

    image (B, 3, H, W) in [-1, 1] --encode--> codes (B, h, w) --decode--> image (B, 3, H, W)

VQ-VAE, van den Oord et al., arXiv:1711.00937, with the moving-average codebook of its appendix A.1.

Shapes: B batch, H W picture, h w code grid, N = B*h*w latents, C code dimension, V codebook size.
"""

from dataclasses import dataclass
from typing import Annotated

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from einops import rearrange


@dataclass(frozen=True)
class VQConfig:
    """What the tokenizer is; stored in its checkpoint."""

    stride: Annotated[int, "pixels per code in each direction", (2, 4, 8, 16, 32)] = 4
    ch: Annotated[int, "channels at half resolution; doubled at each further level, up to 4x"] = 64
    n_res: Annotated[int, "residual blocks per level"] = 2
    local: Annotated[bool, "a code sees its own stride x stride pixels only; easier to predict, harder to draw"] = False
    quantizer: Annotated[str, "how codes are learned (see QUANTIZERS)"] = "ema"
    n_codes: Annotated[int, "codebook size"] = 1024
    code_dim: Annotated[int, "channels of a code"] = 32
    l2_norm: Annotated[bool, "l2-normalise latents and codes (ViT-VQGAN, arXiv:2110.04627 sec. 3.2)"] = False
    beta: Annotated[float, "weight of the commitment loss"] = 0.25
    decay: Annotated[float, "moving-average decay of the codebook"] = 0.99
    restart: Annotated[float, "codes used less than this fraction of an even share are restarted; 0: never"] = 0.1


# --- quantizers ------------------------------------------------------------------------------------


def nearest_code(z, codebook):
    """Index of the nearest codebook entry.

    z (N, C), codebook (V, C) -> codes (N,) in [0, V).  Computed in float32; |z|^2 is the same for
    every code and left out.  VQ-VAE, arXiv:1711.00937 eq. 1.
    """
    with torch.autocast(z.device.type, enabled=False):
        z, codebook = z.float(), codebook.float()
        distance = torch.addmm(codebook.square().sum(1), z, codebook.t(), alpha=-2)  # (N, V)
        return distance.argmin(1)


def processes():
    """(rank, number) of the processes that train together; (0, 1) without torch.distributed."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def reduce_sum(x):
    """Sum over all processes, in place; nothing to do for one process."""
    if processes()[1] > 1:
        dist.all_reduce(x)
    return x


def pick_rows(z, index):
    """Rows `index` (M,) of the latents of all processes, z (n, C) on each -> (M, C), the same on each.

    Process r holds rows r*n ... (r+1)*n - 1; each fills in its own and the rest comes by summing.
    """
    first = processes()[0] * len(z)
    mine = (index >= first) & (index < first + len(z))
    rows = z[(index - first).clamp(0, len(z) - 1)] * mine[:, None]
    return reduce_sum(rows)


class EMAQuantizer(nn.Module):
    """Nearest code, straight-through gradient, codebook as a moving average of its latents.

    `forward` changes nothing; the training loop calls `start` once and `update` after each step.
    Both see the latents of all processes, so that two processes equal one with the doubled batch.
    VQ-VAE, arXiv:1711.00937 appendix A.1.  Restart of dead codes on latents: Jukebox, arXiv:2005.00341 sec. 3.1.
    Ours: a k-means start, and latents drawn in proportion to their squared distance from the nearest code, as
    k-means++ seeds its centres; evenly drawn ones are mostly plain background, which has its codes.
    """

    def __init__(self, cfg):
        super().__init__()
        self.cfg = cfg
        self.register_buffer("codebook", self.norm(torch.randn(cfg.n_codes, cfg.code_dim)))
        self.register_buffer("ema_count", torch.ones(cfg.n_codes))
        self.register_buffer("ema_sum", self.codebook.clone())

    def norm(self, z):
        return F.normalize(z.float(), dim=-1) if self.cfg.l2_norm else z.float()

    def forward(self, z):
        """z (N, C) -> z_q (N, C) with z's gradient, codes (N,), commitment loss ()."""
        z = self.norm(z)
        codes = nearest_code(z, self.codebook)
        z_q = self.lookup(codes)
        loss = self.cfg.beta * F.mse_loss(z, z_q)
        return z + (z_q - z).detach(), codes, loss

    def lookup(self, codes):
        """codes (...) -> latents (..., C)."""
        return F.embedding(codes, self.codebook)

    def draw(self, z, weight, n, step):
        """n latents (n, C) of those of all processes, each as likely as its weight: z (N, C), weight (N,) >= 0.

        A pure function of these and the step.
        """
        rank, world = processes()
        everyone = weight.new_zeros(world, len(weight))
        everyone[rank] = weight
        everyone = reduce_sum(everyone).flatten().cpu() + 1e-12
        index = everyone.multinomial(n, replacement=True, generator=torch.Generator().manual_seed(step))
        return pick_rows(z, index.to(z.device))

    @torch.no_grad()
    def start(self, z, iterations=10):
        """k-means on z (N, C), one Lloyd iteration being an update without memory."""
        z = self.norm(z)
        mean = reduce_sum(z.sum(0)) / (len(z) * processes()[1])
        self.codebook.copy_(self.draw(z, (z - mean).square().sum(1), self.cfg.n_codes, step=0))
        for i in range(iterations):
            self.update(z, nearest_code(z, self.codebook), step=i, decay=0.0)

    @torch.no_grad()
    def update(self, z, codes, step, decay=None):
        """Move the codebook towards the latents that chose it; restart the codes that few choose.

        z (N, C), codes (N,), step: the training step, which seeds the restarts.
        """
        decay = self.cfg.decay if decay is None else decay
        z = self.norm(z)
        good = z.isfinite().all(1)  # a step that overflows in float16 is skipped; it must not reach the codebook
        z = torch.where(good[:, None], z, 0)
        count = torch.zeros_like(self.ema_count).index_add_(0, codes, good.float())  # (V,)
        total = torch.zeros_like(self.codebook).index_add_(0, codes, z)  # (V, C)
        reduce_sum(count), reduce_sum(total)
        self.ema_count.lerp_(count, 1 - decay)
        self.ema_sum.lerp_(total, 1 - decay)
        share = self.ema_count.sum() / self.cfg.n_codes  # what each code would get if all were used alike
        trial = 2 * self.cfg.restart * share  # a restarted code that nothing chooses is dead again after 69 steps
        dead = self.ema_count < self.cfg.restart * share
        far = (z - self.lookup(codes)).square().sum(1) * good  # (N,)
        fresh = self.draw(z, far, self.cfg.n_codes, step)
        self.ema_sum.copy_(torch.where(dead[:, None], fresh * trial, self.ema_sum))
        self.ema_count.copy_(torch.where(dead, trial, self.ema_count))
        mean = self.ema_sum / self.ema_count.clamp_min(1e-6)[:, None]
        self.codebook.copy_(torch.where(self.ema_count[:, None] > 1e-6, self.norm(mean), self.codebook))


QUANTIZERS = {"ema": EMAQuantizer}


# --- encoder and decoder -----------------------------------------------------------------------------


class ResBlock(nn.Module):
    """x (B, ch, h, w) -> the same shape.  3x3 then 1x1 convolution, VQ-VAE sec. 4.1.

    No normalisation: one over the whole picture would let each code know of all others, and the prior
    then knows a training picture by its first codes and need not read the caption.
    """

    def __init__(self, ch, kernel=3):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(ch, ch, kernel, padding=kernel // 2), nn.Conv2d(ch, ch, 1)
        nn.init.zeros_(self.conv2.weight)  # each block starts as the identity

    def forward(self, x):
        return x + self.conv2(F.silu(self.conv1(F.silu(x))))


def widths(cfg):
    """Channels at strides 2, 4, ... up to cfg.stride."""
    return [cfg.ch * min(2**i, 4) for i in range(cfg.stride.bit_length() - 1)]


class Encoder(nn.Sequential):
    """Strided convolutions with residual blocks: (B, 3, H, W) -> (B, C, H/stride, W/stride).

    Kernels of 4 and 3, as VQ-VAE's, so that neighbouring codes overlap; or, if cfg.local, of 2 and 1.
    """

    def __init__(self, cfg):
        layers, last = [], 3
        down, res = (dict(kernel_size=2), 1) if cfg.local else (dict(kernel_size=4, padding=1), 3)
        for w in widths(cfg):
            layers += [nn.Conv2d(last, w, stride=2, **down), *(ResBlock(w, res) for _ in range(cfg.n_res)), nn.SiLU()]
            last = w
        super().__init__(*layers, nn.Conv2d(last, cfg.code_dim, 1))


class Decoder(nn.Sequential):
    """The encoder's mirror, with transposed convolutions: (B, C, h, w) -> (B, 3, h*stride, w*stride)."""

    def __init__(self, cfg):
        ws = widths(cfg)[::-1]
        layers = [nn.Conv2d(cfg.code_dim, ws[0], 3, padding=1)]
        for w, nxt in zip(ws, [*ws[1:], 3]):
            layers += [ResBlock(w) for _ in range(cfg.n_res)]
            layers += [nn.SiLU(), nn.ConvTranspose2d(w, nxt, 4, stride=2, padding=1)]
        super().__init__(*layers)


class VQ(nn.Module):
    """The tokenizer: encoder, quantizer, decoder."""

    def __init__(self, cfg):
        super().__init__()
        if cfg.quantizer not in QUANTIZERS:
            raise ValueError(f"quantizer {cfg.quantizer!r} is not known; use one of {', '.join(QUANTIZERS)}")
        self.cfg = cfg
        self.encoder, self.decoder = Encoder(cfg), Decoder(cfg)
        self.quantizer = QUANTIZERS[cfg.quantizer](cfg)

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

    def forward(self, image):
        """Training pass: image (B, 3, H, W) -> reconstruction, latents (N, C), codes (N,), quantizer loss."""
        z = self.latents(image)  # (B, h, w, C)
        flat = rearrange(z, "b h w c -> (b h w) c")
        z_q, codes, loss = self.quantizer(flat)
        z_q = rearrange(z_q, "(b h w) c -> b c h w", b=z.shape[0], h=z.shape[1])
        return self.decoder(z_q), flat.detach(), codes, loss

    @torch.no_grad()
    def encode(self, image):
        """image (B, 3, H, W) in [-1, 1] -> codes (B, h, w)."""
        z = self.latents(image)
        _, codes, _ = self.quantizer(rearrange(z, "b h w c -> (b h w) c"))
        return codes.view(z.shape[:3])

    @torch.no_grad()
    def decode(self, codes):
        """codes (B, h, w) -> image (B, 3, H, W), clamped to [-1, 1]."""
        z_q = rearrange(self.quantizer.lookup(codes), "b h w c -> b c h w")
        return self.decoder(z_q.to(self.dtype)).float().clamp(-1, 1)

    @property
    def dtype(self):
        return next(self.parameters()).dtype

"""Stage 1: a VQ-VAE turns an image into a grid of codes and back.

    image (B, 3, H, W) in [-1, 1] --VQ.encode--> codes (B, h, w) --VQ.decode--> image (B, 3, H, W)

van den Oord et al., arXiv:1711.00937.  This file is the plain model with four quantizers: a codebook that is a moving
average (ema), that is learned by gradient (st) or that stays fixed, and FSQ, which has none to learn.  The files in
papers/ add backbones, quantizers, losses and upsamplers to the registries below.

Shapes: B batch, H W image, h w code grid, N = B*h*w latents, C latent channels, V codebook size.
"""

import contextlib
import math
from dataclasses import dataclass, replace
from itertools import combinations_with_replacement
from typing import Annotated, NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from einops import rearrange

from minit2i.collectives import all_reduce_sum, rank_and_world
from minit2i.config import Settings, at_least, between, known, merge, pick

# Registries.  A paper's file adds an entry to each that it needs: QUANTIZERS["gumbel"] = GumbelQuantizer.
BACKBONES = {}  # name -> Backbone
QUANTIZERS = {}  # name -> class with the interface of Codebook; its settings are a nested class Config
UPSAMPLERS = {"none": None}  # name -> class built from cfg: decoded image (B, 3, H, W) -> (B, 3, s*H, s*W)
OUTPUTS = {}  # name -> (number of the decoder's maps, function that turns them into an image)
RECON_LOSSES = {}  # name -> loss(maps, image, target); a name that is also in OUTPUTS needs that output
PARTS = {  # fields that name an entry
    "backbone": BACKBONES,
    "decoder": BACKBONES,
    "quantizer": QUANTIZERS,
    "upsampler": UPSAMPLERS,
}


class Backbone(NamedTuple):
    """Entry of BACKBONES: classes built as encoder(cfg, width) and decoder(cfg, width), their settings, and the types of
    device on which training with channels last is faster (measured)."""

    encoder: type
    decoder: type
    Config: type | None = None
    channels_last: tuple = ()


@dataclass(frozen=True)
class VQConfig(Settings):
    """The tokenizer; stored in its checkpoint."""

    stride: Annotated[int, "pixels per code in each direction", (2, 4, 8, 16, 32)] = 4
    backbone: Annotated[str, "encoder and decoder"] = "vqvae"
    ch: Annotated[int, "channels at full resolution, more below; vit: a quarter of its width", at_least(1)] = 64
    n_res: Annotated[int, "residual blocks per resolution; vit: transformer blocks", at_least(1)] = 2
    patchwise: Annotated[bool, "vqvae: a code sees only its own pixels; easier to predict, worse to decode"] = False
    decoder: Annotated[str, "use the decoder of this backbone; empty: the encoder's"] = ""
    decoder_ch: Annotated[int, "channels of the decoder; 0: --ch", at_least(0)] = 0
    decoder_n_res: Annotated[int, "residual blocks of the decoder; 0: --n_res", at_least(0)] = 0
    upsampler: Annotated[str, "network that enlarges the decoded image, for --train upsampler"] = "none"
    quantizer: Annotated[str, "how codes are learned"] = "ema"
    n_codes: Annotated[int, "codebook size", at_least(1)] = 1024
    code_dim: Annotated[int, "channels of a code; not for fsq", at_least(1)] = 32
    l2_norm: Annotated[bool, "l2-normalise latents and codes (arXiv:2110.04627 sec. 3.2); not for fsq"] = False
    beta: Annotated[float, "weight of the commitment loss", at_least(0)] = 0.25
    decay: Annotated[float, "decay of the moving averages of codes and their counts", between(0, 1)] = 0.99
    restart: Annotated[float, "ema, st: restart codes below this share of the mean use; 0: never", at_least(0)] = 0.1
    output: str = "rgb"  # how the decoder's maps are read (OUTPUTS); follows from the reconstruction loss

    upscale = 1  # not a field; an upsampler's Config makes it one

    @property
    def maps(self):
        """Number of the decoder's output maps."""
        return OUTPUTS[self.output][0]


# --- encoder and decoder ---------------------------------------------------------------------------------


class ResBlock(nn.Module):
    """x (B, ch, h, w) -> the same shape.  3x3, then 1x1 convolution, VQ-VAE, arXiv:1711.00937 sec. 4.1.

    No normalisation: statistics of the whole image would leak into every code, and the prior could recognise a training
    image by its first codes instead of its caption.
    """

    def __init__(self, ch, kernel=3):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(ch, ch, kernel, padding=kernel // 2), nn.Conv2d(ch, ch, 1)
        nn.init.zeros_(self.conv2.weight)  # each block starts as the identity

    def forward(self, x):
        return x + self.conv2(F.silu(self.conv1(F.silu(x))))


def channels(cfg):
    """Channels at strides 2, 4, ... up to cfg.stride."""
    return [cfg.ch * min(2**i, 4) for i in range(cfg.stride.bit_length() - 1)]


class Encoder(nn.Sequential):
    """Strided convolutions and residual blocks: (B, 3, H, W) -> (B, width, h, w).

    Kernels of 4 and 3 as in VQ-VAE, so neighbouring codes overlap; with cfg.patchwise kernels of 2 and 1.
    """

    def __init__(self, cfg, width):
        layers, last = [], 3
        down, res = (dict(kernel_size=2), 1) if cfg.patchwise else (dict(kernel_size=4, padding=1), 3)
        for w in channels(cfg):
            layers += [nn.Conv2d(last, w, stride=2, **down), *(ResBlock(w, res) for _ in range(cfg.n_res)), nn.SiLU()]
            last = w
        super().__init__(*layers, nn.Conv2d(last, width, 1))


class Decoder(nn.Sequential):
    """The encoder's mirror with transposed convolutions: (B, width, h, w) -> (B, maps, H, W)."""

    def __init__(self, cfg, width):
        ws = channels(cfg)[::-1]
        layers = [nn.Conv2d(width, ws[0], 3, padding=1)]
        for w, after in zip(ws, [*ws[1:], cfg.maps]):
            layers += [ResBlock(w) for _ in range(cfg.n_res)]
            layers += [nn.SiLU(), nn.ConvTranspose2d(w, after, 4, stride=2, padding=1)]
        super().__init__(*layers)


BACKBONES["vqvae"] = Backbone(Encoder, Decoder, channels_last=("cuda",))  # H200: 1.44 times as fast
OUTPUTS["rgb"] = (3, lambda maps: maps.float())
RECON_LOSSES["l1"] = lambda maps, image, target: (image - target).abs().mean()
RECON_LOSSES["l2"] = lambda maps, image, target: (image - target).square().mean()


# --- codebooks -------------------------------------------------------------------------------------------
# All statistics are all-reduced: N ranks match one rank on the same global batch.


@contextlib.contextmanager
def exact_products(device):
    """Context in which a GPU multiplies float32 matrices in float32, not in TF32, whose 11 bits choose other codes."""
    before = torch.get_float32_matmul_precision()
    if device.type == "cuda":
        torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        if device.type == "cuda":
            torch.set_float32_matmul_precision(before)


@torch.library.custom_op("minit2i::nearest_code", mutates_args=())  # one node of a compiled graph: runs as it stands
@torch.no_grad()
def nearest_code(z: torch.Tensor, codebook: torch.Tensor, block: int = 0) -> torch.Tensor:
    """Index of the nearest codebook entry.

    z (N, C), codebook (V, C) -> codes (N,) in [0, V).  Computed in float32, `block` distances at a time (0: 2^22, on a
    GPU 2^26, 256 MiB, as small products leave it idle); |z|^2 is the same for every code and left out.  VQ-VAE,
    arXiv:1711.00937 eq. 1.  Both are taken relative to the codes' mean: far from zero the terms would cancel (at an
    offset of 300 a tenth of the codes was wrong).
    """
    block = block or (2**26 if z.is_cuda else 2**22)
    with torch.autocast(z.device.type, enabled=False), exact_products(z.device):
        mean = codebook.float().mean(0)
        z, codebook = z.float() - mean, codebook.float() - mean
        norm, rows = codebook.square().sum(1), max(1, block // len(codebook))
        codes = torch.empty(len(z), dtype=torch.long, device=z.device)
        buffer = z.new_empty(min(rows, len(z)), len(codebook))  # one for all parts: fresh ones fragment glibc's heap
        for part, out in zip(z.split(rows), codes.split(rows)):
            out.copy_(torch.addmm(norm, part, codebook.t(), alpha=-2, out=buffer[: len(part)]).argmin(1))
        return codes


@nearest_code.register_fake
def _(z, codebook, block=0):
    return z.new_empty(len(z), dtype=torch.long)


def distances(z, codebook):
    """z (N, C), codebook (V, C) -> their Euclidean distances (N, V), in float32."""
    with torch.autocast(z.device.type, enabled=False), exact_products(z.device):
        return torch.cdist(z.float(), codebook.float())


def finite(z):
    """z (N, C) -> float32 with rows that hold NaN or Inf set to 0, and valid (N,): 0 for those rows, else 1.

    The scaler skips a step that overflows in float16; its latents must not reach the codebook either.
    """
    z = z.float()
    valid = z.isfinite().all(1)
    return torch.where(valid[:, None], z, 0), valid.float()


def count_codes(codes, valid, n_codes):
    """How many valid latents of all ranks chose each code: codes (N,), valid (N,) -> (V,)."""
    codes = codes.where(valid > 0, 0)  # fsq's code of NaN is no code
    return all_reduce_sum(valid.new_zeros(n_codes).index_add_(0, codes, valid))


def sum_latents(z, codes, n_codes):
    """Sum of the latents of all ranks that chose each code: z (N, C), codes (N,) -> (V, C)."""
    return all_reduce_sum(z.new_zeros(n_codes, z.shape[1]).index_add_(0, codes, z))


def sample_indices(weight, n, seed):
    """Sample n indices of weight (..., N) >= 0 with p proportional to it -> (..., n), any if all weights are 0.

    On a GPU uniform numbers are looked up in the cumulative sum, as the CPU's multinomial does with the same numbers,
    so that the process does not wait for the GPU.
    """
    generator = torch.Generator().manual_seed(seed)
    if not weight.is_cuda:
        weight = weight.cpu()
        return (weight if weight.any() else weight + 1).multinomial(n, replacement=True, generator=generator)
    uniform = torch.rand(*weight.shape[:-1], n, dtype=torch.float64, generator=generator)
    return inverse_cdf(weight, uniform.to(weight.device, non_blocking=True))


def inverse_cdf(weight, uniform):
    """weight (..., N), uniform (..., n) in [0, 1), float64 -> (..., n): where the cumulative sum reaches that share."""
    total = weight.double().cumsum(-1)
    return torch.searchsorted(total, uniform * total[..., -1:]).clamp_max(weight.shape[-1] - 1)


def sample_latents(z, codes, valid, codebook, n, seed):
    """Sample n valid latents of all ranks with p proportional to the squared distance to their code (k-means++).

    z (N, C), codes (N,), valid (N,), codebook (V, C) -> (n, C), the same on each rank and a pure function of its
    arguments.  Uniform sampling would mostly return plain background, which has its codes.  If no latent is valid:
    codebook[:n].
    """
    rank, world = rank_and_world()
    weight = z.new_zeros(world, len(z))
    weight[rank] = (z - F.embedding(codes, codebook)).square().sum(1) * valid + 1e-12 * valid
    weight = all_reduce_sum(weight).flatten().nan_to_num(0, 0, 0)  # (world * N,); of a codebook that has diverged
    index = sample_indices(weight, n, seed).to(z.device)
    first = rank * len(z)  # this rank holds rows first ... first + N - 1; the others' rows come with the sum
    mine = (index >= first) & (index < first + len(z))
    drawn = all_reduce_sum(z[(index - first).clamp(0, len(z) - 1)] * mine[:, None])
    return torch.where(weight.any(), drawn, codebook[:n])


@torch.no_grad()
def init_kmeans_(codebook, z, valid, l2_norm=False, iterations=10):
    """Set codebook (V, C) by k-means on z (N, C), valid (N,), in place -> latents per code (V,), at least 1.

    A centre without latents moves to one that is far from all centres.  l2_norm: centres are normalised (spherical).
    """
    n_codes = len(codebook)
    codebook.copy_(all_reduce_sum(z.sum(0)) / all_reduce_sum(valid.sum()).clamp_min(1))  # all at the mean
    codebook.copy_(sample_latents(z, torch.zeros_like(valid, dtype=torch.long), valid, codebook, n_codes, seed=0))
    for i in range(iterations):
        codes = nearest_code(z, codebook)
        count = count_codes(codes, valid, n_codes)
        fresh = sample_latents(z, codes, valid, codebook, n_codes, seed=i)
        mean = sum_latents(z, codes, n_codes) / count.clamp_min(1)[:, None]
        centre = torch.where(count[:, None] > 0, mean, fresh)
        codebook.copy_(F.normalize(centre, dim=-1) if l2_norm else centre)
    return count.clamp_min(1)


@torch.no_grad()
def restart_dead_codes_(codebook, ema_count, z, codes, valid, threshold, step):
    """Move codes used less than threshold * mean to latents that are far from their code, in place -> which (V,) bool.

    Jukebox, arXiv:2005.00341 sec. 3.1.  A restarted code counts as used twice the threshold: one that no latent then
    chooses is dead again after 69 steps at decay 0.99.
    """
    mean = ema_count.mean()
    dead, trial = ema_count < threshold * mean, 2 * threshold * mean
    fresh = sample_latents(z, codes, valid, codebook, len(codebook), step)
    codebook.copy_(torch.where(dead[:, None], fresh, codebook))
    ema_count.copy_(torch.where(dead, trial, ema_count))
    return dead


class Codebook(nn.Module):
    """Nearest code with a straight-through gradient: base of ema, st and fixed, interface of all quantizers.

    `forward` changes no state.  The training loop calls `start` once, at step `first_step`, and `update` after each
    step.  `ema_count` (V,) is a moving average of how many latents chose each code in a step.
    """

    first_step = 0
    learned = False  # whether the codebook is a parameter

    def __init__(self, cfg):
        super().__init__()
        self.cfg = cfg
        self.register_buffer("ema_count", torch.ones(cfg.n_codes))
        codebook = self.norm(torch.randn(cfg.n_codes, cfg.code_dim))
        if self.learned:
            self.codebook = nn.Parameter(codebook)
        else:
            self.register_buffer("codebook", codebook)

    @staticmethod
    def widths(cfg):
        """Channels that the encoder gives, and that the decoder gets."""
        return cfg.code_dim, cfg.code_dim

    def norm(self, z):
        """Float32, and on the unit sphere if cfg.l2_norm."""
        return F.normalize(z.float(), dim=-1) if self.cfg.l2_norm else z.float()

    def forward(self, z, train=False, step=0):
        """z (N, C) -> z_q (N, C) with z's gradient, codes (N,), loss ().  train: the training pass of this step."""
        z = self.norm(z)
        codes = nearest_code(z, self.norm(self.codebook))  # gradients and averages leave the sphere
        z_q = self.lookup(codes)
        return z + (z_q - z).detach(), codes, self.loss(z, z_q)

    def logits(self, z):
        """z (N, C) -> minus the squared distance to each code (N, V), to sample codes from."""
        return -distances(self.norm(z), self.norm(self.codebook)).square()

    def loss(self, z, z_q):
        """Commitment loss, VQ-VAE eq. 3, last term: pulls the latent to its code."""
        return self.cfg.beta * F.mse_loss(z, z_q.detach())

    def lookup(self, codes):
        """codes (...) -> latents (..., C)."""
        return self.norm(F.embedding(codes, self.codebook))

    @torch.no_grad()
    def start(self, z):
        """Set the codebook by k-means on the latents z (N, C) of a whole batch."""
        z, valid = finite(self.norm(z))
        self.ema_count.copy_(init_kmeans_(self.codebook, z, valid, self.cfg.l2_norm))

    @torch.no_grad()
    def update(self, z, codes, step):
        """Update counts and codebook from a step's z (N, C) and codes (N,); step seeds the restarts."""
        z, valid = finite(self.norm(z))
        self.ema_count.lerp_(count_codes(codes, valid, self.cfg.n_codes), 1 - self.cfg.decay)
        self.learn(z, codes, valid, step)

    def learn(self, z, codes, valid, step):
        """Move the codebook."""


class FixedQuantizer(Codebook):
    """The codebook stays where k-means puts it after --free_steps; until then latents pass unquantized.

    CogView, arXiv:2105.13290 sec. 2.2: a well-initialised codebook need not learn.  --free_steps is our choice: codes
    that k-means finds for an untrained encoder soon fit no latent.
    """

    @dataclass(frozen=True)
    class Config(Settings):
        """Settings of --quantizer fixed."""

        group = "Quantizer fixed"
        free_steps: Annotated[int, "steps without quantization before k-means; with --init none", at_least(0)] = 200

    def __init__(self, cfg):
        super().__init__(cfg)
        self.first_step = cfg.free_steps

    def forward(self, z, train=False, step=0):
        z_q, codes, loss = super().forward(z, train, step)
        return (self.norm(z), codes, 0 * loss) if train and step < self.first_step else (z_q, codes, loss)


class EMAQuantizer(Codebook):
    """The codebook is a moving average of the latents that chose each code.  VQ-VAE appendix A.1."""

    def __init__(self, cfg):
        super().__init__(cfg)
        self.register_buffer("ema_sum", self.codebook.clone())

    def start(self, z):
        super().start(z)
        self.ema_sum.copy_(self.codebook * self.ema_count[:, None])

    def learn(self, z, codes, valid, step):
        self.ema_sum.lerp_(sum_latents(z, codes, self.cfg.n_codes), 1 - self.cfg.decay)
        mean = self.ema_sum / self.ema_count.clamp_min(1e-6)[:, None]
        self.codebook.copy_(torch.where(self.ema_count[:, None] > 1e-6, self.norm(mean), self.codebook))
        dead = restart_dead_codes_(self.codebook, self.ema_count, z, codes, valid, self.cfg.restart, step)
        fresh = self.codebook * self.ema_count[:, None]  # a restarted code begins a new average
        self.ema_sum.copy_(torch.where(dead[:, None], fresh, self.ema_sum))


class STQuantizer(Codebook):
    """The codebook learns by gradient: VQ-VAE eq. 3, second term, not weighted by beta."""

    learned = True

    def loss(self, z, z_q):
        return F.mse_loss(z_q, z.detach()) + super().loss(z, z_q)

    def learn(self, z, codes, valid, step):
        restart_dead_codes_(self.codebook, self.ema_count, z, codes, valid, self.cfg.restart, step)


class FSQ(nn.Module):
    """Finite scalar quantization: each of a few channels is rounded to its levels; no codebook is learned.

    A code is the number whose mixed-radix digits are the levels.  arXiv:2309.15505 sec. 3.1 and appendix A.1.
    ValueError for --l2_norm.
    """

    first_step = 0

    def __init__(self, cfg):
        super().__init__()
        if cfg.l2_norm:
            raise ValueError("fsq rounds each channel by itself; leave out --l2_norm")
        self.decay, levels = cfg.decay, fsq_levels(cfg.n_codes)
        digits = torch.cartesian_prod(*(torch.arange(n) for n in levels)).view(-1, len(levels))  # (V, C)
        half = torch.tensor([n // 2 for n in levels])
        radix = [math.prod(levels[i + 1 :]) for i in range(len(levels))]
        self.register_buffer("ema_count", torch.ones(cfg.n_codes))
        self.register_buffer("codebook", (digits - half) / half, persistent=False)
        self.register_buffer("levels", torch.tensor(levels), persistent=False)
        self.register_buffer("radix", torch.tensor(radix), persistent=False)

    @staticmethod
    def widths(cfg):
        return (len(fsq_levels(cfg.n_codes)),) * 2

    def forward(self, z, train=False, step=0):
        """z (N, C) -> z_q (N, C) in [-1, 1] with a straight-through gradient, codes (N,), loss 0."""
        z = self.bound(z)
        digits = z + (z.round() - z).detach()
        codes = ((digits.detach() + self.levels // 2) * self.radix).sum(1).round().long()
        return digits / (self.levels // 2), codes, z.new_zeros(())

    def bound(self, z):
        """z (N, C) -> (N, C), which rounds to -n//2 ... (n-1)//2."""
        half = (self.levels - 1) * (1 + 1e-3) / 2
        offset = torch.where(self.levels % 2 == 0, 0.5, 0.0)
        return (z.float() + (offset / half).atanh()).tanh() * half - offset

    def logits(self, z):
        """z (N, C) -> minus the squared distance to each code (N, V), in levels."""
        scale = self.levels // 2
        return -distances(self.bound(z), self.codebook * scale).square()

    def lookup(self, codes):
        """codes (...) -> latents (..., C)."""
        return F.embedding(codes, self.codebook).float()

    def start(self, z):
        """Nothing to initialise."""

    @torch.no_grad()
    def update(self, z, codes, step):
        """Update the counts from a step's z (N, C) and codes (N,)."""
        self.ema_count.lerp_(count_codes(codes, finite(z)[1], len(self.ema_count)), 1 - self.decay)


def fsq_levels(n_codes):
    """As many numbers from 5 to 16 as possible whose product is n_codes (arXiv:2309.15505 sec. 4.1: none below 5)."""
    for n in range(7, 0, -1):
        for levels in combinations_with_replacement(range(5, 17), n):
            if math.prod(levels) == n_codes:
                return levels
    raise ValueError(f"n_codes {n_codes} is not a product of numbers from 5 to 16, as fsq needs; use 512, 1000 or 1024")


QUANTIZERS |= {"ema": EMAQuantizer, "st": STQuantizer, "fixed": FixedQuantizer, "fsq": FSQ}


# --- the tokenizer ---------------------------------------------------------------------------------------


def build_vq(settings):
    """settings {field: value}, as in config.json -> VQ.  The chosen parts add their settings.

    Entries that are not settings are ignored.  ValueError for unknown names and values out of bounds.
    """
    defaults = VQConfig()
    names = {f: settings.get(f, getattr(defaults, f)) for f in PARTS}
    chosen = [known(PARTS[f], f, name) for f, name in names.items() if name or f != "decoder"]
    return VQ(pick(merge(VQConfig, *(getattr(part, "Config", None) for part in chosen)), settings))


class VQ(nn.Module):
    """Encoder, quantizer, decoder and perhaps an upsampler of the decoded image.

    cfg: a VQConfig with the settings of its parts (see build_vq).  ValueError for settings that cannot work.
    """

    def __init__(self, cfg):
        super().__init__()
        if cfg.patchwise and cfg.backbone != "vqvae":
            raise ValueError(f"--patchwise is for the vqvae backbone, not for {cfg.backbone}; leave it out")
        encoder, decoder = BACKBONES[cfg.backbone].encoder, BACKBONES[cfg.decoder or cfg.backbone].decoder
        quantizer, upsampler = QUANTIZERS[cfg.quantizer], UPSAMPLERS[cfg.upsampler]
        self.cfg, (wide, narrow) = cfg, quantizer.widths(cfg)
        self.encoder = encoder(cfg, wide)
        self.decoder = decoder(replace(cfg, ch=cfg.decoder_ch or cfg.ch, n_res=cfg.decoder_n_res or cfg.n_res), narrow)
        self.quantizer = quantizer(cfg)
        self.upsampler = upsampler and upsampler(cfg)

    def grid(self, height, width):
        """Code grid (h, w) of an image of height x width pixels; ValueError if the stride does not divide it."""
        s = self.cfg.stride
        for name, value in (("height", height), ("width", width)):
            if value % s or value < s:
                lo = max(s, value // s * s)
                raise ValueError(
                    f"image {name} {value} is not a multiple of the tokenizer's stride {s}; use {lo} or {lo + s}"
                )
        return height // s, width // s

    def image_format(self, device):
        """The memory format of the encoder's images on a device, and of all weights in training."""
        fast = device.type in BACKBONES[self.cfg.backbone].channels_last
        return torch.channels_last if fast else torch.contiguous_format

    def latents(self, image):
        """image (B, 3, H, W) in [-1, 1] -> latents (B, h, w, C), before quantization."""
        self.grid(*image.shape[-2:])
        image = image.contiguous(memory_format=self.image_format(image.device))
        return rearrange(self.encoder(image), "b c h w -> b h w c")

    def decode_latents(self, z_q):
        """z_q (B, C, h, w) -> the decoder's maps (B, maps, H, W), or the upsampled image (B, 3, s*H, s*W)."""
        maps = self.decoder(z_q)
        return maps if self.upsampler is None else self.upsampler(self.read_maps(maps).clamp(-1, 1).to(maps.dtype))

    def read_maps(self, maps):
        """The decoder's maps (B, maps, H, W) -> image (B, 3, H, W), float32, not clamped."""
        return OUTPUTS[self.cfg.output][1](maps)

    def to_image(self, maps):
        """Output of `forward` or `decode_latents` -> image (B, 3, ...), float32, not clamped."""
        return self.read_maps(maps) if self.upsampler is None else maps.float()

    def forward(self, image, train=False, step=0):
        """image (B, 3, H, W) -> output maps (see decode_latents), latents (N, C), codes (N,), quantizer loss ()."""
        z = self.latents(image)  # (B, h, w, C)
        flat = rearrange(z, "b h w c -> (b h w) c")
        z_q, codes, loss = self.quantizer(flat, train, step)
        z_q = rearrange(z_q, "(b h w) c -> b c h w", b=z.shape[0], h=z.shape[1])
        return self.decode_latents(z_q), flat.detach(), codes, loss

    @torch.no_grad()
    def encode(self, image, tile=0):
        """image (B, 3, H, W) in [-1, 1] -> codes (B, h, w).  tile: see `tiled`."""

        def encode_whole(image):
            z = self.latents(image)
            _, codes, _ = self.quantizer(rearrange(z, "b h w c -> (b h w) c"))
            return codes.view(z.shape[:3])

        halo = reach(self.encoder) / self.cfg.stride if is_local(self.encoder) else HALO
        return tiled(encode_whole, image, self.grid(*image.shape[-2:]), tile, halo, self.cfg.stride, 1)

    @torch.no_grad()
    def sample_codes(self, image, n, temperature, seeds):
        """n random codes in each place, from softmax(logits / temperature): image (B, 3, H, W) -> (B, n, h, w).

        seeds: of each image, which makes its codes independent of the batch.  DALL-E, arXiv:2102.12092 sec. 2.2
        footnote: codes sampled from the encoder's distribution, instead of its argmax, regularise an overparameterised
        prior.
        """
        found = []
        for z, seed in zip(self.latents(image), seeds):  # (h, w, C)
            p = (self.quantizer.logits(z.flatten(0, 1)) / temperature).softmax(1)  # (N, V)
            found.append(sample_indices(p, n, seed).t().reshape(n, *z.shape[:2]))
        return torch.stack(found)

    @torch.no_grad()
    def decode(self, codes, tile=0):
        """codes (B, h, w) -> image (B, 3, H, W) in [-1, 1], H = h * stride * upscale.  tile: see `tiled`."""

        def decode_whole(codes):
            z_q = rearrange(self.quantizer.lookup(codes), "b h w c -> b c h w")
            return self.to_image(self.decode_latents(z_q.to(self.dtype))).clamp(-1, 1)

        s, halo = self.cfg.stride, HALO
        if is_local(self.decoder):
            halo = reach(self.decoder, s) / s + (reach(self.upsampler) / s if self.upsampler else 0)
        return tiled(decode_whole, codes, codes.shape[1:], tile, halo, 1, s * self.cfg.upscale)

    @property
    def last_weight(self):
        """The weight of the last layer before the image, where adaptive loss weights compare gradients."""
        net = self.decoder if self.upsampler is None else self.upsampler
        return [w for w in net.parameters() if w.dim() > 1][-1]

    @property
    def dtype(self):
        return next(self.parameters()).dtype


def shrink(image, scale):
    """image (B, 3, H, W) in [-1, 1] -> (B, 3, H/scale, W/scale), antialiased bicubic."""
    if scale == 1:
        return image
    return F.interpolate(image, scale_factor=1 / scale, mode="bicubic", antialias=True).clamp(-1, 1)


# --- tiles -----------------------------------------------------------------------------------------------

HALO = 8  # codes computed around a tile and discarded, where the backbone sees the whole image


def is_local(net):
    """Whether each output depends on its surroundings only: no module has `sees_all` (GroupNorm, attention)."""
    return not any(getattr(m, "sees_all", False) for m in net.modules())


def reach(net, jump=1.0):
    """Upper bound of the receptive field's radius, in units in which an input position is `jump` wide."""
    total = 0.0
    for m in net.modules():  # in the order of use
        if isinstance(m, (nn.Conv2d, nn.MaxPool2d)):
            k, s = (v if isinstance(v, int) else v[0] for v in (m.kernel_size, m.stride))
            total, jump = total + k // 2 * jump, jump * s
        elif isinstance(m, nn.ConvTranspose2d):
            total, jump = total + jump, jump / m.stride[0]
        elif isinstance(m, nn.Upsample):
            jump /= m.scale_factor
    return total


def tiled(f, x, grid, tile, halo, unit, out_unit):
    """Apply f by overlapping tiles of at most `tile` codes a side, to bound memory; tile 0: all at once.

    x (..., h*unit, w*unit) -> (..., h*out_unit, w*out_unit), grid = (h, w).  Each tile sees `halo` more codes on
    every side.  For local backbones (vqvae, dvae) the halo covers the receptive field, and the result equals f(x) up
    to rounding.  Others (vqgan, movq, vit) normalise or attend over the image: each tile is an image of its own, and
    results differ.
    """
    (h, w), halo = grid, math.ceil(halo)
    if not tile:
        return f(x)
    rows = []
    for top in range(0, h, tile):
        a, row = max(0, top - halo), []
        for left in range(0, w, tile):
            b = max(0, left - halo)
            part = x[..., a * unit : (top + tile + halo) * unit, b * unit : (left + tile + halo) * unit]
            i, j = (top - a) * out_unit, (left - b) * out_unit
            row.append(f(part)[..., i : i + tile * out_unit, j : j + tile * out_unit])
        rows.append(torch.cat(row, -1))
    return torch.cat(rows, -2)

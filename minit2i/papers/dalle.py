"""DALL-E: Zero-Shot Text-to-Image Generation, Ramesh et al., 2021-02, arXiv:2102.12092.

What it adds
    tokenizer   dVAE: max-pooling, bottleneck blocks of small gain             DVAEEncoder, DVAEDecoder
                Gumbel-softmax mixtures of codes, KL to the uniform distribution  GumbelQuantizer
                a likelihood for pixels in [0, 1]: logit-Laplace               logit_laplace
    prior       text and codes in one sequence, text 1/8 of the loss           gpt.py:GPT, --text_weight
                row, column, convolutional masks; their order over layers      attention.py:row, mask_order
                a pad token for each text position, BPE dropout                tokens.py:Text
                codes sampled from the encoder's distribution                  vq.py:VQ.sample_codes, --code_samples
                a gradient scale for each resblock; float32 where it matters   fp16.py:BlockScaler, --fp32_logits
                shards within a node, gradients averaged between nodes         parallel.py:shard, --strategy hsdp
                and compressed, with error feedback                            parallel.py:PowerSGD, --powersgd
                samples ranked by a contrastive model                          parti.py:Towers, --best_of --judge
    data        random crops of each stage                                     --crop dvae, --crop dalle --crops 4
                captions and shapes that are left out                          --data_filter dalle: Filtered

What differs here
    The first batch sets the Gumbel logits to mean 0 and variance 1: otherwise a few codes dominate and the rest die.
    The log-scale of logit-Laplace is bounded: flat images would have an unbounded density.
    Codes enter the decoder as rows of --code_dim channels (DALL-E: one-hot).
    The dVAE's temperature falls over 5 % of the steps and the weight of its KL rises over 0.2 %, as 150,000 and 5,000
    of 3 million; its rate, 1e-3 (1e-4), falls over all steps (the first 40 %) to 1.25 % of itself after a warm-up.
    Text and codes have an output layer each (the paper does not say).  Pads are never targets.  Linear layers of the
    prior have no biases.
    The prior's rate, 1e-3 (4.5e-4), falls along a cosine (halved at plateaus); the average of the weights is updated at
    every step with decay 0.999 (every 25, 0.99); moments, averages and PowerSGD's buffers are float32 (16 bits).
    Sampled codes are drawn once, several for each crop, and each epoch takes one of them at random.
    A tenth of the captions is dropped, which lets sampling use guidance.
    Crops are resized by Pillow's bicubic filter (area means); dvae's are mirrored with --flip only.  Of the filters the
    number of words and the list of boilerplate are ours, as the paper names an example; none looks for English.

Commands
    python -m minit2i.papers.dalle                                     both stages on generated scenes, in minutes
    python train_vq.py --recipe dalle --data path/to/images --out out/dalle-vq
    python train_prior.py --recipe dalle --data path/to/images --vq out/dalle-vq --out out/dalle
    python sample.py --model out/dalle --prompt "a red circle" --out dalle.png

results: minit2i/experiments/README.md, "priors", "six-tokenizers", "six-systems", "kl-weight", "emoji", "sparse-masks",
    "float16", "hidden-pads", "quantizers", "claims"
"""

import math
import re
from dataclasses import dataclass
from typing import Annotated

import torch
import torch.nn as nn
import torch.nn.functional as F

from minit2i.attention import MASK_ORDERS
from minit2i.collectives import all_reduce_sum
from minit2i.config import Settings, at_least
from minit2i.data import CROPS
from minit2i.demo import demo
from minit2i.sources import DATA_FILTERS, BadEntry, Source
from minit2i.vq import BACKBONES, OUTPUTS, QUANTIZERS, RECON_LOSSES, Backbone, count_codes, finite

# --- STAGE 1: tokenizer ----------------------------------------------------------------------------------
# Shapes: B batch, H W image, h w code grid, N = B*h*w latents, C code channels, V codebook size.


class Bottleneck(nn.Module):
    """x (B, a, h, w) -> (B, b, h, w): a branch of width b/4, added with the factor `gain`.

    App. A.1: gain = 1/n_layers^2.  Kernels are 3 3 3 1 in the encoder and 1 3 3 3 in the decoder.  up: with
    nearest upsampling by 2, to (B, b, 2h, 2w).  The paper upsamples x; here the 1x1 convolutions (kernels must begin
    with 1) come before: the same result for a quarter of their work.
    """

    def __init__(self, a, b, gain, kernels, up=False):
        super().__init__()
        self.up = nn.Upsample(scale_factor=2) if up else nn.Identity()
        widths = [a, *[max(1, b // 4)] * 3, b]
        convs = [nn.Conv2d(i, o, k, padding=k // 2) for i, o, k in zip(widths, widths[1:], kernels)]
        self.branch = nn.Sequential(*(m for conv in convs for m in (nn.ReLU(), conv)))
        self.skip = nn.Conv2d(a, b, 1) if a != b else nn.Identity()
        self.gain = gain

    def forward(self, x):
        narrow = self.up(self.branch[:2](x))  # (B, b/4, h, w); up: (B, b/4, 2h, 2w)
        return self.up(self.skip(x)) + self.gain * self.branch[2:](narrow)


def dvae_groups(cfg):
    """Channels of the groups at strides 1, 2, 4 ... cfg.stride, and the gain of all blocks."""
    ws = [cfg.ch * 2**i for i in range(cfg.stride.bit_length())]
    return ws, 1 / (len(ws) * cfg.n_res) ** 2


def init_unit_gain(m):
    """Weights of variance 1/fan-in and zero biases, as DALL-E's release initialises its convolutions."""
    if isinstance(m, nn.Conv2d):
        nn.init.normal_(m.weight, std=m.weight[0].numel() ** -0.5)
        nn.init.zeros_(m.bias)


EPS = 0.1


def phi(image):
    """Pixels in [-1, 1] -> [EPS, 1 - EPS], where their logit is bounded: (1 - 2 EPS) x + EPS of x in [0, 1].  App.
    A.3."""
    return (1 - 2 * EPS) * (image + 1) / 2 + EPS


class DVAEEncoder(nn.Sequential):
    """7x7 convolution, groups of bottlenecks with max-pooling between, 1x1: (B, 3, H, W) -> (B, width, h, w).

    It reads phi(image) (app. A.3).
    """

    def __init__(self, cfg, width):
        ws, gain = dvae_groups(cfg)
        layers, last = [nn.Conv2d(3, cfg.ch, 7, padding=3)], cfg.ch
        for i, w in enumerate(ws):
            layers += [nn.MaxPool2d(2)] if i else []
            layers += [Bottleneck(w if k else last, w, gain, (3, 3, 3, 1)) for k in range(cfg.n_res)]
            last = w
        super().__init__(*layers, nn.ReLU(), nn.Conv2d(last, width, 1))
        self.apply(init_unit_gain)

    def forward(self, image):
        return super().forward(phi(image))


class DVAEDecoder(nn.Sequential):
    """1x1, groups of bottlenecks with nearest upsampling between, 1x1: (B, width, h, w) -> (B, maps, H, W)."""

    def __init__(self, cfg, width):
        ws, gain = dvae_groups(cfg)
        last = max(1, cfg.ch // 2)
        layers = [nn.Conv2d(width, last, 1)]
        for i, w in enumerate(ws[::-1]):
            layers += [nn.Identity()] if i else []  # counts in the parameters' names; the next block upsamples
            layers += [
                Bottleneck(w if k else last, w, gain, (1, 3, 3, 3), up=i > 0 and k == 0) for k in range(cfg.n_res)
            ]
            last = w
        super().__init__(*layers, nn.ReLU(), nn.Conv2d(last, cfg.maps, 1))
        self.apply(init_unit_gain)


def cosine(step, steps, first, last):
    """From `first` to `last` over `steps`, along half a cosine.  Linear schedules diverge (app. A.2)."""
    return last + (first - last) * (1 + math.cos(math.pi * min(1, step / max(1, steps)))) / 2


def gumbel_noise(uniform):
    """uniform in [0, 1) -> noise of the standard Gumbel distribution, of the same shape."""
    return -(-uniform.clamp_min(1e-20).log()).log()


def gumbel_softmax(logits, tau):
    """A relaxed one-hot sample at temperature tau: logits (N, V) float32 -> (N, V), each row sums to 1.

    Gumbel-softmax, arXiv:1611.01144 eq. 2.  F.gumbel_softmax takes a core 84 ms to sample its noise for 4,096x1,024
    logits, this function 25 (measured), which saves a sixth of a dVAE's training step.
    """
    return ((logits + gumbel_noise(torch.rand_like(logits))) / tau).softmax(1)


class GumbelQuantizer(nn.Module):
    """The encoder gives a logit for each code; the decoder gets a mixture of code vectors.  Sec. 2.1, app. A.2.

    In training the mixture is a Gumbel-softmax sample, else the most likely code.  The temperature falls from 1 to
    1/16 and the KL weight rises from 0 to 6.6, in the recipe over the paper's shares of the training.  The KL to the
    uniform distribution, in nats, is summed over an image's codes and divided by its 3 H W values, as DALL-E divides
    the whole bound: 1 / (3 stride^2) per code.

    Mixture and KL take tables of latents times codes: training holds 33 bytes for each pair (bench --memory), 0.3 GB
    for an image of 32x32 codes of 8,192.
    """

    first_step = 0

    @dataclass(frozen=True)
    class Config(Settings):
        """Settings of --quantizer gumbel."""

        group = "Quantizer gumbel"
        kl_weight: Annotated[float, "final weight of the KL to the uniform distribution", at_least(0)] = 6.6
        kl_steps: Annotated[float, "steps over which that weight rises; below 1: a share of --steps", at_least(0)] = (
            5000
        )
        tau_steps: Annotated[float, "steps to temperature 1/16; below 1: a share of --steps", at_least(0)] = 5000

    def __init__(self, cfg):
        super().__init__()
        self.cfg = cfg
        self.register_buffer("ema_count", torch.ones(cfg.n_codes))
        self.codebook = nn.Parameter(self.norm(torch.randn(cfg.n_codes, cfg.code_dim)))
        self.register_buffer("shift", torch.zeros(cfg.n_codes))
        self.register_buffer("scale", torch.ones(()))

    @staticmethod
    def widths(cfg):
        return cfg.n_codes, cfg.code_dim

    def norm(self, codes):
        return F.normalize(codes.float(), dim=-1) if self.cfg.l2_norm else codes.float()

    def logits(self, z):
        """z (N, V) -> (N, V), of the posterior over the codes."""
        return (z.float() - self.shift) * self.scale

    def forward(self, z, train=False, step=0):
        """z (N, V) -> z_q (N, C), codes (N,), weighted KL ()."""
        logits = self.logits(z)
        codes = logits.argmax(1)
        if not train:
            return self.lookup(codes), codes, logits.new_zeros(())
        cfg = self.cfg
        log_p = logits.log_softmax(1)
        kl = (log_p.exp() * (log_p + math.log(cfg.n_codes))).sum(1).mean()
        soft = gumbel_softmax(logits, cosine(step, cfg.tau_steps, 1.0, 1 / 16))
        weight = cosine(step, cfg.kl_steps, 0.0, cfg.kl_weight) / (3 * cfg.stride**2)
        return soft @ self.norm(self.codebook), codes, weight * kl

    def lookup(self, codes):
        """codes (...) -> latents (..., C)."""
        return self.norm(F.embedding(codes, self.codebook))

    @torch.no_grad()
    def start(self, z):
        """Shift and scale the logits to mean 0 per code and variance 1 overall on z (N, V)."""
        valid = z.isfinite().all(1, keepdim=True)
        z, n = torch.where(valid, z.float(), self.shift), all_reduce_sum(valid.sum()).clamp_min(1)
        self.shift.copy_(all_reduce_sum(z.sum(0)) / n)
        variance = all_reduce_sum(((z - self.shift).square() * valid).sum()) / (n * z.shape[1])
        self.scale.copy_(variance.clamp_min(1e-12).rsqrt())

    @torch.no_grad()
    def update(self, z, codes, step):
        """Update the counts from a step's z (N, V) and codes (N,)."""
        self.ema_count.lerp_(count_codes(codes, finite(z)[1], self.cfg.n_codes), 1 - self.cfg.decay)


LOWEST = -5.0  # of ln b: a scale of 0.007, half an 8-bit step


def logit_laplace(maps, image, target):
    """Negative log-likelihood per value under the logit-Laplace distribution, in nats.  App. A.3.

    maps (B, 6, H, W) hold mu and ln b, target (B, 3, H, W) is in [-1, 1].  Density of x = phi(target):
    1 / (2 b x (1 - x)) exp(-|logit(x) - mu| / b).  Deviation: ln b is at least LOWEST.
    """
    mu, ln_b = maps.float().chunk(2, 1)
    ln_b = ln_b.clamp_min(LOWEST)
    x = phi(target.float())
    return ((x.logit() - mu).abs() * (-ln_b).exp() + ln_b + (2 * x * (1 - x)).log()).mean()


def laplace_image(maps):
    """The image phi^-1(sigmoid(mu)) of maps (B, 6, H, W) -> (B, 3, H, W), at most slightly outside [-1, 1]."""
    mu = maps.float().chunk(2, 1)[0]
    return 2 * (mu.sigmoid() - EPS) / (1 - 2 * EPS) - 1


def crop_of_square(im, size, rng, offsets, low, high):
    """Where a crop of size (H, W) lies in a PIL image -> (left, top, right, bottom).

    The largest part with that aspect ratio (a square if H = W), its left and top within the range offsets(pixels to
    spare), resized to t = low to high times the size, at most its own, and of that a crop anywhere.
    """
    h, w = size
    side, scale = min(size), min(im.height / h, im.width / w)  # scale: pixels of the image to one of the crop
    left, top = (rng.integers(*offsets(int(spare))) for spare in (im.width - w * scale, im.height - h * scale))
    t_low, t_high = (max(side, min(int(side * scale), round(times * side))) for times in (low, high))
    t = rng.integers(t_low, t_high + 1) / side
    x, y = (rng.integers(round(n * t) - n + 1) * scale / t for n in (w, h))
    x, y = min(left + x, im.width - w * scale / t), min(top + y, im.height - h * scale / t)  # but for rounding
    return x, y, x + w * scale / t, y + h * scale / t


def dvae_crop(im, size, resize, rng):
    """Any square, at 9/8 to 12/8 of the size, and a crop of it (listing 1)."""
    return crop_of_square(im, size, rng, lambda spare: (0, spare + 1), 9 / 8, 12 / 8)


BACKBONES["dvae"] = Backbone(DVAEEncoder, DVAEDecoder, channels_last=("cpu",))  # a CPU: 1.2 times as fast
QUANTIZERS["gumbel"] = GumbelQuantizer
RECON_LOSSES["logit_laplace"] = logit_laplace
OUTPUTS["logit_laplace"] = (6, laplace_image)


# --- STAGE 2: prior --------------------------------------------------------------------------------------


def mask_order(n_layer):
    """Each layer's mask: column in layers 2, 6, 10 ... counted from 1, conv in the last, row in the others (app.
    B.1)."""
    return [("row", "column", "row", "row")[i % 4] for i in range(n_layer - 1)] + ["conv"]


def dalle_crop(im, size, resize, rng):
    """A square near the middle, at 1 to 9/8 of the size, and a crop of it (listing 2): captions name what they see."""

    def offsets(spare):
        return 3 * spare // 8, max(3 * spare // 8 + 1, 5 * spare // 8)

    return crop_of_square(im, size, rng, offsets, 1, 9 / 8)


BOILERPLATE = re.compile(  # a word of "photographed on 12 May 2015"
    r"photo\w*|picture|image|taken|uploaded|posted|on|at|in|the|\d+(st|nd|rd|th)?|jan(uary)?|feb(ruary)?|mar(ch)?|"
    r"apr(il)?|may|june?|july?|aug(ust)?|sep(t|tember)?|oct(ober)?|nov(ember)?|dec(ember)?"
)


class Filtered(Source):
    """A source without captions of less than 3 words or of boilerplate such as "photographed on <date>", and without
    images of an aspect ratio outside [1/2, 2] (app. C)."""

    def __init__(self, source):
        self.source, self.skipped = source, source.skipped
        self.key, self.name, self.times = source.key, source.name, source.times

    def __len__(self):
        return len(self.source)

    def stamp(self, i):
        return f"{self.source.stamp(i)} dalle"

    def image(self, i, near=None):
        im = self.source.image(i, near)
        if max(im.size) > 2 * min(im.size):
            raise BadEntry("aspect ratio outside 1/2 to 2")
        return im

    def captions(self, i, rng=None):
        lines = self.source.captions(i, rng)
        long = [line for line in lines if len(line.split()) >= 3]
        kept = [line for line in long if not all(map(BOILERPLATE.fullmatch, re.findall(r"\w+", line.lower())))]
        if not kept:
            raise BadEntry("caption is boilerplate" if long else "caption is too short")
        return kept


MASK_ORDERS["dalle"] = mask_order
CROPS |= {"dvae": dvae_crop, "dalle": dalle_crop}
DATA_FILTERS["dalle"] = Filtered


# --- RECIPE ----------------------------------------------------------------------------------------------

RECIPE = {  # sec. 2, app. A.2, B; codebook and steps are a laptop's, for images of 64 pixels
    "vq": dict(
        backbone="dvae", quantizer="gumbel", stride=8, ch=32, kl_steps=0.002, tau_steps=0.05, recon="logit_laplace"
    )
    | dict(beta2=0.999, weight_decay=1e-4, ema=0.999, min_lr=0.0125),
    "prior": dict(norm="layernorm", mlp="gelu", qk_norm=False, pos="learned", mask="dalle", fp32_logits=True)
    | dict(text_weight=1 / 8, bpe_dropout=0.1, beta2=0.96, weight_decay=0.045, clip=4.0, block_scale=True),
}

LARGE = dict(
    norm="layernorm", mlp="gelu", qk_norm=False, n_codes=8192, grid_h=32, grid_w=32
)  # 256x256 pixels, stride 8
SIZES = {  # app. B.1
    "dalle-12b": LARGE
    | dict(n_layer=64, n_head=62, n_embd=3968, text_len=256, n_vocab=16384, mask="dalle", fp32_logits=True)
}


if __name__ == "__main__":
    demo(
        "dalle",
        __doc__,
        expect="red circles, green triangles at times, yellow and blue; stripes are lost: few codes, each learned well",
        vq="--ch 24 --n_res 1 --lr 3e-3 --steps 1800 --ema 0.99 --recon l2 "  # flat scenes drown logit-Laplace
        "--kl_weight 0.4 --kl_steps 100 --tau_steps 1200",
    )

r"""VQGAN: Taming Transformers for High-Resolution Image Synthesis, Esser et al., 2020-12, arXiv:2012.09841.

What it adds
    tokenizer   a ResNet with GroupNorm, attention at the lowest resolution    VQGANEncoder, VQGANDecoder
                (the release's; published weights load: --vq FOLDER)           vqmodel.py:copy_tokenizer
                a perceptual loss on VGG's features                            Perceptual
                PatchGAN that starts late, with a hinge or logistic loss       PatchGAN, hinge, logistic
                its weight, from gradients at the decoder's last layer         adaptive_weight
    prior       a GPT-2 after its condition, which is not learned              gpt.py:GPT, --text_weight 0
                an image of conditions, tokenized before the target            SpatialPrefix, --condition spatial
                images larger than its grid, in a sliding window               every_place, sample.py:slide

What differs here
    Below the paper's --ch 128 its 32 groups of each GroupNorm become ch/4: no group has fewer than four channels.
    PatchGAN has GroupNorm for BatchNorm: an image's verdict does not depend on its batch, and N ranks match one.
    The perceptual loss lacks LPIPS's learned channel weights, which torchvision does not have.
    Codes start from k-means and dead ones restart (vq.py); the release starts them uniform in 1/n_codes and has neither.
    The discriminator's weight is ramped up from 0.  With --accum each micro-batch has its own adaptive weight.
    Conditions are captions, edges and low resolutions (--condition text,spatial); Taming's class labels are captions
    here, its depth, segmentation and pose maps, which other networks make, are left out.  One tokenizer encodes all.
    A tenth of the captions is dropped, which lets sampling use guidance.

Commands
    python -m minit2i.papers.taming                                    both stages on generated scenes, in minutes
    python train_vq.py --recipe taming --data path/to/images --out out/taming-vq
    python train_prior.py --recipe taming --data path/to/images --vq out/taming-vq --out out/taming
    python sample.py --model out/taming --prompt "a red circle" --image_size 64x128 --out taming.png
    python train_prior.py --recipe taming --condition text,spatial --spatial edges --data path/to/images \
        --vq out/taming-vq --out out/edges
    python sample.py --model out/edges --prompt "" --image wide.png --image_size 64x128 --out edges.png

results: minit2i/experiments/README.md, "priors", "six-tokenizers", "six-systems", "norm-groups", "gan",
    "spatial-condition"
"""

import math
import re
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Annotated

import torch
import torch.nn as nn
import torch.nn.functional as F
from einops import rearrange
from torchvision.models import VGG16_Weights
from torchvision.models.vgg import cfgs, make_layers

from minit2i.collectives import all_reduce_sum, rank_and_world
from minit2i.config import RARE, Settings, at_least
from minit2i.demo import VQGAN, demo
from minit2i.gpt import CONDITIONS, Condition, View, conditions_of
from minit2i.sample import WINDOW_PLANS
from minit2i.tokenizer_losses import DISCRIMINATORS, PERCEPTUAL, AdversaryConfig
from minit2i.vq import BACKBONES, Backbone

# --- STAGE 1: tokenizer ----------------------------------------------------------------------------------
# Shapes: B batch, H W image, h w code grid, C channels.  Images are in [-1, 1].


@dataclass(frozen=True)
class VQGANConfig(Settings):
    """Settings of the backbones vqgan and movq.  Those of published tokenizers fit in (vqmodel.py)."""

    group = "Backbone vqgan, movq"
    attention: Annotated[
        str, "attention after each block at these strides (last: --stride) and in the middle (mid), or none (Muse)"
    ] = "last,mid"
    decoder_attention: Annotated[str, "the decoder's; empty: --attention", RARE] = ""
    ch_mult: Annotated[str, "channels at strides 1, 2, 4, ... over --ch; empty: 1,1,2,2,4,4", RARE] = ""
    z_channels: Annotated[int, "before quant_conv and after post_quant_conv; 0: --code_dim", RARE, at_least(0)] = 0
    norm_groups: Annotated[int, "groups of GroupNorm; 0: a quarter of --ch, at most 32", RARE, at_least(0)] = 0
    pixels: str = "-1,1"  # range of the images that the network reads and writes; a published one's may be another
    float32: bool = False  # never in half precision

    @property
    def pixel_scale(self):
        """(scale, shift) from [-1, 1] to the range of `pixels`."""
        low, high = map(float, self.pixels.split(","))
        return (high - low) / 2, (high + low) / 2

    @property
    def groups(self):
        """Groups of each GroupNorm: the paper's 32 at --ch 128, where its narrowest layers have four channels a group;
        a quarter of --ch in narrower networks.

        With one channel a group the norm would remove each channel's mean over the image, and flat areas would lose
        their colour (on scenes at --ch 16: 17.0 instead of 21.5 dB, see norm-groups).
        """
        return self.norm_groups or max(1, min(32, self.ch // 4))


class Norm(nn.GroupNorm):
    """GroupNorm in float32: x (B, ch, h, w), latents z (not used here) -> the same shape as x.

    Over channels_last memory, which transposed latents have, torch's loses three digits (measured: 4e-4 for 1e-6).
    """

    sees_all = True  # statistics of the whole image

    def __init__(self, ch, groups):
        super().__init__(math.gcd(groups, ch), ch, eps=1e-6)

    def forward(self, x, z):
        with torch.autocast(x.device.type, enabled=False):
            x32, w, b = x.float().contiguous(), self.weight.float(), self.bias.float()
            return F.group_norm(x32, self.num_groups, w, b, self.eps).to(x.dtype)


class ResnetBlock(nn.Module):
    """x (B, a, h, w), latents z -> (B, b, h, w).  Two 3x3 convolutions, each after a norm and SiLU.

    norm: channels -> a module like Norm.
    """

    def __init__(self, a, b, norm):
        super().__init__()
        self.norm1, self.conv1 = norm(a), nn.Conv2d(a, b, 3, padding=1)
        self.norm2, self.conv2 = norm(b), nn.Conv2d(b, b, 3, padding=1)
        self.skip = nn.Conv2d(a, b, 1) if a != b else nn.Identity()

    def forward(self, x, z):
        y = self.conv1(F.silu(self.norm1(x, z)))
        return self.skip(x) + self.conv2(F.silu(self.norm2(y, z)))


class SelfAttention(nn.Module):
    """Attention of all positions, one head: x (B, ch, h, w), latents z -> the same shape as x."""

    def __init__(self, ch, norm):
        super().__init__()
        self.norm = norm(ch)
        self.q, self.k, self.v, self.out = (nn.Linear(ch, ch) for _ in range(4))

    def forward(self, x, z):
        y = rearrange(self.norm(x, z), "b c h w -> b 1 (h w) c")
        y = self.out(F.scaled_dot_product_attention(self.q(y), self.k(y), self.v(y)))
        return x + rearrange(y, "b 1 (h w) c -> b c h w", h=x.shape[2])


def vqgan_levels(cfg, attention):
    """-> [(channels, whether attention follows each block)] at strides 1, 2, 4, ... cfg.stride; whether mid has it.

    By default 1 1 2 2 4 times cfg.ch channels, Taming's at stride 16.  ValueError for unknown places.
    """
    n = cfg.stride.bit_length()
    mult = cfg.ch_mult or ",".join(str(2 ** (i // 2)) for i in range(n))
    if not re.fullmatch(r"[1-9]\d*(,[1-9]\d*)*", mult) or mult.count(",") != n - 1:
        raise ValueError(f"ch_mult {mult!r} is not {n} numbers, one for each stride from 1 to {cfg.stride}")
    places, strides = attention.replace("last", str(cfg.stride)).split(","), [str(2**i) for i in range(n)]
    if unknown := set(places) - {*strides, "mid", "none"}:
        raise ValueError(f"attention {min(unknown)!r} is not known; use {', '.join(strides)}, last, mid or none")
    return [(cfg.ch * int(m), stride in places) for m, stride in zip(mult.split(","), strides)], "mid" in places


def blocks(n, a, b, norm, attend):
    """n residual blocks from a to b channels, each followed by attention if `attend`."""
    layers = []
    for _ in range(n):
        layers += [ResnetBlock(a, b, norm), *([SelfAttention(b, norm)] if attend else [])]
        a = b
    return layers


def middle(ch, norm, attend):
    """The blocks at the lowest resolution, next to the codes."""
    return [*blocks(1, ch, ch, norm, attend), ResnetBlock(ch, ch, norm)]


def apply_layers(layers, x, z, cfg):
    """x through all layers; those with norms get the latents z too."""
    with torch.autocast(x.device.type, enabled=False) if cfg.float32 else nullcontext():
        for layer in layers:
            x = layer(x, z) if isinstance(layer, (Norm, ResnetBlock, SelfAttention)) else layer(x)
        return x


class VQGANEncoder(nn.Module):
    """ResNet with attention at the lowest resolution: (B, 3, H, W) -> (B, width, h, w).  App. A, table 7."""

    def __init__(self, cfg, width):
        super().__init__()
        self.cfg, (self.levels, self.mid) = cfg, vqgan_levels(cfg, cfg.attention)
        norm, last, z_channels = (partial(Norm, groups=cfg.groups), self.levels[0][0], cfg.z_channels or cfg.code_dim)
        layers = [nn.Conv2d(3, last, 3, padding=1)]
        for i, (ch, attend) in enumerate(self.levels):
            if i:  # padded right and below only, as in the release
                layers += [nn.ZeroPad2d((0, 1, 0, 1)), nn.Conv2d(last, last, 3, stride=2)]
            layers += blocks(cfg.n_res, last, ch, norm, attend)
            last = ch
        layers += [*middle(last, norm, self.mid), norm(last), nn.SiLU(), nn.Conv2d(last, z_channels, 3, padding=1)]
        self.layers = nn.ModuleList([*layers, nn.Conv2d(z_channels, width, 1)])  # the last: quant_conv

    def forward(self, x):
        scale, shift = self.cfg.pixel_scale
        return apply_layers(self.layers, x * scale + shift, None, self.cfg)


class VQGANDecoder(nn.Module):
    """The encoder's mirror with n_res + 1 blocks per resolution: (B, width, h, w) -> (B, maps, H, W)."""

    def __init__(self, cfg, width, norm=None):
        super().__init__()
        self.cfg, (self.levels, self.mid) = cfg, vqgan_levels(cfg, cfg.decoder_attention or cfg.attention)
        norm = norm or partial(Norm, groups=cfg.groups)
        last, z_channels = self.levels[-1][0], cfg.z_channels or cfg.code_dim
        layers = [nn.Conv2d(width, z_channels, 1)]  # post_quant_conv
        layers += [nn.Conv2d(z_channels, last, 3, padding=1), *middle(last, norm, self.mid)]
        for i, (ch, attend) in enumerate(self.levels[::-1]):
            layers += [nn.Upsample(scale_factor=2), nn.Conv2d(last, last, 3, padding=1)] if i else []
            layers += blocks(cfg.n_res + 1, last, ch, norm, attend)
            last = ch
        self.layers = nn.ModuleList([*layers, norm(last), nn.SiLU(), nn.Conv2d(last, cfg.maps, 3, padding=1)])

    def forward(self, z):
        scale, shift = self.cfg.pixel_scale
        return (apply_layers(self.layers, z.contiguous(), z, self.cfg) - shift) / scale


def vgg_features(path=""):
    """The convolutions of torchvision's VGG16 trained on ImageNet, from a file or by torchvision's download.

    ValueError if neither works.
    """
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
            f"--perceptual vgg needs VGG16's weights, and {what} ({type(e).__name__}: {str(e).splitlines()[0][:100]}); "
            f"fetch {source.url} and name the file with --vgg, or use --perceptual none"
        ) from e
    return features


class Perceptual(nn.Module):
    """Distance of two images in VGG16's features: a, b (B, 3, H, W) -> (B,).

    As LPIPS, arXiv:1801.03924 eq. 1: the last features before each of five poolings, normalised over channels, squared
    difference, mean over positions; without its learned channel weights.  ValueError for images below 16 pixels.
    """

    LAYERS = (3, 8, 15, 22, 29)  # relu1_2, 2_2, 3_3, 4_3, 5_3

    @dataclass(frozen=True)
    class Config(Settings):
        """Settings of --perceptual vgg."""

        group = "Perceptual vgg"
        perceptual_weight: Annotated[float, "weight of the perceptual loss (VQGAN: 1)", at_least(0)] = 1.0
        vgg: Annotated[str, "file of torchvision's VGG16 weights; empty: torchvision downloads them"] = ""

    def __init__(self, cfg, size):
        super().__init__()
        if min(size) < 16:
            raise ValueError(
                f"--perceptual vgg needs images of at least 16 pixels, not {min(size)}; use --perceptual none"
            )
        self.features = vgg_features(cfg.vgg)[: self.LAYERS[-1] + 1].eval().requires_grad_(False)
        for m in self.features:
            if isinstance(m, nn.ReLU):
                m.inplace = False  # else the features kept here would change
        self.register_buffer("mean", torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1))
        self.register_buffer("std", torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1))

    def forward(self, a, b):
        x, y = (((image + 1) / 2 - self.mean) / self.std for image in (a, b))
        total = 0.0
        for i, layer in enumerate(self.features):
            x, y = layer(x), layer(y)  # apart: there is no backward pass through the true image
            if i in self.LAYERS:
                f, g = (F.normalize(features.float(), dim=1, eps=1e-6) for features in (x, y))  # (B, C, h, w) each
                total = total + (f - g).square().sum(1).mean((1, 2))
        return total


def hinge(real, fake):
    """The discriminator's loss from its logits.  Geometric GAN, arXiv:1705.02894; zero beyond the margin of 1."""
    return (F.relu(1 - real.float()).mean() + F.relu(1 + fake.float()).mean()) / 2


def logistic(real, fake):
    """The discriminator's loss from its logits, -log p(real) - log(1 - p(fake)).  VQGAN eq. 5; GAN, 1406.2661 eq. 1."""
    return F.softplus(-real.float()).mean() + F.softplus(fake.float()).mean()


def adaptive_weight(recon, gan, weight, scale=1.0, delta=1e-6):
    """Norm of the reconstruction loss's gradient at the decoder's last weight, over that of the adversarial loss.

    Two losses that depend on the parameter `weight` -> lambda (), at most 1e4, detached.  Eq. 7, with its delta (the
    code has 1e-4).  Gradients are means over all ranks; scale: float16's loss scale, undone here.
    """

    def norm(loss):
        (g,) = torch.autograd.grad(scale * loss, weight, retain_graph=True)
        return (all_reduce_sum(g.float() / scale) / rank_and_world()[1]).norm()

    return (norm(recon) / (norm(gan) + delta)).clamp(max=1e4).detach()


class PatchGAN(nn.Sequential):
    """Discriminator of patches: (B, 3, H, W) -> a logit for each overlapping patch (B, 1, h, w), high for real.

    pix2pix, arXiv:1611.07004 app. 6.1.2, with GroupNorm for BatchNorm.  ValueError if the images are too small.
    """

    @dataclass(frozen=True)
    class Config(AdversaryConfig):
        """Settings of --discriminator patch."""

        group = "Discriminator patch"
        gan_adaptive: Annotated[bool, "multiply --gan by the ratio of gradients (VQGAN eq. 7)"] = True
        gan_loss: Annotated[str, "hinge, or logistic (VQGAN eq. 5, non-saturating)", ("hinge", "logistic")] = "hinge"
        gan_ch: Annotated[int, "channels at half resolution", at_least(1)] = 64
        gan_layers: Annotated[int, "number of halvings; 3 judge patches of 70x70 pixels", at_least(0)] = 3

    optimizer, penalty_every = dict(beta1=0.5, beta2=0.9, weight_decay=0.0), 0  # VQGAN's release

    def __init__(self, cfg, size):
        least = 3 * 2**cfg.gan_layers
        if min(size) < least:
            raise ValueError(
                f"a discriminator of {cfg.gan_layers} layers needs images of at least {least} pixels, not {min(size)}; "
                "use a smaller --gan_layers"
            )
        ch, n_layers = cfg.gan_ch, cfg.gan_layers
        layers, last = [nn.Conv2d(3, ch, 4, stride=2, padding=1), nn.LeakyReLU(0.2)], ch
        for i in range(1, n_layers + 1):
            w = ch * min(2**i, 8)
            layers += [nn.Conv2d(last, w, 4, stride=2 if i < n_layers else 1, padding=1, bias=False)]
            layers += [nn.GroupNorm(math.gcd(8, w), w), nn.LeakyReLU(0.2)]
            last = w
        super().__init__(*layers, nn.Conv2d(last, 1, 4, padding=1))
        self.adaptive, self.hinge = cfg.gan_adaptive, cfg.gan_loss == "hinge"

    def discriminator_loss(self, real, fake):
        """Logits of real and of generated images -> loss ()."""
        return hinge(real, fake) if self.hinge else logistic(real, fake) / 2

    def generator_loss(self, fake):
        """Logits of generated images -> loss (): -logit, with --gan_loss logistic -log p(fake) (release: -logit)."""
        return -fake.float().mean() if self.hinge else F.softplus(-fake.float()).mean()

    def balance(self, recon, gan, weight, scale):
        """The factor on the generator's loss, or None if it has none."""
        return adaptive_weight(recon, gan, weight, scale) if self.adaptive else None


BACKBONES["vqgan"] = Backbone(VQGANEncoder, VQGANDecoder, VQGANConfig)
PERCEPTUAL["vgg"] = Perceptual
DISCRIMINATORS["patch"] = PatchGAN


# --- STAGE 2: prior --------------------------------------------------------------------------------------
# Shapes: B batch, H W image, h w code grid, N = h*w, D width.


def edges(images):
    """images (B, 3, H, W) in [-1, 1] -> their edges, white on black, the same shape: Sobel's gradient of the gray."""
    gray = F.pad(images.mean(1, keepdim=True), (1, 1, 1, 1), mode="replicate")  # (B, 1, H+2, W+2)
    sobel = gray.new_tensor([[-1, 0, 1], [-2, 0, 2], [-1, 0, 1]]) / 4
    gradient = F.conv2d(gray, torch.stack([sobel, sobel.t()])[:, None])  # (B, 2, H, W); a step from -1 to 1 has 2
    return (2 * gradient.norm(dim=1, keepdim=True) - 1).clamp(max=1).expand_as(images)


def lowres(images):
    """images (B, 3, H, W) in [-1, 1] -> shrunk 8 times in each direction and enlarged again: Taming's factor."""
    size = images.shape[-2:]
    small = F.interpolate(images, [max(1, side // 8) for side in size], mode="bicubic", antialias=True)
    return F.interpolate(small, size, mode="bicubic").clamp(-1, 1)


MAPS = {"edges": edges, "lowres": lowres}


@dataclass(frozen=True)
class SpatialConfig(Settings):
    """Settings of --condition spatial."""

    group = "--condition spatial"
    spatial: Annotated[str, "what is given of the image: its edges, or a low resolution", tuple(MAPS)] = "edges"


class SpatialPrefix(Condition):
    """An image of conditions before the target: the codes that the tokenizer gives f(image), f one of MAPS (sec. 3.2).

    A code of it has the position of the target's code at the same place, and a learned vector tells the two apart.
    Deviations: made from the image itself, as Taming's edges and low resolutions are (its depth and segmentation need
    other networks); the image's own tokenizer encodes it (Taming: another).
    """

    Config = SpatialConfig

    def __init__(self, cfg):
        super().__init__(cfg)
        self.length = cfg.n_image
        self.kind = nn.Parameter(torch.zeros(cfg.n_embd))

    @classmethod
    def settle(cls, cfg):
        if sum(c.extra_codes is not Condition.extra_codes for c in conditions_of(cfg)) > 1:
            raise ValueError(f"--condition {cfg.condition}: an image is conditioned on one other image; leave one out")
        return cfg

    @staticmethod
    def extra_codes(cfg):
        return View("spatial", MAPS[cfg.spatial], cfg.spatial)

    def prefix(self, batch, embed):
        return embed(batch["spatial"] + self.cfg.n_vocab + self.cfg.text_len) + self.kind  # (B, N, D)

    def learned_positions(self, grid):
        return grid

    def coordinates(self, grid):
        return grid


CONDITIONS["spatial"] = SpatialPrefix


def every_place(grid, window, step=1):
    """Window plan: a window (h, w) for each code of the grid (H, W) in raster order, around the code as borders allow.

    -> [(top, left, (row, column) of the code in the window)]; step is not used here.  Sec. 3.3, fig. 3.
    """
    (big_h, big_w), (h, w) = grid, window
    plan = []
    for i in range(big_h):
        for j in range(big_w):
            top, left = min(max(i - h // 2, 0), big_h - h), min(max(j - w // 2, 0), big_w - w)
            plan.append((top, left, (i - top, j - left)))
    return plan


WINDOW_PLANS["every_place"] = every_place


# --- RECIPE ----------------------------------------------------------------------------------------------

RECIPE = {  # sec. 3, 4; sizes, codebook and steps are a laptop's, for images of 64 pixels
    "vq": dict(backbone="vqgan", quantizer="st", stride=8, ch=32, n_res=1)
    | dict(recon="l1", perceptual="vgg", perceptual_weight=1.0, discriminator="patch", gan=0.8)
    | dict(beta1=0.5, beta2=0.9, weight_decay=0.0),
    "prior": dict(norm="layernorm", mlp="gelu", qk_norm=False, pos="learned", mask="causal")
    | dict(text_weight=0.0, bpe_dropout=0.0, weight_decay=0.01),  # the caption is a condition, not predicted
}


if __name__ == "__main__":
    demo(
        "taming",
        __doc__,
        expect="red circles, green, blue and yellow objects, cyan outlines; small shapes are blobs still",
        vq=VQGAN + " --gan_start 1000 --steps 1200",
    )

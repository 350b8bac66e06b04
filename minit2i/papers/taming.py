"""VQGAN: Taming Transformers for High-Resolution Image Synthesis, Esser et al., 2020-12, arXiv:2012.09841.

What it adds
    tokenizer   a ResNet with GroupNorm, attention at the lowest resolution    VQGANEncoder, VQGANDecoder
                a perceptual loss on VGG's features                            Perceptual
                PatchGAN with a hinge loss that starts late                    PatchGAN, hinge
                its weight, from gradients at the decoder's last layer         adaptive_weight
    prior       a GPT-2 after its condition, which is not learned              gpt.py:GPT, --text_weight 0
                images larger than its grid, in a sliding window               every_place, sample.py:slide

What differs here
    PatchGAN has GroupNorm for BatchNorm: an image's verdict does not depend on its batch, and N ranks match one.
    The perceptual loss lacks LPIPS's learned channel weights, which torchvision does not have.
    The discriminator's weight is ramped up from 0.  With --accum each micro-batch has its own adaptive weight.
    The condition is a caption; Taming's class labels, depth and segmentation maps are left out.
    A tenth of the captions is dropped, which lets sampling use guidance.

Commands
    python -m minit2i.papers.taming                                    both stages on generated scenes, in minutes
    python train_vq.py --recipe taming --data path/to/images --out out/taming-vq
    python train_prior.py --recipe taming --data path/to/images --vq out/taming-vq --out out/taming
    python sample.py --model out/taming --prompt "a red circle" --image_size 64x128 --out taming.png

results: minit2i/experiments/README.md, "gan"
"""

import math
from dataclasses import dataclass
from typing import Annotated

import torch
import torch.nn as nn
import torch.nn.functional as F
from einops import rearrange
from torchvision.models import VGG16_Weights
from torchvision.models.vgg import cfgs, make_layers

from minit2i.collectives import all_reduce_sum, rank_and_world
from minit2i.config import Settings, at_least
from minit2i.demo import VQGAN, demo
from minit2i.sample import WINDOW_PLANS
from minit2i.tokenizer_losses import DISCRIMINATORS, PERCEPTUAL, AdversaryConfig
from minit2i.vq import BACKBONES

# --- STAGE 1: tokenizer ----------------------------------------------------------------------------------
# Shapes: B batch, H W image, h w code grid, C channels.  Images are in [-1, 1].


class Norm(nn.Module):
    """GroupNorm of 32 groups in float32: x (B, ch, h, w), latents z (not used here) -> the same shape as x."""

    sees_all = True  # statistics of the whole image

    def __init__(self, ch, affine=True):
        super().__init__()
        self.norm = nn.GroupNorm(math.gcd(32, ch), ch, eps=1e-6, affine=affine)

    def forward(self, x, z):
        w, b = (None if p is None else p.float() for p in (self.norm.weight, self.norm.bias))
        with torch.autocast(x.device.type, enabled=False):
            return F.group_norm(x.float(), self.norm.num_groups, w, b, self.norm.eps).to(x.dtype)


class ResnetBlock(nn.Module):
    """x (B, a, h, w), latents z -> (B, b, h, w).  Two 3x3 convolutions, each after a norm and SiLU.

    norm: channels -> a module like Norm.
    """

    def __init__(self, a, b, norm=Norm):
        super().__init__()
        self.norm1, self.conv1 = norm(a), nn.Conv2d(a, b, 3, padding=1)
        self.norm2, self.conv2 = norm(b), nn.Conv2d(b, b, 3, padding=1)
        self.skip = nn.Conv2d(a, b, 1) if a != b else nn.Identity()

    def forward(self, x, z):
        y = self.conv1(F.silu(self.norm1(x, z)))
        return self.skip(x) + self.conv2(F.silu(self.norm2(y, z)))


class SelfAttention(nn.Module):
    """Attention of all positions, one head: x (B, ch, h, w), latents z -> the same shape as x."""

    def __init__(self, ch, norm=Norm):
        super().__init__()
        self.norm, self.qkv, self.out = norm(ch), nn.Conv2d(ch, 3 * ch, 1), nn.Conv2d(ch, ch, 1)

    def forward(self, x, z):
        q, k, v = rearrange(self.qkv(self.norm(x, z)), "b (n c) h w -> n b 1 (h w) c", n=3)
        y = F.scaled_dot_product_attention(q, k, v)
        return x + self.out(rearrange(y, "b 1 (h w) c -> b c h w", h=x.shape[2]))


def vqgan_widths(cfg):
    """Channels at strides 1, 2, 4, ... cfg.stride: 1 1 2 2 4 times cfg.ch, Taming's at stride 16."""
    return [cfg.ch * 2 ** (i // 2) for i in range(cfg.stride.bit_length())]


def apply_layers(layers, x, z):
    """x through all layers; those with norms get the latents z too."""
    for layer in layers:
        x = layer(x, z) if isinstance(layer, (Norm, ResnetBlock, SelfAttention)) else layer(x)
    return x


class VQGANEncoder(nn.Module):
    """ResNet with attention at the lowest resolution: (B, 3, H, W) -> (B, width, h, w).  App. A, table 7."""

    def __init__(self, cfg, width):
        super().__init__()
        ws, last = vqgan_widths(cfg), cfg.ch
        layers = [nn.Conv2d(3, cfg.ch, 3, padding=1)]
        for i, w in enumerate(ws):
            layers += [nn.Conv2d(last, last, 3, stride=2, padding=1)] if i else []
            for _ in range(cfg.n_res):
                layers += [ResnetBlock(last, w), *([SelfAttention(w)] if i == len(ws) - 1 else [])]
                last = w
        layers += [ResnetBlock(last, last), SelfAttention(last), ResnetBlock(last, last)]
        layers += [Norm(last), nn.SiLU(), nn.Conv2d(last, width, 3, padding=1)]
        self.layers = nn.ModuleList(layers)

    def forward(self, x):
        return apply_layers(self.layers, x, None)


class VQGANDecoder(nn.Module):
    """The encoder's mirror with n_res + 1 blocks per resolution: (B, width, h, w) -> (B, maps, H, W)."""

    def __init__(self, cfg, width, norm=Norm):
        super().__init__()
        ws = vqgan_widths(cfg)[::-1]
        last = ws[0]
        layers = [nn.Conv2d(width, last, 3, padding=1)]
        layers += [ResnetBlock(last, last, norm), SelfAttention(last, norm), ResnetBlock(last, last, norm)]
        for i, w in enumerate(ws):
            layers += [nn.Upsample(scale_factor=2), nn.Conv2d(last, last, 3, padding=1)] if i else []
            for _ in range(cfg.n_res + 1):
                layers += [ResnetBlock(last, w, norm), *([] if i else [SelfAttention(w, norm)])]
                last = w
        layers += [norm(last), nn.SiLU(), nn.Conv2d(last, cfg.maps, 3, padding=1)]
        self.layers = nn.ModuleList(layers)

    def forward(self, z):
        return apply_layers(self.layers, z, z)


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
        x = ((torch.cat([a, b]) + 1) / 2 - self.mean) / self.std
        total = 0.0
        for i, layer in enumerate(self.features):
            x = layer(x)
            if i in self.LAYERS:
                f, g = F.normalize(x.float(), dim=1, eps=1e-6).chunk(2)  # (B, C, h, w) each
                total = total + (f - g).square().sum(1).mean((1, 2))
        return total


def hinge(real, fake):
    """The discriminator's loss from its logits.  Geometric GAN, arXiv:1705.02894; zero beyond the margin of 1."""
    return (F.relu(1 - real.float()).mean() + F.relu(1 + fake.float()).mean()) / 2


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
        gan_ch: Annotated[int, "channels at half resolution", at_least(1)] = 64
        gan_layers: Annotated[int, "number of halvings; 3 judge patches of 70x70 pixels", at_least(0)] = 3

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
        self.adaptive = cfg.gan_adaptive

    def discriminator_loss(self, real, fake):
        """Logits of real and of generated images -> loss ()."""
        return hinge(real, fake)

    def generator_loss(self, fake):
        """Logits of generated images -> loss ()."""
        return -fake.float().mean()

    def balance(self, recon, gan, weight, scale):
        """The factor on the generator's loss, or None if it has none."""
        return adaptive_weight(recon, gan, weight, scale) if self.adaptive else None


BACKBONES["vqgan"] = (VQGANEncoder, VQGANDecoder)
PERCEPTUAL["vgg"] = Perceptual
DISCRIMINATORS["patch"] = PatchGAN


# --- STAGE 2: prior --------------------------------------------------------------------------------------


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
        expect="objects in number and place, without colour, which VQGAN's norms lose in so few steps (lm's MoVQ: not)",
        vq=VQGAN,
        prior="--optimizer muon --lr 3e-3",
    )

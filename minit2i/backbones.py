"""Encoders and decoders of stage 1: pictures to latents, latents to pictures.

    encoder: (B, 3, H, W) in [-1, 1] -> (B, width, h, w)        decoder: (B, width, h, w) -> (B, maps, H, W)

`BACKBONES` names the pairs.  Each is built as Encoder(cfg, width), Decoder(cfg, width) from a VQConfig; a decoder's
last layer is its last convolution (or linear layer), which the adaptive weight of losses.py looks at.

Shapes: B batch, H W picture, h w code grid, C channels, D width of the transformer.
"""

import math

import torch
import torch.nn as nn
import torch.nn.functional as F
from einops import rearrange

# --- vqvae: strided convolutions ---------------------------------------------------------------------


class ResBlock(nn.Module):
    """x (B, ch, h, w) -> the same shape.  3x3 then 1x1 convolution, VQ-VAE, arXiv:1711.00937 sec. 4.1.

    No normalisation: one over the whole picture would let each code know of all others, and the prior
    could tell a training picture by its first codes instead of its caption.
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
    """Strided convolutions with residual blocks: (B, 3, H, W) -> (B, width, H/stride, W/stride).

    Kernels of 4 and 3, as VQ-VAE's, so that neighbouring codes overlap; or, if cfg.patchwise, of 2 and 1.
    """

    def __init__(self, cfg, width):
        layers, last = [], 3
        down, res = (dict(kernel_size=2), 1) if cfg.patchwise else (dict(kernel_size=4, padding=1), 3)
        for w in channels(cfg):
            layers += [nn.Conv2d(last, w, stride=2, **down), *(ResBlock(w, res) for _ in range(cfg.n_res)), nn.SiLU()]
            last = w
        super().__init__(*layers, nn.Conv2d(last, width, 1))


class Decoder(nn.Sequential):
    """The encoder's mirror, with transposed convolutions: (B, width, h, w) -> (B, maps, h*stride, w*stride)."""

    def __init__(self, cfg, width):
        ws = channels(cfg)[::-1]
        layers = [nn.Conv2d(width, ws[0], 3, padding=1)]
        for w, nxt in zip(ws, [*ws[1:], cfg.maps]):
            layers += [ResBlock(w) for _ in range(cfg.n_res)]
            layers += [nn.SiLU(), nn.ConvTranspose2d(w, nxt, 4, stride=2, padding=1)]
        super().__init__(*layers)


# --- dvae: DALL-E ------------------------------------------------------------------------------------


class Bottleneck(nn.Module):
    """x (B, a, h, w) -> (B, b, h, w): a branch of width b/4, added with the factor `gain`.

    DALL-E, arXiv:2102.12092 app. A.1: gain = 1/n_layers^2.  The encoder's kernels are 3 3 3 1, the decoder's 1 3 3 3.
    """

    def __init__(self, a, b, gain, kernels):
        super().__init__()
        widths = [a, *[max(1, b // 4)] * 3, b]
        convs = [nn.Conv2d(i, o, k, padding=k // 2) for i, o, k in zip(widths, widths[1:], kernels)]
        self.branch = nn.Sequential(*(m for conv in convs for m in (nn.ReLU(), conv)))
        self.skip = nn.Conv2d(a, b, 1) if a != b else nn.Identity()
        self.gain = gain

    def forward(self, x):
        return self.skip(x) + self.gain * self.branch(x)


def dvae_groups(cfg):
    """Channels at strides 1, 2, 4 ... cfg.stride, as (from, to) of each group, and the gain of all blocks."""
    ws = [cfg.ch * 2**i for i in range(cfg.stride.bit_length())]
    return ws, 1 / (len(ws) * cfg.n_res) ** 2


class DVAEEncoder(nn.Sequential):
    """7x7 convolution, groups of bottleneck blocks with max-pooling between, 1x1 to the latents."""

    def __init__(self, cfg, width):
        ws, gain = dvae_groups(cfg)
        layers, last = [nn.Conv2d(3, cfg.ch, 7, padding=3)], cfg.ch
        for i, w in enumerate(ws):
            layers += [nn.MaxPool2d(2)] if i else []
            layers += [Bottleneck(w if k else last, w, gain, (3, 3, 3, 1)) for k in range(cfg.n_res)]
            last = w
        super().__init__(*layers, nn.ReLU(), nn.Conv2d(last, width, 1))
        self.apply(unit_gain)


class DVAEDecoder(nn.Sequential):
    """1x1 from the latents, groups of bottleneck blocks with nearest-neighbour doubling between, 1x1 to the picture."""

    def __init__(self, cfg, width):
        ws, gain = dvae_groups(cfg)
        last = max(1, cfg.ch // 2)
        layers = [nn.Conv2d(width, last, 1)]
        for i, w in enumerate(ws[::-1]):
            layers += [nn.Upsample(scale_factor=2)] if i else []
            layers += [Bottleneck(w if k else last, w, gain, (1, 3, 3, 3)) for k in range(cfg.n_res)]
            last = w
        super().__init__(*layers, nn.ReLU(), nn.Conv2d(last, cfg.maps, 1))
        self.apply(unit_gain)


def unit_gain(m):
    """Weights of variance 1/fan-in and no bias, as DALL-E's release starts its convolutions."""
    if isinstance(m, nn.Conv2d):
        nn.init.normal_(m.weight, std=m.weight[0].numel() ** -0.5)
        nn.init.zeros_(m.bias)


# --- vqgan, and MoVQ's decoder -----------------------------------------------------------------------


class Norm(nn.Module):
    """GroupNorm of 32 groups, in float32; with code_dim, scaled and shifted by the codes z (B, code_dim, h, w).

    Spatially conditional normalization of MoVQ, arXiv:2209.09002: y = phi(z) * norm(x) + psi(z), phi and psi 1x1
    convolutions of the codes, which are repeated up to x's size.  It starts as plain GroupNorm: phi 1, psi 0.
    """

    def __init__(self, ch, code_dim=0):
        super().__init__()
        self.norm = nn.GroupNorm(math.gcd(32, ch), ch, eps=1e-6, affine=not code_dim)
        self.modulate = nn.Conv2d(code_dim, 2 * ch, 1) if code_dim else None
        if code_dim:
            nn.init.zeros_(self.modulate.weight)
            nn.init.zeros_(self.modulate.bias)

    def forward(self, x, z):
        w, b = (None if p is None else p.float() for p in (self.norm.weight, self.norm.bias))
        with torch.autocast(x.device.type, enabled=False):
            y = F.group_norm(x.float(), self.norm.num_groups, w, b, self.norm.eps).to(x.dtype)
        if self.modulate is None:
            return y
        scale, shift = self.modulate(z).chunk(2, 1)  # (B, ch, h, w) each: 1x1, so it may come before the repeating
        return y * (1 + F.interpolate(scale, y.shape[-2:])) + F.interpolate(shift, y.shape[-2:])


class GNBlock(nn.Module):
    """x (B, a, h, w), codes z or None -> (B, b, h, w).  Two 3x3 convolutions, each after Norm and SiLU."""

    def __init__(self, a, b, code_dim=0):
        super().__init__()
        self.norm1, self.conv1 = Norm(a, code_dim), nn.Conv2d(a, b, 3, padding=1)
        self.norm2, self.conv2 = Norm(b, code_dim), nn.Conv2d(b, b, 3, padding=1)
        self.skip = nn.Conv2d(a, b, 1) if a != b else nn.Identity()

    def forward(self, x, z):
        y = self.conv1(F.silu(self.norm1(x, z)))
        return self.skip(x) + self.conv2(F.silu(self.norm2(y, z)))


class Attend(nn.Module):
    """Every place sees every other, one head: x (B, ch, h, w) -> the same shape."""

    def __init__(self, ch, code_dim=0):
        super().__init__()
        self.norm, self.qkv, self.out = Norm(ch, code_dim), nn.Conv2d(ch, 3 * ch, 1), nn.Conv2d(ch, ch, 1)

    def forward(self, x, z):
        q, k, v = rearrange(self.qkv(self.norm(x, z)), "b (n c) h w -> n b 1 (h w) c", n=3)
        y = F.scaled_dot_product_attention(q, k, v)
        return x + self.out(rearrange(y, "b 1 (h w) c -> b c h w", h=x.shape[2]))


def vqgan_widths(cfg):
    """Channels at strides 1, 2, 4, ... cfg.stride: 1 1 2 2 4 times cfg.ch, as Taming's at stride 16."""
    return [cfg.ch * 2 ** (i // 2) for i in range(cfg.stride.bit_length())]


class VQGANEncoder(nn.Module):
    """ResNet with GroupNorm, attention at the lowest grid: (B, 3, H, W) -> (B, width, h, w).

    VQGAN, arXiv:2012.09841 app. A, table 7.  Norms and attention see the whole picture.
    """

    def __init__(self, cfg, width):
        super().__init__()
        ws, last = vqgan_widths(cfg), cfg.ch
        layers = [nn.Conv2d(3, cfg.ch, 3, padding=1)]
        for i, w in enumerate(ws):
            layers += [nn.Conv2d(last, last, 3, stride=2, padding=1)] if i else []
            for _ in range(cfg.n_res):
                layers += [GNBlock(last, w), *([Attend(w)] if i == len(ws) - 1 else [])]
                last = w
        layers += [GNBlock(last, last), Attend(last), GNBlock(last, last)]
        layers += [Norm(last), nn.SiLU(), nn.Conv2d(last, width, 3, padding=1)]
        self.layers = nn.ModuleList(layers)

    def forward(self, x):
        return through(self.layers, x, None)


class VQGANDecoder(nn.Module):
    """The encoder's mirror, n_res + 1 blocks a grid, nearest-neighbour doubling: (B, width, h, w) -> (B, maps, H, W)."""

    modulated = False

    def __init__(self, cfg, width):
        super().__init__()
        ws, codes = vqgan_widths(cfg)[::-1], width if self.modulated else 0
        last = ws[0]
        layers = [nn.Conv2d(width, last, 3, padding=1)]
        layers += [GNBlock(last, last, codes), Attend(last, codes), GNBlock(last, last, codes)]
        for i, w in enumerate(ws):
            layers += [nn.Upsample(scale_factor=2), nn.Conv2d(last, last, 3, padding=1)] if i else []
            for _ in range(cfg.n_res + 1):
                layers += [GNBlock(last, w, codes), *([] if i else [Attend(w, codes)])]
                last = w
        layers += [Norm(last, codes), nn.SiLU(), nn.Conv2d(last, cfg.maps, 3, padding=1)]
        self.layers = nn.ModuleList(layers)

    def forward(self, z):
        return through(self.layers, z, z)


class MoVQDecoder(VQGANDecoder):
    """VQGAN's decoder with every norm modulated by the codes.  MoVQ, arXiv:2209.09002, without its multichannel codes."""

    modulated = True


def through(layers, x, z):
    """x through all layers, z given to those that look at the codes."""
    for layer in layers:
        x = layer(x, z) if isinstance(layer, (Norm, GNBlock, Attend)) else layer(x)
    return x


# --- vit: ViT-VQGAN ----------------------------------------------------------------------------------


def positions(h, w, width, device):
    """Fixed sines and cosines of row and column: -> (h*w, width), width a multiple of 4; any grid will do."""
    rates = 10000 ** -(torch.arange(width // 4, device=device) / (width // 4))
    row, column = (torch.arange(n, device=device)[:, None] * rates for n in (h, w))  # (n, width/4)
    grid = torch.cat([row[:, None].expand(-1, w, -1), column.expand(h, -1, -1)], -1).flatten(0, 1)  # (h*w, width/2)
    return torch.cat([grid.sin(), grid.cos()], -1)


class ViTBlock(nn.Module):
    """x (B, N, D) -> the same shape: attention among all places, then an MLP, each after LayerNorm."""

    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.norm1, self.qkv, self.out = nn.LayerNorm(width), nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x):
        q, k, v = rearrange(self.qkv(self.norm1(x)), "b n (three h d) -> three b h n d", three=3, h=self.heads)
        x = x + self.out(rearrange(F.scaled_dot_product_attention(q, k, v), "b h n d -> b n (h d)"))
        return x + self.mlp(self.norm2(x))


class ViT(nn.Module):
    """n_res transformer blocks of width 4*ch over the grid, heads of 64: (B, N, 4*ch) -> the same shape.

    ViT-VQGAN, arXiv:2110.04627 sec. 3.1; "small" is ch 128, n_res 8.  Positions are fixed sines: every grid works.
    """

    def __init__(self, cfg):
        super().__init__()
        width = 4 * cfg.ch
        if width > 64 and width % 64:
            raise ValueError(
                f"ch {cfg.ch} gives vit a width of {width}, not a multiple of its heads of 64; "
                f"use {-(-width // 64) * 16}"
            )
        self.blocks = nn.Sequential(*(ViTBlock(width, max(1, width // 64)) for _ in range(cfg.n_res)))
        self.norm = nn.LayerNorm(width)

    def forward(self, x, h, w):
        return self.norm(self.blocks(x + positions(h, w, x.shape[2], x.device)))


def mlp(a, hidden, b):
    """Two layers with tanh between: at the encoder's and the decoder's end, ViT-VQGAN sec. 3.1."""
    return nn.Sequential(nn.Linear(a, hidden), nn.Tanh(), nn.Linear(hidden, b))


class ViTEncoder(nn.Module):
    """Patches of stride x stride pixels through a transformer: (B, 3, H, W) -> (B, width, h, w)."""

    def __init__(self, cfg, width):
        super().__init__()
        self.stride, d = cfg.stride, 4 * cfg.ch
        self.patch, self.vit, self.head = nn.Linear(3 * cfg.stride**2, d), ViT(cfg), mlp(d, 4 * d, width)

    def forward(self, x):
        x = rearrange(x, "b c (h p) (w q) -> b h w (c p q)", p=self.stride, q=self.stride)
        _, h, w, _ = x.shape
        x = self.head(self.vit(self.patch(x.flatten(1, 2)), h, w))
        return rearrange(x, "b (h w) c -> b c h w", h=h)


class ViTDecoder(nn.Module):
    """The codes through a transformer, each back to its patch: (B, width, h, w) -> (B, maps, h*stride, w*stride)."""

    def __init__(self, cfg, width):
        super().__init__()
        self.stride, d = cfg.stride, 4 * cfg.ch
        self.code, self.vit, self.head = nn.Linear(width, d), ViT(cfg), mlp(d, 4 * d, cfg.maps * cfg.stride**2)

    def forward(self, z):
        _, _, h, w = z.shape
        x = self.head(self.vit(self.code(rearrange(z, "b c h w -> b (h w) c")), h, w))
        return rearrange(x, "b (h w) (c p q) -> b c (h p) (w q)", h=h, p=self.stride, q=self.stride)


# --- super-resolution --------------------------------------------------------------------------------


class WDSR(nn.Module):
    """Doubles or quadruples a picture: (B, 3, H, W) in [-1, 1] -> (B, 3, s*H, s*W).

    WDSR-A, arXiv:1808.08718 sec. 3: residual blocks, wide before the activation, weight normalisation, pixel shuffle, and
    one 5x5 convolution past them all.  Parti, arXiv:2206.10789 sec. 2.1, puts 12 blocks of 128 channels on its
    detokenizer.  Our choice: it starts as bicubic interpolation, by the 5x5 convolution's first weights.
    """

    def __init__(self, scale, ch, n_blocks, expand=4):
        super().__init__()

        def conv(a, b, gain=1.0):
            c = nn.utils.parametrizations.weight_norm(nn.Conv2d(a, b, 3, padding=1))
            c.parametrizations.weight.original0.data.mul_(gain)
            c.bias.data.mul_(gain)
            return c

        self.first, self.last = conv(3, ch), conv(ch, 3 * scale**2, gain=0.0)
        self.blocks = nn.ModuleList(
            nn.Sequential(conv(ch, expand * ch), nn.ReLU(), conv(expand * ch, ch)) for _ in range(n_blocks)
        )
        self.skip = nn.Conv2d(3, 3 * scale**2, 5, padding=2, padding_mode="replicate")
        self.skip.weight.data, self.skip.bias.data = bicubic_kernel(scale), torch.zeros(3 * scale**2)
        self.shuffle = nn.PixelShuffle(scale)

    def forward(self, x):
        y = self.first(x)
        for block in self.blocks:
            y = y + block(y)
        return self.shuffle(self.skip(x) + self.last(y))


def bicubic_kernel(s):
    """Weights (3*s*s, 3, 5, 5) with which a 5x5 convolution and a pixel shuffle are bicubic interpolation by s."""
    impulses = F.pad(torch.eye(25).view(25, 1, 5, 5), (2, 2, 2, 2))  # each place of the window set alone
    answers = F.interpolate(impulses, scale_factor=s, mode="bicubic")[..., 4 * s : 5 * s, 4 * s : 5 * s]  # the middle's
    kernel = torch.zeros(3, s * s, 3, 25)
    for c in range(3):
        kernel[c, :, c] = answers.reshape(25, s * s).t()
    return kernel.view(3 * s * s, 3, 5, 5)


def shrink(image, scale):
    """image (B, 3, H, W) in [-1, 1] -> (B, 3, H/scale, W/scale), bicubic without aliasing."""
    if scale == 1:
        return image
    return F.interpolate(image, scale_factor=1 / scale, mode="bicubic", antialias=True).clamp(-1, 1)


# --- all of them, and how far they look ---------------------------------------------------------------

BACKBONES = {
    "vqvae": (Encoder, Decoder),
    "dvae": (DVAEEncoder, DVAEDecoder),
    "vqgan": (VQGANEncoder, VQGANDecoder),
    "movq": (VQGANEncoder, MoVQDecoder),
    "vit": (ViTEncoder, ViTDecoder),
}


def is_local(net):
    """Whether each output depends on its surroundings only: convolutions, but no norms and no attention."""
    return not any(isinstance(m, (Norm, ViT)) for m in net.modules())


def reach(net, jump=1.0):
    """An upper bound of how far around itself an output looks, in units of which an input position is `jump` wide."""
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


HALO = 8  # codes around a tile that are computed and thrown away, where the backbone sees everything


def tiled(f, x, grid, tile, halo, unit, out_unit):
    """f by overlapping tiles of at most `tile` codes a side (0: all at once), so that memory is bounded.

    x (..., h*unit, w*unit) -> (..., h*out_unit, w*out_unit), grid = (h, w).  Each tile sees `halo` more codes on
    every side.  Where the backbone is convolutions alone (vqvae, dvae), that is as far as they reach, and the result
    is the same as untiled up to rounding.  vqgan, movq and vit normalise or attend over the whole picture: there a tile
    is a picture of its own, and codes and pictures differ.
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

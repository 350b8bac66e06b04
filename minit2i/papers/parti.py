"""Parti: Scaling Autoregressive Models for Content-Rich Text-to-Image Generation, Yu et al., 2022-06, arXiv:2206.10789.

What it adds (the tokenizer is ViT-VQGAN, Yu et al., 2021-10, arXiv:2110.04627)
    tokenizer   a transformer on patches as encoder and decoder                ViTEncoder, ViTDecoder
                l2-normalised codes of few channels                            vq.py:Codebook, --l2_norm
                StyleGAN's discriminator, held in check by R1                  StyleGAN, deviation_map
                a larger decoder, trained afterwards on frozen codes           load_frozen, --train decoder
                learned super-resolution of decoded images, x2 and x4          WDSR, WDSRx4, --train upsampler
    prior       an encoder reads the caption, the decoder attends to it        TextEncoder
                convolutional masks in all decoder layers                      attention.py:conv
                the encoder's pre-training: hidden words, captions and images  Towers, hide_words, info_nce
                the best of many samples, by a contrastive model               Towers.score

What differs here
    Positions of the ViT are fixed sines of row and column, so every grid works; its heads have 64 channels at any size.
    The papers name StyleGAN without a version or settings: this is StyleGAN2's discriminator, loss and optimizer, with
    R1's weight of 10.  It starts late and is ramped up, and the perceptual loss is Taming's (no LPIPS weights).
    WDSR starts as bicubic interpolation; 25 blocks for its x4 are our guess from the number of parameters.
    Pads of the caption are learned vectors that attention sees (--pads hidden hides them), and the text encoder's
    positions are rotary; the paper says neither.
    Words are hidden in the captions themselves, with the contrast in one training; Parti's BERT reads other text (C4).
    The image tower reads codes, not pixels; features are means over positions.
    AdamW replaces Adafactor, with the same beta2 and weight decay; learning rates fall along a cosine.

Commands
    python -m minit2i.papers.parti                                     both stages on generated scenes, in minutes
    python train_vq.py --recipe parti --data images --out out/parti-vq
    python train_vq.py --recipe parti --data images --init out/parti-vq --train decoder --decoder_ch 128 --out out/vq2
    python train_vq.py --recipe parti --data images --init out/vq2 --train upsampler --upsampler wdsr --out out/x2
    python train_prior.py --recipe parti --model towers --condition text --text_weight 0.125 --batch_size 64 \\
        --data images --vq out/parti-vq --out out/towers
    python train_prior.py --recipe parti --init out/towers --model gpt --condition encoder --data images \\
        --vq out/parti-vq --out out/parti                              without --init: from scratch
    python sample.py --model out/parti --vq out/x2 --prompt "a red circle" --best_of 16 --judge out/towers

results: minit2i/experiments/README.md, "priors", "six-tokenizers", "six-systems", "text-positions", "encoder",
    "decoders", "adversarial", "rerank", "claims"
"""

import math
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated

import torch
import torch.nn as nn
import torch.nn.functional as F
from einops import rearrange

from minit2i.attention import AttentionMask, Layout
from minit2i.checkpoint import load_tensors, read_config
from minit2i.collectives import all_gather, rank_and_world
from minit2i.config import Settings, annotations, at_least, pick
from minit2i.demo import demo
from minit2i.fp16 import shrink_gradient
from minit2i.gpt import CONDITIONS, MODELS, Block, Condition, Context, Head, Linear, Prior
from minit2i.gpt import init_weights, make_norm, rotary_tables, seen_text
from minit2i.papers.dalle import LARGE
from minit2i.papers.taming import logistic
from minit2i.tokenizer_losses import DISCRIMINATORS, AdversaryConfig
from minit2i.vq import BACKBONES, UPSAMPLERS, Backbone

# --- STAGE 1: tokenizer ----------------------------------------------------------------------------------
# Shapes: B batch, H W image, h w code grid, N = h*w, C channels, D width of the transformer.


def sine_positions(h, w, width, device):
    """Fixed sines and cosines of row and column: -> (h*w, width), width a multiple of 4."""
    rates = 10000 ** -(torch.arange(width // 4, device=device) / (width // 4))
    row, column = (torch.arange(n, device=device)[:, None] * rates for n in (h, w))  # (n, width/4)
    grid = torch.cat([row[:, None].expand(-1, w, -1), column.expand(h, -1, -1)], -1).flatten(0, 1)  # (h*w, width/2)
    return torch.cat([grid.sin(), grid.cos()], -1)


class ViTBlock(nn.Module):
    """x (B, N, D) -> the same shape: attention of all positions, then an MLP, each after LayerNorm."""

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

    ViT-VQGAN sec. 3.1; its "small" is ch 128, n_res 8.  ValueError if the heads do not divide the width.
    """

    sees_all = True

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
        return self.norm(self.blocks(x + sine_positions(h, w, x.shape[2], x.device)))


def tanh_mlp(a, hidden, b):
    """Two layers with tanh between, at the end of encoder and decoder, ViT-VQGAN sec. 3.1."""
    return nn.Sequential(nn.Linear(a, hidden), nn.Tanh(), nn.Linear(hidden, b))


class ViTEncoder(nn.Module):
    """Patches of stride x stride pixels through a transformer: (B, 3, H, W) -> (B, width, h, w)."""

    def __init__(self, cfg, width):
        super().__init__()
        self.stride, d = cfg.stride, 4 * cfg.ch
        self.patch, self.vit, self.head = nn.Linear(3 * cfg.stride**2, d), ViT(cfg), tanh_mlp(d, 4 * d, width)

    def forward(self, x):
        x = rearrange(x, "b c (h p) (w q) -> b h w (c p q)", p=self.stride, q=self.stride)
        _, h, w, _ = x.shape
        x = self.head(self.vit(self.patch(x.flatten(1, 2)), h, w))  # (B, h*w, width)
        return rearrange(x, "b (h w) c -> b c h w", h=h)


class ViTDecoder(nn.Module):
    """Latents through a transformer, each back to its patch: (B, width, h, w) -> (B, maps, H, W)."""

    def __init__(self, cfg, width):
        super().__init__()
        self.stride, d = cfg.stride, 4 * cfg.ch
        self.code, self.vit, self.head = nn.Linear(width, d), ViT(cfg), tanh_mlp(d, 4 * d, cfg.maps * cfg.stride**2)

    def forward(self, z):
        _, _, h, w = z.shape
        x = self.head(self.vit(self.code(rearrange(z, "b c h w -> b (h w) c")), h, w))
        return rearrange(x, "b (h w) (c p q) -> b c (h p) (w q)", h=h, p=self.stride, q=self.stride)


class WDSR(nn.Module):
    """Enlarge an image 2 or 4 times: (B, 3, H, W) in [-1, 1] -> (B, 3, s*H, s*W).

    WDSR-A, arXiv:1808.08718 sec. 3: residual blocks, wide before the activation, weight normalisation, pixel shuffle,
    and a 5x5 convolution past them all.  Parti sec. 2.1 puts 12 blocks of 128 channels on its detokenizer.  Our
    choice: the 5x5 convolution starts as bicubic interpolation and the rest at zero.
    """

    @dataclass(frozen=True)
    class Config(Settings):
        """Settings of --upsampler wdsr."""

        group = "Upsampler wdsr"
        upscale: Annotated[int, "decoded images become this many times larger", (2, 4)] = 2
        sr_ch: Annotated[int, "channels", at_least(1)] = 128
        sr_blocks: Annotated[int, "residual blocks", at_least(0)] = 12

    def __init__(self, cfg, expand=4):
        super().__init__()
        scale, ch = cfg.upscale, cfg.sr_ch

        def conv(a, b, gain=1.0):
            c = nn.utils.parametrizations.weight_norm(nn.Conv2d(a, b, 3, padding=1))
            c.parametrizations.weight.original0.data.mul_(gain)
            c.bias.data.mul_(gain)
            return c

        self.first, self.last = conv(3, ch), conv(ch, 3 * scale**2, gain=0.0)
        self.blocks = nn.ModuleList(
            nn.Sequential(conv(ch, expand * ch), nn.ReLU(), conv(expand * ch, ch)) for _ in range(cfg.sr_blocks)
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
    """Weights (3*s*s, 3, 5, 5) that make a 5x5 convolution and a pixel shuffle bicubic interpolation by s."""
    impulses = F.pad(torch.eye(25).view(25, 1, 5, 5), (2, 2, 2, 2))  # one for each position of the window
    answers = F.interpolate(impulses, scale_factor=s, mode="bicubic")[..., 4 * s : 5 * s, 4 * s : 5 * s]  # the middle's
    kernel = torch.zeros(3, s * s, 3, 25)
    for c in range(3):
        kernel[c, :, c] = answers.reshape(25, s * s).t()
    return kernel.view(3 * s * s, 3, 5, 5)


class WDSRx4(WDSR):
    """WDSR with Parti's size for 4 times larger images, 30 M parameters, as defaults; WDSR's own are those for 2 times.

    Parti sec. 2.1 gives the number of parameters; that they are 25 blocks of 128 channels is our guess.
    """

    @dataclass(frozen=True)
    class Config(WDSR.Config):
        """Settings of --upsampler wdsr-x4."""

        group = "Upsampler wdsr-x4"
        upscale: Annotated[int, "decoded images become this many times larger", (2, 4)] = 4
        sr_blocks: Annotated[int, "residual blocks", at_least(0)] = 25


class EqualConv(nn.Conv2d):
    """A convolution with equalised learning rate: N(0, 1) weights, divided by the square root of their fan-in in use.

    Under Adam all weights then change at the same relative rate.  Progressive GAN, arXiv:1710.10196 sec. 4.1.
    """

    def reset_parameters(self):
        nn.init.normal_(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, x):
        return self._conv_forward(x, self.weight * self.weight[0].numel() ** -0.5, self.bias)


def leaky(x):
    """Leaky ReLU times sqrt 2, which keeps the variance, as StyleGAN2 has it."""
    return F.leaky_relu(x, 0.2) * 2**0.5


class Halving(nn.Module):
    """Residual block: x (B, a, h, w) -> (B, b, h//2, w//2), with a blur before each stride of 2.

    StyleGAN2, arXiv:1912.04958 sec. 4.1, fig. 7; the filter [1, 3, 3, 1] in both directions is its release's.
    """

    def __init__(self, a, b):
        super().__init__()
        self.conv1, self.conv2 = EqualConv(a, a, 3, padding=1), EqualConv(a, b, 3, stride=2)
        self.skip = EqualConv(a, b, 1, bias=False)
        line = torch.tensor([1.0, 3.0, 3.0, 1.0]) / 8
        self.register_buffer("kernel", torch.outer(line, line).repeat(a, 1, 1, 1), persistent=False)  # (a, 1, 4, 4)

    def blur(self, x, padding, stride=1):
        return F.conv2d(x, self.kernel, padding=padding, stride=stride, groups=len(self.kernel))

    def forward(self, x):
        y = leaky(self.conv2(self.blur(leaky(self.conv1(x)), padding=2)))  # (B, b, h//2, w//2)
        return (y + self.skip(self.blur(x, padding=1, stride=2))) * 0.5**0.5


def deviation_map(x):
    """Minibatch standard deviation: x (B, C, h, w) -> (B, 1, h, w), one number per image.  arXiv:1710.10196 sec. 3.

    The deviation over a group of images, averaged over channels and positions, shows how varied the group is.  Groups
    of 4 as in StyleGAN2 (3, 2 or 1 if 4 does not divide B), here neighbours in the batch: N ranks, or micro-batches,
    match one if each has a multiple of 4 images.
    """
    n = next(n for n in (4, 3, 2, 1) if len(x) % n == 0)
    groups = x.float().unflatten(0, (-1, n))  # (B/n, n, C, h, w)
    deviation = (groups.var(1, unbiased=False) + 1e-8).sqrt().mean((1, 2, 3))  # (B/n,)
    return deviation.repeat_interleave(n)[:, None, None, None].expand(-1, 1, *x.shape[2:])


class StyleGAN(nn.Module):
    """StyleGAN2's discriminator: (B, 3, H, W) -> a logit per image (B,), high for real.

    Residual halvings down to a shorter side of 4 to 7, minibatch standard deviation, a convolution, two dense layers.
    Non-saturating logistic loss and R1.  arXiv:1912.04958 sec. 4.1, app. B; ViT-VQGAN sec. 3.3 and Parti sec. 2.1 say
    "StyleGAN".  Deviations: any H and W (halving drops an odd row or column); channels double from gan_ch on, where
    StyleGAN2 fixes them per resolution.  ValueError for images below 8 pixels.
    """

    @dataclass(frozen=True)
    class Config(AdversaryConfig):
        """Settings of --discriminator stylegan."""

        group = "Discriminator stylegan"
        gan: Annotated[float, "weight of the adversarial loss (ViT-VQGAN: 0.1)", at_least(0)] = 0.1
        gan_lr: Annotated[float, "the discriminator's peak learning rate", at_least(0)] = 2e-3
        gan_ch: Annotated[int, "channels at full resolution, doubled by each halving up to 512", at_least(1)] = 64
        gan_r1: Annotated[float, "weight of R1, the gradient penalty on real images", at_least(0)] = 10.0

    # app. B, with beta2 for 17 steps in the place of 16; unclipped, as R1 comes in few steps, with large gradients
    optimizer = dict(beta1=0.0, beta2=0.99 ** (16 / 17), weight_decay=0.0, clip=0.0)
    penalty_every = 16  # steps

    def __init__(self, cfg, size):
        super().__init__()
        if min(size) < 8:
            raise ValueError(f"--discriminator stylegan needs images of at least 8 pixels, not {min(size)}")
        n = (min(size) // 4).bit_length() - 1  # halvings
        widths = [min(cfg.gan_ch * 2**i, max(cfg.gan_ch, 512)) for i in range(n + 1)]
        self.first, last = EqualConv(3, widths[0], 1), widths[-1]
        self.blocks = nn.Sequential(*(Halving(a, b) for a, b in zip(widths, widths[1:])))
        self.conv = EqualConv(last + 1, last, 3, padding=1)
        self.dense, self.out = EqualConv(last, last, [side >> n for side in size]), EqualConv(last, 1, 1)
        self.r1, self.penalty_every = cfg.gan_r1, self.penalty_every if cfg.gan_r1 else 0

    def forward(self, x):
        x = self.blocks(leaky(self.first(x)))  # (B, C, h, w)
        x = leaky(self.conv(torch.cat([x, deviation_map(x)], 1)))
        return self.out(leaky(self.dense(x))).flatten()  # dense layers: convolutions with one position

    def discriminator_loss(self, real, fake):
        """Logits of real and of generated images -> loss ()."""
        return logistic(real, fake)

    def generator_loss(self, fake):
        """Logits of generated images -> loss ()."""
        return F.softplus(-fake.float()).mean()

    def penalty(self, real):
        """R1: gan_r1 / 2 times the squared norm of the logit's gradient, real (B, 3, H, W) -> (), in float32.

        arXiv:1801.04406 eq. 9.  Every 16 steps, times 16: StyleGAN2 sec. 3.1.
        """
        real = real.detach().requires_grad_()
        with torch.autocast(real.device.type, enabled=False):
            (grad,) = torch.autograd.grad(self(real).sum(), real, create_graph=True)
        return self.r1 / 2 * grad.square().sum((1, 2, 3)).mean()

    def balance(self, recon, gan, weight, scale):
        """The factor on the generator's loss: none."""
        return None


FROZEN = {"all": (), "decoder": ("encoder", "quantizer"), "upsampler": ("encoder", "quantizer", "decoder")}


def load_frozen(model, folder, train):
    """Start a VQ from a tokenizer's folder to train only its decoder or upsampler: its codes stay what they are.

    Parti sec. 2.1 trains a larger decoder, then a super-resolution, on a frozen encoder and codebook.  train: key of
    FROZEN, the parts that are loaded; if all settings are equal, all parts are.  ValueError if a setting of a frozen
    part differs.
    """
    saved, now = pick(type(model.cfg), read_config(folder)["model"]), model.cfg
    free = ["decoder", "decoder_ch", "decoder_n_res", "decoder_attention", "output"]
    if train == "upsampler":
        free = ["upsampler", *annotations(UPSAMPLERS[now.upsampler].Config)]
    for name, value in asdict(now).items():
        if name not in free and value != getattr(saved, name):
            raise ValueError(
                f"--{name} {value} would change what stays of {folder} ({getattr(saved, name)}); leave it out"
            )
    tensors, _ = load_tensors(Path(folder, "model.safetensors"))
    own, same = model.state_dict(), now == saved
    kept = {k: v for k, v in tensors.items() if k in own and (same or k.split(".")[0] in FROZEN[train])}
    model.load_state_dict(own | kept)


BACKBONES["vit"] = Backbone(ViTEncoder, ViTDecoder)
UPSAMPLERS |= {"wdsr": WDSR, "wdsr-x4": WDSRx4}
DISCRIMINATORS["stylegan"] = StyleGAN


# --- STAGE 2: prior --------------------------------------------------------------------------------------
# Shapes: B batch, T text length, N codes of an image, D width, V words.


@dataclass(frozen=True)
class EncoderConfig(Settings):
    """Settings of --condition encoder and --model towers."""

    group = "--condition encoder, --model towers"
    n_encoder: Annotated[int, "blocks of the text encoder", at_least(1)] = 2


class Encoder(nn.Module):
    """A bidirectional transformer: embeddings (B, T, D), seen (B, T) False at hidden pads -> states (B, T, D),
    normalised.

    learned: positions are a learned table, for codes; else rotary along the sequence, for text, as learned ones barely
    told the order of words (experiments/README.md, text-positions).
    """

    def __init__(self, cfg, n_layer, length, learned):
        super().__init__()
        self.learned = learned
        self.mask = AttentionMask("bidirectional", Layout(0, 1, length))
        if self.learned:
            self.pos = nn.Parameter(torch.empty(length, cfg.n_embd))
        else:
            for name, table in zip(("cos", "sin"), rotary_tables(replace(cfg, pos="sequence"), torch.arange(length))):
                self.register_buffer(name, table, persistent=False)
        self.drop = nn.Dropout(cfg.dropout)
        self.blocks = nn.ModuleList(Block(cfg) for _ in range(n_layer))
        self.norm = make_norm(cfg, cfg.n_embd)

    def forward(self, x, seen=None):
        x = self.drop(x + self.pos if self.learned else x)
        rope = None if self.learned else (self.cos, self.sin)
        for block in self.blocks:
            x = block(x, self.mask, rope=rope, context=Context(seen=seen))
        return self.norm(x)


class TextEncoder(Condition):
    """Parti's encoder-decoder: an encoder reads the caption, and all decoder blocks attend to its states (sec. 2.2).

    One begin token stands before the codes.
    """

    Config = EncoderConfig
    length = 1

    def __init__(self, cfg):
        super().__init__(cfg)
        self.memory_length = cfg.text_len
        if cfg.pos == "learned":
            self.pos = nn.Parameter(torch.empty(1, cfg.n_embd))
        self.begin = nn.Parameter(torch.empty(1, 1, cfg.n_embd))
        self.encoder = Encoder(cfg, cfg.n_encoder, cfg.text_len, learned=False)

    def prefix(self, batch, embed):
        return self.begin.expand(len(batch["text"]), 1, -1)

    def memory(self, batch, embed):
        return self.encoder(embed(batch["text"]), seen_text(batch["text"], self.cfg))

    def memory_seen(self, batch):
        """With hidden pads nothing of an empty caption is seen: dropped captions leave self-attention alone (Muse)."""
        seen = seen_text(batch["text"], self.cfg)
        return None if seen is None else seen & seen[:, 1:2]  # an empty caption is a begin token and pads


CONDITIONS["encoder"] = TextEncoder

# Pre-training of the text encoder (sec. 2.2): hidden words are predicted (BERT, arXiv:1810.04805 sec. 3.1) while
# captions and images are told from the others of the batch (CLIP, arXiv:2103.00020).  `--model towers` trains it,
# `--init out/towers --model gpt --condition encoder` starts a prior from it, and `sample.py --judge out/towers` chooses
# images by it.

MAX_LOG_SCALE = math.log(100)  # CLIP sec. 2.5: logits are multiplied by at most 100


def is_word(text, n_vocab):
    """Where text (B, T) has words, which may be hidden: no begin or end token, no pad -> bool (B, T)."""
    ids = text < n_vocab
    following = F.pad(ids[:, 1:], (0, 1))  # the end token is the last before the pads, if there are any
    return ids & following & (torch.arange(text.shape[1], device=text.device) > 0)


def hide_words(text, n_vocab, mask_id, generator=None):
    """text (B, T) -> (B, 2, T): the ids to read, and the targets, -100 where none.  BERT sec. 3.1.

    15 % of the words are targets: 80 % of those are read as `mask_id`, 10 % as a random word, 10 % unchanged.
    """
    u, how = torch.rand(2, *text.shape, generator=generator).to(text.device)
    other = torch.randint(n_vocab, text.shape, generator=generator).to(text.device)
    chosen = is_word(text, n_vocab) & (u < 0.15)
    read = torch.where(chosen & (how < 0.8), mask_id, torch.where(chosen & (how >= 0.9), other, text))
    return torch.stack([read, text.masked_fill(~chosen, -100)], 1)


def info_nce(text, image, scale):
    """Summed cross-entropy of finding each caption's image among all processes', and the reverse, halved -> (), nats.

    text, image (B, D) of norm 1; scale multiplies their cosines.  CLIP fig. 3.  Features are gathered, so the sums over
    processes add up to one process's on the whole batch.
    """
    texts, images, first = all_gather(text), all_gather(image), rank_and_world()[0] * len(text)
    own = torch.arange(first, first + len(text), device=text.device)
    to_image, to_text = scale * text @ images.T, scale * image @ texts.T  # (B, all)
    return (F.cross_entropy(to_image, own, reduction="sum") + F.cross_entropy(to_text, own, reduction="sum")) / 2


class Towers(Prior):
    """A dual encoder: n_encoder blocks read captions, n_layer blocks read codes.  Token ids as in GPT, mask token last.

    Deviations: the image tower reads the tokenizer's codes, not pixels; a feature is the mean over positions (pads left
    out), not one token's state; equal captions in a batch count as different, as they do in CLIP.
    """

    Config = EncoderConfig
    drops_captions = False
    eval_batch = 32

    @classmethod
    def settle(cls, cfg):
        if cfg.condition != "text":
            raise ValueError("towers read captions and codes side by side: leave out --condition")
        return cfg

    def __init__(self, cfg):
        super().__init__()
        self.cfg, self.layout = cfg, Layout(cfg.text_len, cfg.grid_h, cfg.grid_w)
        self.embedding = nn.Embedding(cfg.n_vocab + cfg.text_len + cfg.n_codes + 1, cfg.n_embd)
        self.encoder = Encoder(cfg, cfg.n_encoder, cfg.text_len, learned=False)
        self.image_encoder = Encoder(cfg, cfg.n_layer, cfg.n_image, learned=True)
        self.text_head = Head(cfg, cfg.n_vocab)
        self.text_out, self.image_out = Linear(cfg.n_embd, cfg.n_embd), Linear(cfg.n_embd, cfg.n_embd)
        self.log_scale = nn.Parameter(torch.full((1,), math.log(1 / 0.07)))  # CLIP sec. 2.5
        init_weights(self, cfg.n_layer)

    def embed(self, ids):
        return shrink_gradient(self.embedding(ids), self.cfg.embed_grad)

    def scale(self):
        return self.log_scale.float().clamp(max=MAX_LOG_SCALE).exp()

    def encode(self, ids, text):
        """Ids to read (B, T), the captions that they come from -> the text encoder's states (B, T, D)."""
        return self.encoder(self.embed(ids), seen_text(text, self.cfg))

    def text_feature(self, text, states):
        """text (B, T), the encoder's states of it (B, T, D) -> (B, D), float32, of norm 1."""
        seen = (text < self.cfg.n_vocab)[..., None]
        mean = (states.float() * seen).sum(1) / seen.sum(1)
        return F.normalize(self.text_out(mean.to(states.dtype)).float(), dim=-1)

    def image_feature(self, codes):
        """codes (B, N) -> (B, D), float32, of norm 1."""
        states = self.image_encoder(self.embed(codes + self.cfg.n_vocab + self.cfg.text_len))
        return F.normalize(self.image_out(states.mean(1)).float(), dim=-1)

    def features(self, text, codes):
        """text (B, T), codes (B, N) -> two (B, D), float32, of norm 1."""
        return self.text_feature(text, self.encode(text, text)), self.image_feature(codes)

    def corrupt(self, batch, seeds):
        mask_id = len(self.embedding.weight) - 1
        generators = [torch.Generator().manual_seed(s) for s in seeds]
        rows = [hide_words(t[None], self.cfg.n_vocab, mask_id, g) for t, g in zip(batch["text"], generators)]
        return batch | {"hidden_words": torch.cat(rows)}  # (B, 2, T)

    def words_loss(self, states, target):
        """Summed cross-entropy of the hidden words: states (B, T, D), target (B, T) or -100 -> (), in nats."""
        return self.head_loss(states, self.text_head.weight, target, self.cfg.fp32_logits)

    def loss(self, batch, train=False):
        """Hidden words, and captions against images.  One pass of the text encoder reads corrupted and whole
        captions."""
        (read, target), text = batch["hidden_words"].unbind(1), batch["text"]
        corrupted, whole = self.encode(torch.cat([read, text]), torch.cat([text, text])).chunk(2)  # (B, T, D)
        text_feature, image_feature = self.text_feature(text, whole), self.image_feature(batch["codes"])
        with torch.autocast(text.device.type, enabled=False):
            contrast = info_nce(text_feature, image_feature, self.scale())
        return {"text": self.words_loss(corrupted, target), "image": contrast}

    def n_targets(self, batch):
        return {"text": (batch["hidden_words"][:, 1] >= 0).sum(), "image": torch.tensor(len(batch["text"]))}

    def evaluate(self, batch):
        """The losses within this batch alone, and `retrieval`: the share of captions that find their image in it."""
        text, image = self.features(batch["text"], batch["codes"])
        cosine, n = text @ image.T, len(text)
        own = torch.arange(n, device=cosine.device)
        nce = (F.cross_entropy(self.scale() * cosine, own) + F.cross_entropy(self.scale() * cosine.T, own)) / 2
        read, target = batch["hidden_words"].unbind(1)
        words = self.words_loss(self.encode(read, batch["text"]), target)
        retrieved = (cosine.argmax(1) == own).sum()
        return {"text_loss": (words, (target >= 0).sum()), "image_loss": (nce * n, n), "retrieval": (retrieved, n)}

    @torch.inference_mode()
    def score(self, batch):
        """1 - cosine of each image with its caption (B,).  DALL-E sec. 2.6 and Parti rerank so."""
        text, image = self.features(batch["text"], batch["codes"])
        return 1 - (text * image).sum(1)

    @staticmethod
    def tensors_for(tensors, model):
        """The towers' text encoder and word embeddings, for a prior with a text encoder; ValueError if it has none."""
        own, n = model.state_dict(), model.cfg.n_vocab + model.cfg.text_len
        if isinstance(model, Towers):
            return tensors
        if "encoder" not in model.cfg.condition.split(","):
            raise ValueError(
                "towers start a prior with a text encoder: use --condition encoder, --n_encoder as they have it"
            )
        words = torch.cat([tensors["embedding.weight"][:n].to(own["embedding.weight"]), own["embedding.weight"][n:]])
        encoder = {f"conditions.encoder.{k}": v for k, v in tensors.items() if k.startswith("encoder.")}
        missing = [k for k in own if k.startswith("conditions.encoder.encoder.") and k not in encoder]
        if missing:
            raise ValueError(f"the towers' text encoder has no {missing[0]}: use --n_encoder as they have it")
        return own | encoder | {"embedding.weight": words}


MODELS["towers"] = Towers


# --- RECIPE ----------------------------------------------------------------------------------------------

RECIPE = {  # sec. 2, 4.1; ViT-VQGAN sec. 3; sizes, codebook and steps are a laptop's, for images of 64 pixels
    "vq": dict(backbone="vit", quantizer="st", stride=8, code_dim=32, l2_norm=True, n_res=4)
    | dict(recon="l2", perceptual="vgg", perceptual_weight=0.1, discriminator="stylegan", gan=0.1),
    "prior": dict(norm="layernorm", mlp="gelu", qk_norm=False, pos="learned", mask="conv")
    | dict(condition="encoder", n_encoder=2, n_layer=4, dropout=0.1)
    | dict(text_weight=0.0, bpe_dropout=0.0, beta2=0.96, weight_decay=0.045, clip=4.0),
}

PARTI = LARGE | dict(condition="encoder", text_len=128, mask="conv", n_vocab=16000)
SIZES = {  # sec. 3.1, table 1
    "parti-350m": PARTI | dict(n_encoder=12, n_layer=12, n_head=16, n_embd=1024),
    "parti-750m": PARTI | dict(n_encoder=12, n_layer=36, n_head=16, n_embd=1024),
    "parti-3b": PARTI | dict(n_encoder=12, n_layer=36, n_head=32, n_embd=2048),
    "parti-20b": PARTI | dict(n_encoder=16, n_layer=64, n_head=64, n_embd=4096),
}


if __name__ == "__main__":
    demo(
        "parti",
        __doc__,
        expect="red circles, green triangles, two striped cyan squares, yellow stars and blue squares; some in fragments",
        vq="--ch 32 --n_res 1 --batch_size 32 --lr 3e-3 --beta2 0.95 --steps 1200 "
        "--gan 0.03 --gan_start 1000 --gan_ramp 100 --gan_ch 16",
    )

r"""CogView: Mastering Text-to-Image Generation via Transformers, Ding et al., 2021-05, arXiv:2105.13290.

What it adds
    tokenizer   no network of its own: a VQ-VAE, and a comparison of four ways to train its codebook (fig. 2):
                --quantizer gumbel (dalle.py), st, ema and fixed (vq.py), which end alike if initialised well
    prior       one mean loss over text and image tokens alike                 --loss_mean tokens
                PB-Relax: attention and LayerNorm that float16 can hold        attention.py:attend, fp16.py:PBLayerNorm
                Sandwich-LN, less gradient for the embedding                   gpt.py:Residual, fp16.py:shrink_gradient
                a captioner, whose loss ranks samples (CapLoss)                Captioner, Captioner.score
                token super-resolution                                         CoarsePrefix
                larger images, in windows from the centre outward              centre_outward, sample.py:slide

What differs here
    --quantizer gumbel is DALL-E's: logits from the encoder, a mixture of codes.  CogView's takes logits from the
    distances to the codebook and passes the hard choice through.
    The separator tokens [ROI1] [BASE] [BOI1] [EOI1] are left out; pads are learned and seen, not hidden at the end.
    Positions are text, row + column (CogView: one table); the output layer is not tied to the embedding.
    The captioner's sequence is begin token, codes, caption.  Super-resolution uses one tokenizer for both resolutions.
    A tenth of the captions is dropped, which lets sampling use guidance.

Commands
    python -m minit2i.papers.cogview                                   both stages on generated scenes, in minutes
    python train_vq.py --recipe cogview --data path/to/images --out out/cogview-vq
    python train_prior.py --recipe cogview --data path/to/images --vq out/cogview-vq --out out/cogview
    python train_prior.py --init out/cogview --vq out/cogview/vq --model captioner --data path/to/images --out out/capt
    python train_prior.py --init out/cogview --vq out/cogview/vq --condition text,coarse --image_size 128 \
        --data path/to/images --out out/larger
    python sample.py --model out/cogview --prompt "a red circle" --best_of 16 --judge out/capt --enlarge out/larger

results: minit2i/experiments/README.md, "quantizers", "super-resolution", "captioner", "float16"
"""

from dataclasses import dataclass
from functools import partial
from typing import Annotated

import torch
import torch.nn as nn
import torch.nn.functional as F
from einops import reduce

from minit2i.config import Settings, at_least
from minit2i.demo import demo
from minit2i.gpt import CONDITIONS, GPT, MODELS, Cache, Condition, Prior, View
from minit2i.papers.dalle import LARGE
from minit2i.sample import WINDOW_PLANS
from minit2i.vq import shrink

# --- STAGE 1: tokenizer ----------------------------------------------------------------------------------
# Nothing to add: the plain VQ-VAE of vq.py, with --quantizer ema, st, fixed or gumbel.


# --- STAGE 2: prior --------------------------------------------------------------------------------------
# Shapes: B batch, T text length, h w code grid, N = h*w, M coarse codes, D width.


@dataclass(frozen=True)
class CoarseConfig(Settings):
    """Settings of --condition coarse."""

    group = "--condition coarse"
    shrink: Annotated[int, "how many times smaller the image is whose codes stand before the others", at_least(2)] = 2


class CoarsePrefix(Condition):
    """Token super-resolution: the codes of the shrunk image stand before those of the image (sec. 3.1).

    The same tokenizer encodes both.  Each coarse code has the mean position of the codes that it covers, and a learned
    vector tells coarse codes from others.
    """

    Config = CoarseConfig
    window_plan = "centre_outward"

    def __init__(self, cfg):
        super().__init__(cfg)
        self.length = cfg.grid_h // cfg.shrink * (cfg.grid_w // cfg.shrink)
        if cfg.grid_h % cfg.shrink or cfg.grid_w % cfg.shrink:
            raise ValueError(
                f"shrink {cfg.shrink} does not divide {cfg.grid_h}x{cfg.grid_w} codes; use a number that divides both"
            )
        self.kind = nn.Parameter(torch.zeros(cfg.n_embd))

    @staticmethod
    def extra_codes(cfg):
        return View("coarse", partial(shrink, scale=cfg.shrink), f"shrink{cfg.shrink}", cfg.shrink)

    def prefix(self, batch, embed):
        return embed(batch["coarse"] + self.cfg.n_vocab + self.cfg.text_len) + self.kind

    def learned_positions(self, grid):
        return self.pooled(grid)

    def coordinates(self, grid):
        return self.pooled(grid)

    def pooled(self, grid):
        """grid (N, C) -> the mean over the places of each coarse code (M, C)."""
        f = self.cfg.shrink
        return reduce(grid, "(h f w g) c -> (h w) c", "mean", f=f, g=f, w=self.cfg.grid_w // f)


CONDITIONS["coarse"] = CoarsePrefix


class Captioner(GPT):
    """The reversed order: begin token, codes, rest of the caption (sec. 3.2).  Writes captions, and scores images."""

    n_shown = 1

    @classmethod
    def settle(cls, cfg):
        if cfg.mask != "causal" or cfg.condition != "text":
            raise ValueError("a captioner needs --mask causal and --condition text")
        return cfg

    def arrange(self, prefix, codes):
        return torch.cat([prefix[..., :1, :], codes, prefix[..., 1:, :]], -2)

    def logits(self, batch):
        prefix, _ = self.condition(batch)
        n, x = batch["codes"].shape[1], self.trunk(self.arrange(prefix, self.embed_codes(batch["codes"])))
        return self.text_head(x[:, n:-1]), self.image_head(x[:, :n])

    @torch.inference_mode()
    def score(self, batch):
        """CapLoss (B,): the mean loss of each image's caption tokens, in nats (sec. 3.2; the mean, not the sum)."""
        target = self.text_targets(batch["text"])
        loss = F.cross_entropy(self.logits(batch)[0].float().mT, target, reduction="none")  # (B, T-1)
        return loss.sum(1) / (target >= 0).sum(1).clamp_min(1)

    def generate(self, *args, **how):
        return Prior.generate(self, *args, **how)  # it samples no images

    @torch.inference_mode()
    def write_captions(self, codes, sampler, begin, end):
        """codes (B, N) of B images, one for each of the sampler's seeds -> caption ids (B, T), pads after the end
        token.

        begin, end: the ids that captions begin and end with.
        """
        t, (b, n_image) = self.cfg.text_len, codes.shape
        noise, cache = sampler.uniform(t), Cache(self, b, n_image + t - 1)
        ids = (self.cfg.n_vocab + torch.arange(t, device=codes.device)).repeat(b, 1)  # pads
        ids[:, 0], done = begin, torch.zeros(b, dtype=torch.bool, device=codes.device)
        start = torch.cat([self.embed(ids[:, :1]), self.embed_codes(codes)], 1)
        hidden = self.trunk(start, 0, cache)[:, -1:]
        for i in range(1, t):
            logits = self.text_head(hidden)[:, 0].float()
            token = sampler.pick(sampler.filter(logits), noise[:, i])
            ids[:, i] = torch.where(done, ids[:, i], token)
            done |= token == end
            if done.all() or i + 1 == t:
                break
            hidden = self.trunk(self.embed(ids[:, i : i + 1]), n_image + i, cache)
        return ids

    def sample(self, batch, empty, sampler, text):
        ids = self.write_captions(batch["codes"], sampler, text.sp.bos_id(), text.sp.eos_id())
        return batch["codes"], [text.decode(row) for row in ids]


MODELS["captioner"] = Captioner


def centre_outward(grid, window, step=1):
    """Window plan: windows (h, w) that overlap by half, from the middle of the grid (H, W) outward.

    -> [(top, left, None)]: all of a window is sampled; top and left are multiples of step.  The centre-continuous
    sliding window, sec. 3.1.
    """

    def starts(n, size):
        stride = max(step, size // 2 // step * step)
        return [*range(0, n - size, stride), n - size]

    def distance(corner):  # of the window's centre from the grid's; ties in raster order
        return sum((2 * c + n - m) ** 2 for c, n, m in zip(corner, window, grid)), corner

    corners = [(top, left) for top in starts(grid[0], window[0]) for left in starts(grid[1], window[1])]
    return [(*corner, None) for corner in sorted(corners, key=distance)]


WINDOW_PLANS["centre_outward"] = centre_outward


# --- RECIPE ----------------------------------------------------------------------------------------------

RECIPE = {  # sec. 2 and appendix; sizes, codebook and steps are a laptop's, for images of 64 pixels
    "vq": dict(backbone="vqvae", quantizer="ema", stride=8),
    "prior": dict(norm="pb_layernorm", mlp="gelu", qk_norm=False, pos="learned", mask="causal")
    | dict(pb_relax=True, sandwich=True, embed_grad=0.1)
    | dict(loss_mean="tokens", bpe_dropout=0.0, weight_decay=0.04),
}

SIZES = {  # sec. 2.2, 2.4
    "cogview-4b": LARGE
    | dict(n_layer=48, n_head=40, n_embd=2560, text_len=64, n_vocab=50000)
    | dict(norm="pb_layernorm", pb_relax=True, sandwich=True, embed_grad=0.1)
}


if __name__ == "__main__":
    demo(
        "cogview",
        __doc__,
        expect="red circles, green triangles on black, cyan stripes, yellow and blue objects: plain VQ-VAEs learn fast",
        vq="--ch 32 --n_res 1 --lr 2e-3",
        prior="--optimizer muon --lr 3e-3",
    )

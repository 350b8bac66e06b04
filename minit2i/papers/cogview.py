r"""CogView: Mastering Text-to-Image Generation via Transformers, Ding et al., 2021-05, arXiv:2105.13290.

What it adds
    tokenizer   a plain VQ-VAE, and four ways to train its codebook, compared in fig. 2: moving average, gradients,
                fixed (vq.py: --quantizer ema, st, fixed), Gumbel noise        GumbelSTQuantizer
    prior       [ROI1] caption [BASE] [BOI1] codes [EOI1], pads hidden         Separated, gpt.py:seen_text
                all of it learned by one softmax, tied to the embedding        CogView
                one mean loss over text and image tokens alike                 --loss_mean tokens
                PB-Relax: attention and LayerNorm that float16 can hold        attention.py:attend, fp16.py:PBLayerNorm
                Sandwich-LN, less gradient for the embedding                   gpt.py:Residual, fp16.py:shrink_gradient
                a captioner, whose loss ranks samples (CapLoss)                CogViewCaptioner, Captioner.score
                token super-resolution: the sequence goes on with [ROI2]       SeparatedCoarse
                larger images, in windows, the central ones first              centre_continuous, sample.py:slide
                sparse attention to text, random codes and a window (app. B)   three_region, --mask three_region

What differs here
    k-means sets the codebook at the start, and dead codes restart (CogView: Xavier's initialisation, no restart).
    The random codes of three-region attention are the same in all layers and steps; they lie in all blocks, so that
    it trains no faster here than causal attention.
    Pads stand before [BASE], not at the end, which is the same function (see STAGE 2).
    [BASE] stands for every size (the release has a token for each of four) and [POS0] is left out; positions go on
    after [ROI2] (the release counts again).  The captioner learns the caption's end (the release: a fixed length).
    A tenth of the captions is dropped, which lets sampling use guidance.

Commands
    python -m minit2i.papers.cogview                                   both stages on generated scenes, in minutes
    python train_vq.py --recipe cogview --data path/to/images --out out/cogview-vq
    python train_prior.py --recipe cogview --data path/to/images --vq out/cogview-vq --out out/cogview
    python train_prior.py --recipe cogview --init out/cogview --vq out/cogview/vq --model cogview_captioner \
        --data path/to/images --out out/capt
    python train_prior.py --recipe cogview --init out/cogview --vq out/cogview/vq \
        --condition separated,separated_coarse --image_size 128 --resize 192 --crops 4 --data path/to/images \
        --out out/larger                                               on crops, as windows are
    python sample.py --model out/cogview --prompt "a red circle" --best_of 16 --judge out/capt --enlarge out/larger

results: minit2i/experiments/README.md, "priors", "six-tokenizers", "six-systems", "figure-2", "super-resolution",
    "captioner", "rerank", "float16"
"""

from dataclasses import dataclass, replace
from functools import partial
from typing import Annotated

import torch
import torch.nn as nn
import torch.nn.functional as F
from einops import reduce

from minit2i.attention import MASKS, causal
from minit2i.collectives import all_reduce_sum
from minit2i.config import Settings, at_least
from minit2i.demo import PATCHWISE, demo
from minit2i.gpt import CONDITIONS, GPT, MODELS, Cache, Condition, Context, Prior, View, join_seen, output_layer
from minit2i.papers.dalle import LARGE, cosine, gumbel_softmax
from minit2i.sample import WINDOW_PLANS
from minit2i.vq import QUANTIZERS, Codebook, STQuantizer, distances, finite, shrink

# --- STAGE 1: tokenizer ----------------------------------------------------------------------------------
# The plain VQ-VAE of vq.py, whose codebook is learned in one of four ways: --quantizer ema, st, fixed or gumbel_st.


class GumbelSTQuantizer(STQuantizer):
    """Gumbel noise chooses one code: logits are minus the distance to each codebook entry.  Sec. 2.2, fig. 2.

    In training the decoder gets the row of the chosen code, with the gradient of the Gumbel-softmax mixture that it
    replaces (straight through), for the encoder and the codebook; without noise the nearest code is chosen.  The
    temperature sharpens the gradient only.  The release squares the distances.  The mixture takes tables of latents
    times codes, as DALL-E's does.
    Deviations: a factor, set at the start, gives the distances variance 1, as DALL-E's logits have here; without it
    they grow until no gradient is left (measured).  The commitment loss keeps the latents near the codes, where dead
    codes can restart; --beta 0 leaves it out.
    """

    @dataclass(frozen=True)
    class Config(Settings):
        """Settings of --quantizer gumbel_st."""

        group = "Quantizer gumbel_st"
        tau_steps: Annotated[int, "steps to temperature 1/16, from 1", at_least(0)] = 5000

    def __init__(self, cfg):
        super().__init__(cfg)
        self.register_buffer("scale", torch.ones(()))

    def distances(self, z):
        """z (N, C) -> (N, V), in float32."""
        return distances(self.norm(z), self.norm(self.codebook))

    def logits(self, z):
        """z (N, C) -> (N, V), to sample codes from."""
        return -self.scale * self.distances(z)

    def forward(self, z, train=False, step=0):
        """z (N, C) -> z_q (N, C), nearest codes (N,), commitment loss ()."""
        if not train:
            return super().forward(z)
        d = self.distances(z)
        tau, nearest = cosine(step, self.cfg.tau_steps, 1.0, 1 / 16), d.argmin(1)
        soft = gumbel_softmax(-self.scale * d, tau)  # (N, V)
        hard = torch.zeros_like(soft).scatter_(1, soft.argmax(1, keepdim=True), 1.0)
        chosen = soft + (hard - soft).detach()  # (N, V): one-hot, with the gradient of soft
        return chosen @ self.norm(self.codebook), nearest, Codebook.loss(self, self.norm(z), self.lookup(nearest))

    @torch.no_grad()
    def start(self, z):
        """Set the codebook by k-means on the latents z (N, C) of a whole batch, and the factor on the distances."""
        super().start(z)
        z, valid = finite(z)
        d = self.distances(z)
        sums = all_reduce_sum(torch.stack([valid.sum(), valid @ d.mean(1), valid @ d.square().mean(1)]))
        mean, square = sums[1:] / sums[0].clamp_min(1)
        self.scale.copy_((square - mean.square()).clamp_min(1e-12).rsqrt())


QUANTIZERS["gumbel_st"] = GumbelSTQuantizer


# --- STAGE 2: prior --------------------------------------------------------------------------------------
# Shapes: B batch, T text length, h w code grid, N = h*w, M coarse codes, D width, P prefix, L = P+N sequence, V tokens.
#
# Sec. 2.1's sequence has its pads at the end.  Ours stand inside, where all prompts have their codes in one place:
#
#     the paper   [ROI1] w1 ... wn [BASE] [BOI1] c1 ... cN [EOI1] [PAD] ...
#     here        [ROI1] w1 ... wn  pad ... pad  [BASE] [BOI1] c1 ... cN      (the last code predicts [EOI1])
#
# Both are the same function: pads are hidden from attention, a position's index counts those before it that are not
# hidden, and each predicts the next one that is not hidden.

SEPARATORS = "[ROI1]", "[BASE]", "[BOI1]", "[EOI1]", "[ROI2]", "[BOI2]", "[EOI2]"


def separators(token_ids, rows, *names):
    """Ids of these separators for each of rows (B, ...): -> (B, number of names)."""
    return torch.stack([rows.new_full((len(rows),), token_ids[name]) for name in names], 1)


class Separated(Condition):
    """[ROI1] caption [BASE] [BOI1] before the codes, pads hidden (sec. 2.1).

    [ROI1] stands in place of the caption's begin token and [BASE] in that of its end token, which is hidden.
    """

    predicts_text, tokens, end = True, SEPARATORS, "[EOI1]"

    def __init__(self, cfg):
        super().__init__(cfg)
        self.length = cfg.text_len + 2
        if cfg.pos == "learned":
            self.pos = nn.Parameter(torch.empty(self.length, cfg.n_embd))

    def ids(self, batch):
        """-> token ids (B, T+2)."""
        text = batch["text"]
        roi, base, boi = separators(self.token_ids, text, "[ROI1]", "[BASE]", "[BOI1]").split(1, 1)
        return torch.cat([roi, text[:, 1:], base, boi], 1)

    def prefix(self, batch, embed):
        return embed(self.ids(batch))

    def seen(self, batch):
        words = batch["text"][:, 2:] < self.cfg.n_vocab  # all before the last token that is no pad (B, T-2)
        return F.pad(F.pad(words, (0, 1)), (1, 2), value=True)


CONDITIONS["separated"] = Separated


@dataclass(frozen=True)
class CoarseConfig(Settings):
    """Settings of --condition coarse."""

    group = "--condition coarse"
    shrink: Annotated[int, "how many times smaller the image is whose codes stand before the others", at_least(2)] = 2


class Coarse(Condition):
    """Token super-resolution: the codes of the shrunk image stand before those of the image (sec. 3.1).

    The same tokenizer encodes both.
    """

    Config = CoarseConfig

    def __init__(self, cfg):
        super().__init__(cfg)
        self.window_plan = "centre_outward" if cfg.mask == "bidirectional" else "centre_continuous"
        self.length = cfg.grid_h // cfg.shrink * (cfg.grid_w // cfg.shrink)
        if cfg.grid_h % cfg.shrink or cfg.grid_w % cfg.shrink:
            raise ValueError(
                f"shrink {cfg.shrink} does not divide {cfg.grid_h}x{cfg.grid_w} codes; use a number that divides both"
            )

    @staticmethod
    def extra_codes(cfg):
        return View("coarse", partial(shrink, scale=cfg.shrink), f"shrink{cfg.shrink}", cfg.shrink)

    def ids(self, batch):
        """-> token ids (B, M)."""
        return batch["coarse"] + self.cfg.n_vocab + self.cfg.text_len

    def prefix(self, batch, embed):
        return embed(self.ids(batch))


class CoarsePrefix(Coarse):
    """Coarse codes in any prior's sequence.

    Each has the mean position of the codes that it covers, and a learned vector tells coarse codes from others.
    """

    def __init__(self, cfg):
        super().__init__(cfg)
        self.kind = nn.Parameter(torch.zeros(cfg.n_embd))

    def prefix(self, batch, embed):
        return super().prefix(batch, embed) + self.kind

    def learned_positions(self, grid):
        return self.pooled(grid)

    def coordinates(self, grid):
        return self.pooled(grid)

    def pooled(self, grid):
        """grid (N, C) -> the mean over the places of each coarse code (M, C)."""
        f = self.cfg.shrink
        return reduce(grid, "(h f w g) c -> (h w) c", "mean", f=f, g=f, w=self.cfg.grid_w // f)


class SeparatedCoarse(Coarse):
    """Coarse codes [EOI1] [ROI2] [BASE] [BOI2] after --condition separated: the pattern repeated (sec. 3.1)."""

    tokens, end = SEPARATORS, "[EOI2]"

    def __init__(self, cfg):
        super().__init__(cfg)
        self.length += 4
        if cfg.pos == "learned":
            self.pos = nn.Parameter(torch.empty(self.length, cfg.n_embd))

    def ids(self, batch):
        codes = super().ids(batch)
        return torch.cat([codes, separators(self.token_ids, codes, "[EOI1]", "[ROI2]", "[BASE]", "[BOI2]")], 1)


CONDITIONS |= {"coarse": CoarsePrefix, "separated_coarse": SeparatedCoarse}


class CogView(GPT):
    """CogView's sequence, all of which is learned: caption, separators, codes and the end of the image (sec. 2.1).

    One softmax over all tokens but pads, tied to the embedding; sampling is restricted to codes.  "image" is the
    loss of codes (coarse ones, too), "text" of everything else.
    """

    @classmethod
    def settle(cls, cfg):
        """--condition separated, unless given, positions by index and hidden pads."""
        condition = "separated" if cfg.condition == "text" else cfg.condition  # text is the default
        if condition not in ("separated", "separated,separated_coarse"):
            raise ValueError(
                f"--model {cfg.model} has a sequence of its own, without --condition {condition}; use --condition "
                "separated, or separated,separated_coarse for super-resolution"
            )
        return replace(cfg, condition=condition, pos="index", pads="hidden")

    def make_heads(self, cfg):
        """None: the embedding is the output layer."""

    def tied(self, x, weight):
        """Hidden states (B, S, D), rows of the embedding (V, D) -> logits (B, S, V); float32 with cfg.fp32_logits."""
        return output_layer(x, weight, self.cfg.fp32_logits)

    def text_head(self, x):
        """Logits of text alone."""
        return self.tied(x, self.embedding.weight[: self.cfg.n_vocab])

    def image_head(self, x):
        """Logits of codes alone."""
        first = self.cfg.n_vocab + self.cfg.text_len
        return self.tied(x, self.embedding.weight[first : first + self.cfg.n_codes])

    def tokens(self, batch):
        """-> ids of the whole sequence and its end (B, L+1), and which of them are not hidden."""
        conditions, codes = [*self.conditions.values()], batch["codes"] + self.cfg.n_vocab + self.cfg.text_len
        codes = torch.cat([codes, separators(self.token_ids, codes, conditions[-1].end)], 1)  # (B, N+1)
        seen = join_seen(
            [*(c.seen(batch) for c in conditions), None], [*(c.length for c in conditions), codes.shape[1]]
        )
        return torch.cat([*(c.ids(batch) for c in conditions), codes], 1), seen

    def targets(self, batch):
        """The token that each position predicts, the next that is not hidden (B, L); -100 where it is hidden itself."""
        ids, seen = self.tokens(batch)
        last = seen.shape[1] - 1
        place = torch.where(seen, torch.arange(last + 1, device=ids.device), last)
        following = place.flip(1).cummin(1).values.flip(1)[:, 1:]  # (B, L)
        return ids.masked_fill(~seen, -100).gather(1, following).masked_fill(~seen[:, :-1], -100)

    def kinds(self, target):
        """Targets (...) -> {"text": which are not codes, "image": which are}."""
        first = self.cfg.n_vocab + self.cfg.text_len
        codes = (target >= first) & (target < first + self.cfg.n_codes)
        return {"text": (target >= 0) & ~codes, "image": codes}

    def loss(self, batch, train=False):
        (ids, seen), target = self.tokens(batch), self.targets(batch)
        x = self.trunk(self.embed(ids[:, :-1]), context=Context(seen=seen[:, :-1]))  # (B, L, D)
        n, t, table = self.cfg.n_vocab, self.cfg.text_len, self.embedding.weight
        rows = torch.cat([table[:n], table[n + t :]])  # (V, D): all tokens but pads
        row = torch.where(target < n, target, target - t)
        loss = self.head_loss(x, rows, row, self.cfg.fp32_logits, reduction="none").view_as(row)
        return {name: loss.masked_fill(~which, 0).sum() for name, which in self.kinds(target).items()}

    def n_targets(self, batch):
        return {name: which.sum() for name, which in self.kinds(self.targets(batch)).items()}


MODELS["cogview"] = CogView


class Captioner(GPT):
    """The reversed order: begin token, codes, rest of the caption (sec. 3.2).  Writes captions, and scores images."""

    n_shown = 1

    @classmethod
    def settle(cls, cfg):
        if cfg.mask != "causal" or cfg.condition != "text":
            raise ValueError(
                "a captioner needs --mask causal and --condition text; of CogView's sequence: --model cogview_captioner"
            )
        return cfg

    def arrange(self, prefix, codes):
        return torch.cat([prefix[..., :1, :], codes, prefix[..., 1:, :]], -2)

    def opening(self, codes, begin):
        """Embeddings of all that stands before a caption's first word.  codes (B, N), begin: id of the begin token."""
        return torch.cat([self.embed(torch.full_like(codes[:, :1], begin)), self.embed_codes(codes)], 1)

    def states(self, batch):
        prefix, _ = self.condition(batch)  # pads stand at the end: nothing sees them
        n, x = batch["codes"].shape[1], self.trunk(self.arrange(prefix, self.embed_codes(batch["codes"])))
        return x[:, n:-1], x[:, :n]

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
        t, b, start = self.cfg.text_len, len(codes), self.opening(codes, begin)
        noise, cache = sampler.uniform(t), Cache(self, b, start.shape[1] + t - 2)
        ids = (self.cfg.n_vocab + torch.arange(t, device=codes.device)).repeat(b, 1)  # pads
        ids[:, 0], done = begin, torch.zeros(b, dtype=torch.bool, device=codes.device)
        hidden = self.trunk(start, 0, cache)[:, -1:]
        for i in range(1, t):
            logits = self.text_head(hidden)[:, 0].float()
            token = sampler.pick(sampler.filter(logits), noise[:, i])
            ids[:, i] = torch.where(done, ids[:, i], token)
            done |= token == end
            if done.all() or i + 1 == t:
                break
            hidden = self.trunk(self.embed(ids[:, i : i + 1]), start.shape[1] + i - 1, cache)
        return ids

    def sample(self, batch, empty, sampler, text):
        ids = self.write_captions(batch["codes"], sampler, text.sp.bos_id(), text.sp.eos_id())
        return batch["codes"], [text.decode(row) for row in ids]


class CogViewCaptioner(Captioner, CogView):
    """CogView's own sequence reversed: [BASE] [BOI1] codes [EOI1] [ROI1] caption, pads at the end.

    Deviation: the caption's end token is learned, too; the release writes captions of a fixed length.
    """

    @classmethod
    def settle(cls, cfg):
        cfg = CogView.settle(cfg)
        if cfg.mask != "causal" or cfg.condition != "separated":
            raise ValueError(f"--model {cfg.model} needs --mask causal and --condition separated")
        return cfg

    def opening_ids(self, codes):
        """codes (B, N) -> ids of all that stands before a caption's first word (B, N+4)."""
        ids = [separators(self.token_ids, codes, *names) for names in (("[BASE]", "[BOI1]"), ("[EOI1]", "[ROI1]"))]
        return torch.cat([ids[0], codes + self.cfg.n_vocab + self.cfg.text_len, ids[1]], 1)

    def opening(self, codes, begin):
        return self.embed(self.opening_ids(codes))

    def tokens(self, batch):
        before, caption = self.opening_ids(batch["codes"]), batch["text"][:, 1:]
        return torch.cat([before, caption], 1), F.pad(caption < self.cfg.n_vocab, (before.shape[1], 0), value=True)

    def states(self, batch):
        n, x = batch["codes"].shape[1], self.trunk(self.embed(self.tokens(batch)[0][:, :-1]))
        return x[:, n + 3 :], x[:, 1 : n + 1]


MODELS |= {"captioner": Captioner, "cogview_captioner": CogViewCaptioner}


def three_region(q, k, layout):
    """The prefix; six blocks of codes, of which the last is the code's own; pivots, codes taken at random.  App. B.

    The release has blocks of 128 and 768 pivots (text included) in 4,096 positions: here a block is 1/32 of the codes,
    and 3/16 of the codes are pivots.  Deviation: a mask is a function of positions, so the pivots are the same in all
    layers and steps (the paper takes new ones in each); the release adds log(length / pivots) to their scores.
    """
    p, n = layout.n_prefix, layout.length - layout.n_prefix
    i, j, block = q - p, k - p, max(1, n // 32)
    pivot = (j * j * 40503 & 65535) < 12288  # a hash of j, below 3/16 of its range
    return causal(q, k, layout) & ((k < p) | (i // block - j // block < 6) | pivot)


MASKS["three_region"] = three_region


def window_starts(n, size, step):
    """First places of windows of `size` that overlap by half and cover n; all but the last are multiples of step."""
    return [*range(0, n - size, max(step, size // 2 // step * step)), n - size]


def centre_continuous(grid, window, step=1):
    """Window plan for priors that sample in raster order: windows (h, w) that overlap by half, the central ones of each
    row first.

    -> [(top, left, rows)]: the first `rows` rows of a window are sampled, given the codes above and to the left.  Its
    last `step` rows, which one row of coarse codes covers, are left to the windows below; of the corner only the rows
    that the next window reads are sampled.  The top and the bottom row of windows go from left to right, as the corner
    must come first at the top.
    Sec. 3.1's centre-continuous sliding window, in the order of the release (generation/magnify.py) for 3x3 windows.
    """
    h, w = window
    tops, lefts = (window_starts(n, size, step) for n, size in zip(grid, window))
    central = sorted(lefts, key=lambda left: (abs(2 * left + w - grid[1]), left))
    plan = []
    for i, top in enumerate(tops[:-1]):
        rows = max(tops[i + 1] - top, h - step)
        plan += [(top, left, rows) for left in (central if i else lefts)]
    if len(tops) > 1 and len(lefts) > 1:
        plan[0] = 0, 0, min(tops[1] + step, plan[0][2])
    return plan + [(tops[-1], left, h) for left in lefts]


def centre_outward(grid, window, step=1):
    """Window plan for priors that see codes on all sides (Muse): windows (h, w) that overlap by half, from the middle
    of the grid (H, W) outward, each given all codes that are there already.

    -> [(top, left, rows h)].
    """

    def distance(corner):  # of the window's centre from the grid's; ties in raster order
        return sum((2 * c + n - m) ** 2 for c, n, m in zip(corner, window, grid)), corner

    tops, lefts = (window_starts(n, size, step) for n, size in zip(grid, window))
    corners = sorted(((top, left) for top in tops for left in lefts), key=distance)
    return [(top, left, window[0]) for top, left in corners]


WINDOW_PLANS |= {"centre_continuous": centre_continuous, "centre_outward": centre_outward}


# --- RECIPE ----------------------------------------------------------------------------------------------

RECIPE = {  # sec. 2 and appendix; sizes, codebook and steps are a laptop's, for images of 64 pixels
    "vq": dict(backbone="vqvae", quantizer="ema", stride=8),
    "prior": dict(model="cogview", condition="separated", pads="hidden", pos="index", mask="causal", dropout=0.1)
    | dict(norm="pb_layernorm", mlp="gelu", qk_norm=False, pb_relax=True, sandwich=True, embed_grad=0.1)
    | dict(loss_mean="tokens", bpe_dropout=0.0, weight_decay=0.04),
}

SIZES = {  # sec. 2.2, 2.4
    "cogview-4b": LARGE
    | dict(n_layer=48, n_head=40, n_embd=2560, text_len=64, n_vocab=50000, dropout=0.1)
    | dict(model="cogview", condition="separated", pads="hidden", pos="index")
    | dict(norm="pb_layernorm", pb_relax=True, sandwich=True, embed_grad=0.1)
}


if __name__ == "__main__":
    demo(
        "cogview",
        __doc__,
        expect="red circles, green triangles on black, striped cyan squares, yellow and blue: patchwise codes learn fast",
        vq=PATCHWISE,
    )

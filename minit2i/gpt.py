"""Stage 2: a GPT over one sequence of caption and codes.

    position   0 ........ T-1 | T ............. T+N-1
    token      text and pads  | codes in raster order
    predicts   1 ........ T-1 | 0 ... N-1, code n from position T-1+n

DALL-E's prior (Ramesh et al., arXiv:2102.12092 sec. 2.2) on nanoGPT-sized blocks.  Its relatives on the same blocks:

    --low f             text | codes of the picture shrunk f times | codes    super-resolution (CogView, Muse)
    --order image       beginning mark | codes | rest of the text             a captioner (CogView)
    --objective masked  text | codes, some replaced by a mask token, which predict themselves (MaskGIT, Muse)

Shapes: B batch, T text length, h w code grid, N = h*w, M codes of the shrunk picture, L = T+M+N, S positions at
hand, D width, H heads, K head size, V vocabulary.
"""

from copy import copy
from dataclasses import dataclass, replace
from typing import Annotated

import torch
import torch.nn as nn
import torch.nn.functional as F

from minit2i.attention import Layout
from minit2i.blocks import Block, Head, Linear, init_weights, make_norm, pooled, rotary_tables
from minit2i.fp16 import shrink_gradient
from minit2i.masks import layer_masks


@dataclass(frozen=True)
class GPTConfig:
    """What the prior is; stored in its checkpoint.  The plain fields come from tokenizer and text model."""

    n_layer: Annotated[int, "transformer blocks"] = 6
    n_head: Annotated[int, "attention heads"] = 8
    n_embd: Annotated[int, "width"] = 256
    text_len: Annotated[int, "text positions T, beginning and end mark included"] = 32
    mask: Annotated[
        str, "which positions see which: a name of masks.py, several that layers take in turn, dalle, or auto"
    ] = "auto"
    window: Annotated[int, "side of the crop that the window mask sees, in codes"] = 8
    pos: Annotated[
        str,
        "positions: learned (text, row, column), 2-D rotary, or rotary along the sequence as language models have them",
        ("learned", "rotary", "sequence"),
    ] = "learned"
    norm: Annotated[str, "normalisation; PB-Relax: see fp16.py", ("layernorm", "rmsnorm", "pb_layernorm")] = "rmsnorm"
    mlp: Annotated[str, "feed-forward layer", ("gelu", "swiglu")] = "swiglu"
    qk_norm: Annotated[bool, "normalise queries and keys per head"] = True
    pb_relax: Annotated[bool, "attention scores that float16 can hold (CogView's PB-Relax)"] = False
    sandwich: Annotated[bool, "a norm after each branch, too (CogView's Sandwich-LN)"] = False
    embed_grad: Annotated[float, "share of its gradient that the embedding gets; CogView: 0.1"] = 1.0
    fp32_logits: Annotated[bool, "heads in float32 also under fp16 and bf16 (DALL-E)"] = False
    n_encoder: Annotated[
        int, "blocks of a text encoder that the n_layer decoder blocks look at (Parti); 0: caption and codes in one"
    ] = 0
    objective: Annotated[
        str,
        "what is learned: the next code, hidden ones, words alone, from a text file as --data (a language model), or "
        "hidden words and which caption belongs to which picture (contrast.py: n_encoder and n_layer are its towers)",
        ("causal", "masked", "text", "contrast"),
    ] = "causal"
    order: Annotated[str, "what the sequence begins with; image: a captioner", ("text", "image")] = "text"
    low: Annotated[int, "super-resolution: the sequence also holds the picture's codes when shrunk so much; 0: not"] = 0
    dropout: Annotated[float, "dropout on embeddings and on both branches of each block"] = 0.0
    n_vocab: int = 0
    n_codes: int = 0
    grid_h: int = 0
    grid_w: int = 0
    n_kv_head: int = 0  # heads of keys and values, each for several of queries; 0: as many
    mlp_inner: int = 0  # width inside the feed-forward layer; 0: as usual for its kind
    rope_base: float = 10000.0  # of --pos sequence
    norm_eps: float = 1e-6
    n_states: int = 0  # width of a frozen text encoder's states, which stand in the place of text ids; 0: ids

    @property
    def n_image(self):
        return self.grid_h * self.grid_w

    @property
    def low_grid(self):
        return (self.grid_h // self.low, self.grid_w // self.low) if self.low else (0, 0)

    @property
    def n_prefix(self):
        """Positions before the codes: the text's, and those of the low-resolution codes."""
        return self.text_len + self.low_grid[0] * self.low_grid[1]

    @property
    def length(self):
        return self.n_prefix + self.n_image

    @property
    def sequence(self):
        """The config of the sequence that codes stand in: behind the caption, or behind one begin mark."""
        return replace(self, text_len=1) if self.n_encoder else self

    @property
    def text_loss(self):
        """Whether text is predicted too: not if it has an encoder of its own, nor by a masked model."""
        return not (self.n_encoder or self.n_states or self.objective == "masked")


# The papers' sizes, and smaller ones: train_prior.py --model_size NAME; flags beside it win.  What comes from tokenizer and
# text model (the last four) serves --plan only.

_LARGE = dict(norm="layernorm", mlp="gelu", qk_norm=False, n_codes=8192, grid_h=32, grid_w=32)
_PARTI = _LARGE | dict(text_len=128, mask="conv", n_vocab=16000)  # 2206.10789 sec. 3.1, table 1
SIZES = {
    "tiny": dict(n_layer=4, n_head=4, n_embd=128),
    "small": dict(n_layer=6, n_head=8, n_embd=256),
    "base": dict(n_layer=12, n_head=12, n_embd=768),
    "large": dict(n_layer=24, n_head=16, n_embd=1024),
    "xl": dict(n_layer=24, n_head=16, n_embd=2048),
    "dalle-12b": _LARGE  # 2102.12092 app. B.1
    | dict(n_layer=64, n_head=62, n_embd=3968, text_len=256, mask="dalle", fp32_logits=True, n_vocab=16384),
    "cogview-4b": _LARGE  # 2105.13290 sec. 2.2, 2.4
    | dict(n_layer=48, n_head=40, n_embd=2560, text_len=64, n_vocab=50000)
    | dict(norm="pb_layernorm", pb_relax=True, sandwich=True, embed_grad=0.1),
    "parti-350m": _PARTI | dict(n_encoder=12, n_layer=12, n_head=16, n_embd=1024),
    "parti-750m": _PARTI | dict(n_encoder=12, n_layer=36, n_head=16, n_embd=1024),
    "parti-3b": _PARTI | dict(n_encoder=12, n_layer=36, n_head=32, n_embd=2048),
    "parti-20b": _PARTI | dict(n_encoder=16, n_layer=64, n_head=64, n_embd=4096),
}


# --- the model -----------------------------------------------------------------------------------------


class Encoder(nn.Module):
    """The caption by itself, every position seeing all: (B, T, D) -> (B, T, D), normalised.  Parti, arXiv:2206.10789."""

    def __init__(self, cfg):
        super().__init__()
        self.layout = Layout("none", replace(cfg, text_len=0, grid_h=1, grid_w=cfg.text_len, low=0))
        if cfg.pos == "learned":
            self.pos = nn.Parameter(torch.empty(cfg.text_len, cfg.n_embd))
        else:
            cos, sin = rotary_tables(cfg)
            self.register_buffer("rope_cos", cos[: cfg.text_len], persistent=False)
            self.register_buffer("rope_sin", sin[: cfg.text_len], persistent=False)
        self.learned, self.drop = cfg.pos == "learned", nn.Dropout(cfg.dropout)
        self.blocks = nn.ModuleList(Block(cfg) for _ in range(cfg.n_encoder))
        self.norm = make_norm(cfg, cfg.n_embd)

    def forward(self, x, scales):
        """scales: of each block's gradients, or None."""
        x = self.drop(x + self.pos if self.learned else x)
        rope = None if self.learned else (self.rope_cos, self.rope_sin)
        for i, block in enumerate(self.blocks):
            x = block(x, self.layout, rope=rope, scale=None if scales is None else scales[i])
        return self.norm(x)


def check(cfg):
    """ValueError for sizes and choices that do not go together."""
    for name, least in (("n_layer", 1), ("n_head", 1), ("n_embd", 1), ("n_encoder", 0)):
        if getattr(cfg, name) < least:
            raise ValueError(f"{name} {getattr(cfg, name)} is less than {least}")
    if cfg.n_embd % cfg.n_head:
        raise ValueError(f"n_embd {cfg.n_embd} is not a multiple of n_head {cfg.n_head}")
    if cfg.pos == "rotary" and cfg.n_embd // cfg.n_head % 4:
        raise ValueError(f"2-D rotary positions need a head size that 4 divides, not {cfg.n_embd // cfg.n_head}")
    if cfg.pos == "sequence" and cfg.n_embd // cfg.n_head % 2:
        raise ValueError(f"rotary positions need an even head size, not {cfg.n_embd // cfg.n_head}")
    if cfg.text_len < 3:
        raise ValueError(f"text_len {cfg.text_len} has no room for a word between its two marks; use 3 or more")
    if not 0 < cfg.embed_grad <= 1:
        raise ValueError(f"embed_grad {cfg.embed_grad} is not a share in (0, 1]; use 1 for the whole gradient")
    if cfg.window < 1:
        raise ValueError(f"window {cfg.window} shows nothing; use 1 or more")
    if cfg.low < 0 or cfg.low == 1 or cfg.low and (cfg.grid_h % cfg.low or cfg.grid_w % cfg.low):
        raise ValueError(
            f"low {cfg.low} does not shrink {cfg.grid_h}x{cfg.grid_w} codes; use a number from 2 that divides both, or 0"
        )
    masks = set(layer_masks(cfg))
    if cfg.objective == "masked" and masks != {"none"}:
        raise ValueError(f"a masked model sees all places, which mask {cfg.mask} does not; use --mask none")
    if cfg.order == "image" and (masks != {"full"} or cfg.low or not cfg.text_loss):
        raise ValueError("order image, a captioner, needs --mask full, --low 0 and no text encoder")


class GPT(nn.Module):
    """Caption and codes as one sequence, one embedding, a head for each kind.

    Token ids: text [0, n_vocab), pad of text position t: n_vocab + t, code c: n_vocab + T + c, the mask token last.
    With n_encoder the caption goes through an encoder of its own, and the sequence is one begin mark and the codes;
    every block then also looks at the encoder's states (Parti, arXiv:2206.10789 sec. 2.2).
    """

    def __init__(self, cfg):
        super().__init__()
        check(cfg)
        masks, sequence = layer_masks(cfg), cfg.sequence
        t, p = sequence.text_len, sequence.n_prefix
        self.cfg, self.masked = cfg, cfg.objective == "masked"
        self.embedding = nn.Embedding(cfg.n_vocab + cfg.text_len + cfg.n_codes + self.masked, cfg.n_embd)
        if cfg.pos == "learned":
            self.pos_text = nn.Parameter(torch.empty(sequence.text_len, cfg.n_embd))
            self.pos_row = nn.Parameter(torch.empty(cfg.grid_h, 1, cfg.n_embd))
            self.pos_column = nn.Parameter(torch.empty(1, cfg.grid_w, cfg.n_embd))
        else:
            cos, sin = rotary_tables(sequence)
            if cfg.pos == "rotary":
                cos, sin = (self.ordered(x[:t], x[t:p], x[p:]) for x in (cos, sin))
            self.register_buffer("rope_cos", cos, persistent=False)
            self.register_buffer("rope_sin", sin, persistent=False)
        if cfg.low:
            self.low = nn.Parameter(torch.zeros(cfg.n_embd))  # added to low-resolution codes, to tell them from others
            at = torch.arange(sequence.length)
            self.register_buffer("is_low", ((at >= t) & (at < p)).float()[:, None], persistent=False)  # (L, 1)
        self.drop = nn.Dropout(cfg.dropout)
        if cfg.n_encoder:
            self.encoder, self.begin = Encoder(cfg), nn.Parameter(torch.empty(1, 1, cfg.n_embd))
        self.blocks = nn.ModuleList(Block(cfg, cross=cfg.n_encoder > 0) for _ in range(cfg.n_layer))
        self.layouts = nn.ModuleDict({name: Layout(name, sequence) for name in sorted(set(masks))})
        self.masks = masks  # of each layer, a key of layouts
        self.text_ahead = any(layout.text_ahead for layout in self.layouts.values())
        self.image_ahead = any(layout.image_ahead for layout in self.layouts.values())
        self.norm = make_norm(cfg, cfg.n_embd)
        if cfg.n_states:  # linear projection: Muse, arXiv:2301.00704 sec. 2.1
            self.text_in = Linear(cfg.n_states, cfg.n_embd)
        if cfg.text_loss:
            self.text_head = Head(cfg, cfg.n_vocab)
        self.image_head = Head(cfg, cfg.n_codes)
        self.step = None  # `trunk` for one position in a tensor, compiled, once `compile_step` was called
        self.block_scales = None  # (n_encoder + n_layer,) of gradients, from a BlockScaler
        init_weights(self, cfg.n_layer)

    def ordered(self, text, low, codes):
        """What belongs to text (T, ...), low-resolution codes (M, ...) and codes (N, ...), as the sequence has it."""
        return torch.cat([text[:1], codes, text[1:]] if self.cfg.order == "image" else [text, low, codes])

    def positions(self):
        """Learned positions of the whole sequence (L, D): text, then row + column of each code (DALL-E)."""
        grid = (self.pos_row + self.pos_column).flatten(0, 1)  # (N, D)
        low = pooled(grid, self.cfg) if self.cfg.low else grid[:0]
        return self.ordered(self.pos_text, low, grid)

    def embed(self, text):
        """text (B, T) ids, or (B, T, W) states of a frozen encoder with zeros for pads -> (B, T, D).

        A pad is a token of its own for each position either way.
        """
        if not self.cfg.n_states:
            return self.embedding(text)
        pads = self.embedding.weight[self.cfg.n_vocab :][: text.shape[1]]  # (T, D)
        return torch.where(text.any(-1, keepdim=True), self.text_in(text.to(self.text_in.weight.dtype)), pads)

    def read(self, text):
        """text, as `embed` takes it -> what stands before the codes (B, P, D), and the memory (B, T, D) or None."""
        x = self.embed(text)
        if not self.cfg.n_encoder:
            return x, None
        memory = self.encoder(shrink_gradient(x, self.cfg.embed_grad), self.block_scales)
        return self.begin.expand(len(x), 1, -1), memory

    def all_blocks(self):
        """The encoder's blocks, if any, and the others."""
        return [*(self.encoder.blocks if self.cfg.n_encoder else ()), *self.blocks]

    def code_ids(self, codes):
        """codes (B, N) -> token ids (B, N); a hidden code -1 is the mask token."""
        if self.masked:
            codes = torch.where(codes < 0, self.cfg.n_codes, codes)
        return codes + self.cfg.n_vocab + self.cfg.text_len

    def trunk(self, ids, start=0, cache=None, memory=None):
        """Positions start ... start+S-1, or the one in the tensor start (1,) -> hidden states (B, S, D), normalised.

        ids (B, S), or embedded already (B, S, D); memory (B, T, D) from the encoder, if any; the cache keeps it.
        """
        at = start if isinstance(start, torch.Tensor) else slice(start, start + ids.shape[1])
        x = ids if ids.is_floating_point() else self.embedding(ids)  # (B, S, D)
        x = shrink_gradient(x, self.cfg.embed_grad)
        rope = None
        if self.cfg.pos == "learned":
            table = self.positions() if cache is None else cache.positions
            x = x + table[at]
        else:
            rope = self.rope_cos[at], self.rope_sin[at]
        if self.cfg.low:
            x = x + self.low * self.is_low[at]
        x = self.drop(x)
        for i, block in enumerate(self.blocks):
            kv = None if cache is None else cache.kv[i]
            scale = None if self.block_scales is None else self.block_scales[self.cfg.n_encoder + i]
            x = block(x, self.layouts[self.masks[i]], start, rope, kv, scale, memory)
        return self.norm(x)

    def compile_step(self):
        """Draw with torch.compile: on a CPU one graph for any part of the cache (`Cache.upto`), after one for the first, and
        one more for other batches; on a GPU, where it has not been tried yet, one for the whole cache.
        """
        dynamic = None if self.embedding.weight.is_cpu else False
        self.step = torch.compile(self.trunk, dynamic=dynamic, mode="reduce-overhead")

    def logits(self, text, codes, low=None):
        """text, as `embed` takes it, codes (B, N), low (B, M) -> text logits (B, T-1, V) for text 1...T-1, or None; image
        logits (B, N, n_codes).

        Masked: logits of all places themselves; a code -1 is hidden.  ValueError if the mask of a causal model shows
        codes that are to be predicted.
        """
        if not self.masked:
            self.check_causal()
        if self.cfg.order == "image":
            n, x = codes.shape[1], self.trunk(torch.cat([text[:, :1], self.code_ids(codes), text[:, 1:]], 1))
            return self.text_head(x[:, n:-1]), self.image_head(x[:, :n])
        before, memory = self.read(text)
        t, p = before.shape[1], self.cfg.sequence.n_prefix
        codes = codes if low is None else torch.cat([low, codes], 1)
        x = torch.cat([before, self.embedding(self.code_ids(codes))], 1)  # (B, P+N, D); the last predicts nothing
        x = self.trunk(x, memory=memory)
        image_logits = self.image_head(x[:, p:] if self.masked else x[:, p - 1 : -1])
        return self.text_head(x[:, : t - 1]) if self.cfg.text_loss else None, image_logits

    def check_causal(self):
        if self.image_ahead:
            raise ValueError(
                f"mask {self.cfg.mask} shows a code those after it: codes one by one are neither learned nor drawn "
                "with it; use a causal mask, or train a masked model (--objective masked)"
            )

    def forward(self, text, codes, low=None, shown=None, smoothing=0.0):
        """Training pass -> summed cross-entropies: text (), image (), in float32, in nats.

        shown (B, N): for a masked model, the codes with -1 where hidden, which alone count.
        Sums, so that the caller can average over all parts of a batch.
        """
        text_logits, image_logits = self.logits(text, codes if shown is None else shown, low)
        target = codes if shown is None else codes.masked_fill(shown >= 0, -100)
        image_loss = F.cross_entropy(
            image_logits.flatten(0, 1).float(), target.flatten(), reduction="sum", label_smoothing=smoothing
        )
        if not self.cfg.text_loss:
            return torch.zeros_like(image_loss), image_loss
        target = self.text_targets(text).flatten()
        return F.cross_entropy(text_logits.flatten(0, 1).float(), target, reduction="sum"), image_loss

    def text_targets(self, text):
        """text (B, T) ids -> what is predicted of it (B, T-1): up to the end mark; -100 elsewhere, which is everywhere where
        text sees itself ahead (prefix)."""
        return text[:, 1:].masked_fill(text[:, 1:] >= (0 if self.text_ahead else self.cfg.n_vocab), -100)

    def n_text_targets(self, text):
        """How many terms the text loss of this batch has."""
        if not self.cfg.text_loss:
            return torch.zeros((), dtype=torch.long, device=text.device)
        return (self.text_targets(text) >= 0).sum()


def fit_grid(tensors, model):
    """A model's tensors for another code grid, as finetuning to super-resolution needs: positions are interpolated.

    What the other model did not have keeps its start.
    """
    own = model.state_dict()
    fitted = {k: own[k] for k in ("low",) if k in own} | tensors
    for name, axis in (("pos_row", 0), ("pos_column", 1)):
        if name in fitted and name in own and fitted[name].shape != own[name].shape:
            line = fitted[name].squeeze(1 - axis).t()[None]  # (1, D, n)
            line = F.interpolate(line.float(), own[name].shape[axis], mode="linear", align_corners=False)
            fitted[name] = line[0].t().unsqueeze(1 - axis)
    return fitted


class Cache:
    """Keys and values of each layer, (B, H, L, K), and of the encoder's states, (B, H, T, K); and the position table."""

    def __init__(self, model, batch, length):
        model.check_causal()
        cfg, weight = model.cfg, model.embedding.weight
        own, memory = (cfg.n_kv_head or cfg.n_head, length), (cfg.n_head, cfg.text_len)
        shapes = (own, own, memory, memory) if cfg.n_encoder else (own, own)
        size = cfg.n_embd // cfg.n_head
        self.kv = [tuple(weight.new_zeros(batch, *shape, size) for shape in shapes) for _ in range(cfg.n_layer)]
        self.positions = model.positions() if cfg.pos == "learned" else None

    def spread(self, model, rows, length):
        """A longer cache whose row b starts as this one's row rows[b]: a prompt is read once for all its pictures."""
        new = Cache(model, len(rows), length)
        for old_pair, new_pair in zip(self.kv, new.kv):
            for old, fresh in zip(old_pair, new_pair):
                fresh[:, :, : old.shape[2]] = old[rows]
        return new

    def upto(self, length):
        """This cache, on a CPU without what comes after the first length positions, in steps of 32: a few shapes only."""
        if not self.kv[0][0].is_cpu:
            return self
        part, n = copy(self), -(-length // 32) * 32  # measured: 1.2 times as fast as steps of 128 for 16 pictures
        part.kv = [(k[:, :, :n], v[:, :, :n], *memory) for k, v, *memory in self.kv]
        return part

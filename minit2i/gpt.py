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

import math
from dataclasses import dataclass, replace
from typing import Annotated

import torch
import torch.nn as nn
import torch.nn.functional as F

from minit2i.attention import Layout, attend, dense
from minit2i.fp16 import ALPHA, Enter, PBLayerNorm, branch, shrink_gradient
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


# --- positions -----------------------------------------------------------------------------------------


def rotary_tables(cfg):
    """Angles of rotary positions: cos, sin (L, K/2).

    --pos sequence: position n turns pair i by n * base^(-2i/K).  --pos rotary is 2-D:

    RoPE, arXiv:2104.09864, half of the frequencies turning with the row and half with the column.
    Text lies on the diagonal before the grid's corner: token t at (t-T, t-T), as in M-RoPE,
    arXiv:2409.12191 sec. 2.1 (there text and picture order are reversed).
    Not the default: priors with learned positions came to follow captions sooner (README, "Positions and patches").
    """
    if cfg.pos == "sequence":
        half = cfg.n_embd // cfg.n_head // 2
        angle = torch.arange(cfg.length).float()[:, None] * cfg.rope_base ** (-torch.arange(half).float() / half)
        return angle.cos(), angle.sin()
    half = cfg.n_embd // cfg.n_head // 4  # frequencies per axis
    text = torch.arange(-cfg.text_len, 0).float()
    row, column = (torch.arange(n).float() for n in (cfg.grid_h, cfg.grid_w))
    row, column = row.repeat_interleave(cfg.grid_w), column.repeat(cfg.grid_h)  # (N,)
    if cfg.low:  # a low-resolution code stands in the middle of the codes it covers
        row, column = (torch.cat([pooled(x, cfg), x]) for x in (row, column))
    row, column = torch.cat([text, row]), torch.cat([text, column])  # (L,)
    frequency = 100.0 ** (-torch.arange(half).float() / half)  # base 100: grids are short
    angle = torch.cat([row[:, None] * frequency, column[:, None] * frequency], 1)  # (L, K/2)
    return angle.cos(), angle.sin()


def pooled(grid, cfg):
    """What each place of the grid (N, ...) has -> its mean over the places of each low-resolution code (M, ...)."""
    (h, w), f = cfg.low_grid, cfg.low
    return grid.view(h, f, w, f, *grid.shape[1:]).mean((1, 3)).flatten(0, 1)


def rotate(x, cos, sin):
    """x (..., S, K), cos and sin (S, K/2): turn each pair (x_i, x_{i+K/2})."""
    a, b = x.chunk(2, -1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], -1).to(x.dtype)


# --- blocks --------------------------------------------------------------------------------------------


class RMSNorm(nn.RMSNorm):
    """x / rms(x) * gain over the last dimension, in float32.  arXiv:1910.07467 eq. 4."""

    def __init__(self, width, eps):
        super().__init__(width, eps)
        self.register_buffer("eps_tensor", torch.tensor(eps), persistent=False)

    def forward(self, x):
        y = x.float()
        if torch.is_grad_enabled() or x.device.type != "cpu":
            return F.rms_norm(y, self.normalized_shape, self.weight.float(), self.eps).to(x.dtype)
        # decoding on a CPU: half the time of what F.rms_norm does there
        norm = torch.linalg.vector_norm(y, dim=-1, keepdim=True)
        mean_square = torch.addcmul(self.eps_tensor, norm, norm, value=1 / y.shape[-1])  # eps included
        return (y * mean_square.rsqrt_()).mul_(self.weight).to(x.dtype)


def make_norm(cfg, width):
    if cfg.norm == "rmsnorm":
        return RMSNorm(width, eps=cfg.norm_eps)
    return nn.LayerNorm(width) if cfg.norm == "layernorm" else PBLayerNorm(width)


class Linear(nn.Linear):
    """nn.Linear without bias."""

    def __init__(self, n_in, n_out):
        super().__init__(n_in, n_out, bias=False)


class Head(Linear):
    """Hidden states (B, S, D) -> logits (B, S, V), in float32 whatever else is if cfg.fp32_logits."""

    def __init__(self, cfg, n_out):
        super().__init__(cfg.n_embd, n_out)
        self.fp32 = cfg.fp32_logits

    def forward(self, x):
        if not self.fp32:
            return super().forward(x)
        with torch.autocast(x.device.type, enabled=False):
            return F.linear(x.float(), self.weight.float())


class Attention(nn.Module):
    """Multi-head self-attention: x (B, S, D) -> (B, S, D).  Grouped queries: arXiv:2305.13245 sec. 2.2."""

    def __init__(self, cfg):
        super().__init__()
        self.cfg, self.head_size = cfg, cfg.n_embd // cfg.n_head
        self.n_kv = cfg.n_kv_head or cfg.n_head
        self.qkv = Linear(cfg.n_embd, (cfg.n_head + 2 * self.n_kv) * self.head_size)
        self.out = Linear(cfg.n_embd, cfg.n_embd)
        if cfg.qk_norm:
            self.q_norm, self.k_norm = make_norm(cfg, self.head_size), make_norm(cfg, self.head_size)

    def forward(self, x, layout, start, rope, kv):
        """Positions start ... start+S-1.  kv: this layer's cache (keys, values), each (B, H, L, K), written here."""
        b, s, d = x.shape
        heads = self.qkv(x).reshape(b, s, -1, self.head_size).transpose(1, 2)  # (B, H + 2 of keys and values, S, K)
        q, k, v = heads.split((self.cfg.n_head, self.n_kv, self.n_kv), 1)
        if self.cfg.qk_norm:
            q, k = self.q_norm(q).to(v.dtype), self.k_norm(k).to(v.dtype)
        if rope is not None:
            q, k = rotate(torch.cat([q, k], 1), *rope).split((self.cfg.n_head, self.n_kv), 1)
        if kv is not None:
            kv[0][:, :, start : start + s], kv[1][:, :, start : start + s] = k, v
            k, v = kv[0][:, :, : start + s], kv[1][:, :, : start + s]
        if self.n_kv < self.cfg.n_head:
            k, v = (x.repeat_interleave(self.cfg.n_head // self.n_kv, 1) for x in (k, v))
        y = attend(q, k, v, layout, start, ALPHA if self.cfg.pb_relax else None)
        return self.out(y.transpose(1, 2).reshape(b, s, d))


class MLP(nn.Module):
    """x (B, S, D) -> (B, S, D).  GELU four times as wide, or SwiGLU (arXiv:2002.05202) of the same size."""

    def __init__(self, cfg):
        super().__init__()
        self.gated = cfg.mlp == "swiglu"
        inner = cfg.mlp_inner or (round(cfg.n_embd * 8 / 3 / 32) * 32 if self.gated else 4 * cfg.n_embd)
        self.up = Linear(cfg.n_embd, 2 * inner if self.gated else inner)
        self.down = Linear(inner, cfg.n_embd)

    def forward(self, x):
        x = self.up(x)
        if self.gated:
            gate, x = x.chunk(2, -1)
            return self.down(F.silu(gate) * x)
        return self.down(F.gelu(x, approximate="tanh"))


class CrossAttention(nn.Module):
    """Attention to the encoder's states: x (B, S, D), memory (B, T, D) -> (B, S, D)."""

    def __init__(self, cfg):
        super().__init__()
        self.head_size, self.qk_norm = cfg.n_embd // cfg.n_head, cfg.qk_norm
        self.alpha = ALPHA if cfg.pb_relax else None
        self.q, self.kv = Linear(cfg.n_embd, cfg.n_embd), Linear(cfg.n_embd, 2 * cfg.n_embd)
        self.out = Linear(cfg.n_embd, cfg.n_embd)
        if cfg.qk_norm:
            self.q_norm, self.k_norm = make_norm(cfg, self.head_size), make_norm(cfg, self.head_size)

    def forward(self, x, memory, kv):
        """kv: this layer's cache, whose third and fourth are the memory's keys and values (B, H, T, K).

        They are written here if memory is given, else read.
        """
        q = self.q(x).unflatten(2, (-1, self.head_size)).transpose(1, 2)  # (B, H, S, K)
        if memory is None:
            k, v = kv[2:]
        else:
            k, v = self.kv(memory).unflatten(2, (2, -1, self.head_size)).permute(2, 0, 3, 1, 4)  # 2 x (B, H, T, K)
            k = self.k_norm(k).to(v.dtype) if self.qk_norm else k
            if kv is not None:
                kv[2].copy_(k), kv[3].copy_(v)
        q = self.q_norm(q).to(v.dtype) if self.qk_norm else q
        return self.out(dense(q, k, v, alpha=self.alpha).transpose(1, 2).flatten(2))


class Block(nn.Module):
    """Pre-norm transformer block: x (B, S, D) -> (B, S, D).  Sandwich-LN (CogView sec. 2.4): x + norm(branch(norm(x))).

    cross: with attention to memory (B, T, D) in between.
    """

    def __init__(self, cfg, cross=False):
        super().__init__()
        self.norm1, self.attn = make_norm(cfg, cfg.n_embd), Attention(cfg)
        self.norm2, self.mlp = make_norm(cfg, cfg.n_embd), MLP(cfg)
        self.after1, self.after2 = (make_norm(cfg, cfg.n_embd) if cfg.sandwich else nn.Identity() for _ in range(2))
        self.cross = CrossAttention(cfg) if cross else None
        if cross:
            self.norm_cross = make_norm(cfg, cfg.n_embd)
            self.after_cross = make_norm(cfg, cfg.n_embd) if cfg.sandwich else nn.Identity()
        self.drop = nn.Dropout(cfg.dropout) if cfg.dropout else nn.Identity()

    def forward(self, x, layout, start=0, rope=None, kv=None, scale=None, memory=None):
        """scale: of this block's gradients, a tensor (see BlockScaler)."""

        def attention(x):
            return self.drop(self.after1(self.attn(self.norm1(x), layout, start, rope, kv)))

        def cross(x):
            seen = memory if memory is None or scale is None else Enter.apply(memory, scale)
            return self.drop(self.after_cross(self.cross(self.norm_cross(x), seen, kv)))

        def mlp(x):
            return self.drop(self.after2(self.mlp(self.norm2(x))))

        x = x + branch(attention, x, scale)
        if self.cross is not None:
            x = x + branch(cross, x, scale)
        return x + branch(mlp, x, scale)


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
        self.drop = nn.Dropout(cfg.dropout) if cfg.dropout else nn.Identity()
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
        self.block_scales = None  # (n_encoder + n_layer,) of gradients, from a BlockScaler
        for name, p in self.named_parameters():  # GPT-2: 0.02, less where branches join the residual stream
            if p.dim() >= 2:
                joins = name.endswith(("attn.out.weight", "cross.out.weight", "mlp.down.weight"))
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * cfg.n_layer) if joins else 0.02)

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
        """Positions start ... start+S-1 -> hidden states (B, S, D), normalised.

        ids (B, S), or embedded already (B, S, D); memory (B, T, D) from the encoder, if any; the cache keeps it.
        """
        stop = start + ids.shape[1]
        x = ids if ids.is_floating_point() else self.embedding(ids)  # (B, S, D)
        x = shrink_gradient(x, self.cfg.embed_grad)
        rope = None
        if self.cfg.pos == "learned":
            table = self.positions() if cache is None else cache.positions
            x = x + table[start:stop]
        else:
            rope = self.rope_cos[start:stop], self.rope_sin[start:stop]
        if self.cfg.low:
            x = x + self.low * self.is_low[start:stop]
        x = self.drop(x)
        for i, block in enumerate(self.blocks):
            kv = None if cache is None else cache.kv[i]
            scale = None if self.block_scales is None else self.block_scales[self.cfg.n_encoder + i]
            x = block(x, self.layouts[self.masks[i]], start, rope, kv, scale, memory)
        return self.norm(x)

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

        Text counts up to its end mark: pads are no targets, and nothing is where text sees itself ahead (prefix) or
        has an encoder.  shown (B, N): for a masked model, the codes with -1 where hidden, which alone count.
        Sums, so that the caller can average over all parts of a batch.
        """
        text_logits, image_logits = self.logits(text, codes if shown is None else shown, low)
        target = codes if shown is None else codes.masked_fill(shown >= 0, -100)
        image_loss = F.cross_entropy(
            image_logits.flatten(0, 1).float(), target.flatten(), reduction="sum", label_smoothing=smoothing
        )
        if not self.cfg.text_loss:
            return torch.zeros_like(image_loss), image_loss
        target = text[:, 1:].masked_fill(text[:, 1:] >= (0 if self.text_ahead else self.cfg.n_vocab), -100)
        text_loss = F.cross_entropy(text_logits.flatten(0, 1).float(), target.flatten(), reduction="sum")
        return text_loss, image_loss

    def n_text_targets(self, text):
        """How many terms the text loss of this batch has."""
        if not self.cfg.text_loss:
            return torch.zeros((), dtype=torch.long, device=text.device)
        return (text[:, 1:] < (0 if self.text_ahead else self.cfg.n_vocab)).sum()


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

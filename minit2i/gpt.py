"""Stage 2: a GPT over one sequence, caption and then image codes.

    position   0 ......... T-2   T-1   | T ...... T+N-2     T+N-1
    token      text and pads           | code 0 ... code N-2  code N-1
    predicts   text 1 .. T-1   code 0  | code 1 ... code N-1  nothing

DALL-E's prior (arXiv:2102.12092 sec. 2.2) on nanoGPT-sized blocks.  Where pads are hidden from attention (--pads
hidden), the last word predicts code 0.  The papers' files add to it along two axes:

    MODELS      how a prior learns and samples: a subclass of GPT with its own `loss` and `generate`      --model
    CONDITIONS  what it is conditioned on: modules that put positions before the codes, or give a memory  --condition
                that all blocks attend to

A batch is a dict of tensors: "text" (B, T) ids (or a frozen encoder's states (B, T, W)), "codes" (B, N), and what its
conditions read.

Shapes: B batch, T text length, P prefix length, h w code grid, N = h*w, L = P+N, S positions at hand, M memory length,
D width, H heads, K head size, V vocabulary.
"""

import math
from collections.abc import Callable
from copy import copy
from dataclasses import dataclass, replace
from typing import Annotated, NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F

from minit2i.attention import AttentionMask, Layout, attend, dense_attention, layer_masks
from minit2i.config import RARE, Settings, Group, at_least, between, merge, pick
from minit2i.fp16 import ALPHA, Enter, Leave, PBLayerNorm, shrink_gradient

HALF = Group("Half precision")


@dataclass(frozen=True)
class GPTConfig(Settings):
    """The prior's shape; stored in its checkpoint.  Plain fields come from tokenizer, text model or a paper's file."""

    model: Annotated[str, "how it learns and samples"] = "gpt"
    condition: Annotated[str, "what the codes are conditioned on; several joined by commas"] = "text"
    n_layer: Annotated[int, "transformer blocks", at_least(1)] = 6
    n_head: Annotated[int, "attention heads", at_least(1)] = 8
    n_embd: Annotated[int, "width", at_least(1)] = 256
    text_len: Annotated[int, "text positions T, begin and end tokens included", at_least(3)] = 32
    mask: Annotated[str, "attention mask: a name (see MASKS), several that layers take in turn, or dalle"] = "causal"
    pos: Annotated[
        str, "positions: learned (text, row + column; or by index), 2-D rotary, or rotary along the sequence",
        ("learned", "index", "rotary", "sequence"),
    ] = "learned"  # fmt: skip
    norm: Annotated[str, "normalisation (PB-Relax: see fp16.py)", ("layernorm", "rmsnorm", "pb_layernorm")] = "rmsnorm"
    mlp: Annotated[str, "feed-forward layer", ("gelu", "swiglu")] = "swiglu"
    qk_norm: Annotated[bool, "normalise queries and keys per head"] = True
    dropout: Annotated[float, "dropout on embeddings and residual branches", between(0, 1)] = 0.0
    pb_relax: Annotated[bool, "attention scores that float16 can hold (CogView's PB-Relax)", HALF] = False
    sandwich: Annotated[bool, "a second norm at the end of each branch (CogView's Sandwich-LN)", HALF] = False
    embed_grad: Annotated[float, "share of the gradient that reaches the embedding (CogView: 0.1)", HALF,
                          between(0, 1, open=True)] = 1.0  # fmt: skip
    fp32_logits: Annotated[bool, "output layers in float32 even with fp16 and bf16 (DALL-E)", HALF] = False
    pads: Annotated[
        str, "pads of captions: learned vectors (DALL-E), or hidden from attention (CogView)",
        ("learned", "hidden"), RARE,
    ] = "learned"  # fmt: skip
    n_vocab: int = 0
    n_codes: int = 0
    grid_h: int = 0
    grid_w: int = 0
    n_kv_head: int = 0  # heads of keys and values, each serving several query heads; 0: n_head
    mlp_inner: int = 0  # width inside the feed-forward layer; 0: the usual one for its kind
    rope_base: float = 10000.0  # of pos "sequence"
    norm_eps: float = 1e-6

    def __post_init__(self):
        super().__post_init__()
        if self.n_embd % self.n_head:
            raise ValueError(f"n_embd {self.n_embd} is not a multiple of n_head {self.n_head}")
        head = self.n_embd // self.n_head
        if self.pos == "rotary" and head % 4:
            raise ValueError(f"2-D rotary positions need a head size that is a multiple of 4, not {head}")
        if self.pos == "sequence" and head % 2:
            raise ValueError(f"rotary positions need an even head size, not {head}")
        if self.mlp == "swiglu" and not swiglu_inner(self):
            raise ValueError(f"n_embd {self.n_embd} is too narrow for swiglu; use 7 or more, or --mlp gelu")
        layer_masks(self.mask, self.n_layer)

    @property
    def n_image(self):
        """Codes of an image, N."""
        return self.grid_h * self.grid_w


# Named sizes, for --model_size NAME; the papers' files add theirs.
SIZES = {
    "tiny": dict(n_layer=4, n_head=4, n_embd=128),
    "small": dict(n_layer=6, n_head=8, n_embd=256),
    "base": dict(n_layer=12, n_head=12, n_embd=768),
    "large": dict(n_layer=24, n_head=16, n_embd=1024),
    "xl": dict(n_layer=24, n_head=16, n_embd=2048),
}


# --- layers ----------------------------------------------------------------------------------------------


class RMSNorm(nn.RMSNorm):
    """x / rms(x) * gain over the last dimension, in float32.  arXiv:1910.07467 eq. 4."""

    def __init__(self, width, eps):
        super().__init__(width, eps)
        self.register_buffer("eps_tensor", torch.tensor(eps), persistent=False)

    def forward(self, x):
        if torch.is_grad_enabled() or not x.is_cpu or x.dtype == torch.float64:
            return F.rms_norm(x.float(), self.normalized_shape, self.weight.float(), self.eps).to(x.dtype)
        # sampling on a CPU: half the time of F.rms_norm there (measured)
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
        mean_square = torch.addcmul(self.eps_tensor, norm, norm, value=1 / x.shape[-1])  # eps included
        return (x * mean_square.rsqrt_()).mul_(self.weight).to(x.dtype)


def layernorm(width, eps):
    """nn.LayerNorm with its usual eps."""
    return nn.LayerNorm(width)


def pb_layernorm(width, eps):
    """CogView's LayerNorm, see fp16.py."""
    return PBLayerNorm(width)


NORMS = {"layernorm": layernorm, "rmsnorm": RMSNorm, "pb_layernorm": pb_layernorm}


def make_norm(cfg, width):
    """The norm that cfg names, over the last dimension of size `width`."""
    return NORMS[cfg.norm](width, cfg.norm_eps)


def identity(x):
    """In place of a norm or dropout that is off: calling an nn.Module for each code costs time."""
    return x


class Linear(nn.Linear):
    """nn.Linear without bias."""

    def __init__(self, n_in, n_out):
        super().__init__(n_in, n_out, bias=False)


class Head(Linear):
    """Hidden states (B, S, D) -> logits (B, S, V), in float32 with cfg.fp32_logits."""

    def __init__(self, cfg, n_out):
        super().__init__(cfg.n_embd, n_out)
        self.fp32 = cfg.fp32_logits

    def forward(self, x):
        return output_layer(x, self.weight, self.fp32)


def output_layer(x, weight, fp32):
    """Hidden states (B, S, D), weight (V, D) -> logits (B, S, V), in float32 if fp32."""
    if not fp32:
        return F.linear(x, weight)
    with torch.autocast(x.device.type, enabled=False):
        return F.linear(x.float(), weight.float())


def cross_entropy(logits, target, reduction="sum", **how):
    """Summed cross-entropy in nats: logits (..., V), target (...), -100 left out -> (), float32."""
    return F.cross_entropy(logits.flatten(0, 1).float(), target.flatten(), reduction=reduction, **how)


def head_loss(x, weight, target, fp32, **how):
    """Cross-entropy of an output layer: hidden states (B, S, D), weight (V, D), target (B, S) -> (), see cross_entropy.

    parallel.py compiles it: then the logits, the largest tensor of a training step, are kept once and in the product's
    precision; eager, they become float32 log-probabilities, to which the backward pass adds two gradients.
    """
    return cross_entropy(output_layer(x, weight, fp32), target, **how)


def rotate(x, cos, sin):
    """Rotary positions: turn each pair (x_i, x_{i+K/2}) of x (..., S, K); cos and sin (S, K/2)."""
    a, b = x.chunk(2, -1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], -1).to(x.dtype)


class Attention(nn.Module):
    """Multi-head self-attention: x (B, S, D) -> (B, S, D).  Grouped queries: arXiv:2305.13245 sec. 2.2."""

    def __init__(self, cfg):
        super().__init__()
        self.n_head, self.n_kv = cfg.n_head, cfg.n_kv_head or cfg.n_head
        self.head_size, self.alpha = cfg.n_embd // cfg.n_head, ALPHA if cfg.pb_relax else None
        self.qkv = Linear(cfg.n_embd, (self.n_head + 2 * self.n_kv) * self.head_size)
        self.out = Linear(cfg.n_embd, cfg.n_embd)
        self.qk_norm = cfg.qk_norm
        if cfg.qk_norm:
            self.q_norm, self.k_norm = make_norm(cfg, self.head_size), make_norm(cfg, self.head_size)

    def forward(self, x, mask, start, rope, kv, seen=None):
        """Positions start ... start+S-1, or the one in the tensor start (1,).  kv: this layer's cache (keys, values),
        each (B, H, L, K), written here; None in training.  seen: see Context."""
        b, s, d = x.shape
        heads = self.qkv(x).reshape(b, s, -1, self.head_size).transpose(1, 2)  # (B, H + 2 n_kv, S, K)
        q, k, v = heads.split((self.n_head, self.n_kv, self.n_kv), 1)
        if self.qk_norm:
            q, k = self.q_norm(q).to(v.dtype), self.k_norm(k).to(v.dtype)
        if rope is not None:
            q, k = rotate(torch.cat([q, k], 1), *rope).split((self.n_head, self.n_kv), 1)
        if isinstance(start, torch.Tensor):
            k, v = (old.index_copy_(2, start, new) for old, new in zip(kv, (k, v)))
        elif kv is not None:
            kv[0].narrow(2, start, s).copy_(k), kv[1].narrow(2, start, s).copy_(v)
            k, v = kv[0].narrow(2, 0, start + s), kv[1].narrow(2, 0, start + s)
        if self.n_kv < self.n_head:
            k, v = (x.repeat_interleave(self.n_head // self.n_kv, 1) for x in (k, v))
        y = attend(q, k, v, mask, start, self.alpha, seen)
        return self.out(y.transpose(1, 2).reshape(b, s, d))


class CrossAttention(nn.Module):
    """Attention to a memory: x (B, S, D), memory (B, M, D) -> (B, S, D)."""

    def __init__(self, cfg):
        super().__init__()
        self.head_size, self.qk_norm, self.alpha = (
            cfg.n_embd // cfg.n_head,
            cfg.qk_norm,
            ALPHA if cfg.pb_relax else None,
        )
        self.q, self.kv = Linear(cfg.n_embd, cfg.n_embd), Linear(cfg.n_embd, 2 * cfg.n_embd)
        self.out = Linear(cfg.n_embd, cfg.n_embd)
        if cfg.qk_norm:
            self.q_norm, self.k_norm = make_norm(cfg, self.head_size), make_norm(cfg, self.head_size)

    def forward(self, x, memory, kv, seen=None):
        """kv: this layer's cache; its third and fourth entry, the memory's keys and values (B, H, M, K), are written
        here if memory is given, else read.  seen (B, M): which states of the memory are attended to; exactly zero where
        none is."""
        q = self.q(x).unflatten(2, (-1, self.head_size)).transpose(1, 2)  # (B, H, S, K)
        if memory is None:
            k, v = kv[2:]
        else:
            k, v = self.kv(memory).unflatten(2, (2, -1, self.head_size)).permute(2, 0, 3, 1, 4)  # 2 x (B, H, M, K)
            k = self.k_norm(k).to(v.dtype) if self.qk_norm else k
            if kv is not None:
                kv[2].copy_(k), kv[3].copy_(v)
        q = self.q_norm(q).to(v.dtype) if self.qk_norm else q
        if seen is None:
            y = dense_attention(q, k, v, alpha=self.alpha)
        else:  # a softmax over nothing would be NaN
            none = ~seen.any(1, keepdim=True)  # (B, 1)
            y = dense_attention(q, k, v, alpha=self.alpha, seen=seen | none).masked_fill(none[:, :, None, None], 0)
        return self.out(y.transpose(1, 2).flatten(2))


def swiglu_inner(cfg):
    """Width inside a SwiGLU that has as many weights as a GELU four times as wide."""
    return cfg.mlp_inner or round(cfg.n_embd * 8 / 3 / 32) * 32


class MLP(nn.Module):
    """x (B, S, D) -> (B, S, D): GELU four times as wide, or SwiGLU (arXiv:2002.05202) with as many weights."""

    def __init__(self, cfg):
        super().__init__()
        self.gated = cfg.mlp == "swiglu"
        inner = swiglu_inner(cfg) if self.gated else cfg.mlp_inner or 4 * cfg.n_embd
        self.up = Linear(cfg.n_embd, 2 * inner if self.gated else inner)
        self.down = Linear(inner, cfg.n_embd)

    def forward(self, x):
        x = self.up(x)
        if self.gated:
            gate, x = x.chunk(2, -1)
            return self.down(F.silu(gate) * x)
        return self.down(F.gelu(x, approximate="tanh"))


class Residual(nn.Module):
    """x + drop(after(f(norm(x)))), a pre-norm residual branch.

    after: CogView's Sandwich-LN (sec. 2.4), else the identity.  gradient_scale: a tensor set by fp16.BlockScaler, or
    None.
    """

    def __init__(self, cfg, f):
        super().__init__()
        self.norm, self.f = make_norm(cfg, cfg.n_embd), f
        self.after = make_norm(cfg, cfg.n_embd) if cfg.sandwich else identity
        self.drop = nn.Dropout(cfg.dropout) if cfg.dropout else identity
        self.gradient_scale = None

    def forward(self, x, *inputs):
        """inputs: further arguments of f."""
        scale = self.gradient_scale
        if scale is None:
            return x + self.drop(self.after(self.f(self.norm(x), *inputs)))
        inputs = [Enter.apply(t, scale) if torch.is_tensor(t) and t.requires_grad else t for t in inputs]
        return x + Leave.apply(self.drop(self.after(self.f(self.norm(Enter.apply(x, scale)), *inputs))), scale)


class Context(NamedTuple):
    """What a sequence is read with: states that all blocks attend to, and the positions that are not hidden.

    None: no memory; nothing is hidden.  The first position is always seen.
    """

    memory: torch.Tensor | None = None  # (B, M, D)
    memory_seen: torch.Tensor | None = None  # (B, M) bool
    seen: torch.Tensor | None = None  # (B, L) bool


class Block(nn.Module):
    """Transformer block: x (B, S, D) -> (B, S, D); cross: with attention to a memory (B, M, D)."""

    def __init__(self, cfg, cross=False):
        super().__init__()
        self.attn, self.mlp = Residual(cfg, Attention(cfg)), Residual(cfg, MLP(cfg))
        self.cross = Residual(cfg, CrossAttention(cfg)) if cross else None

    def forward(self, x, mask, start=0, rope=None, kv=None, context=Context()):
        x = self.attn(x, mask, start, rope, kv, context.seen)
        if self.cross is not None:
            x = self.cross(x, context.memory, kv, context.memory_seen)
        return self.mlp(x)


def init_weights(model, n_layer):
    """GPT-2's initialisation: matrices with std 0.02, smaller where branches join the residual stream."""
    for name, p in model.named_parameters():
        if p.dim() >= 2:
            joins = name.endswith(("f.out.weight", "f.down.weight"))
            nn.init.normal_(p, std=0.02 / math.sqrt(2 * n_layer) if joins else 0.02)


# --- positions and conditions ----------------------------------------------------------------------------


def rotary_tables(cfg, coordinates):
    """cos, sin (L, K/2) of the angles by which each pair of a head turns.  RoPE, arXiv:2104.09864.

    coordinates (L, 2): the row and column of each position, each turning half of the frequencies; with pos "sequence"
    the position in the sequence turns all of them, and only L counts.
    """
    head = cfg.n_embd // cfg.n_head
    if cfg.pos == "sequence":
        frequency = cfg.rope_base ** (-torch.arange(head // 2).float() / (head // 2))
        angle = torch.arange(len(coordinates)).float()[:, None] * frequency
    else:
        frequency = 100.0 ** (-torch.arange(head // 4).float() / (head // 4))  # base 100: grids are short
        angle = (coordinates[..., None] * frequency).flatten(1)  # (L, K/2)
    return angle.cos(), angle.sin()


class GridPositions(nn.Module):
    """Learned positions of the code grid (N, D): row + column (DALL-E)."""

    def __init__(self, cfg):
        super().__init__()
        self.row = nn.Parameter(torch.empty(cfg.grid_h, 1, cfg.n_embd))
        self.column = nn.Parameter(torch.empty(1, cfg.grid_w, cfg.n_embd))

    def forward(self):
        return (self.row + self.column).flatten(0, 1)


class View(NamedTuple):
    """Codes of another view of the image, f(images (B, 3, H, W)), for the batch's `key`; `name` says what f is.

    ratio: codes of the image for each of the view's, in each direction.  vq, vq_hash: folder and hash of another
    tokenizer, which the run keeps as {key}_vq; "": the prior's own.
    """

    key: str
    f: Callable
    name: str
    ratio: int = 1
    vq: str = ""
    vq_hash: str = ""


class Condition(nn.Module):
    """One thing that the codes are conditioned on; a prior may have several.

    `length` positions stand before the codes, or `memory_length` states are attended to by all blocks.  A condition
    that is another image's codes names them with `extra_codes`.
    """

    Config = None  # the dataclass of its settings
    predicts_text = False  # whether a causal prior learns it, too
    reads_captions = False  # whether it has a `reader`
    tokens = ()  # names of tokens that it adds to the embedding table; the prior sets `token_ids`, {name: id}
    window_plan = None  # see Prior; None: the model's
    length = memory_length = 0

    def __init__(self, cfg):
        super().__init__()
        self.cfg = cfg

    @classmethod
    def settle(cls, cfg):
        """cfg with the fields that follow from the condition's settings; ValueError if they conflict."""
        return cfg

    @staticmethod
    def reader(cfg, device, dtype=torch.float32):
        """What turns captions into the batch's "text" in place of the checkpoint's SentencePiece model."""

    @staticmethod
    def extra_codes(cfg):
        """The View of the image whose codes it reads, or None."""

    @classmethod
    def fit(cls, cfg, stride):
        """cfg once its code grid is known; stride: pixels of a code in each direction.  ValueError if they conflict."""
        return cfg

    def prefix(self, batch, embed):
        """-> (B, length, D); embed: token ids -> embeddings."""

    def memory(self, batch, embed):
        """-> (B, memory_length, D), or None."""

    def seen(self, batch):
        """Which positions of the prefix are attended to: bool (B, length); None: all.  A prior's first always is."""

    def memory_seen(self, batch):
        """Which states of the memory are attended to: bool (B, memory_length), all False for nothing; None: all."""

    def learned_positions(self, grid):
        """Learned positions of the prefix (length, D), given those of the code grid (N, D)."""
        return self.pos

    def coordinates(self, grid):
        """Rows and columns of the prefix (length, 2) for 2-D rotary positions, given those of the codes (N, 2).

        Default: on the diagonal before the grid's corner, as in M-RoPE, arXiv:2409.12191 sec. 2.1 (there image first).
        """
        return torch.arange(-self.length, 0).float()[:, None].expand(-1, 2)


class TextPrefix(Condition):
    """Caption ids before the codes, learned like them (DALL-E)."""

    predicts_text = True

    def __init__(self, cfg):
        super().__init__(cfg)
        self.length = cfg.text_len
        if cfg.pos == "learned":
            self.pos = nn.Parameter(torch.empty(cfg.text_len, cfg.n_embd))

    def prefix(self, batch, embed):
        return embed(batch["text"])

    def seen(self, batch):
        return seen_text(batch["text"], self.cfg)


def seen_text(text, cfg):
    """Which caption ids (B, T) are attended to: bool (B, T), False at pads, if those are hidden; else None: all."""
    return text < cfg.n_vocab if cfg.pads == "hidden" else None


def join_seen(found, lengths):
    """What several parts of a row show, bool (B, n) or None for all of it -> bool (B, sum of lengths), or None."""
    if (some := next((x for x in found if x is not None), None)) is None:
        return None
    return torch.cat([some.new_ones(len(some), n) if x is None else x for x, n in zip(found, lengths)], 1)


CONDITIONS = {"text": TextPrefix}


# --- the model -------------------------------------------------------------------------------------------


class Prior(nn.Module):
    """What the training script, the sampler and the experiments ask of any prior; a subclass answers what it can."""

    Config = None  # the dataclass of its settings
    Sampling = None  # the dataclass of its settings for sampling
    learns_text = True  # whether it predicts captions where a condition lets it
    drops_captions = True  # whether --cond_drop applies, for guidance
    data = None  # a function that loads other data than captioned images
    n_shown = 2  # samples of each caption in a training run's grid
    eval_batch = 0  # samples of a validation batch; 0: as many as a training step has
    window_plan = "every_place"  # how it samples images larger than its grid: a name of sample.WINDOW_PLANS
    head_loss = staticmethod(head_loss)  # compiled by parallel.py:compile_blocks

    @classmethod
    def settle(cls, cfg):
        """cfg with the fields that follow from the model's settings; ValueError if they conflict."""
        return cfg

    @staticmethod
    def vocabulary(cfg):
        """The SentencePiece model (bytes) that this prior must use; None: any."""
        return None

    @staticmethod
    def tensors_for(tensors, model):
        """This class's tensors as the start of another prior (--init); ValueError if they cannot be."""
        return resize_grid(tensors, model)

    def check(self, text_weight):
        """ValueError if it cannot learn as its settings say."""

    def load_start(self):
        """Load initial weights that the settings name."""

    def after_save(self, folder, text):
        """Called on the first process after a checkpoint was written, with the text model."""

    def corrupt(self, batch, seeds):
        """The batch with what the model hides from itself in training, a pure function of each sample's seed."""
        return batch

    def forward(self, batch, train=False):
        return self.loss(batch, train)

    def loss(self, batch, train=False):
        """-> {"text": (), "image": ()}: summed losses in nats, float32; sums, so that means can be taken over
        gradient-accumulation steps and processes.  train: with what only training does (label smoothing)."""
        raise NotImplementedError

    def n_targets(self, batch):
        """How many terms each loss of this batch has: {"text": (), "image": ()}."""
        raise NotImplementedError

    def evaluate(self, batch):
        """-> {name: (sum, number of terms)}, for the means that the log shows of a validation batch."""
        n = self.n_targets(batch)
        return {f"{name}_loss": (total, n[name]) for name, total in self.loss(batch).items()}

    def score(self, batch):
        """A loss of each image given its caption (B,): lower is better."""
        raise ValueError(f"--model {self.cfg.model} gives no score to choose images by")

    def generate(self, batch, empty, sampler, known=None, watch=None):
        """-> codes (B, N), see GPT.generate."""
        raise ValueError(f"--model {self.cfg.model} samples no images")

    def write_captions(self, codes, sampler, begin, end):
        """-> caption ids (B, T) of images."""
        writers = [name for name, model in MODELS.items() if model.write_captions is not Prior.write_captions]
        raise ValueError(f"--model {self.cfg.model} writes no captions; use --model {' or '.join(writers)}")

    def sample(self, batch, empty, sampler, text):
        """Samples for the grid of a training run -> codes (B, N) and their captions, None for the batch's own; or None
        if the model samples nothing."""
        return None


class GPT(Prior):
    """Prefix and codes as one sequence, one embedding table, an output layer for each kind.

    Token ids: text [0, n_vocab), pad of text position t: n_vocab + t, code c: n_vocab + T + c, then n_extra_tokens,
    then those of the conditions.
    """

    n_extra_tokens = 0

    def __init__(self, cfg):
        super().__init__()
        self.cfg, self.masks = cfg, layer_masks(cfg.mask, cfg.n_layer)
        self.conditions = nn.ModuleDict({name: CONDITIONS[name](cfg) for name in cfg.condition.split(",")})
        conditions = self.conditions.values()
        self.layout = Layout(sum(c.length for c in conditions), cfg.grid_h, cfg.grid_w)
        self.memory_length = sum(c.memory_length for c in conditions)
        self.predicts_text = self.learns_text and any(c.predicts_text for c in conditions)
        self.window_plan = next((c.window_plan for c in conditions if c.window_plan), type(self).window_plan)
        if cfg.pos == "learned":
            self.grid = GridPositions(cfg)
        elif cfg.pos == "index":
            self.index = nn.Parameter(torch.empty(self.layout.length, cfg.n_embd))
        else:
            for name, table in zip(("cos", "sin"), self.rotary()):
                self.register_buffer(name, table, persistent=False)
        names = dict.fromkeys(name for c in conditions for name in c.tokens)
        first = cfg.n_vocab + cfg.text_len + cfg.n_codes + self.n_extra_tokens
        self.token_ids = {name: first + i for i, name in enumerate(names)}
        for c in conditions:
            c.token_ids = self.token_ids
        self.embedding = nn.Embedding(first + len(names), cfg.n_embd)
        self.drop = nn.Dropout(cfg.dropout)
        self.blocks = nn.ModuleList(Block(cfg, cross=self.memory_length > 0) for _ in range(cfg.n_layer))
        self.attention_masks = nn.ModuleDict({n: AttentionMask(n, self.layout) for n in sorted(set(self.masks))})
        self.prefix_ahead = any(mask.prefix_ahead for mask in self.attention_masks.values())
        self.codes_ahead = any(mask.codes_ahead for mask in self.attention_masks.values())
        self.norm = make_norm(cfg, cfg.n_embd)
        self.make_heads(cfg)
        self.compiled_step = None  # see compile_step
        init_weights(self, cfg.n_layer)

    def make_heads(self, cfg):
        """An output layer for text, if it is predicted, and one for codes."""
        if self.predicts_text:
            self.text_head = Head(cfg, cfg.n_vocab)
        if cfg.n_codes:
            self.image_head = Head(cfg, cfg.n_codes)

    # --- one pass

    def arrange(self, prefix, codes):
        """Embeddings, positions or coordinates of prefix (..., P, D) and codes (..., N, D) in sequence order."""
        return torch.cat([prefix, codes], -2)

    def positions(self, seen=None):
        """Learned positions of the whole sequence (L, D); by index, where pads are hidden (seen (B, L)) and not
        counted, of each sample's (B, L, D)."""
        if self.cfg.pos == "index":
            return self.index if seen is None else self.index[seen.cumsum(1) - 1]
        grid = self.grid()
        return self.arrange(torch.cat([c.learned_positions(grid) for c in self.conditions.values() if c.length]), grid)

    def rotary(self):
        """cos, sin (L, K/2) of the whole sequence."""
        h, w = self.layout.grid_h, self.layout.grid_w
        grid = torch.cartesian_prod(torch.arange(h).float(), torch.arange(w).float()).view(-1, 2)  # (N, 2)
        before = torch.cat([c.coordinates(grid) for c in self.conditions.values() if c.length])
        return rotary_tables(self.cfg, self.arrange(before, grid))

    def embed(self, ids):
        """Token ids (B, S) -> embeddings (B, S, D)."""
        return shrink_gradient(self.embedding(ids), self.cfg.embed_grad)

    def embed_codes(self, codes):
        """codes (B, N) -> embeddings (B, N, D)."""
        return self.embed(codes + self.cfg.n_vocab + self.cfg.text_len)

    def condition(self, batch):
        """-> prefix (B, P, D), Context."""
        before = [c for c in self.conditions.values() if c.length]
        beside = [c for c in self.conditions.values() if c.memory_length]
        prefix = torch.cat([c.prefix(batch, self.embed) for c in before], 1)
        memory = torch.cat([c.memory(batch, self.embed) for c in beside], 1) if beside else None
        memory_seen = join_seen([c.memory_seen(batch) for c in beside], [c.memory_length for c in beside])
        seen = join_seen([*(c.seen(batch) for c in before), None], [*(c.length for c in before), self.cfg.n_image])
        return prefix, Context(memory, memory_seen, seen)

    def trunk(self, x, start=0, cache=None, context=None):
        """Embeddings (B, S, D) of positions start ... start+S-1, or of the one in the tensor start (1,) -> hidden
        states.

        The context is needed once: the cache keeps it, and the memory's keys and values.
        """
        at = start if isinstance(start, torch.Tensor) else slice(start, start + x.shape[1])
        rope = None
        if context is None:
            context = Context() if cache is None else cache.context
        elif cache is not None:
            cache.keep(self, context)
        if self.cfg.pos in ("learned", "index"):
            x = x + (self.positions(context.seen) if cache is None else cache.positions)[..., at, :]
        else:
            rope = self.cos[at], self.sin[at]
        x = self.drop(x)
        for i, block in enumerate(self.blocks):
            kv = None if cache is None else cache.kv[i]
            x = block(x, self.attention_masks[self.masks[i]], start, rope, kv, context)
        return self.norm(x)  # (B, S, D)

    def states(self, batch):
        """-> hidden states (B, T-1, D) that predict text 1 ... T-1, or None; those that predict codes (B, N, D), each
        at the position before, or None."""
        self.check_causal()
        prefix, context = self.condition(batch)
        x = self.trunk(self.arrange(prefix, self.embed_codes(batch["codes"])), context=context)  # (B, L, D)
        p, t = self.layout.n_prefix, self.cfg.text_len
        states = x[:, p - 1 : -1]  # (B, N, D)
        if context.seen is not None:
            states = torch.cat([last_seen(x[:, :p], context.seen), states[:, 1:]], 1)
        return x[:, : t - 1] if self.predicts_text else None, states

    def logits(self, batch):
        """-> text logits (B, T-1, V) of text 1 ... T-1, or None; code logits (B, N, n_codes), or None."""
        text, codes = self.states(batch)
        return None if text is None else self.text_head(text), None if codes is None else self.image_head(codes)

    def check_causal(self):
        """ValueError if the mask shows a code what it should predict."""
        if self.codes_ahead:
            raise ValueError(
                f"mask {self.cfg.mask} shows a code those after it: codes are neither learned nor sampled one by one "
                "with it; use a causal mask, or a model that samples in parallel"
            )

    # --- learning

    def check(self, text_weight):
        self.check_causal()
        if self.prefix_ahead and text_weight and self.predicts_text:
            raise ValueError(f"mask {self.cfg.mask} shows text what it should predict: it needs --text_weight 0")

    def loss(self, batch, train=False):
        """Cross-entropy of the codes and, where it is predicted, of the text up to its end token."""
        (text, codes), fp32 = self.states(batch), self.cfg.fp32_logits
        loss = {"image": self.head_loss(codes, self.image_head.weight, batch["codes"], fp32)}
        if self.predicts_text:
            loss["text"] = self.head_loss(text, self.text_head.weight, self.text_targets(batch["text"]), fp32)
        return loss

    def n_targets(self, batch):
        n = {"image": torch.tensor(batch["codes"].numel())}
        return n | ({"text": (self.text_targets(batch["text"]) >= 0).sum()} if self.predicts_text else {})

    def text_targets(self, text):
        """Text ids (B, T) -> targets (B, T-1): up to the end token, -100 for pads; all -100 if the mask shows text
        ahead."""
        known = 0 if self.prefix_ahead else self.cfg.n_vocab
        return torch.where(text[:, 1:] < known, text[:, 1:], -100)

    @torch.inference_mode()
    def score(self, batch):
        """Mean loss of each image's codes, -log p(codes | condition) / N (B,), in nats: lower is likelier."""
        return F.cross_entropy(self.logits(batch)[1].float().mT, batch["codes"], reduction="none").mean(1)

    # --- sampling

    def compile_step(self):
        """Compile the step that samples a code, as gpt-fast does: on a GPU one CUDA graph, replayed for each code.

        On a CPU one dynamic graph serves every length (`Cache.upto`).
        """
        torch._dynamo.config.recompile_limit = 64  # batch sizes and settings of sampling
        dynamic = None if self.embedding.weight.is_cpu else False
        self.compiled_step = torch.compile(self.step, dynamic=dynamic, mode="reduce-overhead")

    def step(self, code, at, cache, sampler, scale, uniform):
        """The code (B,) at position `at`, an int or tensor (1,) -> the next one (B,), n_codes for NaN and Inf."""
        code = code.clamp_max(self.cfg.n_codes - 1)[:, None]
        state = self.trunk(self.embed_codes(torch.cat([code, code]) if sampler.guided else code), at, cache)
        return sampler.draw(self.image_head(state)[:, 0].float(), scale, uniform)

    @torch.inference_mode()
    def generate(self, batch, empty, sampler, known=None, watch=None):
        """Sample codes one by one from a cache: -> codes (B, N).

        batch: the conditions of P prompts (no "codes"); each gets B / P images, one for each of the sampler's seeds.
        empty (T,): the text that guidance leads away from, the empty caption's.  known (B, N): given codes, -1 where
        to sample (a code is conditioned on those before it only).  watch(codes): called after each code, with -1
        where there is none yet.
        """
        n_prompts, b, n_image = len(batch["text"]), len(sampler), self.layout.length - self.layout.n_prefix
        p, device = self.layout.n_prefix, batch["text"].device
        rows = torch.arange(n_prompts, device=device).repeat_interleave(b // n_prompts)  # (B,) the prompt of each image
        codes = torch.full((b, n_image), -1, device=device) if known is None else known.clone()
        given = codes >= 0
        forced, free = given.any(0).tolist(), (~given.all(0)).nonzero().flatten().tolist()
        first, stop = (free[0], free[-1] + 1) if free else (0, 0)
        noise = sampler.uniform(n_image)  # (B, N)

        if sampler.guided:  # the unconditional half follows
            batch, rows = without_text(batch, empty), torch.cat([rows, rows + n_prompts])

        def doubled(x):
            return torch.cat([x, x]) if sampler.guided else x

        prompts = Cache(self, len(batch["text"]), p)
        prefix, context = self.condition(batch)
        state = last_seen(self.trunk(prefix, 0, prompts, context), context.seen)[rows]  # (2B, 1, D): predicts code 0
        cache = prompts.spread(self, rows, p + n_image - 1)  # a prompt is read once for all its images
        if first:
            state = self.trunk(self.embed_codes(doubled(codes[:, :first])), p, cache)[:, -1:]
        scales, places = [sampler.scale((i + 1) / n_image) for i in range(n_image)], range(p, p + n_image)
        if self.compiled_step:  # numbers that change would be compiled anew
            scales, places = torch.tensor(scales, device=device), torch.arange(p, p + n_image, device=device)[:, None]
        for i in range(first, stop):
            if i == first:
                code = sampler.draw(self.image_head(state)[:, 0], scales[i], noise[:, i])
            elif self.compiled_step:
                short = cache.upto(p + i)
                code = self.compiled_step(codes[:, i - 1], places[i - 1], short, sampler, scales[i], noise[:, i])
            else:
                code = self.step(codes[:, i - 1], places[i - 1], cache, sampler, scales[i], noise[:, i])
            codes[:, i] = torch.where(given[:, i], codes[:, i], code) if forced[i] else code
            if watch:
                watch(codes.clamp_max(self.cfg.n_codes - 1))
        return sampler.valid(codes, self.cfg.n_codes)

    def sample(self, batch, empty, sampler, text):
        return self.generate({k: v for k, v in batch.items() if k != "codes"}, empty, sampler), None


def last_seen(x, seen):
    """States of the prefix (B, P, D), seen (B, L) or None -> the state of the last position that is no hidden pad
    (B, 1, D)."""
    if seen is None:
        return x[:, -1:]
    last = seen[:, : x.shape[1]].cumsum(1).argmax(1)
    return x[torch.arange(len(x), device=x.device), last][:, None]


def without_text(batch, empty):
    """A batch of conditions followed by the same without its captions: (P, ...) -> (2P, ...)."""
    empty = empty.expand_as(batch["text"])
    return {k: torch.cat([v, empty if k == "text" else v]) for k, v in batch.items()}


class Cache:
    """Keys and values of each layer (B, H, L, K), and of a memory (B, H, M, K); what is hidden of them, and the table
    of learned positions."""

    def __init__(self, model, batch, length):
        model.check_causal()
        cfg, weight, m = model.cfg, model.embedding.weight, model.memory_length
        own, memory = (cfg.n_kv_head or cfg.n_head, length), (cfg.n_head, m)
        shapes = (own, own, memory, memory) if m else (own, own)
        size = cfg.n_embd // cfg.n_head
        self.kv = [tuple(weight.new_zeros(batch, *shape, size) for shape in shapes) for _ in range(cfg.n_layer)]
        self.keep(model, Context())
        if weight.is_cuda:
            for tensor in (t for layer in self.kv for t in layer):
                torch._dynamo.mark_static_address(tensor)  # a compiled step may write to it within a CUDA graph

    def keep(self, model, context):
        """Keep what a sequence is read with, but the memory, and its learned positions (L, D) or (B, L, D)."""
        self.context = context._replace(memory=None)
        self.positions = model.positions(context.seen) if model.cfg.pos in ("learned", "index") else None

    def spread(self, model, rows, length):
        """A longer cache whose row b starts as this one's row rows[b]."""
        new = Cache(model, len(rows), length)
        for old_tensors, new_tensors in zip(self.kv, new.kv):
            for old, fresh in zip(old_tensors, new_tensors):
                fresh[:, :, : old.shape[2]] = old[rows]
        new.keep(model, Context(*(None if x is None else x[rows] for x in self.context)))
        return new

    def upto(self, length):
        """On a CPU this cache without what comes after the first `length` positions, in steps of 32: few shapes."""
        if not self.kv[0][0].is_cpu:
            return self
        part, n = copy(self), -(-length // 32) * 32  # measured: 1.2 times as fast as steps of 128 for 16 images
        part.kv = [(k[:, :, :n], v[:, :, :n], *memory) for k, v, *memory in self.kv]
        return part


def grow_vocabulary(tensors, n_vocab, spelled):
    """A prior's tensors for a longer text model: new ids follow the n_vocab old ones, pads and codes move up.

    spelled: for each new id the old ids that spelled it; its embedding and output row start as the mean of theirs
    (arXiv:2112.14569).
    """
    tensors = dict(tensors)
    for name in ("embedding.weight", "text_head.weight"):
        if spelled and name in tensors:
            w = tensors[name]
            new = torch.stack([w[ids].float().mean(0) for ids in spelled])  # (new ids, D)
            tensors[name] = torch.cat([w[:n_vocab], new.to(w.dtype), w[n_vocab:]])
    return tensors


def resize_grid(tensors, model):
    """A prior's tensors for another code grid, as finetuning to larger images needs: learned positions are
    interpolated.

    A condition that the other prior did not have keeps its initialisation.
    """
    own, known = model.state_dict(), {k.split(".")[1] for k in tensors if k.startswith("conditions.")}
    new = {k: v for k, v in own.items() if k.startswith("conditions.") and k.split(".")[1] not in known}
    fitted = new | tensors
    for name, axis in (("grid.row", 0), ("grid.column", 1)):
        if name in fitted and name in own and fitted[name].shape != own[name].shape and own[name].numel():
            line = fitted[name].squeeze(1 - axis).t()[None]  # (1, D, n)
            line = F.interpolate(line.float(), own[name].shape[axis], mode="linear", align_corners=False)
            fitted[name] = line[0].t().unsqueeze(1 - axis)
    if "index" in fitted and "index" in own:  # a longer sequence: the rest keeps its initialisation
        n = len(own["index"])
        fitted["index"] = torch.cat([fitted["index"][:n], own["index"][len(fitted["index"]) :]])
    return fitted


MODELS = {"gpt": GPT}


def conditions_of(cfg):
    """The classes of a prior's conditions."""
    return [CONDITIONS[name] for name in cfg.condition.split(",")]


def reads_captions(cfg):
    """Whether a condition reads the captions itself, with a vocabulary of its own."""
    return any(condition.reads_captions for condition in conditions_of(cfg))


def views_of(cfg):
    """The views whose codes a prior's conditions read."""
    return [view for condition in conditions_of(cfg) if (view := condition.extra_codes(cfg))]


def with_codes(cfg, vq, grid):
    """A prior's config with what its tokenizer decides, for images of `grid` (h, w) codes."""
    cfg = replace(cfg, n_codes=vq.cfg.n_codes, grid_h=grid[0], grid_w=grid[1])
    for condition in conditions_of(cfg):
        cfg = condition.fit(cfg, vq.cfg.stride)
    return cfg


def prior_config(settings):
    """Flat settings -> (the model's class, its config with the fields of model and conditions, dependent ones filled
    in)."""
    plain = pick(GPTConfig, settings)
    model, parts = MODELS[plain.model], [MODELS[plain.model], *conditions_of(plain)]
    cfg = pick(merge(GPTConfig, *(part.Config for part in parts)), settings)
    for part in parts:
        cfg = part.settle(cfg)
    return model, cfg


def build_prior(settings):
    """Flat settings, as in config.json -> the prior, randomly initialised."""
    model, cfg = prior_config(settings)
    return model(cfg)

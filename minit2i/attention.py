"""The attention masks, each written once, and attention under them.

A mask is a function (q, k, layout) -> whether position q may attend to position k, for integer tensors that broadcast.
Training, cached sampling and the image of the masks all take it from MASKS; --mask gives each layer its own.

`attend` picks the fastest way that gives the dense mask's result (measured on CPUs; on GPUs by reading):

    whole sequence    causal or bidirectional: scaled_dot_product_attention (half precision on a CPU: explicit products)
                      other masks on a GPU: FlexAttention with block masks, compiled; the dense mask where it fails
                      other masks on a CPU: bands of queries, each with the rows or columns of codes that any of them
                      sees
    one new position  the keys that it sees; compiled: the whole cache under one row of the mask
    anything else     the dense mask

All of them take `seen` (B, M), the keys that a sample's queries may attend to at all: pads of a caption can be hidden.
The first key must be among them, so that each query sees something.

Shapes: B batch, H heads, S queries, M keys, K head size, P prefix length, h w code grid, N = h*w, L = P+N sequence.
"""

import math
import warnings
from functools import cache
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

# --- the masks -----------------------------------------------------------------------------------------

KERNEL = 11  # side of the conv mask, DALL-E app. B.1
WINDOW = 8  # side of the window mask; Taming's, which serves sampling only, is 16


class Layout(NamedTuple):
    """Where things stand in the sequence: n_prefix positions of text (and other conditions), then the code grid."""

    n_prefix: int
    grid_h: int
    grid_w: int

    @property
    def length(self):
        return self.n_prefix + self.grid_h * self.grid_w


def causal(q, k, layout):
    """Every earlier position and itself."""
    return k <= q


def row(q, k, layout):
    """The prefix, and codes back to the one above: grid_w + 1 with itself.  DALL-E, arXiv:2102.12092 fig. 11a."""
    return causal(q, k, layout) & ((k < layout.n_prefix) | (q - k <= layout.grid_w))


def column(q, k, layout):
    """The prefix, and the codes straight above.  DALL-E fig. 11b."""
    return causal(q, k, layout) & ((k < layout.n_prefix) | ((q - k) % layout.grid_w == 0))


def conv(q, k, layout):
    """The prefix, and the earlier half of an 11x11 window that wraps in raster order.  DALL-E fig. 11d (drawn 3x3)."""
    side, w = KERNEL // 2, layout.grid_w
    inside = ((q - k + side) % w < KERNEL) & (q - k <= side * w + side)
    return causal(q, k, layout) & ((k < layout.n_prefix) | inside)


def window(q, k, layout):
    """The prefix, and earlier codes in a WINDOW x WINDOW crop around the code, clamped to the grid.

    Taming's sliding window, arXiv:2012.09841 sec. 3.3.  Deviation: a mask of each layer, so n layers see further.
    """

    def inside(q, k, n):  # of n rows (or columns)
        first = (q - WINDOW // 2).clamp(max=n - WINDOW).clamp(min=0)
        return (k >= first) & (k < first + WINDOW)

    p, h, w = layout
    q_row, q_column, k_row, k_column = (q - p) // w, (q - p) % w, (k - p) // w, (k - p) % w
    return causal(q, k, layout) & ((k < p) | (inside(q_row, k_row, h) & inside(q_column, k_column, w)))


def prefix(q, k, layout):
    """Causal, but the prefix sees all of itself, so its text cannot be learned.  Prefix LM, T5, arXiv:1910.10683 sec.
    3.2."""
    return causal(q, k, layout) | ((q < layout.n_prefix) & (k < layout.n_prefix))


def bidirectional(q, k, layout):
    """All positions: for models that do not sample code by code."""
    return (k >= 0) & (q >= 0)


MASKS = {f.__name__: f for f in (causal, row, column, conv, window, prefix, bidirectional)}
MASK_ORDERS = {}  # a paper's order of masks: name -> (number of layers -> the name of each layer's mask)


def layer_masks(mask, n_layer):
    """--mask -> the name of each layer's mask, n_layer of them; ValueError for an unknown name.

    A name of MASKS, several joined by commas, which layers take in turn, or a name of MASK_ORDERS.
    """
    if mask in MASK_ORDERS:
        return MASK_ORDERS[mask](n_layer)
    names = mask.split(",")
    for name in names:
        if name not in MASKS:
            known = ", ".join([*MASKS, *MASK_ORDERS])
            raise ValueError(f"mask {name!r} is not known; use {known}, or several joined by commas")
    return [names[i % len(names)] for i in range(n_layer)]


class AttentionMask(nn.Module):
    """A mask over one layout, and what `attend` derives from it once."""

    def __init__(self, name, layout):
        super().__init__()
        self.name, self.layout, self.block_masks = name, layout, {}
        with torch.device("cpu"):  # even if the model is built on another device, or on meta
            at, p = torch.arange(layout.length), layout.n_prefix
            dense = MASKS[name](at[:, None], at[None], layout)  # (L, L)
            self.register_buffer("dense", dense, persistent=False)
            ahead = dense & (at > at[:, None])
            self.prefix_ahead = bool(ahead[:p].any())  # a prefix position sees what it would have to predict
            self.codes_ahead = bool(ahead[:, p:].any())  # the same of codes
            self.is_causal, self.is_open = dense.equal(at <= at[:, None]), bool(dense.all())
            self.n_shared = p if bool(dense[p:, :p].all()) else 0  # keys at the start that all codes see
            self.ends = dense.sum(1).cumsum(0).tolist()
            keys = at[:0] if self.is_causal else dense.nonzero()[:, 1]
            self.register_buffer("keys", keys, persistent=False)  # seen by position 0, then by 1, ...
            self.by_columns, order = False, at
            if not (self.is_causal or self.is_open):
                order = self.make_bands(dense, at)
            self.register_buffer("order", order, persistent=False)
            self.register_buffer("inverse", order.argsort(), persistent=False)

    def make_bands(self, dense, at):
        """Split the queries into bands and find the lines (rows or columns of codes) that any query of a band sees.

        -> order (L,): positions with rows or columns contiguous, whichever needs fewer scores.
        blocks: sizes of the prefix and of each line; queries: sizes of the bands; bands: the blocks that each reads;
        visible0, ... bool: the mask of each band; n_scores: how many scores there are in all.
        """
        p, self.n_scores = self.layout.n_prefix, math.inf
        grid = at[p:].view(self.layout.grid_h, self.layout.grid_w)
        for lines in (grid, grid.t()):
            blocks, per = [at[:p], *lines], max(1, 128 // lines.shape[1])  # measured: bands of 64 to 128 are best
            queries = [q for q in (at[:p], *map(torch.flatten, lines.split(per))) if len(q)]
            bands = [[i for i, keys in enumerate(blocks) if dense[q][:, keys].any()] for q in queries]
            keys = [torch.cat([blocks[i] for i in band]) for band in bands]
            n_scores = sum(len(q) * len(k) for q, k in zip(queries, keys))
            if n_scores < self.n_scores:
                self.n_scores, self.bands, self.by_columns, order = (
                    n_scores,
                    bands,
                    lines is not grid,
                    torch.cat(blocks),
                )
                self.blocks, self.queries = [len(x) for x in blocks], [len(x) for x in queries]
                visible = [dense[q][:, k] for q, k in zip(queries, keys)]
        for i, mask in enumerate(visible):
            self.register_buffer(f"visible{i}", mask, persistent=False)
        return order

    def keys_of(self, position):
        """The keys that one position sees (M,), if the mask is not plainly causal."""
        return self.keys[self.ends[position - 1] if position else 0 : self.ends[position]]

    def block_mask(self, device):
        """FlexAttention's block mask of the reordered sequence, made once for each device."""
        if device not in self.block_masks:
            order, layout, rule = self.order.to(device), self.layout, MASKS[self.name]
            self.block_masks[device] = create_block_mask(
                lambda b, h, q, k: rule(order[q], order[k], layout),
                None, None, layout.length, layout.length, device=device,
            )  # fmt: skip
        return self.block_masks[device]


# --- attention under a mask ------------------------------------------------------------------------------


def attend(q, k, v, mask, start=0, alpha=None, seen=None):
    """Attention of positions start ... start+S-1: q (B, H, S, K), k and v (B, H, start+S, K) -> (B, H, S, K).

    mask: an AttentionMask.  start may be a tensor (1,) for one position: k and v may then hold later positions, too.
    seen: bool (B, L), False at pads that are hidden from all queries; None: nothing is.
    alpha: PB-Relax, CogView, arXiv:2105.13290 sec. 2.4: softmax((q k^T / alpha - max) * alpha), dividing before the
    product, after which it would protect nothing.  A fused kernel keeps its scores in float32 and subtracts their
    maximum itself: there q is divided by alpha, and alpha is the kernel's scale.
    """
    s, stop = q.shape[2], k.shape[2]
    seen = None if seen is None else seen[:, :stop]
    if isinstance(start, torch.Tensor):
        return dense_attention(q, k, v, mask.dense[start, :stop], alpha=alpha, seen=seen)
    if s == 1 and stop > 1:
        keys = None if mask.is_causal else mask.keys_of(start)
        if keys is None or len(keys) == stop:
            return dense_attention(q, k, v, alpha=alpha, seen=seen)
        if seen is not None:
            k, v = (x.index_select(2, keys) for x in (k, v))
            return dense_attention(q, k, v, alpha=alpha, seen=seen[:, keys])
        n = mask.n_shared if start >= mask.n_shared >= 128 else 0  # measured: a shorter prefix is faster gathered, too
        k, v = ((x[:, :, :n], x.index_select(2, keys[n:])) for x in (k, v))
        return two_part_attention(q, k, v, alpha) if n else dense_attention(q, k[1], v[1], alpha=alpha)
    if mask.is_causal and start == 0 and not (seen is not None and q.is_cuda):
        return dense_attention(q, k, v, is_causal=True, alpha=alpha, seen=seen)
    if s < mask.layout.length:
        return dense_attention(q, k, v, mask.dense[start:stop, :stop], alpha=alpha, seen=seen)
    if mask.is_open:
        return dense_attention(q, k, v, alpha=alpha, seen=seen)
    if not q.is_cuda:
        return banded(q, k, v, mask, alpha, seen)
    if can_flex(q.shape[-1], q.dtype, q.device):
        return flex(q, k, v, mask, alpha, seen)
    return dense_attention(q, k, v, mask.dense, alpha=alpha, seen=seen)


def visible(mask, seen):
    """A mask (S, M) and visible keys (B, M), None: all -> both in one mask that broadcasts to (B, H, S, M), or None."""
    if mask is None or seen is None:
        return mask if seen is None else seen[:, None, None]
    return mask & seen[:, None, None]


def dense_attention(q, k, v, mask=None, is_causal=False, alpha=None, seen=None):
    """softmax(q k^T / sqrt K + mask) v: q (B, H, S, K), k and v (B, H, M, K), mask (S, M) bool, seen (B, M) bool ->
    (B, H, S, K).

    Training on a CPU in half precision, up to 512 keys, takes explicit products: the fused kernel's backward pass is
    slow there.  If causal, 64 queries at a time read only the keys up to the last of them.
    """
    n = q.shape[2]
    if is_causal and seen is not None:
        mask = torch.ones(n, n, dtype=torch.bool, device=q.device).tril()
    if not q.is_cpu or not q.requires_grad or q.dtype == torch.float32 or k.shape[2] > 512:
        q, scale = divide(q, alpha)
        is_causal, mask = is_causal and seen is None, visible(mask, seen)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=is_causal, scale=scale)
    if is_causal:
        mask = torch.ones(n, n, dtype=torch.bool).tril()
    out = []
    for i in range(0, n, 64 if is_causal else n):
        part = q[:, :, i : i + 64 if is_causal else n]
        j = min(i + 64, n) if is_causal else k.shape[2]  # keys read
        rows = None if mask is None else mask[i : i + part.shape[2], :j]
        shown = visible(rows, None if seen is None else seen[:, :j])
        out.append(products(part, k[:, :, :j], v[:, :, :j], shown, alpha))
    return torch.cat(out, 2)


def divide(q, alpha):
    """-> q, and the scale for a fused kernel: None, or PB-Relax's alpha with q divided by it."""
    return (q, None) if alpha is None else (q * (q.shape[-1] ** -0.5 / alpha), alpha)


def products(q, k, v, mask, alpha=None):
    """Attention as two products with a softmax in between, for any leading dimensions."""
    score = (q * (q.shape[-1] ** -0.5 / (alpha or 1))) @ k.transpose(-1, -2)  # (..., S, M)
    if mask is not None:
        score = score + torch.zeros(mask.shape, dtype=score.dtype, device=mask.device).masked_fill_(~mask, -math.inf)
    if alpha is not None:
        score = (score - score.detach().amax(-1, keepdim=True)) * alpha
    return score.softmax(-1) @ v


def two_part_attention(q, k, v, alpha=None):
    """Attention to keys in two tensors without copying them together: q (B, H, S, K), k and v pairs of (B, H, M_i, K).

    1.3 times as fast as gathering all keys, for row masks after a prefix of 256 (measured on a CPU).
    """
    q = q * (q.shape[-1] ** -0.5 / (alpha or 1))
    score = torch.cat([q @ part.mT for part in k], -1).to(torch.promote_types(q.dtype, torch.float32))
    if alpha is not None:
        score = (score - score.amax(-1, keepdim=True)) * alpha
    first, second = score.softmax(-1).to(q.dtype).split([part.shape[2] for part in k], -1)
    return first @ v[0] + second @ v[1]


def banded(q, k, v, mask, alpha=None, seen=None):
    """The whole sequence in bands of queries, each with the prefix and the rows or columns that any of them sees."""
    if mask.by_columns:
        q, k, v = (x.index_select(2, mask.order) for x in (q, k, v))
    k, v = k.split(mask.blocks, 2), v.split(mask.blocks, 2)
    seen = None if seen is None else seen[:, mask.order].split(mask.blocks, 1)
    out = []
    for i, (part, band) in enumerate(zip(q.split(mask.queries, 2), mask.bands)):
        keys, values = (torch.cat([x[j] for j in band], 2) for x in (k, v))
        shown = None if seen is None else torch.cat([seen[j] for j in band], 1)
        out.append(dense_attention(part, keys, values, getattr(mask, f"visible{i}"), alpha=alpha, seen=shown))
    y = torch.cat(out, 2)
    return y.index_select(2, mask.inverse) if mask.by_columns else y


@cache
def compiled_flex():
    """FlexAttention, compiled once for all masks and layers."""
    torch._dynamo.config.recompile_limit = 64  # masks times batch sizes; beyond it the whole score matrix is made
    return torch.compile(flex_attention, dynamic=False)


FLEX = {}  # (head size, dtype, device) -> whether FlexAttention works for it


def can_flex(size, dtype, device):
    """Whether FlexAttention compiles for heads of this size, forward and backward: tried once.

    It needs Triton (none on Windows), a size of 16 or more, and a card whose shared memory holds a block of keys.
    """
    key = size, dtype, device
    if torch.compiler.is_compiling():  # nothing can be tried while a compiler traces: see `prepare`
        return FLEX.get(key, True)
    if key not in FLEX:
        try:
            with torch.inference_mode(False), torch.enable_grad():
                x = torch.zeros(1, 1, 128, size, dtype=dtype, device=device, requires_grad=True)
                compiled_flex()(x, x, x).sum().backward()
            FLEX[key] = True
        except Exception as e:  # of three compilers
            FLEX[key] = False
            why = (str(e).strip().splitlines() or [type(e).__name__])[0]
            warnings.warn(f"FlexAttention does not work here for heads of {size}: dense masks, more memory ({why})")
    return FLEX[key]


def prepare(model, head_size, dtype, device):
    """Before a model's blocks are compiled: try FlexAttention and make the block masks, which would break the graph."""
    for mask in model.modules():
        if isinstance(mask, AttentionMask) and not mask.is_open and device.type == "cuda":
            if can_flex(head_size, dtype, device):
                mask.block_mask(device)


def flex(q, k, v, mask, alpha=None, seen=None):
    """The whole sequence with FlexAttention, rows or columns contiguous so that whole blocks are skipped.

    Hidden pads have a score of -inf, so that one block mask serves all batches.
    """
    q, scale = divide(q, alpha)
    if mask.by_columns:
        q, k, v = (x.index_select(2, mask.order) for x in (q, k, v))
    shown = None if seen is None else seen[:, mask.order]

    def hide(score, b, h, q, k):
        return torch.where(shown[b, k], score, -math.inf)

    score_mod, run = None if seen is None else hide, flex_attention
    if not torch.compiler.is_compiling():  # else it becomes part of the graph at hand
        run = compiled_flex()
    y = run(q, k, v, score_mod, block_mask=mask.block_mask(q.device), scale=scale)
    return y.index_select(2, mask.inverse) if mask.by_columns else y

"""Attention under a mask, by what the device does well; every way gives what the dense mask gives.

    whole sequence    full or none: products, or scaled_dot_product_attention
                      other masks on a GPU: FlexAttention with block masks, compiled
                      other masks on a CPU: bands of queries that read the rows or columns that any of them sees
    one new position  the keys that it sees; compiled, all that it is given, under a row of the mask
    else              the dense mask

All of it is derived from the mask's function in masks.py.

Shapes: B batch, H heads, S queries, M keys, K head size, T text length, h w code grid, L whole sequence.
"""

import math
from functools import cache

import torch
import torch.nn.functional as F

from minit2i.masks import MASKS


class Layout(torch.nn.Module):
    """A mask over the whole sequence, and what follows from it."""

    def __init__(self, name, cfg):
        super().__init__()
        self.name, self.cfg, self.block_masks = name, cfg, {}
        with torch.device("cpu"):  # also when the model is built on another device, or on none
            at, t = torch.arange(cfg.length), cfg.n_prefix
            dense = MASKS[name](at[:, None], at[None], cfg)  # (L, L)
            self.register_buffer("dense", dense, persistent=False)
            ahead = dense & (at > at[:, None])
            self.text_ahead = bool(ahead[:t].any())  # some text is seen by the position that has to predict it
            self.image_ahead = bool(ahead[:, t:].any())  # the same of codes
            self.causal, self.open = dense.equal(at <= at[:, None]), bool(dense.all())
            self.lead = t if bool(dense[t:, :t].all()) else 0  # keys at the start that all codes see
            self.ends = dense.sum(1).cumsum(0).tolist()
            seen = at[:0] if self.causal else dense.nonzero()[:, 1]
            self.register_buffer("seen", seen, persistent=False)  # keys of position 0, of 1, ...
            self.band(dense, at)

    def band(self, dense, at):
        """Bands of queries, each with the lines of keys that any of them sees; a line is a row or a column of codes.

        order (L,) positions with rows or columns together, whichever needs fewer scores, and back (L,) its inverse.
        blocks: sizes of the prefix and of each line; queries: sizes of the bands; bands: the blocks that each band
        reads; visible0, ... bool: what its queries see there; scores: how many there are in all.
        """
        t, self.scores = self.cfg.n_prefix, math.inf
        grid = at[t:].view(self.cfg.grid_h, self.cfg.grid_w)
        for lines in (grid, grid.t()):
            blocks, per = [at[:t], *lines], max(1, 128 // lines.shape[1])  # measured: bands of 64 to 128 are best
            queries = [q for q in (at[:t], *map(torch.flatten, lines.split(per))) if len(q)]  # there may be no prefix
            bands = [[i for i, keys in enumerate(blocks) if dense[q][:, keys].any()] for q in queries]
            keys = [torch.cat([blocks[i] for i in some]) for some in bands]
            scores = sum(len(q) * len(k) for q, k in zip(queries, keys))
            if scores < self.scores:
                self.scores, self.bands, self.by_columns, order = scores, bands, lines is not grid, torch.cat(blocks)
                self.blocks, self.queries = [len(x) for x in blocks], [len(x) for x in queries]
                visible = [dense[q][:, k] for q, k in zip(queries, keys)]
        self.register_buffer("order", order, persistent=False)
        self.register_buffer("back", order.argsort(), persistent=False)
        for i, some in enumerate(visible):
            self.register_buffer(f"visible{i}", some, persistent=False)

    def keys_of(self, position):
        """The keys that one position sees, if the mask is not plainly causal: (M,)."""
        return self.seen[self.ends[position - 1] if position else 0 : self.ends[position]]

    def block_mask(self, device):
        """FlexAttention's blocks of the reordered sequence, made once for each device."""
        if device not in self.block_masks:
            from torch.nn.attention.flex_attention import create_block_mask

            order, cfg = self.order, self.cfg

            def visible(b, h, q, k):
                return MASKS[self.name](order[q], order[k], cfg)

            self.block_masks[device] = create_block_mask(visible, None, None, cfg.length, cfg.length, device=device)
        return self.block_masks[device]


@cache
def compiled_flex():
    from torch.nn.attention.flex_attention import flex_attention

    torch._dynamo.config.recompile_limit = 64  # layouts times batch sizes; past it the whole score matrix is made
    return torch.compile(flex_attention, dynamic=False)


def attend(q, k, v, layout, start=0, alpha=None):
    """Attention of positions start ... start+S-1: q (B, H, S, K), k and v (B, H, start+S, K) -> (B, H, S, K).

    start may be a tensor (1,), for one position: k and v may then hold later positions, too.
    alpha: PB-Relax, CogView 2105.13290 sec. 2.4: softmax((q k^T / alpha - max) * alpha), the division before the product,
    as after it nothing is left to protect.  A fused kernel never shows its scores and subtracts their maximum itself, so
    there the division belongs on q and the factor is the kernel's own scale, which it applies to float32 sums.
    """
    s, stop = q.shape[2], k.shape[2]
    if isinstance(start, torch.Tensor):
        return dense(q, k, v, layout.dense[start, :stop], alpha=alpha)
    if s == 1 and stop > 1:
        seen = None if layout.causal else layout.keys_of(start)
        if seen is None or len(seen) == stop:
            return dense(q, k, v, alpha=alpha)
        lead = layout.lead if start >= layout.lead >= 128 else 0  # measured: fewer are gathered sooner than read apart
        k, v = ((x[:, :, :lead], x.index_select(2, seen[lead:])) for x in (k, v))
        return beside(q, k, v, alpha) if lead else dense(q, k[1], v[1], alpha=alpha)
    if layout.causal and start == 0:
        return dense(q, k, v, causal=True, alpha=alpha)
    if s < layout.cfg.length:
        return dense(q, k, v, layout.dense[start:stop, :stop], alpha=alpha)
    if layout.open:
        return dense(q, k, v, alpha=alpha)
    if q.is_cuda:
        return flex(q, k, v, layout, alpha)
    return banded(q, k, v, layout, alpha)


def dense(q, k, v, mask=None, causal=False, alpha=None):
    """softmax(q k^T / sqrt K + mask) v: q (B, H, S, K), k and v (B, H, M, K), mask (S, M) bool -> (B, H, S, K).

    Training on a CPU in half precision, up to 512 keys, uses products with a softmax in between: the fused kernel's
    backward is slow there.  If causal, 64 queries at a time read only the keys up to the last of them.
    """
    n = q.shape[2]
    if not q.is_cpu or not q.requires_grad or q.dtype == torch.float32 or k.shape[2] > 512:
        q, scale = divided(q, alpha)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, scale=scale)
    if causal:
        mask = torch.ones(n, n, dtype=torch.bool).tril()
    out = []
    for i in range(0, n, 64 if causal else n):
        j = min(i + 64, n) if causal else k.shape[2]  # keys read
        part = q[:, :, i : i + 64 if causal else n]
        seen = None if mask is None else mask[i : i + part.shape[2], :j]
        out.append(products(part, k[:, :, :j], v[:, :, :j], seen, alpha))
    return torch.cat(out, 2)


def divided(q, alpha):
    """-> q, and the scale that a fused kernel is to give its scores."""
    return (q, None) if alpha is None else (q * (q.shape[-1] ** -0.5 / alpha), alpha)


def products(q, k, v, mask, alpha=None):
    """The same as products with a softmax in between, for any leading dimensions."""
    score = (q * (q.shape[-1] ** -0.5 / (alpha or 1))) @ k.transpose(-1, -2)  # (..., S, M)
    if mask is not None:
        score = score + torch.zeros(mask.shape, dtype=score.dtype, device=mask.device).masked_fill_(~mask, -math.inf)
    if alpha is not None:
        score = (score - score.detach().amax(-1, keepdim=True)) * alpha
    return score.softmax(-1) @ v


def beside(q, ks, vs, alpha=None):
    """Attention to keys in two places, which are not copied together: q (B, H, S, K), both of ks and vs (B, H, M_i, K)."""
    q = q * (q.shape[-1] ** -0.5 / (alpha or 1))
    score = torch.cat([q @ k.mT for k in ks], -1).float()
    if alpha is not None:
        score = (score - score.amax(-1, keepdim=True)) * alpha
    first, second = score.softmax(-1).to(q.dtype).split([k.shape[2] for k in ks], -1)
    return first @ vs[0] + second @ vs[1]


def banded(q, k, v, layout, alpha=None):
    """The whole sequence in bands of queries, each with the prefix and the rows or columns that any of them sees."""
    if layout.by_columns:
        q, k, v = (x.index_select(2, layout.order) for x in (q, k, v))
    k, v = k.split(layout.blocks, 2), v.split(layout.blocks, 2)
    out = []
    for i, (part, some) in enumerate(zip(q.split(layout.queries, 2), layout.bands)):
        keys, values = (torch.cat([x[j] for j in some], 2) for x in (k, v))
        out.append(dense(part, keys, values, getattr(layout, f"visible{i}"), alpha=alpha))
    y = torch.cat(out, 2)
    return y.index_select(2, layout.back) if layout.by_columns else y


def flex(q, k, v, layout, alpha=None):
    """The whole sequence with FlexAttention, rows or columns together so that whole blocks are hidden."""
    q, scale = divided(q, alpha)
    if layout.by_columns:
        q, k, v = (x.index_select(2, layout.order) for x in (q, k, v))
    y = compiled_flex()(q, k, v, block_mask=layout.block_mask(q.device), scale=scale)
    return y.index_select(2, layout.back) if layout.by_columns else y

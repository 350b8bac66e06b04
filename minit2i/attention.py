"""Attention under a mask, by what the device does well; every way gives what the dense mask gives.

    whole sequence    full or none: products, or scaled_dot_product_attention
                      other masks on a GPU: FlexAttention with block masks, compiled
                      other masks on a CPU: groups of queries that read the keys that any of them sees
    one new position  the keys that it sees; compiled, where shapes must stay, all of the cache under a row of the mask
    else              the dense mask

All of it is derived from the mask's function in masks.py.

Shapes: B batch, H heads, S queries, M keys, K head size, T text length, h w code grid, L whole sequence,
G groups of g queries and n keys.
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
            self.ends = dense.sum(1).cumsum(0).tolist()
            seen = at[:0] if self.causal else dense.nonzero()[:, 1]
            self.register_buffer("seen", seen, persistent=False)  # keys of position 0, of 1, ...
            self.group(dense, at)

    def group(self, dense, at):
        """Groups of queries, rows or columns together, whichever needs fewer scores.

        order (L,) positions with rows or columns together; queries (G, g) and keys (G, n) positions,
        visible (G, g, n) bool; back (L,) where in the G*g outputs each position's is.
        """
        t, least = self.cfg.n_prefix, math.inf
        grid = at[t:].view(self.cfg.grid_h, self.cfg.grid_w)
        for lines in (grid, grid.t()):
            g = max(1, 32 // lines.shape[1]) * lines.shape[1]  # measured: 32 or more, as small products are slow
            queries = torch.cat([chunks(at[:t], g), chunks(lines.flatten(), g)])  # (G, g)
            some = dense[queries].any(1)  # (G, L)
            n = int(some.sum(1).max())
            if queries.numel() * n < least:
                least, self.by_columns = queries.numel() * n, lines is not grid
                keys = some.byte().argsort(dim=1, descending=True, stable=True)[:, :n]  # (G, n): those seen first
                visible = dense[queries[:, :, None], keys[:, None]]  # (G, g, n)
                back = torch.empty_like(at).scatter_(0, queries.flatten(), torch.arange(queries.numel()))
                order = torch.cat([at[:t], lines.flatten()])
                tensors = dict(order=order, queries=queries.flatten(), keys=keys.flatten(), visible=visible, back=back)
        self.saves = least < at.numel() ** 2 / 2  # measured: else the dense way is as fast
        for name, tensor in tensors.items():
            self.register_buffer(name, tensor, persistent=False)

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


def chunks(positions, g):
    """positions (n,) -> (ceil(n/g), g); the last one is repeated to fill."""
    return positions[torch.arange(-(-len(positions) // g) * g).clamp(max=len(positions) - 1)].view(-1, g)


@cache
def compiled_flex():
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)


def attend(q, k, v, layout, start=0, alpha=None):
    """Attention of positions start ... start+S-1: q (B, H, S, K), k and v (B, H, start+S, K) -> (B, H, S, K).

    start may be a tensor (1,), for one position: k and v then have the whole cache, later positions included.
    alpha: PB-Relax, CogView 2105.13290 sec. 2.4: softmax((q k^T / alpha - max) * alpha), the division before the product,
    as after it nothing is left to protect.  A fused kernel never shows its scores and subtracts their maximum itself, so
    there the division belongs on q and the factor is the kernel's own scale, which it applies to float32 sums.
    """
    s, stop = q.shape[2], k.shape[2]
    if isinstance(start, torch.Tensor):
        return dense(q, k, v, layout.dense[start, :stop], alpha=alpha)
    if s == 1 and stop > 1:
        seen = None if layout.causal else layout.keys_of(start)
        if seen is not None and len(seen) < stop:
            k, v = k.index_select(2, seen), v.index_select(2, seen)
        return dense(q, k, v, alpha=alpha)
    if layout.causal and start == 0:
        return dense(q, k, v, causal=True, alpha=alpha)
    if s < layout.cfg.length:
        return dense(q, k, v, layout.dense[start:stop, :stop], alpha=alpha)
    if layout.open:
        return dense(q, k, v, alpha=alpha)
    if q.is_cuda:
        return flex(q, k, v, layout, alpha)
    return grouped(q, k, v, layout, alpha) if layout.saves else dense(q, k, v, layout.dense, alpha=alpha)


def dense(q, k, v, mask=None, causal=False, alpha=None):
    """softmax(q k^T / sqrt K + mask) v: q (B, H, S, K), k and v (B, H, M, K), mask (S, M) bool -> (B, H, S, K).

    Training on a CPU, up to 512 keys, uses products with a softmax in between: the fused kernel's backward
    is slow there.  If causal, 64 queries at a time read only the keys up to the last of them.
    """
    n = q.shape[2]
    if not q.is_cpu or not q.requires_grad or k.shape[2] > 512:
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


def grouped(q, k, v, layout, alpha=None):
    """The whole sequence in groups of queries, each with the keys that any of its queries sees."""
    groups = layout.visible.shape[0]
    q = q.index_select(2, layout.queries).unflatten(2, (groups, -1))  # (B, H, G, g, K)
    k, v = (x.index_select(2, layout.keys).unflatten(2, (groups, -1)) for x in (k, v))  # (B, H, G, n, K)
    y = products(q, k, v, layout.visible, alpha).flatten(2, 3)  # (B, H, G*g, K)
    return y.index_select(2, layout.back)


def flex(q, k, v, layout, alpha=None):
    """The whole sequence with FlexAttention, rows or columns together so that whole blocks are hidden."""
    q, scale = divided(q, alpha)
    if layout.by_columns:
        q, k, v = (x.index_select(2, layout.order) for x in (q, k, v))
    y = compiled_flex()(q, k, v, block_mask=layout.block_mask(q.device), scale=scale)
    return y.index_select(2, layout.order.argsort()) if layout.by_columns else y

"""What the prior is made of: positions, norms, attention, transformer blocks.

cfg is a gpt.GPTConfig throughout.

Shapes: B batch, T text length, h w code grid, N = h*w, M codes of the shrunk picture, L = T+M+N, S positions at hand,
D width, H heads, K head size, V vocabulary.
"""

import math

import torch
import torch.nn as nn
import torch.nn.functional as F

from minit2i.attention import attend, dense
from minit2i.fp16 import ALPHA, Enter, PBLayerNorm, branch

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
        if torch.is_grad_enabled() or not x.is_cpu:
            return F.rms_norm(x.float(), self.normalized_shape, self.weight.float(), self.eps).to(x.dtype)
        # decoding on a CPU: half the time of what F.rms_norm does there
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
        mean_square = torch.addcmul(self.eps_tensor, norm, norm, value=1 / x.shape[-1])  # eps included
        return (x * mean_square.rsqrt_()).mul_(self.weight).to(x.dtype)


def make_norm(cfg, width):
    if cfg.norm == "rmsnorm":
        return RMSNorm(width, eps=cfg.norm_eps)
    return nn.LayerNorm(width) if cfg.norm == "layernorm" else PBLayerNorm(width)


def unchanged(x):
    """In the place of a norm or a dropout that is not asked for; calling a module takes time when a code is drawn."""
    return x


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


def init_weights(model, n_layer):
    """GPT-2's start: matrices of deviation 0.02, less where branches join the residual stream."""
    for name, p in model.named_parameters():
        if p.dim() >= 2:
            joins = name.endswith(("attn.out.weight", "cross.out.weight", "mlp.down.weight"))
            nn.init.normal_(p, std=0.02 / math.sqrt(2 * n_layer) if joins else 0.02)


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
        """Positions start ... start+S-1, or start (1,) alone.  kv: this layer's cache (keys, values), each (B, H, L, K),
        written here."""
        b, s, d = x.shape
        heads = self.qkv(x).reshape(b, s, -1, self.head_size).transpose(1, 2)  # (B, H + 2 of keys and values, S, K)
        q, k, v = heads.split((self.cfg.n_head, self.n_kv, self.n_kv), 1)
        if self.cfg.qk_norm:
            q, k = self.q_norm(q).to(v.dtype), self.k_norm(k).to(v.dtype)
        if rope is not None:
            q, k = rotate(torch.cat([q, k], 1), *rope).split((self.cfg.n_head, self.n_kv), 1)
        if isinstance(start, torch.Tensor):
            k, v = (old.index_copy_(2, start, new) for old, new in zip(kv, (k, v)))
        elif kv is not None:
            kv[0].narrow(2, start, s).copy_(k), kv[1].narrow(2, start, s).copy_(v)
            k, v = kv[0].narrow(2, 0, start + s), kv[1].narrow(2, 0, start + s)
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
        self.after1, self.after2 = (make_norm(cfg, cfg.n_embd) if cfg.sandwich else unchanged for _ in range(2))
        self.cross = CrossAttention(cfg) if cross else None
        if cross:
            self.norm_cross = make_norm(cfg, cfg.n_embd)
            self.after_cross = make_norm(cfg, cfg.n_embd) if cfg.sandwich else unchanged
        self.drop = nn.Dropout(cfg.dropout) if cfg.dropout else unchanged

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

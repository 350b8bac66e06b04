"""What keeps a prior trained in float16 finite: activations that would overflow, gradients that would vanish.

float16 ends at 65,504, and below 6e-8 everything is zero.  `python -m minit2i.experiments.stability` provokes both.
"""

import torch
import torch.nn as nn
import torch.nn.functional as F

ALPHA = 32  # of PB-Relax attention (attention.py:attend), CogView, arXiv:2105.13290 sec. 2.4


class PBLayerNorm(nn.LayerNorm):
    """LayerNorm that squares nothing large: x is divided by its largest absolute value first.

    PB-Relax, CogView sec. 2.4: LayerNorm(x / c) = LayerNorm(x) but for eps.  The quotient goes through torch's kernel,
    in float32: a quarter of the time of `plain` after the same division (measured on a CPU).
    """

    def forward(self, x):
        y = x / x.detach().abs().amax(-1, keepdim=True).clamp_min(torch.finfo(x.dtype).tiny)
        wide = torch.promote_types(x.dtype, torch.float32)
        gain, bias = self.weight.to(wide), self.bias.to(wide)
        return F.layer_norm(y.to(wide), self.normalized_shape, gain, bias, self.eps).to(x.dtype)

    def plain(self, x):
        """LayerNorm from its definition, in x's precision, for experiments/stability.py: what overflows without it."""
        x = x - x.mean(-1, keepdim=True)
        x = x * (x.square().mean(-1, keepdim=True) + self.eps).rsqrt()
        return x * self.weight.to(x.dtype) + self.bias.to(x.dtype)


def shrink_gradient(x, share):
    """x, with only `share` of its gradient.  CogView sec. 2.4 applies it to the embedding, with 0.1."""
    return x if share == 1 else x * share + x.detach() * (1 - share)


# --- a gradient scale for each residual branch -----------------------------------------------------------
#
#     forward    x ---------------------------------------(+)--->     float32
#                 \\--> enter --> norm, attention --> leave --/
#     backward   <-(+)--------------------------------------- g       float32
#                   \\-- filter, / s <-- float16 <-- * s ----/


class Enter(torch.autograd.Function):
    """Into a branch: identity; backward, NaN and Inf become zero and the gradient is divided by the branch's scale."""

    @staticmethod
    def forward(ctx, x, scale):
        ctx.save_for_backward(scale)
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        return grad.masked_fill(~grad.isfinite(), 0) / ctx.saved_tensors[0], None


class Leave(torch.autograd.Function):
    """Out of a branch, to float32; backward, the gradient is multiplied by the scale and cast to the branch's
    precision."""

    @staticmethod
    def forward(ctx, x, scale):
        ctx.save_for_backward(scale)
        ctx.dtype = x.dtype
        return x.float()

    @staticmethod
    def backward(ctx, grad):
        return (grad * ctx.saved_tensors[0]).to(ctx.dtype), None


def make_scaler(model, cfg, p):
    """The scaler for float16's small gradients: one scale for the loss, or with cfg.block_scale one for each branch.

    p: the training's Processes (device, precision, world, all_reduce).
    """
    if not cfg.block_scale:
        return torch.amp.GradScaler(p.device.type, enabled=p.precision == "fp16")
    if p.precision == "fp16" and not model.cfg.fp32_logits:
        raise ValueError("--block_scale leaves the heads' gradients without a scale: with fp16 it needs --fp32_logits")
    return BlockScaler(model, p)


class BlockScaler:
    """Per-resblock gradient scaling, DALL-E, arXiv:2102.12092 sec. 2.4 and app. D; used like a GradScaler.

    Each resblock (attention and MLP are one each: 2 n_layer scales) starts at M * 2^13 for M processes.  A finite
    update multiplies its scale by 2^(1/1000); a nonfinite one is skipped for that resblock and divides the scale by
    sqrt 2, unless that happened within the last 125 updates; scales stay in M * [2^7, 2^24].  Everything outside the
    branches (embeddings, heads, last norm) has float32 gradients and no scale; its update is skipped when they are
    NaN or Inf.

    p: Processes; they decide together, so scales are the same on all of them.
    """

    def __init__(self, model, p):
        self.p, self.low, self.high = p, p.world * 2.0**7, p.world * 2.0**24
        self.model, self.branches = model, [m for m in model.modules() if hasattr(m, "gradient_scale")]
        self.scales = torch.full((len(self.branches),), p.world * 2.0**13, device=p.device)
        for branch, scale in zip(self.branches, self.scales):
            branch.gradient_scale = scale  # a view: `update` changes it in place
        self.n_updates, self.n_skipped = 0, 0
        self.last_divided = [-125] * len(self.branches)  # the update at which each scale was divided last

    def parameter_groups(self):
        """The parameters of each branch, and those outside all branches."""
        inside = [[*branch.parameters()] for branch in self.branches]
        known = {w for group in inside for w in group}
        return [*inside, [w for w in self.model.parameters() if w not in known]]

    def scale(self, loss):
        """The loss itself: branches scale their own gradients."""
        return loss

    @torch.no_grad()
    def unscale_(self, optimizer):
        """Divide each branch's gradients by its scale; drop those with a NaN or Inf, so the optimizer skips them."""
        groups, nonfinite = self.parameter_groups(), []
        for group, scale in zip(groups, [*self.scales, torch.ones_like(self.scales[0])]):
            grads = [w.grad for w in group if w.grad is not None]
            grads = [g.to_local() if hasattr(g, "to_local") else g for g in grads]  # of a sharded model
            nonfinite.append(torch.stack([~g.isfinite().all() for g in grads]).any())
            torch._foreach_div_(grads, scale)
        self.nonfinite = [n > 0 for n in self.p.all_reduce(torch.stack(nonfinite).float()).tolist()]
        for group, skip in zip(groups, self.nonfinite):
            for w in group if skip else ():
                w.grad = None

    def step(self, optimizer):
        optimizer.step()

    def update(self):
        """The paper's rule, after each step."""
        factor = torch.full_like(self.scales, 2 ** (1 / 1000))
        for i, nonfinite in enumerate(self.nonfinite[:-1]):
            if nonfinite:
                divide = self.n_updates - self.last_divided[i] >= 125
                factor[i] = 0.5**0.5 if divide else 1.0
                self.last_divided[i] = self.n_updates if divide else self.last_divided[i]
        self.scales.mul_(factor).clamp_(self.low, self.high)
        self.n_updates, self.n_skipped = self.n_updates + 1, self.n_skipped + any(self.nonfinite)

    def get_scale(self):
        """1.0: the loss is not scaled (the adaptive weight of a tokenizer's losses asks)."""
        return 1.0

    def state_dict(self):
        """JSON-able; scales are divided by M, as a run may resume on another number of processes."""
        scales = [s / self.p.world for s in self.scales.tolist()]
        counts = {"n_updates": self.n_updates, "n_skipped": self.n_skipped}
        return {"scales": scales, "last_divided": self.last_divided} | counts

    def load_state_dict(self, state):
        self.scales.copy_(torch.tensor(state["scales"]) * self.p.world)
        self.last_divided, self.n_updates, self.n_skipped = (
            state["last_divided"],
            state["n_updates"],
            state["n_skipped"],
        )

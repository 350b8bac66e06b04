"""What keeps a prior trained in float16 finite: activations that would overflow, gradients that would vanish.

float16 ends at 65,504, and below 6e-8 everything is zero.  `python -m minit2i.stability` provokes both.
"""

import torch
import torch.nn as nn

ALPHA = 32  # of PB-Relax attention, CogView, 2105.13290 sec. 2.4


class PBLayerNorm(nn.LayerNorm):
    """LayerNorm in x's own precision that squares nothing large: x is divided by its largest absolute value first.

    PB-Relax, CogView sec. 2.4: LayerNorm(x / c) = LayerNorm(x) but for eps.  torch's layer_norm is computed in float32
    even for float16; this is for devices and kernels that do not.
    """

    def forward(self, x):
        return self.plain(x / x.detach().abs().amax(-1, keepdim=True).clamp_min(torch.finfo(x.dtype).tiny))

    def plain(self, x):
        """LayerNorm from its definition."""
        x = x - x.mean(-1, keepdim=True)
        x = x * (x.square().mean(-1, keepdim=True) + self.eps).rsqrt()
        return x * self.weight.to(x.dtype) + self.bias.to(x.dtype)


def shrink_gradient(x, share):
    """x, through which only `share` of the gradient passes.  CogView sec. 2.4, of the embedding, with 0.1."""
    return x if share == 1 else x * share + x.detach() * (1 - share)


# --- gradient scales for each block ------------------------------------------------------------------------
#
#     forward    x ---------------------------------------(+)--->     float32
#                 \\--> enter --> norm, attention --> leave --/
#     backward   <-(+)--------------------------------------- g       float32
#                   \\-- filter, / s <-- float16 <-- * s ----/


class Enter(torch.autograd.Function):
    """Into a branch: nothing forward; backward the gradient without what is not finite, divided by the block's scale."""

    @staticmethod
    def forward(ctx, x, scale):
        ctx.save_for_backward(scale)
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        return grad.masked_fill(~grad.isfinite(), 0) / ctx.saved_tensors[0], None


class Leave(torch.autograd.Function):
    """Out of a branch, to float32; backward the gradient times the block's scale, then to the branch's precision."""

    @staticmethod
    def forward(ctx, x, scale):
        ctx.save_for_backward(scale)
        ctx.dtype = x.dtype
        return x.float()

    @staticmethod
    def backward(ctx, grad):
        return (grad * ctx.saved_tensors[0]).to(ctx.dtype), None


def branch(f, x, scale):
    """f(x), its gradients computed times `scale` (a tensor), or as they are if that is None."""
    return f(x) if scale is None else Leave.apply(f(Enter.apply(x, scale)), scale)


def make_scaler(model, cfg, p):
    """What keeps small gradients of float16: a scale of the loss, or of each block if cfg.block_scale."""
    if not cfg.block_scale:
        return torch.amp.GradScaler(p.device.type, enabled=p.precision == "fp16")
    if p.precision == "fp16" and not model.cfg.fp32_logits:
        raise ValueError("block_scale leaves the heads' gradients without a scale: under fp16 it needs --fp32_logits")
    return BlockScaler(model, p)


class BlockScaler:
    """Per-resblock gradient scaling, DALL-E, 2102.12092 sec. 2.4 and app. B.2, to be used as a GradScaler.

    Every block has a scale, which starts at M * 2^13 (M processes); an update with finite gradients multiplies it by
    2^(1/1000); one with others is skipped for that block, and divides its scale by sqrt 2 if none has within 125 updates;
    it stays in M * [2^7, 2^24].  The paper does not say what a resblock is; here both branches of a block share its scale.
    What lies outside the blocks (embeddings, heads, the last norm) has float32 gradients and no scale; its update is
    skipped when they are not finite.

    p: Processes, which decide together, as the scales must stay the same everywhere.
    """

    def __init__(self, model, p):
        self.p, self.low, self.high = p, p.world * 2.0**7, p.world * 2.0**24
        self.scales = torch.full((len(model.all_blocks()),), p.world * 2.0**13, device=p.device)
        self.model, model.block_scales = model, self.scales
        self.updates, self.skips = 0, 0
        self.divided = [-125] * len(self.scales)  # the last time each was, in updates

    def parts(self):
        """The parameters of each block, and of the rest."""
        blocks = [[*block.parameters()] for block in self.model.all_blocks()]
        inside = {w for part in blocks for w in part}
        return [*blocks, [w for w in self.model.parameters() if w not in inside]]

    def scale(self, loss):
        return loss

    @torch.no_grad()
    def unscale_(self, optimizer):
        """Divide each block's gradients by its scale; without gradients, the optimizer skips what is not finite."""
        parts, bad = self.parts(), []
        for part, scale in zip(parts, [*self.scales, torch.ones_like(self.scales[0])]):
            grads = [w.grad for w in part if w.grad is not None]
            grads = [g.to_local() if hasattr(g, "to_local") else g for g in grads]  # of a sharded model
            bad.append(torch.stack([~g.isfinite().all() for g in grads]).any())
            torch._foreach_div_(grads, scale)
        self.bad = [n > 0 for n in self.p.total(torch.stack(bad).float()).tolist()]
        for part, bad in zip(parts, self.bad):
            for w in part if bad else ():
                w.grad = None

    def step(self, optimizer):
        optimizer.step()

    def update(self):
        """The paper's rule, after each step."""
        factor = torch.full_like(self.scales, 2 ** (1 / 1000))
        for i, bad in enumerate(self.bad[:-1]):
            if bad:
                divide = self.updates - self.divided[i] >= 125
                factor[i] = 0.5**0.5 if divide else 1.0
                self.divided[i] = self.updates if divide else self.divided[i]
        self.scales.mul_(factor).clamp_(self.low, self.high)
        self.updates, self.skips = self.updates + 1, self.skips + any(self.bad)

    def get_scale(self):
        """A number that changes when an update was skipped."""
        return self.skips

    def state_dict(self):
        """JSON-able; the scales without M, as another number of processes may go on."""
        scales = [s / self.p.world for s in self.scales.tolist()]
        return {"scales": scales, "divided": self.divided, "updates": self.updates, "skips": self.skips}

    def load_state_dict(self, state):
        self.scales.copy_(torch.tensor(state["scales"]) * self.p.world)
        self.divided, self.updates, self.skips = list(state["divided"]), state["updates"], state["skips"]

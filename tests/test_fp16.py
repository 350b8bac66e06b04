"""float16 remedies: each on an input that overflows or underflows without it, against float64."""

import math
from types import SimpleNamespace

import pytest
import torch
from priors import CASES, GPT2, batch, big, build

from minit2i.attention import AttentionMask, Layout
from minit2i.fp16 import BlockScaler, Enter, Leave, PBLayerNorm, make_scaler, shrink_gradient
from minit2i.gpt import MODELS, Residual
from minit2i.train import Processes, TrainConfig, make_optimizer, optimizer_step

PROCS = Processes("cpu", "fp32")
SMALL = GPT2 | dict(n_layer=3, n_embd=32, text_len=4, grid_h=3, grid_w=4)
CAUSAL = AttentionMask("causal", Layout(4, 3, 4))


# --- norms, the embedding's gradient, float32 logits ---


def test_pb_layernorm_of_large_activations():
    norm = PBLayerNorm(64)
    torch.nn.init.normal_(norm.weight)
    x = (3000 * torch.randn(5, 64)).half()
    expected = torch.nn.functional.layer_norm(x.double(), (64,), norm.weight.double(), norm.bias.double())
    assert norm(x).dtype == torch.float16
    # values up to about 10, a handful of roundings to 11 bits
    assert torch.allclose(norm(x).double(), expected, atol=0.02)
    assert not torch.allclose(norm.plain(x).double(), expected, atol=1)  # the squares overflow
    assert norm(torch.zeros(1, 64)).equal(norm.bias[None])


def test_pb_layernorm_equals_layernorm_up_to_eps():
    norm = PBLayerNorm(64).double()
    x, inputs = torch.randn(3, 64, dtype=torch.float64), []
    for f in (norm, lambda x: torch.nn.LayerNorm.forward(norm, x)):
        leaf = x.clone().requires_grad_()
        y = f(leaf)
        inputs.append((y.detach(), *torch.autograd.grad((y * x.flip(0)).sum(), leaf)))
    for a, b in zip(*inputs):  # eps 1e-5 beside a variance of 1, or of 1 / max^2 = 1/16
        assert torch.allclose(a, b, atol=1e-3)


def test_shrink_gradient_keeps_the_value():
    x = torch.randn(5, dtype=torch.float64, requires_grad=True)
    y = shrink_gradient(x, 0.1)
    assert torch.allclose(y, x, rtol=1e-15) and shrink_gradient(x, 1) is x
    (grad,) = torch.autograd.grad((y * torch.arange(5)).sum(), x)
    assert torch.allclose(grad, 0.1 * torch.arange(5.0, dtype=torch.float64))


def test_embed_grad_shrinks_the_embeddings_gradient_alone():
    grads = []
    for share in (1.0, 0.1):
        torch.manual_seed(0)
        model = build(embed_grad=share, **SMALL).double()
        loss = sum(model(batch(model)).values())
        loss.backward()
        grads.append((loss.detach(), model.embedding.weight.grad, model.grid.row.grad))
    (loss, e, rest), (loss2, e2, rest2) = grads  # the loss itself is summed in float32
    assert torch.allclose(loss, loss2, rtol=1e-5) and torch.allclose(e2, 0.1 * e, rtol=1e-5, atol=1e-6 * e.abs().max())
    assert torch.allclose(rest, rest2, rtol=1e-5, atol=1e-6 * rest.abs().max())


def test_sandwich_keeps_the_residual_stream_in_float16():
    """Branches whose outputs float16 holds, but not their sum."""
    for sandwich in (False, True):
        torch.manual_seed(0)
        model = build(sandwich=sandwich, **SMALL)
        with torch.no_grad():
            for block in model.blocks:
                block.mlp.f.up.weight *= 100
                block.mlp.f.down.weight *= 2e4
        x, largest, model = 15000 * torch.randn(1, 16, 32).half(), [], model.half()
        for block in model.blocks:
            block.mlp.f.register_forward_hook(lambda m, args, out: largest.append(float(out.detach().abs().max())))
            x = block(x, CAUSAL).detach()
        assert x.isfinite().all() == sandwich and largest[0] < 65504


def test_embeddings_norms_and_logits_stay_float32():
    """Under autocast a change too small for float16 passes the blocks, and logits beyond 65,504 are right."""
    model = build(fp32_logits=True, **SMALL)
    with torch.autocast("cpu", torch.float16), torch.no_grad():
        x = model.embedding(batch(model)["text"])
        small = 1e-6 * x.abs().amax()
        moved = model.blocks[0](x + small, CAUSAL)
        assert x.dtype == moved.dtype == model.norm(moved).dtype == torch.float32
        assert not moved.equal(model.blocks[0](x, CAUSAL))
        model.image_head.weight.fill_(500)
        hidden = torch.full((1, 1, 32), 10.0)
        assert model.image_head(hidden).eq(160_000).all()
        model.image_head.fp32 = False
        assert model.image_head(hidden).isinf().all()


# --- a gradient scale for each residual branch ---


def gradients(scale, factor, dtype=torch.float16):
    """Of a block's weights and its input, of a loss times `factor`, in float16 autocast or in float64."""
    torch.manual_seed(0)
    model = build(**SMALL).to(torch.float64 if dtype == torch.float64 else torch.float32)
    block = model.blocks[0]
    for branch in (block.attn, block.mlp):
        branch.gradient_scale = None if scale is None else torch.tensor(scale)
    x, weight = (torch.randn(2, 16, 32).to(model.embedding.weight.dtype).requires_grad_() for _ in range(2))
    with torch.autocast("cpu", torch.float16, enabled=dtype == torch.float16):
        y = block(x, CAUSAL)
    (y * weight.detach()).sum().mul(factor).backward()
    return [w.grad.double() / factor / (scale or 1) for w in block.parameters()], x.grad.double() / factor


def test_gradients_that_underflow_arrive_with_a_scale():
    exact, x_exact = gradients(None, 1.0, torch.float64)
    lost, _ = gradients(None, 1e-9)
    assert sum(g.abs().sum() for g in lost) < 0.1 * sum(g.abs().sum() for g in exact)
    arrived, x_arrived = gradients(2.0**27, 1e-9)
    for a, e in zip(arrived, exact):  # sums of products that are each rounded to 11 bits
        assert (a - e).norm() < 0.02 * e.norm()
    assert (x_arrived - x_exact).norm() < 0.02 * x_exact.norm()


@pytest.mark.parametrize("scale, expected", [(2.0**8, 101), (2.0**13, 1)])
def test_nonfinite_gradients_stay_in_their_branch(scale, expected):
    """x + 100 x with the branch in float16: 100 * 2^13 overflows, and only the identity's gradient is left."""
    x, scale = torch.ones(4, requires_grad=True), torch.tensor(scale)
    w = torch.full((4,), 100.0, dtype=torch.float16, requires_grad=True)
    (x + Leave.apply(Enter.apply(x, scale).half() * w, scale)).sum().backward()
    assert w.grad.eq(scale).all() and x.grad.eq(expected).all()


def test_nan_gradients_are_filtered():
    x = torch.ones(4, requires_grad=True)
    Enter.apply(x, torch.tensor(2.0)).backward(torch.tensor([1.0, math.nan, math.inf, -math.inf]))
    assert x.grad.tolist() == [0.5, 0, 0, 0]


@pytest.mark.parametrize("model", MODELS)
def test_every_branch_has_a_scale(model):
    model = build(model=model, n_layer=3)
    scaler = BlockScaler(model, PROCS)
    branches = [m for m in model.modules() if isinstance(m, Residual)]
    assert scaler.branches == branches and scaler.scales.eq(2.0**13).all()
    if type(model).Config is None:
        assert len(branches) == 2 * 3
    *inside, outside = scaler.parameter_groups()
    assert sum(map(len, [*inside, outside])) == len([*model.parameters()]) and model.embedding.weight in {*outside}
    assert not {*outside} & {w for block in model.modules() if isinstance(block, Residual) for w in block.parameters()}
    for branch, scale in zip(branches, scaler.scales):
        assert branch.gradient_scale.data_ptr() == scale.data_ptr()  # updates reach it


@pytest.mark.parametrize("condition", CASES)
def test_scales_change_no_gradient(condition):
    """In float64 nothing overflows.  A memory's gradient passes a branch with another scale than the encoder's."""
    model = big(build(condition=condition, **GPT2 | dict(grid_h=4, grid_w=2))).double()
    inputs = batch(model)

    def grads():
        model.zero_grad()
        sum(model(inputs).values()).backward()
        return {k: p.grad.clone() for k, p in model.named_parameters()}

    plain, scaler = grads(), BlockScaler(model, PROCS)
    scaler.scales.copy_(2.0 ** torch.randint(-3, 6, scaler.scales.shape))
    scaled = grads()
    scale_of = {w: scale for group, scale in zip(scaler.parameter_groups(), scaler.scales) for w in group}
    for k, w in model.named_parameters():  # a branch's output becomes float32
        found = scaled[k] / scale_of.get(w, 1)
        assert torch.allclose(found, plain[k], rtol=1e-4, atol=1e-5 * plain[k].abs().max()), k


def test_the_rule_equals_a_loop():
    """arXiv:2102.12092 app. D over 700 updates with random overflows: never, rarely, and nearly always."""
    scaler = BlockScaler(build(n_layer=2), PROCS)
    rates = torch.tensor([0.0, 0.02, 0.9, 0.5])
    overflows = torch.rand(700, 4, generator=torch.Generator().manual_seed(3)) < rates
    scales, last = [2.0**13] * 4, [None] * 4
    for update, nonfinite in enumerate(overflows.tolist()):
        scaler.nonfinite = [*nonfinite, False]
        scaler.update()
        for i in range(4):
            if not nonfinite[i]:
                scales[i] *= 2 ** (1 / 1000)
            elif last[i] is None or update - last[i] >= 125:
                scales[i], last[i] = scales[i] / math.sqrt(2), update
            scales[i] = min(max(scales[i], 2.0**7), 2.0**24)
    # 700 products in float32
    assert torch.allclose(scaler.scales, torch.tensor(scales), rtol=700 * torch.finfo(torch.float32).eps)
    assert scales[0] > 2.0**13 > scales[1] > scales[3] > scales[2]
    assert scaler.n_updates == 700 and scaler.n_skipped == overflows.any(1).sum()


@pytest.mark.parametrize("world", [1, 8])
def test_scales_stay_in_the_papers_range(world):
    procs = SimpleNamespace(world=world, device=torch.device("cpu"), all_reduce=lambda x: x)
    scaler = BlockScaler(build(n_layer=1), procs)
    assert scaler.scales.eq(world * 2.0**13).all()
    for nonfinite, end in ((False, 2.0**24), (True, 2.0**7)):
        for _ in range(20):
            scaler.scales *= 0.5 if nonfinite else 2.0
            scaler.nonfinite = [nonfinite] * 3
            scaler.update()
        assert scaler.scales.eq(world * end).all()
    assert scaler.state_dict()["scales"] == [2.0**7] * 2  # of one process


def test_an_overflowing_branch_skips_its_update():
    """All other weights are updated as without scales."""
    cfg = TrainConfig("", lr=1e-2, warmup=0, clip=0, steps=10)
    ends, grads = [], []
    for scaled in (False, True):
        torch.manual_seed(0)
        model = build(**SMALL)
        optimizer = make_optimizer(model, cfg)
        scaler = BlockScaler(model, PROCS) if scaled else torch.amp.GradScaler("cpu", enabled=False)
        before = {k: w.detach().clone() for k, w in model.named_parameters()}
        (scaler.scale(sum(model(batch(model)).values())) / 10).backward()
        grads.append(model.blocks[0].mlp.f.up.weight.grad / (2**13 if scaled else 1))
        if scaled:
            model.blocks[1].mlp.f.up.weight.grad[0, 0] = math.inf
        optimizer_step(model, optimizer, scaler, cfg, 0)
        ends.append(dict(model.named_parameters()))
    assert torch.allclose(*grads, rtol=1e-3, atol=1e-5 * float(grads[0].abs().max()))
    for k, w in ends[1].items():
        if k.startswith("blocks.1.mlp."):
            assert w.equal(before[k])
        else:  # AdamW's first step is lr * sign: 1e-2, unless the gradient is rounding alone
            assert (w - ends[0][k]).abs().gt(1e-4).float().mean() < 0.02 and not w.equal(before[k]), k
    skipped = scaler.scales < 2.0**13
    assert skipped.tolist() == [False, False, False, True, False, False] and scaler.n_skipped == 1
    assert scaler.scales[~skipped].gt(2.0**13).all()


def test_nonfinite_gradients_outside_the_branches_skip_those():
    model = build(n_layer=1)
    scaler = BlockScaler(model, PROCS)
    sum(model(batch(model)).values()).backward()
    model.image_head.weight.grad[0, 0] = math.nan
    scaler.unscale_(None)
    assert scaler.nonfinite == [False, False, True]
    assert model.embedding.weight.grad is None and model.blocks[0].mlp.f.up.weight.grad is not None
    scaler.update()
    assert scaler.scales.gt(2.0**13).all() and scaler.n_skipped == 1


def test_state_dict():
    first, second = (BlockScaler(build(n_layer=2), PROCS) for _ in range(2))
    for nonfinite in (True, False, True):
        first.nonfinite = [nonfinite, False, False, False, False]
        first.update()
    second.load_state_dict(first.state_dict())
    assert second.scales.equal(first.scales) and second.last_divided == [0, -125, -125, -125]
    assert (second.n_updates, second.n_skipped, second.get_scale()) == (3, 2, 1.0)
    assert second.branches[0].gradient_scale == second.scales[0]


def test_make_scaler():
    def cfg(block_scale):
        return SimpleNamespace(block_scale=block_scale)

    half = SimpleNamespace(world=1, device=torch.device("cpu"), precision="fp16")
    with pytest.raises(ValueError, match="needs --fp32_logits"):
        make_scaler(build(), cfg(True), half)
    assert isinstance(make_scaler(build(fp32_logits=True), cfg(True), half), BlockScaler)
    assert make_scaler(build(), cfg(False), half).is_enabled()
    assert not make_scaler(build(), cfg(False), PROCS).is_enabled()

"""float16 remedies: each on an input that overflows or vanishes without it, beside float64."""

import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from minit2i import stability
from minit2i.attention import Layout, attend, products
from minit2i.fp16 import ALPHA, BlockScaler, PBLayerNorm, branch, shrink_gradient
from minit2i.gpt import GPT, GPTConfig
from minit2i.masks import MASKS
from minit2i.train import Processes, TrainConfig, make_optimizer, optimizer_step

TINY = GPTConfig(
    n_layer=3, n_head=2, n_embd=32, text_len=4, n_vocab=11, n_codes=7, grid_h=3, grid_w=4, qk_norm=False, mlp="gelu"
)


def batch(cfg, b=3):
    g = torch.Generator().manual_seed(1)
    text = torch.randint(0, cfg.n_vocab, (b, cfg.text_len), generator=g)
    return text, torch.randint(0, cfg.n_codes, (b, cfg.n_image), generator=g)


def test_scores_that_overflow_float16_are_finite_with_pb_relax():
    q, k, v = (torch.randn(2, 2, 20, 16, dtype=torch.float64) for _ in range(3))
    q, k = 250 * q, 250 * k
    mask = torch.ones(20, 20, dtype=torch.bool).tril()
    half = [x.half() for x in (q, k, v)]
    expected = products(*(x.double() for x in half), mask)
    assert expected.isfinite().all() and not products(*half, mask).isfinite().all()
    relaxed = products(*half, mask, ALPHA)
    assert relaxed.dtype == torch.float16
    close = (relaxed - expected).abs().amax(-1) < 0.05  # but for pairs of scores that float16 cannot tell apart
    assert relaxed.isfinite().all() and close.float().mean() > 0.9
    late = (((half[0] @ half[1].mT).masked_fill(~mask, -math.inf) / (4 * ALPHA)).softmax(-1)) @ half[2]
    assert not late.isfinite().all()  # divided after the product: nothing is protected


@pytest.mark.parametrize("name", MASKS)
def test_pb_relax_changes_no_result(name):
    """Every way of attention, also where a fused kernel gets the division on q and the factor as its scale."""
    layout = Layout(name, replace(TINY, grid_h=7, grid_w=12))
    q, k, v = (torch.randn(1, 2, layout.cfg.length, 16, dtype=torch.float64) for _ in range(3))
    for way in (q, q.clone().requires_grad_()):  # fused without gradients, products with
        assert torch.allclose(attend(way, k, v, layout, alpha=ALPHA), attend(way, k, v, layout))


def test_layernorm_of_large_activations_is_right_with_pb_relax():
    norm = PBLayerNorm(64)
    torch.nn.init.normal_(norm.weight)
    x = (3000 * torch.randn(5, 64)).half()
    expected = torch.nn.functional.layer_norm(x.double(), (64,), norm.weight.double(), norm.bias.double())
    assert torch.allclose(norm(x).double(), expected, atol=2e-2) and norm(x).dtype == torch.float16
    assert not torch.allclose(norm.plain(x).double(), expected, atol=1)  # the squares overflow
    x = torch.randn(3, 64)
    assert torch.allclose(norm(x), torch.nn.LayerNorm.forward(norm, x), atol=1e-3)
    assert norm(torch.zeros(1, 64)).equal(norm.bias[None])


def test_sandwich_keeps_the_residual_stream_in_float16():
    """Branches whose outputs float16 holds, but not their sum."""
    for sandwich in (False, True):
        torch.manual_seed(0)
        model = GPT(replace(TINY, sandwich=sandwich, norm="layernorm"))
        with torch.no_grad():
            for block in model.blocks:
                block.mlp.up.weight *= 100
                block.mlp.down.weight *= 2e4
        x = 15000 * torch.randn(1, 16, 32).half()
        largest, model = [], model.half()
        for block in model.blocks:
            block.mlp.register_forward_hook(lambda m, args, out: largest.append(float(out.detach().abs().max())))
            x = block(x, model.layouts["full"]).detach()
        assert x.isfinite().all() == sandwich and largest[0] < 65504


def test_the_embedding_gets_its_share_of_the_gradient_and_the_rest_all():
    text, codes = batch(TINY)
    grads = []
    for share in (1.0, 0.1):
        torch.manual_seed(0)
        model = GPT(replace(TINY, embed_grad=share))
        loss = sum(model(text, codes))
        loss.backward()
        grads.append((loss.detach(), model.embedding.weight.grad, model.pos_row.grad))
    (loss, e, rest), (loss2, e2, rest2) = grads
    assert torch.allclose(loss, loss2) and torch.allclose(e2, 0.1 * e, rtol=1e-3, atol=1e-6)
    assert torch.allclose(rest, rest2, rtol=1e-3, atol=1e-5)
    assert shrink_gradient(e, 1) is e


def test_embeddings_gains_and_logits_stay_float32():
    """Under autocast: a change too small for float16 reaches the logits; logits beyond 65,504 are right."""
    model = GPT(replace(TINY, fp32_logits=True))
    text, codes = batch(TINY)
    with torch.autocast("cpu", torch.float16), torch.no_grad():
        x = model.embedding(text)
        moved = model.blocks[0](x + 1e-6, model.layouts["full"], 0)
        assert (
            x.dtype == moved.dtype == torch.float32 and (x + 1e-6 != x).any() and ((x + 1e-6).half() == x.half()).any()
        )
        assert model.norm(moved).dtype == torch.float32
        model.image_head.weight.fill_(500)
        hidden = torch.full((1, 1, 32), 10.0)
        assert model.image_head(hidden).eq(160_000).all()
        model.image_head.fp32 = False
        assert model.image_head(hidden).isinf().all()


def gradients(scale, factor, dtype=torch.float16):
    """Of a block's weights under float16 autocast (or in another precision), of a loss times factor."""
    torch.manual_seed(0)
    model = GPT(replace(TINY, n_layer=1)).to(torch.float64 if dtype == torch.float64 else torch.float32)
    block, like = model.blocks[0], model.embedding.weight.detach()
    x, weight = (torch.randn(2, 16, 32).to(like).requires_grad_() for _ in range(2))
    with torch.autocast("cpu", torch.float16, enabled=dtype == torch.float16):
        y = block(x, model.layouts["full"], scale=None if scale is None else torch.tensor(scale))
    (y * weight.detach()).sum().mul(factor).backward()
    return [w.grad.double() / factor / (scale or 1) for w in block.parameters()], x.grad.double() / factor


def test_gradients_that_underflow_arrive_with_a_scale_of_their_block():
    exact, x_exact = gradients(None, 1.0, torch.float64)
    lost, _ = gradients(None, 1e-9)
    assert sum(g.abs().sum() for g in lost) < 0.1 * sum(g.abs().sum() for g in exact)
    arrived, x_arrived = gradients(2.0**27, 1e-9)
    for a, e in zip(arrived, exact):
        assert (a - e).norm() < 0.02 * e.norm()
    assert (x_arrived - x_exact).norm() < 0.02 * x_exact.norm()  # unscaled again on the identity path


def test_what_is_not_finite_in_a_block_stays_there():
    """An overflow in a block's backward pass reaches its own weights, and neither x nor what comes before it."""
    x = torch.ones(4, requires_grad=True)
    w = torch.full((4,), 100.0, dtype=torch.float16, requires_grad=True)
    y = x + branch(lambda x: x.half() * w, x, torch.tensor(2.0**13))
    y.sum().backward()
    assert w.grad.eq(2.0**13).all() and x.grad.eq(1).all()  # 100 * 2^13 is too much: only the identity's gradient
    x.grad = w.grad = None
    y = x + branch(lambda x: x.half() * w, x, torch.tensor(2.0**8))
    y.sum().backward()
    assert x.grad.eq(101).all()


def test_the_rule_of_the_block_scales_equals_a_loop():
    """2102.12092 app. B.2, by hand over 700 updates with overflows at random."""
    model = GPT(TINY)
    scaler = BlockScaler(model, Processes("cpu"))
    draws = torch.rand(700, 3, generator=torch.Generator().manual_seed(3)) < torch.tensor([0.0, 0.02, 0.9])
    scales, last = [2.0**13] * 3, [None] * 3
    for update, bad in enumerate(draws.tolist()):
        scaler.bad = [*bad, False]
        scaler.update()
        for i in range(3):
            if not bad[i]:
                scales[i] *= 2 ** (1 / 1000)
            elif last[i] is None or update - last[i] >= 125:
                scales[i], last[i] = scales[i] / math.sqrt(2), update
            scales[i] = min(max(scales[i], 2.0**7), 2.0**24)
    assert torch.allclose(model.block_scales, torch.tensor(scales), rtol=1e-4)
    assert scales[0] > 2.0**13 > scales[1] > scales[2]
    for bad, end in ((False, 2.0**24), (True, 2.0**7)):
        for _ in range(20):
            scaler.scales *= 0.5 if bad else 2.0
            scaler.bad = [bad] * 4
            scaler.update()
        assert scaler.scales.eq(end).all()


def test_a_block_that_overflowed_is_not_updated_and_the_others_are_as_without_scales():
    cfg = TrainConfig("", lr=1e-2, warmup=0, clip=0, steps=10)
    text, codes = batch(TINY)
    ends = []
    for scaled in (False, True):
        torch.manual_seed(0)
        model = GPT(TINY)
        optimizer = make_optimizer(model, cfg)
        scaler = BlockScaler(model, Processes("cpu")) if scaled else torch.amp.GradScaler("cpu", enabled=False)
        before = {k: w.detach().clone() for k, w in model.named_parameters()}
        (sum(model(text, codes)) / 10).backward()
        if scaled:
            assert torch.allclose(model.blocks[0].mlp.up.weight.grad / 2**13, grads, rtol=1e-3, atol=1e-7)  # noqa: F821
            model.blocks[1].mlp.up.weight.grad[0, 0] = math.inf
        else:
            grads = model.blocks[0].mlp.up.weight.grad.clone()  # noqa: F841
        optimizer_step(model, optimizer, scaler, cfg, 0)
        ends.append(dict(model.named_parameters()))
    for k, w in ends[1].items():
        if k.startswith("blocks.1."):
            assert w.equal(before[k])
        else:
            assert torch.allclose(w, ends[0][k], atol=2e-4) and not w.equal(before[k]), k
    assert model.block_scales[1] < 2.0**13 < model.block_scales[0]
    again = BlockScaler(GPT(TINY), Processes("cpu"))
    again.load_state_dict(scaler.state_dict())
    assert again.scales.equal(scaler.scales) and again.divided == [-125, 0, -125] and again.get_scale() == 1


def test_the_toy_experiment_shows_that_the_remedies_help(tmp_path):
    args = SimpleNamespace(steps=3, batch=2, lr=2e-3, scores=600, branches=300)
    stability_runs = {name: stability.train(args, **stability.RUNS[name]) for name in ("none", "all")}
    assert len(stability_runs["none"][0]) < 3 and stability_runs["none"][1]
    assert len(stability_runs["all"][0]) == 3
    shown = stability.curves(stability_runs, 3)
    assert len(shown["all"]) == 1 and [k for k in shown if k.startswith("none (ended after ")]
    assert stability.plot(shown, "loss").size == (560, 340)

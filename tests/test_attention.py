"""Attention: each mask against a loop over the grid, every way of computing it against the dense mask."""

import math
import warnings

import pytest
import torch
import torch.nn.functional as F
from priors import batch, build
from torch._dynamo.utils import counters
from torch.nn.attention.flex_attention import flex_attention

from minit2i import attention
from minit2i.attention import MASK_ORDERS, MASKS, AttentionMask, Layout, attend, banded, dense_attention, flex
from minit2i.attention import layer_masks, products
from minit2i.fp16 import ALPHA
from minit2i.parallel import compile_blocks

# Rounding of float32 attention: a score sums K = 16 products, an output up to 360 values, of size about 1.
ATOL = {torch.float64: 1e-12, torch.float32: 400 * torch.finfo(torch.float32).eps}
GRIDS = [(2, 3), (7, 4), (3, 13), (12, 12)]


def dense(name, layout):
    return AttentionMask(name, layout).dense


def qkv(length, dtype=torch.float64, grad=False):
    return [torch.randn(2, 2, length, 16, dtype=dtype, requires_grad=grad) for _ in range(3)]


def reference(q, k, v, mask, seen=None):
    """Attention as its formula has it; seen (B, M): keys of each sample that are not hidden."""
    mask = mask if seen is None else mask & seen[:, None, None]
    return (q @ k.mT / 4).masked_fill(~mask, -math.inf).softmax(-1) @ v


def pads(length):
    """Two samples, two and four of the first five positions hidden: -> seen (2, L)."""
    seen = torch.ones(2, length, dtype=torch.bool)
    seen[0, 3:5] = seen[1, 1:5] = False
    return seen


# --- the masks ---


def crop(i, n, size):
    """Taming's crop of `size` around i: centred, but pushed inside n."""
    first = i - size // 2
    while first + size > n:
        first -= 1
    return range(max(0, first), max(0, first) + size)


def in_window(r, c, i, j, h, w):
    """Whether (i, j) is in an 11x11 window around (r, c), whose columns wrap into the rows beside."""
    return any((r + dr) * w + c + dc == i * w + j for dr in range(-5, 6) for dc in range(-5, 6))


def in_region(r, c, i, j, h, w):
    """CogView's three regions but for the text: six blocks of codes, or a pivot."""
    block = next(n for n in range(1, 999) if 32 * (n + 1) > h * w)
    return (r * w + c) // block - (i * w + j) // block <= 5 or ((i * w + j) ** 2 * 40503 % 65536) * 16 < 3 * 65536


LOOPS = {  # whether the code in row r, column c sees the earlier code in row i, column j of an h x w grid
    "causal": lambda r, c, i, j, h, w: True,
    "row": lambda r, c, i, j, h, w: i == r or (i == r - 1 and j >= c),
    "column": lambda r, c, i, j, h, w: j == c,
    "conv": in_window,
    "window": lambda r, c, i, j, h, w: i in crop(r, h, 4) and j in crop(c, w, 4),
    "prefix": lambda r, c, i, j, h, w: True,
    "three_region": in_region,
    "bidirectional": lambda r, c, i, j, h, w: True,
}


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("name", MASKS)
def test_masks_equal_a_loop(name, grid, monkeypatch):
    monkeypatch.setattr(attention, "WINDOW", 4)
    (h, w), p = grid, 3
    expected = torch.zeros(p + h * w, p + h * w, dtype=torch.bool)
    for q in range(p + h * w):
        for k in range(p + h * w):
            if name == "bidirectional":
                seen = True
            elif k > q:
                seen = name == "prefix" and q < p and k < p
            else:
                seen = k < p or k == q or LOOPS[name](*divmod(q - p, w), *divmod(k - p, w), h, w)
            expected[q, k] = seen
    assert dense(name, Layout(p, h, w)).equal(expected)


def test_a_new_mask_needs_a_loop():
    assert set(LOOPS) == set(MASKS)


def test_sizes_of_the_papers():
    assert attention.KERNEL == 11  # DALL-E app. B.1
    assert dense("window", Layout(0, 16, 16))[-1].sum() == attention.WINDOW**2  # the corner sees its whole crop
    assert dense("row", Layout(0, 16, 16))[-1].sum() == 17 and dense("column", Layout(0, 16, 16))[-1].sum() == 16


def test_three_regions_are_as_large_as_in_the_release():
    """CogView app. B: of 4,096 codes a window of six blocks of 128, and 768 pivots, here within a tenth."""
    mask = dense("three_region", Layout(4, 64, 64))
    last, codes = mask[-1, 4:], torch.arange(4096)
    assert mask[:, :4].tril().equal(mask[:, :4]) and mask[4:, :4].all() and last[-768:].all()
    assert abs(int(mask[-1, 4 : 4 + 3072].sum()) / (768 * 3072 / 4096) - 1) < 0.1
    assert mask[4:, 4:].equal((codes <= codes[:, None]) & (last | (codes[:, None] // 128 - codes // 128 < 6)))


@pytest.mark.parametrize("name", MASKS)
def test_what_masks_show_ahead(name):
    mask = AttentionMask(name, Layout(3, 9, 12))
    ahead = mask.dense.triu(1)
    assert mask.prefix_ahead == ahead[:3].any() and mask.codes_ahead == ahead[:, 3:].any()
    assert mask.prefix_ahead == (name in ("prefix", "bidirectional")) and mask.codes_ahead == (name == "bidirectional")
    assert mask.is_causal == (name == "causal") and mask.is_open == (name == "bidirectional")


def test_each_layers_mask():
    dalle = layer_masks("dalle", 12)  # arXiv:2102.12092 app. B.1, counted from 1
    assert [i for i, name in enumerate(dalle, 1) if name == "column"] == [2, 6, 10]
    assert dalle[-1] == "conv" and dalle.count("row") == 8
    assert layer_masks("dalle", 64).count("column") == 16 and layer_masks("dalle", 1) == ["conv"]
    assert layer_masks("row,column", 3) == ["row", "column", "row"]
    with pytest.raises(ValueError, match="mask 'diagonal' is not known; use causal, .*dalle, or several joined"):
        layer_masks("row,diagonal", 2)


@pytest.mark.parametrize("name", [*MASKS, *MASK_ORDERS])
def test_every_name_gives_each_layer_a_mask(name):
    for n in (1, 2, 7):
        names = layer_masks(name, n)
        assert len(names) == n and set(names) <= set(MASKS)


def test_masks_are_made_on_the_cpu_for_any_device():
    with torch.device("meta"):
        mask = AttentionMask("row", Layout(3, 4, 5))
    assert mask.dense.equal(dense("row", Layout(3, 4, 5))) and mask.n_scores > 0 and not mask.state_dict()


# --- ways to compute attention ---


@pytest.mark.parametrize("hidden", [False, True])
@pytest.mark.parametrize("dtype", ATOL, ids=str)  # explicit products, a fused kernel
@pytest.mark.parametrize("grid", [(3, 40), (9, 30)], ids=str)
@pytest.mark.parametrize("name", MASKS)
def test_every_way_equals_the_dense_mask(name, grid, dtype, hidden, monkeypatch):
    """Forward and backward, also with pads that are hidden."""
    monkeypatch.setattr(attention, "WINDOW", 3)
    mask = AttentionMask(name, Layout(5, *grid))
    inputs, seen = qkv(mask.layout.length, dtype, grad=True), pads(mask.layout.length) if hidden else None
    expected = reference(*inputs, mask.dense, seen)
    weight = torch.randn_like(expected)
    grads = torch.autograd.grad((expected * weight).sum(), inputs)
    for way in [attend] if mask.is_causal or mask.is_open else [attend, banded]:
        y = way(*inputs, mask, seen=seen)
        assert torch.allclose(y, expected, atol=ATOL[dtype])
        for a, b in zip(torch.autograd.grad((y * weight).sum(), inputs), grads):
            assert torch.allclose(a, b, atol=10 * ATOL[dtype])


@pytest.mark.parametrize("hidden", [False, True])
@pytest.mark.parametrize("name", ["causal", "row", "column"])  # as they stand, and reordered
def test_flex_attention_equals_the_dense_mask(name, hidden, monkeypatch):
    """Forward only and not compiled, as a CPU has it."""
    monkeypatch.setattr(attention, "compiled_flex", lambda: flex_attention)
    mask = AttentionMask(name, Layout(5, 7, 4))
    inputs, seen = qkv(mask.layout.length, torch.float32), pads(33) if hidden else None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it is not compiled
        y = flex(*inputs, mask, seen=seen)
    assert torch.allclose(y, reference(*inputs, mask.dense, seen), atol=ATOL[torch.float32])


@pytest.mark.slow
def test_flex_attention_is_compiled_once_for_all_batches(monkeypatch):
    """Which pads are hidden is data, no reason to compile again."""
    graphs = []
    monkeypatch.setattr(attention, "compiled_flex", lambda: compiled)
    torch._dynamo.reset()
    compiled = torch.compile(flex_attention, dynamic=False, backend=lambda graph, inputs: graphs.append(1) or graph)
    mask = AttentionMask("row", Layout(5, 7, 4))
    inputs, hidden = qkv(33, torch.float32), pads(33)
    for seen in (hidden, hidden.flip(0), torch.ones_like(hidden)):
        y = flex(*inputs, mask, seen=seen)
        assert torch.allclose(y, reference(*inputs, mask.dense, seen), atol=ATOL[torch.float32])
    assert len(graphs) == 1


@pytest.mark.parametrize("failing", [False, True])
def test_heads_that_flex_cannot_compile_take_the_dense_mask(failing, monkeypatch):
    """Below 16, without Triton, with too little shared memory: found once, said once, before anything is traced."""
    tried = []

    def compiled():
        tried.append(1)
        return (lambda *args, **how: 1 / 0) if failing else lambda q, k, v, *args, **how: q

    monkeypatch.setattr(attention, "compiled_flex", compiled)
    monkeypatch.setattr(attention, "FLEX", {})
    monkeypatch.setattr(torch.Tensor, "is_cuda", True, raising=False)
    monkeypatch.setattr(attention, "flex", lambda q, *_: q)
    mask = AttentionMask("row", Layout(5, 7, 4))
    inputs = qkv(33, torch.float32)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        ys = [attend(*inputs, mask, seen=seen) for seen in (None, pads(33))]
    assert len(tried) == 1 and len(said) == failing
    for y, seen in zip(ys, (None, pads(33))):
        expected = reference(*inputs, mask.dense, seen) if failing else inputs[0]
        assert torch.allclose(y, expected, atol=ATOL[torch.float32])


@pytest.mark.slow
@pytest.mark.parametrize("hidden", ["learned", "hidden"])
def test_compiled_training_with_flex_has_one_graph_for_a_mask_and_no_break(hidden, monkeypatch):
    """Block masks are there before anything is traced, and FlexAttention becomes part of a block's graph."""
    names = ["causal", "row", "column", "conv", "window", "row", "causal"]
    model = build(n_layer=len(names), mask=",".join(names), pads=hidden, grid_h=12, grid_w=12)
    inputs = batch(model, 2)
    expected = sum(model.loss(inputs).values())
    grads = torch.autograd.grad(expected, [*model.parameters()])
    fully = torch.compile
    monkeypatch.setattr("torch.nn.attention.flex_attention._validate_device", lambda *_: None)  # forward only on a CPU
    monkeypatch.setattr(attention, "banded", flex)
    monkeypatch.setattr("torch.compile", lambda f, **how: fully(f, backend="aot_eager", fullgraph=True, **how))
    for mask in model.attention_masks.values():
        mask.block_mask(torch.device("cpu"))
    torch._dynamo.reset()
    counters.clear()
    compile_blocks(model, torch.float32, torch.device("cpu"))
    for _ in range(3):
        loss = sum(model.loss(inputs).values())
        found = torch.autograd.grad(loss, [*model.parameters()])
        assert counters["stats"]["unique_graphs"] == len(set(names)) + 2 and not counters["graph_break"]  # two losses
        assert torch.allclose(loss, expected)
        assert all(torch.allclose(a, b, atol=1e-4, rtol=1e-4) for a, b in zip(found, grads))


@pytest.mark.parametrize("name", [name for name in MASKS if name != "bidirectional"])
def test_block_masks_are_the_reordered_dense_mask(name):
    mask = AttentionMask(name, Layout(5, 9, 13))
    at = torch.arange(mask.layout.length)
    seen = mask.block_mask("cpu").mask_mod(0, 0, at[:, None], at[None])
    assert seen.equal(mask.dense[mask.order][:, mask.order]) and mask.order[mask.inverse].equal(at)


@pytest.mark.parametrize("alpha", [None, ALPHA])
@pytest.mark.parametrize("name", [name for name in MASKS if not AttentionMask(name, Layout(5, 3, 4)).codes_ahead])
def test_a_part_of_the_sequence_equals_the_dense_mask(name, alpha, monkeypatch):
    """One new position or several from a cache; keys that a position does not see are NaN."""
    monkeypatch.setattr(attention, "WINDOW", 3)
    places = (5, 1), (16, 1), (28, 1), (7, 4), (20, 9), (0, 5)
    for p in (5, 130):  # a long prefix is read where it lies
        moved, mask = [(start and start + p - 5, n) for start, n in places], AttentionMask(name, Layout(p, 6, 4))
        check_part(mask, moved, alpha)
        check_part(mask, moved, alpha, pads(mask.layout.length))


def check_part(mask, places, alpha, shown=None):
    q, k, v = qkv(mask.layout.length)
    for start, n in places:
        stop = start + n
        seen = mask.dense[start:stop, :stop]
        hidden = None if shown is None else shown[:, :stop]
        expected = reference(q[:, :, start:stop], k[:, :, :stop], v[:, :, :stop], seen, hidden)
        keys, values = k[:, :, :stop].clone(), v[:, :, :stop].clone()
        if n == 1:
            keys[:, :, ~seen[0]] = values[:, :, ~seen[0]] = math.nan
        y = attend(q[:, :, start:stop], keys, values, mask, start, alpha, shown)
        assert torch.allclose(y, expected, atol=ATOL[torch.float64]), start
        if n == 1:  # compiled: the position is a tensor, the cache whole
            y = attend(q[:, :, start:stop], k, v, mask, torch.tensor([start]), alpha, shown)
            assert torch.allclose(y, expected, atol=ATOL[torch.float64]), start
            assert mask.is_causal or mask.keys_of(start).equal(seen[0].nonzero().flatten())


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_explicit_products_equal_the_fused_kernel(dtype):
    """Training on a CPU in half precision, over three blocks of 64 queries."""
    q, k, v = (x.to(dtype) for x in qkv(150))
    mask = (torch.rand(150, 150) < 0.5) | torch.eye(150, dtype=torch.bool)
    seen = pads(150)
    lower = torch.ones(150, 150, dtype=torch.bool).tril()
    hidden = dict(is_causal=True, seen=seen), dict(mask=lower, seen=seen), dict(seen=seen)
    for how in (dict(is_causal=True), dict(mask=mask), {}, *hidden):
        args = dict(attn_mask=how.get("mask"), is_causal=how.get("is_causal", False))
        if "seen" in how:
            args = dict(attn_mask=seen[:, None, None] & (lower if len(how) == 2 else lower | True))
        expected = F.scaled_dot_product_attention(q.double(), k.double(), v.double(), **args)
        y = dense_attention(q.clone().requires_grad_(), k, v, **how)
        # bfloat16 has 8 bits: scores up to about 5 and values up to about 4 are rounded to 2^-9 of that
        assert torch.allclose(y.double(), expected, atol=1e-12 if dtype == torch.float64 else 0.05), how


@pytest.mark.parametrize("name", MASKS)
def test_pb_relax_changes_no_result(name):
    """softmax((s / alpha - max) * alpha) = softmax(s), in explicit products and in a fused kernel."""
    mask = AttentionMask(name, Layout(4, 7, 12))
    q, k, v = qkv(mask.layout.length)
    for way in (q, q.clone().requires_grad_()):  # fused without gradients, products with
        assert torch.allclose(attend(way, k, v, mask, alpha=ALPHA), attend(way, k, v, mask), atol=1e-12)


def test_pb_relax_keeps_scores_finite_in_float16():
    q, k, v = qkv(20)
    half = [(250 * q).half(), (250 * k).half(), v.half()]
    mask = torch.ones(20, 20, dtype=torch.bool).tril()
    expected = products(*(x.double() for x in half), mask)
    assert not products(*half, mask).isfinite().all()
    relaxed = products(*half, mask, ALPHA)
    assert relaxed.dtype == torch.float16 and relaxed.isfinite().all()
    close = (relaxed - expected).abs().amax(-1) < 0.05  # except for pairs of scores that float16 cannot tell apart
    assert close.float().mean() > 0.9
    late = ((half[0] @ half[1].mT).masked_fill(~mask, -math.inf) / (4 * ALPHA)).softmax(-1) @ half[2]
    assert not late.isfinite().all()  # divided after the product, it protects nothing


def test_sparse_masks_compute_fewer_scores():
    """DALL-E's grid, with its 256 text positions and with 64: shares of L^2, of which causal attention needs half."""
    for text, most in (
        (64, dict(row=0.2, column=0.18, conv=0.32, window=0.32)),
        (256, dict(row=0.31, column=0.29, conv=0.4, window=0.4)),
    ):
        layout = Layout(text, 32, 32)
        for name, share in most.items():
            mask = AttentionMask(name, layout)
            assert mask.n_scores < share * layout.length**2, (name, text)
            assert mask.n_scores >= mask.dense.sum() and mask.by_columns == (name == "column")
            assert len(mask.keys_of(layout.length - 1)) == mask.dense[-1].sum() < layout.length / 3.9

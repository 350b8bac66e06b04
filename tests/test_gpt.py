"""Prior: masks against a loop, what may depend on what, cached against full, loss against by hand."""

import math
from dataclasses import replace
from itertools import product

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention.flex_attention import flex_attention

from minit2i.attention import Layout, attend, banded, dense, flex
from minit2i.blocks import RMSNorm
from minit2i.gpt import GPT, Cache, GPTConfig
from minit2i.masks import MASKS, layer_masks, picture

TINY = GPTConfig(  # GPT-2's choices; VARIANTS has the others
    pos="learned",
    norm="layernorm",
    mlp="gelu",
    qk_norm=False,
    n_layer=2,
    n_head=2,
    n_embd=16,
    text_len=5,
    n_vocab=11,
    n_codes=7,
    grid_h=2,
    grid_w=3,
)
VARIANTS = [
    dict(zip(("pos", "norm", "mlp", "qk_norm"), v))
    for v in product(("learned", "rotary"), ("layernorm", "rmsnorm"), ("gelu", "swiglu"), (False, True))
]


def batch(cfg, b=3):
    g = torch.Generator().manual_seed(1)
    text = torch.randint(0, cfg.n_vocab, (b, cfg.text_len), generator=g)
    text[0, 3:] = cfg.n_vocab + torch.arange(3, cfg.text_len)  # pads
    return text, torch.randint(0, cfg.n_codes, (b, cfg.n_image), generator=g)


def big_init(model):
    """Large weights, so that a wrong connection shows."""
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3)
    return model


# --- masks ---

GRIDS = [(2, 3), (7, 4), (3, 13), (12, 12)]


def crop(i, n, size):
    """Taming's crop: centred, but pushed inside."""
    first = i - size // 2
    while first + size > n:
        first -= 1
    return range(max(0, first), max(0, first) + size)


def raster(r, c, w):
    """Offsets of the rows and columns of an 11x11 window, as raster positions."""
    return {(r + dr) * w + c + dc for dr in range(-5, 6) for dc in range(-5, 6)}


LOOPS = {  # what the code in row r, column c sees of earlier codes (i, j)
    "full": lambda r, c, i, j, cfg: True,
    "row": lambda r, c, i, j, cfg: i == r or (i == r - 1 and j >= c),
    "column": lambda r, c, i, j, cfg: j == c,
    "conv": lambda r, c, i, j, cfg: i * cfg.grid_w + j in raster(r, c, cfg.grid_w),
    "window": lambda r, c, i, j, cfg: i in crop(r, cfg.grid_h, 4) and j in crop(c, cfg.grid_w, 4),
    "prefix": lambda r, c, i, j, cfg: True,
}


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("name", LOOPS)
def test_masks_equal_a_loop_over_positions(name, grid):
    cfg = replace(TINY, text_len=3, grid_h=grid[0], grid_w=grid[1], window=4)
    expected = []
    for q in range(cfg.length):
        for k in range(cfg.length):
            if k > q:
                seen = name == "prefix" and q < 3 and k < 3
            elif k < 3:
                seen = True
            else:
                seen = k == q or LOOPS[name](*divmod(q - 3, grid[1]), *divmod(k - 3, grid[1]), cfg)
            expected.append(seen)
    assert Layout(name, cfg).dense.flatten().tolist() == expected


def test_the_mask_of_masked_models_hides_nothing():
    assert Layout("none", TINY).dense.all()


def test_each_layer_has_its_mask():
    def masks(mask, n):
        return layer_masks(replace(TINY, mask=mask, n_layer=n))

    dalle = masks("dalle", 12)  # 2102.12092 app. B.1, counted from 1
    assert [i for i, name in enumerate(dalle, 1) if name == "column"] == [2, 6, 10]
    assert dalle[-1] == "conv" and set(dalle) == {"row", "column", "conv"}
    assert masks("dalle", 1) == ["conv"] and masks("row,column", 3) == ["row", "column", "row"]
    model = big_init(GPT(replace(TINY, mask="row,full", n_layer=2, grid_h=3, grid_w=3)))
    n = model.cfg.length
    x = torch.randn(1, n, 16, requires_grad=True)
    out = model.blocks[0](x, model.layouts[model.masks[0]])
    (grad,) = torch.autograd.grad(out[0, -1].sum(), x)
    assert (grad[0].abs().sum(1) > 0).equal(Layout("row", model.cfg).dense[-1])


@pytest.mark.parametrize("name", MASKS)
def test_logits_depend_on_exactly_what_they_may(name):
    """One layer's gradient support is the mask."""
    cfg = replace(TINY, n_layer=1, mask=name, grid_h=5, grid_w=4, window=2)
    model = big_init(GPT(cfg))
    at = torch.arange(cfg.length)
    allowed = MASKS[name](at[:, None], at[None], cfg)
    x = model.embedding(at % cfg.n_vocab)[None].detach().requires_grad_()
    out = model.blocks[0](x + model.positions(), model.layouts[name])
    for q in range(cfg.length):
        (grad,) = torch.autograd.grad(out[0, q].sum(), x, retain_graph=True)
        assert (grad[0].abs().sum(1) > 0).equal(allowed[q] | (at == q)), q


@pytest.mark.parametrize("name", [name for name in MASKS if not Layout(name, TINY).image_ahead])
def test_no_code_leaks_into_its_own_prediction(name):
    model = big_init(GPT(replace(TINY, n_layer=3, mask=name, grid_h=4, grid_w=3)))
    text, codes = batch(model.cfg)
    for n in range(12):
        other = codes.clone()
        other[:, n:] = (other[:, n:] + 1) % 7
        now, then = model.logits(text, codes), model.logits(text, other)
        assert torch.allclose(now[1][:, : n + 1], then[1][:, : n + 1], atol=1e-5), n
        assert torch.allclose(now[0], then[0], atol=1e-5)
    if not model.text_ahead:
        other = text.clone()
        other[:, 3:] = (other[:, 3:] + 1) % 11
        assert torch.allclose(model.logits(text, codes)[0][:, :3], model.logits(other, codes)[0][:, :3], atol=1e-5)


def test_text_that_sees_ahead_has_no_loss():
    model = GPT(replace(TINY, mask="full,prefix"))
    text, codes = batch(TINY)
    assert model(text, codes)[0] == 0 and model.n_text_targets(text) == 0 and model(text, codes)[1] > 0


def test_the_bidirectional_mask_is_refused_code_by_code():
    model = GPT(replace(TINY, mask="row,none"))
    text, codes = batch(TINY)
    assert model.trunk(text, 0).isfinite().all()
    for causal in (lambda: model(text, codes), lambda: Cache(model, 1, TINY.length)):
        with pytest.raises(ValueError, match="mask row,none shows a code those after it"):
            causal()


def test_the_picture_of_the_masks_shows_them():
    cfg = replace(TINY, grid_h=3, grid_w=4)
    sheet = torch.tensor(np.array(picture(cfg, ("full", "column"), cell=1, columns=2)))
    n = cfg.length
    panel = sheet[20 : 20 + n, 40 + n : 40 + 2 * n]  # the second one
    seen = (panel != 232).any(-1)
    inner = torch.arange(n) != cfg.text_len  # the lines between text and picture
    assert seen[inner][:, inner].equal(Layout("column", cfg).dense[inner][:, inner])


# --- the model ---


CAUSAL = [{"mask": name, "grid_h": 5} for name in MASKS if not Layout(name, TINY).image_ahead]


@pytest.mark.parametrize(
    "variant", [*VARIANTS, *CAUSAL, {"mask": "dalle", "n_layer": 4}], ids=lambda v: "-".join(map(str, v.values()))
)
def test_cached_logits_equal_full_ones_at_every_position(variant):
    cfg = replace(TINY, window=2, **variant)
    model = big_init(GPT(cfg)).eval()
    text, codes = batch(cfg)
    with torch.no_grad():
        text_logits, image_logits = model.logits(text, codes)
        cache = Cache(model, 3, cfg.length - 1)
        hidden = [model.trunk(text, 0, cache)]
        hidden += [
            model.trunk(model.code_ids(codes[:, i : i + 1]), cfg.text_len + i, cache) for i in range(cfg.n_image - 1)
        ]
        hidden = torch.cat(hidden, 1)
        assert torch.allclose(model.text_head(hidden[:, : cfg.text_len - 1]), text_logits, atol=1e-4)
        assert torch.allclose(model.image_head(hidden[:, cfg.text_len - 1 :]), image_logits, atol=1e-4)
        # several codes at once, as when a given part of a picture is read
        cache = Cache(model, 3, cfg.length - 1)
        model.trunk(text, 0, cache)
        some = model.trunk(model.code_ids(codes[:, :4]), cfg.text_len, cache)
        assert torch.allclose(model.image_head(some), image_logits[:, 1:5], atol=1e-4)
        # positions in tensors, as the compiled loop has them
        cache = Cache(model, 3, cfg.length - 1)
        hidden = [model.trunk(text, 0, cache)[:, -1:]]
        hidden += [
            model.trunk(model.code_ids(codes[:, i : i + 1]), torch.tensor([cfg.text_len + i]), cache)
            for i in range(cfg.n_image - 1)
        ]
        assert torch.allclose(model.image_head(torch.cat(hidden, 1)), image_logits, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cpu_training_attention_equals_the_fused_one(dtype):
    q, k, v = (torch.randn(2, 3, 150, 8, dtype=dtype) for _ in range(3))  # three blocks of queries
    mask = torch.rand(150, 150) < 0.5
    mask |= torch.eye(150, dtype=torch.bool)
    for how in ({"causal": True}, {"mask": mask}, {}):
        args = dict(attn_mask=how.get("mask"), is_causal=how.get("causal", False))
        expected = F.scaled_dot_product_attention(q.float(), k.float(), v.float(), **args)
        ours = dense(q.clone().requires_grad_(), k, v, **how)
        assert torch.allclose(ours.float(), expected, atol=1e-5 if dtype == torch.float32 else 3e-2), how


@pytest.mark.parametrize("dtype, scale", [(torch.float32, 1.0), (torch.float32, 1e-3), (torch.bfloat16, 1.0)])
def test_rms_norm_is_the_same_when_decoding(dtype, scale):
    norm = RMSNorm(24, 1e-6)
    torch.nn.init.normal_(norm.weight)
    x = torch.randn(5, 3, 24) * scale
    x[0] = 0
    x = x.to(dtype)
    y = x.float()
    expected = y / (y.square().mean(-1, keepdim=True) + 1e-6).sqrt() * norm.weight
    with torch.no_grad():
        decoding = norm(x)
    for got in (norm(x), decoding):
        assert got.dtype == dtype and torch.allclose(
            got.float(), expected, rtol=1e-2 if dtype == torch.bfloat16 else 1e-5
        )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)  # products on a CPU, a fused kernel
@pytest.mark.parametrize("grid", [(7, 4), (3, 40), (9, 30)], ids=str)
@pytest.mark.parametrize("name", MASKS)
def test_every_way_of_attention_gives_what_the_dense_mask_gives(name, grid, dtype, monkeypatch):
    """Forward and backward; FlexAttention forward only, not compiled, which is what a CPU can."""
    layout = Layout(name, replace(TINY, grid_h=grid[0], grid_w=grid[1], window=3))
    qkv = [torch.randn(2, 2, layout.cfg.length, 16, dtype=dtype, requires_grad=True) for _ in range(3)]
    score = (qkv[0] @ qkv[1].mT / 4).masked_fill(~layout.dense, -math.inf)
    expected = score.softmax(-1) @ qkv[2]
    weight = torch.randn_like(expected)
    grads = torch.autograd.grad((expected * weight).sum(), qkv)
    atol = 1e-8 if dtype == torch.float64 else 1e-4
    for way in (attend, banded):
        y = way(*qkv, layout)
        assert torch.allclose(y, expected, atol=atol) and all(
            torch.allclose(a, b, atol=atol) for a, b in zip(torch.autograd.grad((y * weight).sum(), qkv), grads)
        )
    monkeypatch.setattr("minit2i.attention.compiled_flex", lambda: flex_attention)
    with torch.no_grad():
        assert torch.allclose(flex(*(x.detach().float() for x in qkv), layout), expected.float(), atol=1e-5)


@pytest.mark.parametrize("alpha", [None, 32.0])
@pytest.mark.parametrize("text", [9, 140])  # the latter is long enough to be read where it lies
def test_a_new_position_reads_only_what_it_sees(text, alpha):
    """Against the dense mask's last row, with keys that it does not see made useless."""
    for name in ("full", "row", "column", "conv", "window", "prefix"):
        layout = Layout(name, replace(TINY, text_len=text, grid_h=5, grid_w=4, window=3))
        for at in (text, text + 11, layout.cfg.length - 1):
            q, k, v = (torch.randn(2, 2, n, 16, dtype=torch.float64) for n in (1, at + 1, at + 1))
            seen = layout.dense[at, : at + 1]
            expected = (q @ k.mT / 4).masked_fill(~seen, -math.inf).softmax(-1) @ v
            k[:, :, ~seen], v[:, :, ~seen] = math.nan, math.nan
            assert torch.allclose(attend(q, k, v, layout, at, alpha), expected)


def test_sparse_masks_compute_less():
    """DALL-E's sizes, and with fewer words: shares of all pairs of positions, where causal attention has half of them."""
    for text, most in (
        (64, dict(row=0.2, column=0.18, conv=0.32, window=0.3)),
        (256, dict(row=0.31, column=0.29, conv=0.4)),
    ):
        cfg = replace(TINY, text_len=text, grid_h=32, grid_w=32)
        for name, share in most.items():
            layout = Layout(name, cfg)
            assert layout.scores < share * cfg.length**2, layout.scores / cfg.length**2
            assert len(layout.keys_of(cfg.length - 1)) == layout.dense[-1].sum() < cfg.length / 3.9
            assert layout.by_columns == (name == "column")


def test_loss_equals_one_by_hand_and_pads_are_no_targets():
    model = GPT(TINY)
    text, codes = batch(TINY)
    text_logits, image_logits = model.logits(text, codes)
    text_loss, image_loss = model(text, codes)
    by_hand = sum(
        -float(text_logits.detach()[b, t].log_softmax(0)[text[b, t + 1]])
        for b in range(3)
        for t in range(4)
        if text[b, t + 1] < TINY.n_vocab
    )
    assert math.isclose(text_loss.item(), by_hand, rel_tol=1e-5)
    by_hand = sum(-float(image_logits.detach()[b, n].log_softmax(0)[codes[b, n]]) for b in range(3) for n in range(6))
    assert math.isclose(image_loss.item(), by_hand, rel_tol=1e-5)
    assert int(model.n_text_targets(text)) == 2 + 4 + 4


def test_initial_loss_is_that_of_a_uniform_guess():
    cfg = replace(TINY, n_embd=64, n_vocab=500, n_codes=300)
    text, codes = torch.randint(0, 500, (8, 5)), torch.randint(0, 300, (8, 6))
    text_loss, image_loss = GPT(cfg)(text, codes)
    assert abs(float(text_loss) / 32 - math.log(500)) < 0.1 and abs(float(image_loss) / 48 - math.log(300)) < 0.1


def test_parameter_count_in_closed_form():
    cfg = replace(TINY, n_embd=32, n_layer=3)
    d = 32
    expected = (cfg.n_vocab + cfg.text_len + cfg.n_codes) * d + (cfg.text_len + cfg.grid_h + cfg.grid_w) * d
    expected += 3 * (12 * d * d + 4 * d) + 2 * d + d * (cfg.n_vocab + cfg.n_codes)
    assert sum(p.numel() for p in GPT(cfg).parameters()) == expected


@pytest.mark.parametrize(
    "change, message",
    [
        ({"mask": "diagonal"}, "mask 'diagonal' is not known"),
        ({"n_head": 3}, "not a multiple of n_head 3"),
        ({"n_head": 0}, "n_head 0 is less than 1"),
        ({"n_encoder": -1}, "n_encoder -1 is less than 0"),
        ({"text_len": 2}, "text_len 2"),
        ({"pos": "rotary", "n_embd": 12}, "head size that 4 divides"),
    ],
)
def test_impossible_configs_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        GPT(replace(TINY, **change))


@pytest.mark.parametrize("variant", [VARIANTS[0], VARIANTS[-1]], ids=["plain", "modern"])
def test_overfits_one_batch(variant):
    torch.manual_seed(0)
    model = GPT(replace(TINY, n_embd=32, **variant))
    text, codes = batch(TINY, 4)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    for _ in range(80):
        text_loss, image_loss = model(text, codes)
        (text_loss + image_loss).backward()
        optimizer.step(), optimizer.zero_grad()
    assert float(image_loss) / codes.numel() < 0.1


def test_the_caption_matters():
    model = big_init(GPT(TINY))
    text, codes = batch(TINY)
    other = text.clone()
    other[:, 1] = (other[:, 1] + 1) % TINY.n_vocab
    assert (model.logits(text, codes)[1] - model.logits(other, codes)[1]).abs().amax((1, 2)).min() > 1e-4

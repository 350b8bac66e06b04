"""Decoding: filters against brute force, guidance, seeds, cached against uncached, finishing a picture."""

from collections import Counter
from dataclasses import replace

import pytest
import torch

from minit2i.gpt import GPT, GPTConfig
from minit2i.sample import FILTERS, SampleConfig, draw, generate, guide, temperature, top_k, top_p

CFG = GPTConfig(n_layer=2, n_head=2, n_embd=16, text_len=5, n_vocab=11, n_codes=13, grid_h=3, grid_w=2)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    model = GPT(CFG).requires_grad_(False)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.4)
    return model


@pytest.fixture(scope="module")
def text():
    return torch.randint(0, 11, (3, 5), generator=torch.Generator().manual_seed(2))


EMPTY = torch.tensor([1, 12, 13, 14, 15])


# --- filters ---


def test_top_k_against_brute_force():
    logits = torch.randn(20, 13)
    for k in (1, 3, 13):
        kept = top_k(logits, k).isfinite()
        for row, keep in zip(logits, kept):
            best = sorted(range(13), key=lambda v: -float(row[v]))[:k]
            assert set(keep.nonzero().flatten().tolist()) == set(best)
    assert top_k(logits, 0).equal(logits) and top_k(logits, 99).equal(logits)


def test_top_p_against_brute_force():
    logits = torch.randn(20, 13) * 2
    for p in (0.05, 0.5, 0.9, 0.999):
        for row, keep in zip(logits, top_p(logits, p).isfinite()):
            probability, best, held = row.softmax(0), [], 0.0
            for v in sorted(range(13), key=lambda v: -float(row[v])):
                if held >= p:
                    break
                best.append(v)
                held += float(probability[v])
            assert set(keep.nonzero().flatten().tolist()) == set(best)
    assert top_p(logits, 1.0).equal(logits)


def test_temperature():
    logits = torch.randn(4, 13)
    assert torch.allclose(temperature(logits, 0.5), logits * 2)
    assert temperature(logits, 0).isfinite().sum(1).tolist() == [1] * 4
    assert temperature(logits, 0).argmax(1).equal(logits.argmax(1))


@pytest.mark.parametrize("name, f", FILTERS)
def test_filters_leave_their_input_alone(name, f):
    logits = torch.randn(4, 13)
    before = logits.clone()
    f(logits, {"top_k": 3}.get(name, 0.5))
    assert logits.equal(before)


def test_draw_follows_the_distribution():
    logits = torch.tensor([0.1, 0.0, 0.5, 0.4]).log()
    n = 20000
    seen = Counter(draw(logits.expand(n, 4), torch.rand(n)).tolist())
    assert 1 not in seen
    for v, p in ((0, 0.1), (2, 0.5), (3, 0.4)):
        assert abs(seen[v] / n - p) < 0.015
    ends = draw(torch.tensor([[0.0, 0.0, -torch.inf]] * 2), torch.tensor([0.0, 1 - 2**-24]))
    assert ends.tolist() == [0, 1]


# --- the loop ---


def uncached(model, text, empty, cfg):
    """The same pictures by recomputing all logits for each code, one picture at a time."""
    n_image, out = model.cfg.n_image, []
    for prompt in text:
        for i in range(cfg.n):
            noise = torch.rand(n_image, generator=torch.Generator().manual_seed(cfg.seed + i))
            codes = torch.zeros(1, n_image, dtype=torch.long)
            for k in range(n_image):
                logits = model.logits(prompt[None], codes)[1][:, k]
                scale = 1 + (cfg.cfg_scale - 1) * ((k + 1) / n_image if cfg.cfg_schedule == "rising" else 1)
                if cfg.cfg_scale != 1:
                    logits = guide(logits, model.logits(empty[None], codes)[1][:, k], scale)
                logits = top_p(top_k(temperature(logits, cfg.temperature), cfg.top_k), cfg.top_p)
                codes[0, k] = draw(logits, noise[k : k + 1])
            out.append(codes[0])
    return torch.stack(out)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"cfg_scale": 1.0},
        {"cfg_schedule": "rising"},
        {"temperature": 0.0},
        {"top_k": 4, "top_p": 0.8, "temperature": 0.7},
        {"cfg_scale": 0.0},
    ],
    ids=str,
)
def test_the_cached_loop_equals_the_naive_one(model, text, settings):
    cfg = SampleConfig(n=2, **settings)
    assert generate(model, text, EMPTY, cfg).equal(uncached(model, text, EMPTY, cfg))


def test_batched_equals_alone_and_seeds_name_pictures(model, text):
    cfg = SampleConfig(n=3, seed=5)
    together = generate(model, text, EMPTY, cfg)
    alone = torch.cat([generate(model, t[None], EMPTY, cfg) for t in text])
    assert together.equal(alone)
    second = generate(model, text[:1], EMPTY, replace(cfg, n=1, seed=6))
    assert second[0].equal(together[1]) and not together[0].equal(together[1])


def test_guidance_one_is_plain_conditional_and_zero_unconditional(model, text):
    c, u = torch.randn(2, 13), torch.randn(2, 13)
    assert torch.allclose(guide(c, u, 1.0), c) and guide(c, u, 0.0).equal(u)
    unconditional = generate(model, EMPTY[None], EMPTY, SampleConfig(n=2, cfg_scale=1.0))
    assert generate(model, text[:1], EMPTY, SampleConfig(n=2, cfg_scale=0.0)).equal(unconditional)


def test_the_callers_tensors_are_never_changed(model, text):
    """A guidance loop that builds its second half in place once zeroed the prompt in a well-known repository."""
    before, empty, first = text.clone(), EMPTY.clone(), torch.zeros(6, 2, dtype=torch.long)
    weights = {k: v.clone() for k, v in model.state_dict().items()}
    generate(model, text, EMPTY, SampleConfig(n=2), first)
    assert text.equal(before) and EMPTY.equal(empty) and first.eq(0).all()
    assert all(v.equal(weights[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize("m", [1, 2, 5, 6])
def test_finishing_a_picture_keeps_what_is_given_and_goes_on_as_before(model, text, m):
    cfg = SampleConfig(n=2)
    whole = generate(model, text, EMPTY, cfg)
    assert generate(model, text, EMPTY, cfg, whole[:, :m]).equal(whole)
    other = (whole[:, :m] + 1) % 13
    assert generate(model, text, EMPTY, cfg, other)[:, :m].equal(other)


@pytest.mark.parametrize(
    "settings",
    [{"n": 0}, {"temperature": -1.0}, {"top_k": -1}, {"top_p": 0.0}, {"top_p": 1.5}, {"cfg_scale": -1.0}],
    ids=str,
)
def test_impossible_settings_are_refused(settings):
    with pytest.raises(ValueError, match=next(iter(settings))):
        SampleConfig(**settings)

"""Sampling without a model: filters against brute force, guidance, random numbers per image, windows."""

import re
from collections import Counter

import pytest
import torch

from minit2i.gpt import build_prior
from minit2i.papers.cogview import centre_outward
from minit2i.papers.taming import every_place
from minit2i.sample import (
    FILTERS,
    SCHEDULES,
    WINDOW_PLANS,
    SampleConfig,
    Sampler,
    guide,
    min_p,
    sample_code,
    slide,
    store_by_columns,
    temperature,
    top_k,
    top_p,
)

# --- filters -------------------------------------------------------------------------------------------


def test_top_k_against_brute_force():
    logits = torch.randn(20, 13)
    for k in (1, 3, 13):
        for row, keep in zip(logits, top_k(logits, k).isfinite()):
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
    assert (top_p(logits, 1e-46).isfinite().sum(1) == 1).all()  # less than float32 can tell from 0: still the likeliest


def test_min_p_against_brute_force():
    logits = torch.randn(20, 13) * 2
    for p in (0.01, 0.3, 1.0):
        for row, keep in zip(logits, min_p(logits, p).isfinite()):
            probability = row.softmax(0).tolist()
            assert keep.tolist() == [x >= p * max(probability) * (1 - 1e-6) for x in probability]
    assert min_p(logits, 0.0).equal(logits)


def test_temperature():
    logits = torch.randn(4, 13)
    assert torch.allclose(temperature(logits, 0.5), logits * 2)
    assert temperature(logits, 0).isfinite().sum(1).tolist() == [1] * 4
    assert temperature(logits, 0).argmax(1).equal(logits.argmax(1))


@pytest.mark.parametrize("name", FILTERS)
def test_filters_do_not_change_their_input_and_take_any_leading_shape(name):
    logits, value = torch.randn(4, 2, 13), {"top_k": 3}.get(name, 0.5)
    before = logits.clone()
    filtered = FILTERS[name](logits, value)
    assert logits.equal(before)
    assert filtered.flatten(0, 1).equal(FILTERS[name](logits.flatten(0, 1), value))


def test_filters_are_applied_in_order():
    logits = torch.randn(5, 13)
    cfg = SampleConfig(temperature=0.7, top_k=6, top_p=0.8, min_p=0.1)
    assert Sampler(cfg, []).filter(logits).equal(min_p(top_p(top_k(logits / 0.7, 6), 0.8), 0.1))


# --- the choice of a code ------------------------------------------------------------------------------


def test_sampled_codes_follow_the_distribution():
    logits, n = torch.tensor([0.1, 0.0, 0.5, 0.4]).log(), 20000
    seen = Counter(sample_code(logits.expand(n, 4), torch.rand(n)).tolist())
    assert 1 not in seen
    for v, p in ((0, 0.1), (2, 0.5), (3, 0.4)):
        assert abs(seen[v] / n - p) < 5 * (p * (1 - p) / n) ** 0.5  # five standard deviations
    ends = sample_code(torch.tensor([[0.0, 0.0, -torch.inf]] * 2), torch.tensor([0.0, 1 - 2**-24]))
    assert ends.tolist() == [0, 1]
    assert sample_code(logits.expand(2, 3, 4), torch.rand(2, 3)).shape == (2, 3)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_nan_logits_are_reported_and_do_not_index_past_the_vocabulary(bad):
    sampler, logits = Sampler(SampleConfig(), [0, 1]), torch.zeros(2, 5)
    sampler.pick(logits, sampler.uniform())
    sampler.check()
    logits[1, 2] = bad
    assert sampler.pick(sampler.filter(logits), sampler.uniform()).max() < 5
    with pytest.raises(ValueError, match="logits are NaN or Inf: cfg_scale 2.5"):
        sampler.check()


def test_random_numbers_belong_to_an_image_whatever_the_batch():
    sampler = Sampler(SampleConfig(), [3, 8, 3])
    first, second = sampler.uniform(4), sampler.uniform(2, 5)
    generator = torch.Generator().manual_seed(8)
    assert first[1].equal(torch.rand(4, generator=generator))
    assert second[1].equal(torch.rand(2, 5, generator=generator))
    assert first[0].equal(first[2]) and not first[0].equal(first[1]) and len(sampler) == 3


def test_guidance_one_is_conditional_and_zero_unconditional():
    a, b = torch.randn(2, 13), torch.randn(2, 13)
    assert torch.allclose(guide(a, b, 1.0), a) and guide(a, b, 0.0).equal(b)
    both = torch.cat([a, b])
    assert Sampler(SampleConfig(), [0]).guide(both, 3.0).equal(b + 3 * (a - b))
    assert Sampler(SampleConfig(cfg_scale=1.0), [0]).guide(a, 3.0).equal(a)


def test_guidance_schedules():
    for schedule, expected in (("constant", [3, 3, 3]), ("rising", [1.5, 2, 3]), ("falling", [2.5, 2, 1])):
        assert [SCHEDULES[schedule](3.0, u) for u in (0.25, 0.5, 1.0)] == expected


@pytest.mark.parametrize(
    "name, value",
    [("n", 0), ("temperature", -1.0), ("top_k", -1), ("top_p", 0.0), ("top_p", 1.5), ("cfg_scale", -1.0)]
    + [("cfg_scale", float("nan")), ("min_p", 2.0), ("cfg_schedule", "up")],
)
def test_impossible_settings_are_refused(name, value):
    with pytest.raises(ValueError, match=re.escape(f"{name} {value!r}")):
        SampleConfig(**{name: value})


# --- windows -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "grid, window, step", [((5, 7), (3, 4), 1), ((8, 8), (4, 4), 2), ((4, 9), (4, 4), 2), ((3, 3), (3, 3), 1)]
)
@pytest.mark.parametrize("name", WINDOW_PLANS)
def test_window_plans_cover_the_grid_with_windows_inside_it(name, grid, window, step):
    if step > 1 and any((g - w) % step for g, w in zip(grid, window)):
        grid = grid[0], grid[1] - 1  # callers give multiples of step
    covered = torch.zeros(grid)
    for top, left, place in WINDOW_PLANS[name](grid, window, step):
        assert 0 <= top <= grid[0] - window[0] and 0 <= left <= grid[1] - window[1]
        if isinstance(place, int):
            assert top % step == 0 and left % step == 0
            covered[top : top + place, left : left + window[1]] += 1
        else:
            covered[top + place[0], left + place[1]] += 1
    assert (covered == 1).all() if name == "every_place" else (covered >= 1).all()


def test_every_place_keeps_the_code_near_the_middle():
    plan = every_place((6, 6), (3, 3))
    assert plan[0] == (0, 0, (0, 0)) and plan[-1] == (3, 3, (2, 2))
    assert plan[6 * 2 + 3] == (1, 2, (1, 1))  # row 2, column 3: one row and column before it


def test_centre_outward_begins_in_the_middle_and_overlaps_by_half():
    plan = centre_outward((8, 8), (4, 4))
    assert [place for *_, place in plan] == [4] * 9 and plan[0] == (2, 2, 4)
    distance = [abs(top - 2) + abs(left - 2) for top, left, _ in plan]
    assert distance == sorted(distance)


def test_sliding_samples_what_is_hidden_and_keeps_the_rest():
    codes, seen = torch.full((2, 4, 5), -1), []
    codes[:, 1, 1:3] = 7
    before = codes.clone()

    def sample(part, k, top, left):
        assert (part < 0).any()
        return torch.where(part < 0, 100 + k, part)

    for plan in (f((4, 5), (3, 3)) for f in WINDOW_PLANS.values()):
        out = slide(sample, codes, (3, 3), plan, seen.append)
        assert codes.equal(before) and (out >= 0).all()
        assert (out == 7).nonzero().tolist() == (codes == 7).nonzero().tolist()
    out = slide(sample, codes, (3, 3), every_place((4, 5), (3, 3)))
    assert [int(x) for x in out[0].flatten() if x != 7] == [100 + k for k in range(20) if k not in (6, 7)]


def test_weights_stored_by_columns_give_the_same_codes():
    torch.manual_seed(0)
    model = build_prior(dict(n_layer=2, n_embd=32, n_head=2, n_vocab=20, n_codes=16, text_len=4, grid_h=4, grid_w=4))
    text = torch.zeros(1, 4, dtype=torch.long)

    def sampled():
        return model.generate({"text": text}, text[0], Sampler(SampleConfig(n=4), range(4), text.device))

    before = sampled()
    store_by_columns(model.requires_grad_(False))
    assert {layer.weight.stride()[0] for layer in model.modules() if isinstance(layer, torch.nn.Linear)} == {1}
    assert sampled().equal(before)

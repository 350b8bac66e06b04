"""Masked priors: how much is hidden, what the loss counts, how places are kept; and windows over large pictures."""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from minit2i.gpt import GPT, GPTConfig, fit_grid
from minit2i.masked import hide, hide_each, still_hidden, unmask
from minit2i.sample import SampleConfig
from minit2i.windows import centre_outward, every_place, slide

CFG = GPTConfig(
    n_layer=2, n_head=2, n_embd=16, text_len=5, n_vocab=11, n_codes=13, grid_h=4, grid_w=4, objective="masked"
)
EMPTY = torch.tensor([1, 12, 13, 14, 15])


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    model = GPT(CFG).requires_grad_(False)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3)
    return model


@pytest.fixture(scope="module")
def text():
    return torch.randint(0, 11, (2, 5), generator=torch.Generator().manual_seed(2))


# --- training ---


def test_the_share_hidden_has_the_density_of_the_paper():
    """P(rate < r) = (2/pi) arcsin r; the often seen 2 arccos(u) / pi has another one."""
    codes = torch.arange(400).expand(4000, 400)
    shown = hide(codes, torch.Generator().manual_seed(0))
    rate = (shown < 0).float().mean(1)
    assert ((shown == codes) | (shown < 0)).all() and rate.min() > 0
    assert abs(float(rate.mean()) - 2 / math.pi) < 0.01
    for r in (0.2, 0.5, 0.8, 0.95):
        assert abs(float((rate < r).float().mean()) - 2 / math.pi * math.asin(r)) < 0.025
    assert hide(codes[:3], torch.Generator().manual_seed(0)).equal(hide(codes[:3], torch.Generator().manual_seed(0)))
    parts = hide_each(codes[:2], [7, 8]), hide_each(codes[2:4], [9, 10])
    assert hide_each(codes[:4], range(7, 11)).equal(torch.cat(parts)) and not parts[0].equal(parts[1])
    places = (shown < 0).float().mean(0)
    assert abs(places - 2 / math.pi).max() < 0.04, "every place as often"


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_the_loss_counts_hidden_places_only_and_sees_none_of_them(model, text, smoothing):
    codes = torch.randint(0, 13, (2, 16))
    shown = codes.clone()
    shown[0, :5] = shown[1, 7] = -1
    text_loss, image_loss = model(text, codes, None, shown, smoothing)
    logits = model.logits(text, shown)[1]
    by_hand = 0
    for b, n in ((0, 0), (0, 1), (0, 2), (0, 3), (0, 4), (1, 7)):
        log_p = logits[b, n].log_softmax(0)
        by_hand -= (1 - smoothing) * float(log_p[codes[b, n]]) + smoothing * float(log_p.mean())
    assert math.isclose(float(image_loss), by_hand, rel_tol=1e-5) and float(text_loss) == 0
    assert model.logits(text, shown)[1].equal(logits)
    other = shown.clone()
    other[0, 15] = (other[0, 15] + 1) % 13
    assert ((model.logits(text, other)[1] - logits)[0].abs().amax(1) > 1e-6).all(), "all places see a known one"


def test_overfits_one_batch(text):
    torch.manual_seed(0)
    model, codes = GPT(replace(CFG, n_embd=32)), torch.randint(0, 13, (2, 16))
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    for _ in range(150):
        model(text, codes, None, hide(codes))[1].backward()
        optimizer.step(), optimizer.zero_grad()
    model.requires_grad_(False)
    assert (
        unmask(model, text, EMPTY, SampleConfig(n=1, steps=4, cfg_scale=1.0, temperature=0.0)).eq(codes).float().mean()
        > 0.9
    )


# --- drawing ---


def test_how_many_stay_hidden():
    n, hidden, counts = torch.tensor([16, 1, 0]), torch.tensor([16, 1, 0]), []
    for step in range(8):
        hidden = still_hidden(n, hidden, (step + 1) / 8)
        counts.append(hidden.tolist())
    # floor(16 cos(pi (t+1)/16)) = 15, 14, 13, 11, 8, 6, 3, 0
    assert [c[0] for c in counts] == [15, 14, 13, 11, 8, 6, 3, 0]
    assert [c[1] for c in counts] == [1] * 7 + [0] and not any(c[2] for c in counts)
    hidden = torch.tensor([5])
    for step in range(20):  # more steps than places: each keeps one until one is left for the last
        before, hidden = hidden, still_hidden(torch.tensor([5]), hidden, (step + 1) / 20)
        assert hidden == 0 if step == 19 else max(1, int(before) - 1) >= int(hidden) >= 1


@pytest.mark.parametrize("steps", [1, 3, 16, 40])
def test_places_are_drawn_once_in_the_scheduled_numbers_and_known_ones_never_change(model, text, steps):
    known = torch.full((4, 16), -1)
    known[:, [0, 7, 9]] = torch.tensor([3, 5, 12])
    before, seen = known.clone(), []
    cfg = SampleConfig(n=2, steps=steps)
    codes = unmask(model, text, EMPTY, cfg, known, watch=lambda c: seen.append(c.clone()))
    assert known.equal(before) and codes[:, [0, 7, 9]].equal(before[:, [0, 7, 9]]) and (codes >= 0).all()
    hidden = at_start = torch.tensor([13])
    for step, now in enumerate(seen):
        hidden = still_hidden(at_start, hidden, (step + 1) / steps)
        assert (now < 0).sum(1).eq(hidden).all()
        if step:
            assert seen[step - 1][seen[step - 1] >= 0].equal(now[seen[step - 1] >= 0])
    assert len(seen) == steps


def test_pictures_are_a_function_of_the_seed_and_not_of_the_batch(model, text):
    cfg = SampleConfig(n=3, seed=5, steps=6, cfg_scale=3.0)
    together = unmask(model, text, EMPTY, cfg)
    alone = [unmask(model, t[None], EMPTY, replace(cfg, seed=5 + 3 * k)) for k, t in enumerate(text)]
    assert together.equal(torch.cat(alone))
    assert unmask(model, text[:1], EMPTY, replace(cfg, n=1, seed=6))[0].equal(together[1])
    assert unmask(model, text[:1], EMPTY, cfg, seeds=[9, 2, 6])[2].equal(together[1])
    assert not together[0].equal(together[1])
    constant = unmask(model, text, EMPTY, replace(cfg, cfg_schedule="constant"))
    assert unmask(model, text, EMPTY, replace(cfg, cfg_schedule="rising")).equal(together)
    assert not constant.equal(together)


def test_the_surest_places_are_kept_without_noise(model, text):
    """One step of two, temperature 0, no noise: the places kept are those of the largest probability."""
    seen = []
    cfg = SampleConfig(n=1, steps=2, temperature=0.0, choice_noise=0.0, cfg_scale=1.0)
    unmask(model, text, EMPTY, cfg, watch=lambda c: seen.append(c.clone()))
    probability, code = model.logits(text, torch.full((2, 16), -1))[1].softmax(2).max(2)
    for b in range(2):
        best = set(probability[b].topk(5).indices.tolist())  # floor(16 cos(pi/4)) = 11 stay hidden
        kept = (seen[0][b] >= 0).nonzero().flatten().tolist()
        assert set(kept) == best and all(seen[0][b, k] == code[b, k] for k in kept)


def test_small_codes_matter_to_a_masked_model(text):
    model = GPT(replace(CFG, low=2)).requires_grad_(False)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3)
    shown, low = torch.full((2, 16), -1), torch.zeros(2, 4, dtype=torch.long)
    logits = model.logits(text, shown, low)[1]
    for place in range(4):
        other = low.clone()
        other[:, place] = 1
        assert ((model.logits(text, shown, other)[1] - logits).abs().amax(2) > 1e-5).all()
    drawn = unmask(model, text, EMPTY, SampleConfig(n=1, steps=3), None, low)
    assert drawn.shape == (2, 16) and (drawn >= 0).all()


@pytest.mark.parametrize(
    "change, message",
    [
        ({"mask": "full"}, "use --mask none"),
        ({"order": "image"}, "a captioner, needs"),
        ({"low": 3}, "low 3 does not shrink 4x4"),
        ({"low": 1}, "low 1 does not shrink"),
        ({"objective": "causal", "mask": "row", "order": "image"}, "a captioner, needs"),
    ],
)
def test_impossible_configs_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        GPT(replace(CFG, **change))


def test_positions_grow_with_the_grid():
    small, large = GPT(replace(CFG, objective="causal")), GPT(replace(CFG, objective="causal", grid_h=8, low=2))
    fitted = fit_grid(small.state_dict(), large)
    large.load_state_dict(fitted)
    assert fitted["pos_column"].equal(small.pos_column) and fitted["pos_row"].shape == (8, 1, 16)
    rows = small.pos_row.detach()
    expected = F.interpolate(rows[:, 0].t()[None], 8, mode="linear")[0].t()
    assert torch.allclose(fitted["pos_row"][:, 0], expected) and expected[0].equal(rows[0, 0])


# --- windows ---


@pytest.mark.parametrize("grid, window", [((6, 9), (4, 4)), ((4, 4), (4, 4)), ((5, 8), (2, 3))])
def test_every_place_is_drawn_once_near_the_middle_of_its_window(grid, window):
    plan, places = every_place(grid, window), []
    for top, left, (row, column) in plan:
        assert 0 <= top <= grid[0] - window[0] and 0 <= left <= grid[1] - window[1]
        places.append((top + row, left + column))
        for at, start, n, size in ((row, top, grid[0], window[0]), (column, left, grid[1], window[1])):
            assert at == size // 2 or start in (0, n - size)
    assert places == [(i, j) for i in range(grid[0]) for j in range(grid[1])]


def test_windows_from_the_centre_outward_overlap_and_cover_all():
    plan = centre_outward((64, 64), (32, 32), 2)
    assert [p[:2] for p in plan][0] == (16, 16) and len(plan) == 9
    assert {p[:2] for p in plan[1:5]} == {(0, 16), (16, 0), (16, 32), (32, 16)}, "CogView: then its sides, then corners"
    for grid, window, step in (((6, 10), (4, 4), 2), ((7, 5), (4, 4), 1), ((4, 4), (4, 4), 2), ((30, 12), (4, 6), 2)):
        seen = torch.zeros(grid)
        for top, left, _ in centre_outward(grid, window, step):
            assert top % step == 0 and left % step == 0
            seen[top : top + window[0], left : left + window[1]] += 1
        assert seen.min() >= 1


def test_sliding_reads_what_is_drawn_and_keeps_what_is_known():
    known = torch.full((2, 5, 7), -1)
    known[:, 2, 3] = 9
    calls = []

    def draw(part, k, top, left):  # what the places before hold, in raster order
        hidden = part < 0
        calls.append((k, int(hidden[0].sum())))
        return torch.where(hidden, part.flatten(1).cumsum(1).view_as(part) * 0 + k, part)

    by_place = slide(draw, known, (4, 4), every_place((5, 7), (4, 4)))
    expected = torch.arange(35).view(1, 5, 7).repeat(2, 1, 1)
    expected[:, 2, 3] = 9
    assert by_place.equal(expected) and len(calls) == 34 and all(n == 1 for _, n in calls)
    calls.clear()
    plan = centre_outward((5, 7), (4, 4))
    by_window = slide(draw, known, (4, 4), plan)
    assert (by_window >= 0).all() and by_window[0, 2, 3] == 9 and sum(n for _, n in calls) == 34
    assert (known < 0).sum() == 68

"""CogView: the captioner and its loss, codes of a smaller image, windows from the centre outward."""

import math

import pytest
import torch
from priors import GPT2, batch, big, build

from minit2i.config import pick
from minit2i.gpt import resize_grid
from minit2i.papers.cogview import CoarsePrefix, centre_outward
from minit2i.sample import SampleConfig, Sampler
from minit2i.vq import shrink


@pytest.fixture(params=["learned", "rotary"])
def captioner(request):
    return big(build(model="captioner", pos=request.param, grid_h=3, grid_w=2, **GPT2), 0.4).double()


# --- the captioner ---


@torch.no_grad()
def test_text_reads_all_codes_and_codes_read_no_text(captioner):
    """Order: begin token, codes, rest of the caption."""
    inputs = batch(captioner, 1, seed=2)
    text, codes = inputs["text"], inputs["codes"]
    text_logits, image_logits = captioner.logits(inputs)
    assert text_logits.shape == (1, 4, 11) and image_logits.shape == (1, 6, 7)
    for t in range(5):
        other = text.clone()
        other[0, t] = (other[0, t] + 1) % 11
        again = captioner.logits({"text": other, "codes": codes})
        assert ((again[0] - text_logits).abs().amax(2)[0] > 1e-9).tolist() == [i >= t for i in range(4)]
        assert ((again[1] - image_logits).abs().amax(2)[0] > 1e-9).tolist() == [t == 0] * 6
    for n in range(6):
        other = codes.clone()
        other[0, n] = (other[0, n] + 1) % 7
        again = captioner.logits({"text": text, "codes": other})
        assert ((again[0] - text_logits).abs().amax(2) > 1e-9).all()
        assert ((again[1] - image_logits).abs().amax(2)[0] > 1e-9).tolist() == [i > n for i in range(6)]


def test_positions_stay_with_their_tokens():
    """A caption token has the position of its place in the caption, though codes stand before it."""
    model = build(model="captioner")
    positions, own = model.positions(), model.conditions["text"].pos
    assert positions[0].equal(own[0]) and positions[1:7].equal(model.grid()) and positions[7:].equal(own[1:])


@torch.no_grad()
def test_caploss_against_a_loop(captioner):
    """Sec. 3.2: the mean over a caption's tokens; pads do not count."""
    inputs = batch(captioner)
    log_p = captioner.logits(inputs)[0].log_softmax(2)
    expected = []
    for b, n in enumerate((2, 4, 4)):
        expected.append(-sum(float(log_p[b, t, inputs["text"][b, t + 1]]) for t in range(n)) / n)
    assert torch.allclose(captioner.score(inputs).double(), torch.tensor(expected).double(), rtol=1e-5)
    empty = torch.tensor([[1, 12, 13, 14, 15]])
    assert captioner.score({"text": empty, "codes": inputs["codes"][:1]}).tolist() == [0]  # no division by zero


@pytest.mark.parametrize("settings", [dict(top_p=0.8, temperature=1.0), dict(temperature=0.0)], ids=str)
def test_captions_equal_a_naive_loop(captioner, settings):
    """All text logits are computed for each token; a caption ends with its end token."""
    codes, cfg = batch(captioner, 4)["codes"], SampleConfig(**settings)
    end = int(captioner.write_captions(codes, Sampler(cfg, range(4)), 1, -1)[0, 2])  # ends the first caption, at least
    ids = captioner.write_captions(codes, Sampler(cfg, range(4)), 1, end)
    assert ids[0, 3:].tolist() == [14, 15]
    for b, row in enumerate(ids):
        sampler = Sampler(cfg, [b])
        noise, expected = sampler.uniform(5), 11 + torch.arange(5)
        expected[0] = 1
        for t in range(1, 5):
            logits = captioner.logits({"text": expected[None], "codes": codes[b : b + 1]})[0][:, t - 1].float()
            expected[t] = sampler.pick(sampler.filter(logits), noise[:, t])
            if expected[t] == end:
                break
        assert row.equal(expected)


def test_a_captioner_ends_at_once_if_all_captions_have():
    model = build(model="captioner", **GPT2)
    model.text_head.forward = lambda x: torch.nn.functional.one_hot(torch.tensor(2), 11).expand(len(x), 1, 11) * 99.0
    ids = model.write_captions(batch(model)["codes"], Sampler(SampleConfig(), range(3)), 1, 2)
    assert ids.tolist() == [[1, 2, 13, 14, 15]] * 3


@pytest.mark.parametrize("change", [{"mask": "row"}, {"condition": "encoder"}, {"condition": "text,coarse"}], ids=str)
def test_a_captioner_needs_the_plain_sequence(change):
    with pytest.raises(ValueError, match="a captioner needs --mask causal and --condition text"):
        build(model="captioner", **change)


# --- codes of a smaller image ---


@pytest.mark.parametrize("grid, factor", [((4, 6), 2), ((3, 6), 3)])
def test_each_coarse_code_has_the_mean_position_of_those_it_covers(grid, factor):
    h, w = grid
    model = build(condition="text,coarse", grid_h=h, grid_w=w, shrink=factor)
    codes, positions = model.grid().view(h, w, -1), model.positions()
    rotary = build(condition="text,coarse", grid_h=h, grid_w=w, shrink=factor, pos="rotary", n_head=1)
    m = h // factor * (w // factor)
    assert model.layout == (5 + m, h, w) and positions.shape == (5 + m + h * w, 16)
    for k in range(m):
        top, left = (factor * i for i in divmod(k, w // factor))
        covered = codes[top : top + factor, left : left + factor].flatten(0, 1)
        assert torch.allclose(positions[5 + k], covered.mean(0), atol=1e-6)
        # 2-D rotary: frequencies 100^(-i/4), rows in the first four
        row, column = top + (factor - 1) / 2, left + (factor - 1) / 2
        angle = torch.tensor([x * 100 ** (-i / 4) for x in (row, column) for i in range(4)])
        assert torch.allclose(rotary.cos[5 + k], angle.cos(), atol=1e-5)
        assert torch.allclose(rotary.sin[5 + k], angle.sin(), atol=1e-5)


def test_coarse_codes_share_the_embedding_table():
    model = build(condition="text,coarse", grid_h=4, grid_w=2)
    inputs, condition = batch(model), model.conditions["coarse"]
    torch.nn.init.normal_(condition.kind)
    expected = model.embed_codes(inputs["coarse"]) + condition.kind
    assert model.condition(inputs)[0][:, 5:].equal(expected) and model.condition(inputs)[0].shape == (3, 7, 16)
    assert model.window_plan == "centre_outward" and build().window_plan == "every_place"


def test_a_coarse_condition_reads_the_codes_of_the_shrunk_image():
    model = build(condition="text,coarse", grid_h=4, grid_w=2)
    key, (view, name) = CoarsePrefix.extra_codes(model.cfg)
    x = torch.rand(2, 3, 16, 8)
    assert (key, name) == ("coarse", "shrink2") and view(x).equal(shrink(x, 2)) and view(x).shape == (2, 3, 8, 4)


def test_a_prior_starts_one_that_enlarges():
    small, large = build(), build(condition="text,coarse", grid_h=4, grid_w=6)
    fitted = resize_grid(small.state_dict(), large)
    large.load_state_dict(fitted)
    assert fitted["blocks.0.attn.f.qkv.weight"].equal(small.blocks[0].attn.f.qkv.weight)
    assert pick(type(large.cfg), vars(large.cfg)) == large.cfg


# --- windows ---


def test_windows_start_at_the_centre():
    """Then its sides, then the corners, overlapping by half: sec. 3.1."""
    plan = centre_outward((64, 64), (32, 32), 2)
    assert len(plan) == 9 and plan[0] == (16, 16, None)
    assert {p[:2] for p in plan[1:5]} == {(0, 16), (16, 0), (16, 32), (32, 16)}


@pytest.mark.parametrize(
    "grid, window, step", [((6, 10), (4, 4), 2), ((7, 5), (4, 4), 1), ((4, 4), (4, 4), 2), ((30, 12), (4, 6), 2)]
)
def test_windows_cover_the_grid_and_fit_in_it(grid, window, step):
    seen, distances = torch.zeros(grid), []
    for top, left, place in centre_outward(grid, window, step):
        assert top % step == left % step == 0 and place is None
        assert 0 <= top <= grid[0] - window[0] and 0 <= left <= grid[1] - window[1]
        seen[top : top + window[0], left : left + window[1]] += 1
        distances.append(math.hypot(top + window[0] / 2 - grid[0] / 2, left + window[1] / 2 - grid[1] / 2))
    assert seen.min() >= 1 and distances == sorted(distances)

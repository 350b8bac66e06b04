"""Decoding: filters against brute force, schedules, guidance, seeds, cached against uncached, finishing a picture."""

from collections import Counter
from dataclasses import replace

import pytest
import torch

from minit2i.gpt import GPT, GPTConfig
from minit2i.filters import FILTERS, draw, filtered, guide, min_p, scheduled, temperature, top_k, top_p
from minit2i.sample import SampleConfig, generate, image_loss, text_loss, write_captions

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


def test_min_p_against_brute_force():
    logits = torch.randn(20, 13) * 2
    for p in (0.01, 0.3, 1.0):
        for row, keep in zip(logits, min_p(logits, p).isfinite()):
            probability = row.softmax(0).tolist()
            assert keep.tolist() == [x >= p * max(probability) * (1 - 1e-6) for x in probability]
    assert min_p(logits, 0.0).equal(logits)


def test_schedules():
    for schedule, expected in (("constant", [3, 3, 3]), ("rising", [1.5, 2, 3]), ("falling", [2.5, 2, 1])):
        assert [scheduled(3.0, schedule, u) for u in (0.25, 0.5, 1.0)] == expected
    logits = torch.randn(4, 13)
    cfg = SampleConfig(temperature=0.5, temperature_schedule="rising", top_p=1.0)
    assert torch.allclose(filtered(logits, cfg, 0.5), logits / 0.75) and filtered(logits, cfg, 0.0).equal(logits)
    cfg = SampleConfig(temperature=0.0, temperature_schedule="rising", top_p=1.0)
    assert filtered(logits, cfg, 1.0).isfinite().sum(1).tolist() == [1] * 4


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


def uncached(model, text, empty, cfg, known=None, low=None):
    """The same pictures by recomputing all logits for each code, one picture at a time."""
    n_image, out = model.cfg.n_image, []
    for prompt in text:
        for i in range(cfg.n):
            codes, b = torch.zeros(1, n_image, dtype=torch.long), len(out)
            noise = torch.rand(n_image, generator=torch.Generator().manual_seed(cfg.seed + b))
            small = None if low is None else low[b : b + 1]
            for k in range(n_image):
                logits, u = model.logits(prompt[None], codes, small)[1][:, k], (k + 1) / n_image
                rise = {"rising": u, "falling": 1 - u}
                scale = 1 + (cfg.cfg_scale - 1) * rise.get(cfg.cfg_schedule, 1)
                if cfg.cfg_scale != 1:
                    logits = guide(logits, model.logits(empty[None], codes, small)[1][:, k], scale)
                t = 1 + (cfg.temperature - 1) * rise.get(cfg.temperature_schedule, 1)
                logits = min_p(top_p(top_k(temperature(logits, t), cfg.top_k), cfg.top_p), cfg.min_p)
                codes[0, k] = draw(logits, noise[k : k + 1])
                if known is not None and known[b, k] >= 0:
                    codes[0, k] = known[b, k]
            out.append(codes[0])
    return torch.stack(out)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"cfg_scale": 1.0},
        {"cfg_schedule": "constant"},
        {"cfg_schedule": "falling", "temperature_schedule": "falling", "temperature": 2.0},
        {"temperature": 0.0},
        {"top_k": 4, "top_p": 0.8, "temperature": 0.7, "min_p": 0.1},
        {"cfg_scale": 0.0},
    ],
    ids=str,
)
def test_the_cached_loop_equals_the_naive_one(model, text, settings):
    cfg = SampleConfig(n=2, **settings)
    assert generate(model, text, EMPTY, cfg).equal(uncached(model, text, EMPTY, cfg))


@pytest.mark.parametrize("mask", ["full", "row"])
def test_the_compiled_loop_draws_the_same_from_two_graphs(mask, monkeypatch):
    torch.manual_seed(0)
    model = GPT(replace(CFG, mask=mask, grid_h=12, grid_w=12)).requires_grad_(False)  # several lengths of the cache
    text = torch.randint(0, CFG.n_vocab, (2, CFG.text_len))
    expected, compiled = generate(model, text, EMPTY, SampleConfig(n=2)), torch.compile
    graphs, lengths = [], set()

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    monkeypatch.setattr("torch.compile", lambda f, mode, **how: compiled(f, backend=backend, fullgraph=True, **how))
    torch._dynamo.reset()
    model.compile_step()
    step = model.step
    model.step = lambda ids, at, cache: lengths.add(cache.kv[0][0].shape[2]) or step(ids, at, cache)
    for _ in range(2):  # the second time with another cache
        assert generate(model, text, EMPTY, SampleConfig(n=2)).equal(expected)
    assert len(graphs) == 2 and lengths == {32, 64, 96, 128, CFG.text_len + 143}


def test_known_codes_anywhere_are_kept_and_seen_by_what_follows(model, text):
    cfg = SampleConfig(n=2)
    for places in ([], [0], [3], [0, 1, 4], [5], range(6)):
        known = torch.full((6, 6), -1)
        known[:, places] = torch.arange(6)[:, None] % 13
        assert generate(model, text, EMPTY, cfg, known).equal(uncached(model, text, EMPTY, cfg, known))
    known[1, 2] = -1  # in one picture only
    assert generate(model, text, EMPTY, cfg, known).equal(uncached(model, text, EMPTY, cfg, known))


def test_batched_equals_alone_and_seeds_name_pictures(model, text):
    cfg = SampleConfig(n=3, seed=5)
    together = generate(model, text, EMPTY, cfg)
    alone = [generate(model, t[None], EMPTY, replace(cfg, seed=5 + 3 * k)) for k, t in enumerate(text)]
    assert together.equal(torch.cat(alone))
    second = generate(model, text[:1], EMPTY, replace(cfg, n=1, seed=6))
    assert second[0].equal(together[1]) and not together[0].equal(together[1])
    same = generate(model, text[:1].repeat(2, 1), EMPTY, cfg)
    assert not same[:3].equal(same[3:])  # the same prompt twice has two noises
    seeds = [9, 2, 6]
    assert generate(model, text[:1], EMPTY, cfg, seeds=seeds)[2].equal(second[0])


def test_guidance_one_is_plain_conditional_and_zero_unconditional(model, text):
    c, u = torch.randn(2, 13), torch.randn(2, 13)
    assert torch.allclose(guide(c, u, 1.0), c) and guide(c, u, 0.0).equal(u)
    unconditional = generate(model, EMPTY[None], EMPTY, SampleConfig(n=2, cfg_scale=1.0))
    assert generate(model, text[:1], EMPTY, SampleConfig(n=2, cfg_scale=0.0, cfg_schedule="constant")).equal(
        unconditional
    )


def test_the_callers_tensors_are_never_changed(model, text):
    """A guidance loop that builds its second half in place once zeroed the prompt in a well-known repository."""
    before, empty, first = text.clone(), EMPTY.clone(), torch.zeros(6, 2, dtype=torch.long)
    weights = {k: v.clone() for k, v in model.state_dict().items()}
    first = torch.cat([first, first - 1, first - 1], 1)
    generate(model, text, EMPTY, SampleConfig(n=2), first)
    assert text.equal(before) and EMPTY.equal(empty) and first.eq(0).sum() == 12
    assert all(v.equal(weights[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize("m", [1, 2, 5, 6])
def test_finishing_a_picture_keeps_what_is_given_and_goes_on_as_before(model, text, m):
    cfg = SampleConfig(n=2)
    whole = generate(model, text, EMPTY, cfg)
    known = whole.clone()
    known[:, m:] = -1
    assert generate(model, text, EMPTY, cfg, known).equal(whole)
    known[:, :m] = (whole[:, :m] + 1) % 13
    assert generate(model, text, EMPTY, cfg, known)[:, :m].equal(known[:, :m])


def test_every_code_is_watched(model, text):
    seen = []
    codes = generate(model, text, EMPTY, SampleConfig(n=2), watch=lambda c: seen.append(c.clone()))
    assert [int((c >= 0).sum()) for c in seen] == [6, 12, 18, 24, 30, 36] and seen[-1].equal(codes)


@pytest.mark.parametrize(
    "settings",
    [
        {"n": 0},
        {"temperature": -1.0},
        {"top_k": -1},
        {"top_p": 0.0},
        {"top_p": 1.5},
        {"cfg_scale": -1.0},
        {"cfg_scale": float("nan")},
        {"min_p": 2.0},
        {"steps": 0},
    ],
    ids=str,
)
def test_impossible_settings_are_refused(settings):
    with pytest.raises(ValueError, match=next(iter(settings))):
        SampleConfig(**settings)


# --- super-resolution and captions ---


@pytest.mark.parametrize("pos", ["learned", "rotary"])
def test_super_resolution_sees_the_small_picture_and_the_cached_loop_agrees(text, pos):
    cfg = replace(CFG, low=2, grid_h=4, grid_w=2, n_embd=16, pos=pos)
    model = GPT(cfg).requires_grad_(False)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.4)
    low, codes = torch.randint(0, 13, (3, 2)), torch.randint(0, 13, (3, 8))
    logits = model.logits(text, codes, low)[1]
    for place in range(2):
        other = low.clone()
        other[:, place] = (low[:, place] + 1) % 13
        changed = (model.logits(text, codes, other)[1] - logits).abs().amax(2)
        assert changed.min() > 1e-5, "each small code matters to every code"
    assert model.logits(text, codes, codes[:, :2])[1].shape == (3, 8, 13)
    small = low.repeat_interleave(2, 0)
    for known in (None, torch.cat([small, torch.full((6, 6), -1)], 1)):
        drawn = generate(model, text, EMPTY, SampleConfig(n=2), known, small)
        assert drawn.equal(uncached(model, text, EMPTY, SampleConfig(n=2), known, small))


@pytest.mark.parametrize("pos", ["learned", "rotary"])
def test_a_captioner_reads_the_picture_first(text, pos):
    model = GPT(replace(CFG, order="image", pos=pos)).requires_grad_(False)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.4)
    codes = torch.randint(0, 13, (2, 6))
    cfg = SampleConfig(n=2, top_p=0.8, temperature=1.0)
    ids = write_captions(model, codes, 1, 2, cfg)
    for b, row in enumerate(ids):  # a naive loop
        noise = torch.rand(5, generator=torch.Generator().manual_seed(b))
        expected = 11 + torch.arange(5)
        expected[0] = 1
        for t in range(1, 5):
            logits = model.logits(expected[None], codes[b // 2][None])[0][:, t - 1]
            expected[t] = draw(top_p(logits, 0.8), noise[t : t + 1])
            if expected[t] == 2:
                break
        assert row.equal(expected)
    # what sees what: text all codes, codes no text but the beginning mark
    text_logits, image_logits = model.logits(text[:2], codes)
    other = text[:2].clone()
    other[:, 1:] = (other[:, 1:] + 1) % 11
    assert model.logits(other, codes)[1].equal(image_logits)
    assert ((model.logits(text[:2], (codes + 1) % 13)[0] - text_logits).abs().amax(2) > 1e-5).all()


def test_losses_of_captions_and_pictures_are_means_over_their_tokens(model, text):
    captioner = GPT(replace(CFG, order="image")).requires_grad_(False)
    codes, pads = torch.randint(0, 13, (3, 6)), text.clone()
    pads[0, 3:] = torch.tensor([14, 15])
    t, i = captioner.logits(pads, codes)[0].log_softmax(2), model.logits(text, codes)[1].log_softmax(2)
    for b, n in enumerate((2, 4, 4)):
        by_hand = -sum(float(t[b, k, pads[b, k + 1]]) for k in range(n)) / n
        assert abs(float(text_loss(captioner, pads, codes)[b]) - by_hand) < 1e-5
        by_hand = -sum(float(i[b, k, codes[b, k]]) for k in range(6)) / 6
        assert abs(float(image_loss(model, text, codes)[b]) - by_hand) < 1e-5

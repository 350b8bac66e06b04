"""CogView: its Gumbel quantizer, its sequence beside a plain loop, the captioner and its loss, codes of a smaller image, windows."""

import math

import pytest
import torch
import torch.nn.functional as F
from conftest import COMMON_FLAGS
from priors import GPT2, batch, big, build
from processes import call, fork

import train_prior
from minit2i.collectives import gather_objects
from minit2i.config import pick
from minit2i.gpt import resize_grid
from minit2i.papers.cogview import CoarsePrefix, centre_continuous, centre_outward
from minit2i.plot import read_log
from minit2i.sample import SampleConfig, Sampler, slide
from minit2i.train import Processes
from minit2i.vq import build_vq, shrink


@pytest.fixture(params=["learned", "rotary"])
def captioner(request):
    return big(build(model="captioner", pos=request.param, grid_h=3, grid_w=2, **GPT2), 0.4).double()


# --- the tokenizer ---


def gumbel_st(**settings):
    return build_vq(dict(stride=4, ch=8, n_codes=16, code_dim=4, quantizer="gumbel_st") | settings).quantizer


def test_gumbel_takes_the_nearest_code_after_noise_with_the_gradient_of_the_mixture():
    """Against loops: logits are minus the distances, one row of the codebook goes on, the softmax has the gradient."""
    quantizer, weight = gumbel_st(tau_steps=100), torch.randn(30, 4)
    quantizer.scale.fill_(3.0)
    for step, tau in ((0, 1.0), (50, 17 / 32), (100, 1 / 16), (1000, 1 / 16)):
        z = torch.randn(30, 4, requires_grad=True)
        torch.manual_seed(step)
        z_q, nearest, loss = quantizer(z, True, step)
        torch.manual_seed(step)
        noise, rows = -(-torch.rand(30, 16).log()).log(), quantizer.codebook.detach().requires_grad_()
        distance = torch.stack([torch.stack([(x - row).square().sum().sqrt() for row in rows]) for x in z])
        noisy = (-3 * distance + noise) / tau
        assert torch.allclose(z_q, rows[noisy.argmax(1)], atol=1e-5)
        assert torch.allclose(loss, 0.25 * (z - rows[distance.argmin(1)]).square().mean(), atol=1e-5)
        assert nearest.equal(distance.argmin(1)) and not nearest.equal(noisy.argmax(1))
        hard = F.one_hot(noisy.argmax(1), 16) + noisy.softmax(1) - noisy.softmax(1).detach()
        expected = torch.autograd.grad((hard @ rows * weight).sum(), (z, rows))
        found = torch.autograd.grad((z_q * weight).sum(), (z, quantizer.codebook))
        assert all(torch.allclose(a, b, atol=1e-4) for a, b in zip(found, expected))
    assert quantizer(z)[1].equal(distance.argmin(1)), "without noise the nearest"


def start_distances(z):
    procs, quantizer = Processes("cpu"), gumbel_st()
    quantizer.start(z.chunk(procs.world)[procs.rank])
    return gather_objects((quantizer.codebook.detach(), quantizer.scale))


def test_gumbel_starts_with_distances_of_variance_one():
    """From k-means; an overflow is left out, and two ranks get the same."""
    z = 5 * torch.randn(200, 4)
    z[7, 3] = torch.inf
    ((codebook, scale),) = start_distances(z)
    distance = torch.cdist(torch.cat([z[:7], z[8:]]).double(), codebook.double())
    assert abs(float((distance * scale).std(unbiased=False)) - 1) < 0.01 and distance.min(1).values.mean() < 6
    for other in fork(2, start_distances, z):
        assert torch.allclose(other[0], codebook, atol=1e-3) and torch.allclose(other[1], scale, rtol=1e-3)


# --- the sequence ---


def paper_sequence(model, text, codes, coarse=None, reverse=False):
    """Sec. 2.1: token ids of one sample, without pads.  text (T,): begin token, words, end token, pads."""
    cfg, name = model.cfg, model.token_ids
    words = [int(i) for i in text[1:] if i < cfg.n_vocab]
    end, words = words[-1:], words[:-1]
    codes, coarse = (
        [int(c) + cfg.n_vocab + cfg.text_len for c in row] for row in (codes, [] if coarse is None else coarse)
    )
    if reverse:
        return [name["[BASE]"], name["[BOI1]"], *codes, name["[EOI1]"], name["[ROI1]"], *words, *end]
    ids = [name["[ROI1]"], *words, name["[BASE]"], name["[BOI1]"]]
    if coarse:
        ids += [*coarse, name["[EOI1]"], name["[ROI2]"], name["[BASE]"], name["[BOI2]"]]
        return ids + codes + [name["[EOI2]"]]
    return ids + codes + [name["[EOI1]"]]


def layernorm(x, w, name):
    """PB-Relax: LayerNorm(x / max |x|), sec. 2.4."""
    x = x / x.abs().amax(-1, keepdim=True).detach()
    x = x - x.mean(-1, keepdim=True)
    return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * w[f"{name}.weight"] + w[f"{name}.bias"]


def paper_logits(w, ids, cfg):
    """CogView written from the paper: ids (B, S) with pads at the end -> logits (B, S, V) over all tokens.

    w: {name: tensor}.  1-D positions, Sandwich-LN, causal attention, less gradient for the embedding, tied output.
    """
    table, s = w["embedding.weight"], ids.shape[1]
    x = table[ids] * cfg.embed_grad + table[ids].detach() * (1 - cfg.embed_grad) + w["index"][:s]
    later = torch.ones(s, s, dtype=torch.bool).triu(1)
    for i in range(cfg.n_layer):
        name = f"blocks.{i}."
        h = layernorm(x, w, name + "attn.norm") @ w[name + "attn.f.qkv.weight"].t()
        q, k, v = (part.unflatten(2, (cfg.n_head, -1)).transpose(1, 2) for part in h.chunk(3, 2))
        score = (q @ k.mT / q.shape[-1] ** 0.5).masked_fill(later, -math.inf)
        h = (score.softmax(3) @ v).transpose(1, 2).flatten(2) @ w[name + "attn.f.out.weight"].t()
        x = x + layernorm(h, w, name + "attn.after")
        h = F.gelu(layernorm(x, w, name + "mlp.norm") @ w[name + "mlp.f.up.weight"].t(), approximate="tanh")
        x = x + layernorm(h @ w[name + "mlp.f.down.weight"].t(), w, name + "mlp.after")
    return layernorm(x, w, "norm") @ table.t()


def paper_loss(w, sequences, cfg):
    """Loss of each token (all but the first) of sequences of any length, as one row: one softmax over all tokens."""
    pad, length = cfg.n_vocab, max(map(len, sequences))
    ids = torch.tensor([row + [pad] * (length - len(row)) for row in sequences])
    logits = paper_logits(w, ids[:, :-1], cfg)
    logits[..., cfg.n_vocab : cfg.n_vocab + cfg.text_len] = -math.inf  # there is no such token
    loss = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none").view(len(ids), -1)
    return torch.cat([row[: len(s) - 1] for row, s in zip(loss, sequences)])


STABLE = dict(norm="pb_layernorm", mlp="gelu", qk_norm=False, sandwich=True, pb_relax=True, embed_grad=0.1)
KINDS = [dict(), dict(condition="separated,separated_coarse", grid_h=4, grid_w=2), dict(model="cogview_captioner")]


def cogview(b=4, **changes):
    """A CogView in float64 with large weights, and captions of 0, 1, 3 and 3 words."""
    model = big(build(**dict(model="cogview", text_len=5) | STABLE | changes)).double()
    inputs = batch(model, b)
    inputs["text"][0], inputs["text"][1, 3:] = torch.tensor([1, 12, 13, 14, 15]), torch.tensor([14, 15])
    sequences = [
        paper_sequence(
            model, text, codes, inputs["coarse"][i] if "coarse" in inputs else None, "captioner" in model.cfg.model
        )
        for i, (text, codes) in enumerate(zip(inputs["text"], inputs["codes"]))
    ]
    return model, inputs, sequences


@pytest.mark.parametrize("change", KINDS, ids=str)
def test_cogview_equals_its_paper_with_pads_at_the_end(change):
    """Tokens, what each predicts, and the loss of every kind, for captions of any length, an empty one included."""
    model, inputs, sequences = cogview(**change)
    ids, seen = model.tokens(inputs)
    assert [row[shown].tolist() for row, shown in zip(ids, seen)] == sequences
    target = model.targets(inputs)
    assert [row[row >= 0].tolist() for row in target] == [row[1:] for row in sequences]
    w, targets = dict(model.named_parameters()), torch.tensor([i for row in sequences for i in row[1:]])
    expected, codes = paper_loss(w, sequences, model.cfg), (targets >= 16) & (targets < 23)
    loss, n = model(inputs), model.n_targets(inputs)
    assert torch.allclose(loss["image"].double(), expected[codes].sum()) and n["image"] == codes.sum()
    assert torch.allclose(loss["text"].double(), expected[~codes].sum()) and n["text"] == (~codes).sum()
    grads = torch.autograd.grad(sum(loss.values()), [*w.values()])
    for g, h in zip(grads, torch.autograd.grad(expected.sum(), [*w.values()])):
        assert torch.allclose(g, h, atol=1e-6 * float(h.abs().max()))
    assert (grads[[*w].index("embedding.weight")][11:16] == 0).all(), "pads are neither read nor predicted"


@pytest.mark.parametrize("change", KINDS[:2], ids=str)
@torch.no_grad()
def test_cogview_samples_the_likeliest_codes_of_its_paper(change):
    """From its cache, prompts of any length in one batch; sampling is restricted to codes."""
    model, inputs, sequences = cogview(**change)
    sampler = Sampler(SampleConfig(temperature=0.0, cfg_scale=1.0), range(4))
    given = {k: x for k, x in inputs.items() if k != "codes"}
    codes, n = model.generate(given, inputs["text"][0], sampler), model.cfg.n_image
    for row, sequence in zip(codes, sequences):
        ids = sequence[: -n - 1]
        for _ in range(n):
            logits = paper_logits(dict(model.named_parameters()), torch.tensor([ids]), model.cfg)[0, -1, 16:23]
            ids.append(16 + int(logits.argmax()))
        assert (row + 16).tolist() == ids[-n:]
    guided = Sampler(SampleConfig(cfg_scale=3.0), range(4))
    together = model.generate(given, inputs["text"][0], guided)
    for b in range(4):  # prompts and the empty caption have different lengths
        one, alone = {k: x[b : b + 1] for k, x in given.items()}, Sampler(SampleConfig(cfg_scale=3.0), [b])
        assert model.generate(one, inputs["text"][0], alone)[0].equal(together[b])


@torch.no_grad()
def test_caploss_of_cogviews_sequence():
    """The mean over a caption's tokens, after [BASE] [BOI1] codes [EOI1] [ROI1]; only text can follow."""
    model, inputs, sequences = cogview(model="cogview_captioner")
    for score, ids, codes in zip(model.score(inputs), sequences, inputs["codes"]):
        ids = torch.tensor([ids])
        logits = paper_logits(dict(model.named_parameters()), ids[:, :-1], model.cfg)[0, 9:, :11]
        expected = F.cross_entropy(logits, ids[0, 10:]) if ids.shape[1] > 10 else torch.tensor(0.0)
        assert torch.allclose(score.double(), expected.double(), rtol=1e-5)


def test_a_cogview_starts_its_captioner_and_one_that_enlarges():
    """One table of tokens and positions; a longer sequence has further positions."""
    small, other = build(model="cogview", grid_h=4, grid_w=2), build(model="cogview_captioner", grid_h=4, grid_w=2)
    other.load_state_dict(resize_grid(small.state_dict(), other))
    large = build(model="cogview", condition="separated,separated_coarse", grid_h=4, grid_w=2)
    fitted = resize_grid(small.state_dict(), large)
    large.load_state_dict(fitted)
    assert small.index.shape == (7 + 8, 16) and large.index.shape == (7 + 2 + 4 + 8, 16)
    assert large.index[:15].equal(small.index) and large.index[15:].equal(fitted["index"][15:])


@pytest.mark.parametrize(
    "change, message",
    [
        ({"condition": "encoder"}, "--model cogview has a sequence of its own, without --condition encoder"),
        ({"model": "cogview_captioner", "mask": "row"}, "cogview_captioner needs --mask causal"),
        (
            {"model": "cogview_captioner", "condition": "separated,separated_coarse"},
            "needs --mask causal and --condition s",
        ),
    ],
    ids=str,
)
def test_cogview_needs_its_sequence(change, message):
    with pytest.raises(ValueError, match=message):
        build(**dict(model="cogview", grid_h=4, grid_w=2) | change)


def test_20_steps_of_the_recipe_equal_a_plain_loop(images, vq_run, tmp_path, monkeypatch):
    """The whole of train_prior.py beside the paper: sequence, loss over all tokens, AdamW; without dropout's chance."""
    parts, start, gradients = [], {}, train_prior.gradients

    def watched(forward, model, micro, *args):
        parts.extend({k: x.clone() for k, x in part.items()} for part in micro)
        if not start:
            start.update({k: x.detach().clone() for k, x in model.named_parameters()}, model=model)
        return gradients(forward, model, micro, *args)

    monkeypatch.setattr(train_prior, "gradients", watched)
    flags = "--n_layer 2 --n_head 2 --n_embd 32 --text_len 16 --vocab_size 320 --dropout 0 --steps 20 --lr 0.003"
    call(train_prior, f"--recipe cogview --data {images} --vq {vq_run} --out {tmp_path} {COMMON_FLAGS} {flags}")
    logged = [r["loss"] for r in read_log(tmp_path / "log.jsonl") if "loss" in r]

    model = start.pop("model")
    w = {k: x.requires_grad_() for k, x in start.items()}
    matrices, vectors = ([x for x in w.values() if (x.dim() > 1) == wide] for wide in (True, False))
    groups = [{"params": matrices, "weight_decay": 0.04}, {"params": vectors, "weight_decay": 0.0}]
    optimizer, found = torch.optim.AdamW(groups, betas=(0.9, 0.95)), []
    for step, part in enumerate(parts):
        sequences = [paper_sequence(model, *pair) for pair in zip(part["text"], part["codes"])]
        loss = paper_loss(w, sequences, model.cfg).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(w.values(), 1.0)
        for group in optimizer.param_groups:
            falling = 0.05 + 0.95 * (1 + math.cos(math.pi * (step - 2) / 18)) / 2
            group["lr"] = 0.003 * ((step + 1) / 2 if step < 2 else falling)
        optimizer.step()
        found.append(loss.item())
    assert len({len(s) for s in sequences}) > 1 and logged[0] > logged[-1] + 1
    assert len(logged) == 20 and all(abs(a - b) < 1e-4 for a, b in zip(found, logged)), (found, logged)


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
    assert model.window_plan == "centre_continuous" and build().window_plan == "every_place"


def test_a_coarse_condition_reads_the_codes_of_the_shrunk_image():
    model = build(condition="text,coarse", grid_h=4, grid_w=2)
    key, view, name, ratio, *other = CoarsePrefix.extra_codes(model.cfg)
    x = torch.rand(2, 3, 16, 8)
    assert (
        (key, name, ratio, *other) == ("coarse", "shrink2", 2, "", "")
        and view(x).equal(shrink(x, 2))
        and view(x).shape == (2, 3, 8, 4)
    )


def test_a_prior_starts_one_that_enlarges():
    small, large = build(), build(condition="text,coarse", grid_h=4, grid_w=6)
    fitted = resize_grid(small.state_dict(), large)
    large.load_state_dict(fitted)
    assert fitted["blocks.0.attn.f.qkv.weight"].equal(small.blocks[0].attn.f.qkv.weight)
    assert pick(type(large.cfg), vars(large.cfg)) == large.cfg


# --- windows ---


def test_nine_windows_in_the_order_of_the_release():
    """generation/magnify.py: (row, column, rows sampled) of windows of 32x32 codes that lie 16 apart."""
    release = [
        (0, 0, 18),
        (0, 1, 30),
        (0, 2, 30),
        (1, 1, 30),
        (1, 0, 30),
        (1, 2, 30),
        (2, 0, 32),
        (2, 1, 32),
        (2, 2, 32),
    ]
    assert centre_continuous((64, 64), (32, 32), 2) == [(16 * i, 16 * j, rows) for i, j, rows in release]
    by, sampled = torch.full((1, 64, 64), -1), torch.full((1, 64, 64), -1)
    for k, (i, j, rows) in enumerate(release):
        part = sampled[:, 16 * i : 16 * i + rows, 16 * j : 16 * j + 32]
        part[part < 0] = k
    assert slide(
        lambda part, k, *_: part.where(part >= 0, k), by, (32, 32), centre_continuous((64, 64), (32, 32), 2)
    ).equal(sampled)


GROWN = [((6, 10), (4, 4), 2), ((7, 5), (4, 4), 1), ((4, 4), (4, 4), 2), ((30, 12), (4, 6), 2), ((4, 12), (4, 4), 2)]


@pytest.mark.parametrize("grid, window, step", GROWN)
def test_a_window_is_given_what_stands_above_and_left_of_it(grid, window, step):
    """All codes before a sampled one in the window's raster order are there; none is sampled above one that is there."""
    final, known = {}, torch.full((1, *grid), -1)

    def sample(part, k, top, left):
        for at in range(int((part < 0).flatten().nonzero().max())):  # all that the model reads
            row, column = divmod(at, window[1])
            assert part[0, row, column] == final.get((top + row, left + column), -1), "neither final nor sampled here"
        for row, column in (part[0] < 0).nonzero().tolist():
            assert (top + row + 1, left + column) not in final, "the code below was sampled before"
        final.update(((top + row, left + column), 100 + k) for row, column in (part[0] < 0).nonzero().tolist())
        return part.where(part >= 0, 100 + k)

    plan = centre_continuous(grid, window, step)
    out = slide(sample, known, window, plan)
    assert (out >= 100).all() and all(top % step == left % step == 0 for top, left, _ in plan)


def test_masked_priors_begin_in_the_middle():
    """They see codes on all sides; the central window, then its sides, then the corners."""
    plan = centre_outward((64, 64), (32, 32), 2)
    assert len(plan) == 9 and plan[0] == (16, 16, 32)
    assert {p[:2] for p in plan[1:5]} == {(0, 16), (16, 0), (16, 32), (32, 16)}
    assert build(model="masked", condition="text,coarse", grid_h=4, grid_w=2).window_plan == "centre_outward"


@pytest.mark.parametrize("grid, window, step", GROWN)
def test_windows_cover_the_grid_and_fit_in_it(grid, window, step):
    seen, distances = torch.zeros(grid), []
    for top, left, rows in centre_outward(grid, window, step):
        assert top % step == left % step == 0 and rows == window[0]
        assert 0 <= top <= grid[0] - window[0] and 0 <= left <= grid[1] - window[1]
        seen[top : top + window[0], left : left + window[1]] += 1
        distances.append(math.hypot(top + window[0] / 2 - grid[0] / 2, left + window[1] / 2 - grid[1] / 2))
    assert seen.min() >= 1 and distances == sorted(distances)

"""Muse: hidden codes, parallel sampling, and the frozen T5 against a loop over positions.

The loop is the independent reference; transformers' T5EncoderModel with random weights differs from load_t5 by at most
5e-7 (measured once).
"""

import io
import json
import math
import pickle
import shutil

import pytest
import sentencepiece
import torch
from PIL import Image
from conftest import COMMON_FLAGS
from priors import EMPTY, GPT2, batch, big, build, empty_of
from processes import call
from safetensors.torch import save_file
from untrained import make_vq

import train_prior
from minit2i import sample_cli
from minit2i.checkpoint import file_hash, read_config
from minit2i.config import merge
from minit2i.gpt import prior_config
from minit2i.papers.muse import CoarseCodes, MaskedSampling, T5Text
from minit2i.papers.muse import folder_hash, hide, hide_each, load_t5, n_still_hidden
from minit2i.sample import SampleConfig, Sampler
from minit2i.train import Processes
from minit2i.vq import shrink

GRID = dict(model="masked", grid_h=4, grid_w=4, n_codes=13)
CASCADE = GRID | dict(condition="t5,coarse_codes")


def sample(model, inputs, n=2, known=None, watch=None, negative=None, **settings):
    cfg = merge(SampleConfig, MaskedSampling)(**settings)
    sampler = Sampler(cfg, range(cfg.seed, cfg.seed + n * len(inputs["text"])))
    empty = empty_of(inputs) if negative is None else negative
    return model.generate({k: v for k, v in inputs.items() if k != "codes"}, empty, sampler, known, watch)


@pytest.fixture
def model():
    return big(build(**GRID)).requires_grad_(False)


# --- training ---


def test_the_hidden_share_has_the_papers_density():
    """P(share < r) = (2/pi) arcsin r, Muse sec. 2.6; 2 arccos(u) / pi, often seen in its place, has another."""
    codes = torch.arange(400).expand(4000, 400)
    visible = hide(codes, torch.Generator().manual_seed(0))
    share = (visible < 0).float().mean(1)
    assert ((visible == codes) | (visible < 0)).all() and share.min() > 0
    # 4000 shares with a standard deviation of at most 0.5: 0.008 of a probability
    assert abs(float(share.mean()) - 2 / math.pi) < 0.02
    for r in (0.2, 0.5, 0.8, 0.95):
        assert abs(float((share < r).float().mean()) - 2 / math.pi * math.asin(r)) < 0.03
    assert abs((visible < 0).float().mean(0) - 2 / math.pi).max() < 0.04  # each position as often


def test_at_least_one_code_is_hidden():
    assert (hide(torch.zeros(2000, 2, dtype=torch.long)) < 0).any(1).all()


def test_hidden_codes_depend_on_each_rows_seed_alone():
    codes = torch.arange(400).expand(4, 400)
    assert hide_each(codes, range(7, 11)).equal(
        torch.cat([hide_each(codes[:2], [7, 8]), hide_each(codes[2:], [9, 10])])
    )
    assert not hide_each(codes[:2], [7, 8]).equal(hide_each(codes[:2], [9, 10]))


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_the_loss_counts_hidden_codes_alone(smoothing):
    model = big(build(**GRID | dict(label_smoothing=smoothing))).requires_grad_(False)
    inputs = batch(model, 2)
    visible = inputs["codes"].clone()
    visible[0, :5] = visible[1, 7] = -1
    inputs["visible_codes"] = visible
    log_p = model.logits(inputs)[1].double().log_softmax(2)
    places = [(0, 0), (0, 1), (0, 2), (0, 3), (0, 4), (1, 7)]
    plain = [-float(log_p[b, n, inputs["codes"][b, n]]) for b, n in places]
    smooth = [-float(log_p[b, n].mean()) for b, n in places]
    by_hand = sum((1 - smoothing) * p + smoothing * s for p, s in zip(plain, smooth))
    assert math.isclose(float(model(inputs, train=True)["image"]), by_hand, rel_tol=1e-5)
    assert math.isclose(float(model(inputs)["image"]), sum(plain), rel_tol=1e-5)  # evaluation is not smoothed
    assert model.n_targets(inputs) == {"image": 6} and not model.predicts_text


def test_logits_read_visible_codes_and_no_hidden_one(model):
    inputs = batch(model, 2)
    visible = inputs["codes"].clone()
    visible[:, :5] = -1
    logits = model.logits(inputs | {"visible_codes": visible})[1]
    hidden = (inputs["codes"] + 1).remainder(13).where(visible < 0, inputs["codes"])
    assert model.logits(inputs | {"codes": hidden, "visible_codes": visible})[1].equal(logits)
    visible[0, 15] = (visible[0, 15] + 1) % 13
    changed = (model.logits(inputs | {"visible_codes": visible})[1] - logits).abs().amax(2) > 1e-6
    assert changed[0].all() and not changed[1].any()


# --- sampling ---


def test_how_many_codes_stay_hidden():
    """MaskGIT sec. 3.2: floor(16 cos(pi (t + 1) / 16)) after step t of 8."""
    n, hidden, counts = torch.tensor([16, 1, 0]), torch.tensor([16, 1, 0]), []
    for step in range(8):
        hidden = n_still_hidden(n, hidden, (step + 1) / 8)
        counts.append(hidden.tolist())
    assert [c[0] for c in counts] == [math.floor(16 * math.cos(math.pi * t / 16)) for t in range(1, 8)] + [0]
    assert [c[1] for c in counts] == [1] * 7 + [0] and not any(c[2] for c in counts)
    hidden = torch.tensor([5])
    for step in range(20):  # more steps than codes: each keeps one, until one is left for the last
        before, hidden = int(hidden), n_still_hidden(torch.tensor([5]), hidden, (step + 1) / 20)
        assert hidden == 0 if step == 19 else max(1, before - 1) >= int(hidden) >= 1


@pytest.mark.parametrize("steps", [1, 3, 16, 40])
def test_codes_are_sampled_once_and_known_ones_never_change(model, steps):
    known = torch.full((4, 16), -1)
    known[:, [0, 7, 9]] = torch.tensor([3, 5, 12])
    given, seen = known.clone(), []
    codes = sample(model, batch(model, 2), known=known, watch=lambda c: seen.append(c.clone()), steps=steps)
    assert known.equal(given) and codes[:, [0, 7, 9]].equal(given[:, [0, 7, 9]]) and (codes >= 0).all()
    hidden = torch.tensor([13])
    for step, (before, now) in enumerate(zip([given, *seen], seen)):
        hidden = n_still_hidden(torch.tensor([13]), hidden, (step + 1) / steps)
        assert (now < 0).sum(1).eq(hidden).all() and now[before >= 0].equal(before[before >= 0])
    assert len(seen) == steps


def test_a_learned_image_is_sampled_again():
    model = build(**GRID | dict(n_embd=32, n_layer=1))
    inputs, optimizer = batch(model, 2), torch.optim.AdamW(model.parameters(), 1e-2)
    for step in range(60):
        corrupted = model.corrupt(inputs, [2 * step, 2 * step + 1])
        model(corrupted)["image"].backward()
        optimizer.step(), optimizer.zero_grad()
    codes = sample(model, inputs, n=1, steps=4, cfg_scale=1.0, temperature=0.0)
    assert codes.eq(inputs["codes"]).float().mean() > 0.8


def test_the_most_confident_codes_are_kept_first(model):
    """Two steps at temperature 0 without noise: floor(16 cos(pi / 4)) = 11 codes wait for the second."""
    inputs, seen = batch(model, 2), []
    settings = dict(steps=2, temperature=0.0, choice_noise=0.0, cfg_scale=1.0)
    sample(model, inputs, n=1, watch=lambda c: seen.append(c.clone()), **settings)
    probability, code = model.logits(inputs | {"codes": torch.full((2, 16), -1)})[1].softmax(2).max(2)
    for b in range(2):
        kept = (seen[0][b] >= 0).nonzero().flatten()
        assert set(kept.tolist()) == set(probability[b].topk(5).indices.tolist())
        assert seen[0][b, kept].equal(code[b, kept])


@pytest.mark.parametrize(
    "kind, cfg_scale, negative",
    [(GRID, 1.0, False), (GRID, 3.0, False), (GRID, 3.0, True), (CASCADE, 3.0, False), (CASCADE, 3.0, True)],
    ids=["plain", "guided", "negative", "cascade", "cascade-negative"],
)
def test_sampling_equals_a_naive_loop(kind, cfg_scale, negative):
    """MaskGIT sec. 3.2: Gumbel noise on the log probability falls to 0 with u = (step + 1) / steps; one image at a time.

    A negative prompt stands in the unconditional half, which has the coarse codes as well; they have steps of their own.
    """
    model = big(build(**kind, **GPT2)).double().requires_grad_(False)
    inputs, settings = batch(model, 2), dict(cfg_scale=cfg_scale, temperature=0.9, choice_noise=4.5)
    settings |= dict(steps=2, enlarge_steps=5) if kind is CASCADE else dict(steps=5, enlarge_steps=2)
    expected, away = [], batch(model, 2, seed=9)["text"][1] if negative else empty_of(inputs)
    for b in range(4):
        sampler = Sampler(merge(SampleConfig, MaskedSampling)(**settings), [b])
        codes, text = torch.full((16,), -1), inputs["text"][b // 2]
        rest = {k: v[b // 2][None] for k, v in inputs.items() if k == "coarse"}
        for step in range(5):
            u, (noise, choice) = (step + 1) / 5, sampler.uniform(2, 16)[0]
            rows = [{"text": t[None], "codes": codes[None]} | rest for t in (text, away)[: 1 + sampler.guided]]
            logits = sampler.guide(torch.cat([model.logits(row)[1] for row in rows]), sampler.scale(u))[0]
            sampled, confidence = sampler.pick(sampler.filter(logits), noise), {}
            for n in range(16):
                if codes[n] < 0:
                    log_p = float(logits[n].log_softmax(0)[sampled[n]])
                    confidence[n] = log_p - 4.5 * (1 - u) * math.log(-math.log(float(choice[n])))
            n_stay = math.floor(16 * math.cos(math.pi / 2 * u)) if step < 4 else 0
            for n in sorted(confidence, key=confidence.get)[n_stay:]:
                codes[n] = sampled[n]
        expected.append(codes)
    assert sample(model, inputs, negative=away, **settings).equal(torch.stack(expected))


@pytest.mark.parametrize("setting", [dict(cfg_schedule="constant"), dict(choice_noise=0.0), dict(steps=4)], ids=str)
def test_settings_change_the_sample(model, setting):
    """And a guidance of 1 is plain conditional sampling."""
    inputs = batch(model, 2)
    base = dict(steps=6, cfg_scale=3.0)
    assert sample(model, inputs, **base).equal(sample(model, inputs, **base))
    assert not sample(model, inputs, **base).equal(sample(model, inputs, **base | setting))


def test_guidance_of_zero_reads_no_caption(model):
    inputs = batch(model, 2)
    empty = inputs | {"text": EMPTY.repeat(2, 1)}
    zero = dict(cfg_scale=0.0, cfg_schedule="constant", choice_noise=0.0, steps=1)
    assert sample(model, inputs, **zero).equal(sample(model, empty, **zero | dict(cfg_scale=1.0)))


def test_coarse_codes_condition_a_masked_prior():
    model = big(build(**GRID | dict(condition="text,coarse"))).requires_grad_(False)
    inputs = batch(model, 2) | {"visible_codes": torch.full((2, 16), -1)}
    logits = model.logits(inputs)[1]
    for place in range(4):
        other = inputs["coarse"].clone()
        other[:, place] = (other[:, place] + 1) % 13
        assert ((model.logits(inputs | {"coarse": other})[1] - logits).abs().amax(2) > 1e-5).all()
    del inputs["visible_codes"]
    seen = []
    codes = sample(model, inputs, n=1, steps=3, watch=lambda c: seen.append(c.clone()))
    assert codes.shape == (2, 16) and (codes >= 0).all() and model.window_plan == "centre_outward"
    assert len(seen) == 8  # Muse: 8 steps for super-resolution


# --- cross-attention, and super-resolution ---


@pytest.mark.parametrize("condition", ["t5", "encoder", "encoder,coarse_codes"])
def test_a_dropped_caption_attends_to_nothing(condition):
    """Muse sec. 2.7: without the text, attention is that of image tokens to themselves."""
    model = big(build(**GRID | GPT2 | dict(condition=condition, pads="hidden", dropout=0.0))).double()
    inputs = batch(model, 3)
    inputs["visible_codes"] = inputs["codes"].masked_fill(torch.rand(3, 16) < 0.5, -1)
    dropped = inputs | {"text": empty_of(inputs).expand_as(inputs["text"])}
    logits = model.logits(dropped)[1]
    model.loss(dropped)["image"].backward()
    text = [p for k, p in model.conditions.named_parameters() if ".encoder.blocks" in k or k == "t5.project.weight"]
    text = [
        p
        for p in text
        if not any(p is q for q in getattr(model.conditions, "coarse_codes", torch.nn.Module()).parameters())
    ]
    assert all(p.grad is None or not p.grad.any() for p in text)
    model.zero_grad()
    model.loss(inputs)["image"].backward()
    assert text and all(p.grad.any() for p in text)
    if "coarse" not in condition:
        for block in model.blocks:
            torch.nn.init.zeros_(block.cross.f.out.weight)
        assert model.logits(inputs)[1].equal(logits) and model.logits(dropped)[1].equal(logits)
    else:
        other = dropped | {"coarse": (dropped["coarse"] + 1) % 5}
        assert ((model.logits(other)[1] - logits).abs().amax(2) > 1e-5).all()  # the coarse codes still count


def test_pads_of_t5_are_hidden():
    """The memory has no positions: a state alone is attended to like five copies of it, unless pads count."""
    model = big(build(**GRID | GPT2 | dict(condition="t5"))).double()
    inputs = batch(model, 1)
    alone, five = torch.zeros(1, 5, 12, dtype=torch.double), torch.randn(1, 1, 12, dtype=torch.double).expand(1, 5, 12)
    alone[:, 0] = five[:, 0]
    logits = [model.logits(inputs | {"text": text})[1] for text in (alone, five)]
    assert torch.allclose(*logits, atol=1e-9)


def test_super_resolution_attends_to_text_and_coarse_codes():
    """A table, learned positions and blocks of their own; beside the text's states, of which only pads are hidden."""
    model, base = (big(build(**kind | GPT2)).double() for kind in (CASCADE, GRID | dict(condition="t5")))
    inputs, condition = batch(model, 2) | {"visible_codes": torch.full((2, 16), -1)}, model.conditions["coarse_codes"]
    _, context = model.condition(inputs)
    assert context.memory.shape == (2, 5 + 4, 16) and context.memory_seen[1].all()
    assert context.memory_seen[0].tolist() == [True] * 3 + [False] * 2 + [True] * 4
    x = torch.stack(
        [condition.embedding.weight[c] + condition.encoder.pos[i] for i, c in enumerate(inputs["coarse"][1])]
    )
    for block in condition.encoder.blocks:
        x = block(x[None] if x.dim() == 2 else x, condition.encoder.mask)
    assert torch.allclose(context.memory[1, 5:], condition.encoder.norm(x)[0])
    own = [p.numel() for p in condition.encoder.blocks.parameters()] + [16, 16]  # the last norm's
    n = sum(p.numel() for p in model.parameters()) - sum(p.numel() for p in base.parameters())
    assert n == 5 * 16 + 4 * 16 + sum(own) and len(condition.encoder.blocks) == 2
    logits = model.logits(inputs)[1]
    for place in range(4):
        other = inputs["coarse"].clone()
        other[:, place] = (other[:, place] + 1) % 5
        assert ((model.logits(inputs | {"coarse": other})[1] - logits).abs().amax(2) > 1e-5).all()
    assert ((model.logits(inputs | {"text": inputs["text"] * 1.1})[1] - logits).abs().amax(2) > 1e-5).all()


def test_coarse_codes_are_another_tokenizers(tmp_path):
    """Its stride, number of codes and hash join the config; Muse: f16 of 256 pixels and f8 of 512 are 4 to 1."""
    vq = make_vq(tmp_path / "vq", stride=16, n_codes=9)
    settings = GRID | dict(condition="text,coarse_codes", coarse_vq=str(vq), coarse_hash="", n_vocab=11)
    cfg = prior_config(settings)[1]
    found = file_hash(vq / "model.safetensors")
    assert (cfg.coarse_hash, cfg.coarse_stride, cfg.coarse_n_codes) == (found, 16, 9)
    for stride, times, ratio in ((8, 1, 2), (4, 1, 4), (8, 2, 4), (16, 2, 2)):
        fitted = CoarseCodes.fit(prior_config(settings | {"coarse_shrink": times})[1], stride)
        view, x = CoarseCodes.extra_codes(fitted), torch.rand(1, 3, 32, 32)
        assert (view.key, view.ratio, view.vq, view.vq_hash) == ("coarse", ratio, str(vq), found)
        assert view.f(x).equal(shrink(x, times)) and bool(view.name) == (times > 1)
    with pytest.raises(ValueError, match="stride 16, times coarse_shrink 1, is not a multiple of the stride 32"):
        CoarseCodes.fit(cfg, 32)
    with pytest.raises(ValueError, match="not above"):
        CoarseCodes.fit(cfg, 16)


def test_the_cascade_trains_resumes_and_samples(images, tmp_path):
    """16 to 32 pixels, two tokenizers; the run keeps both, and nothing is given again when it resumes or samples."""
    base, larger = tmp_path / "base", tmp_path / "larger"
    coarse, fine = make_vq(tmp_path / "coarse", image_size="16"), make_vq(tmp_path / "fine", stride=4, image_size="32")
    flags = f"{COMMON_FLAGS} --data {images} --n_layer 1 --n_head 2 --n_embd 16 --text_len 16 --vocab_size 320"
    flags += f" --recipe muse --n_encoder 1 --cache {tmp_path / 'cache'} --eval_every 1"
    call(train_prior, f"{flags} --vq {coarse} --image_size 16 --out {base} --steps 1")
    more = f"--condition encoder,coarse_codes --coarse_vq {base / 'vq'} --coarse_shrink 2 --n_coarse 1"
    call(train_prior, f"{flags} {more} --vq {fine} --out {larger} --steps 1")
    for folder in (coarse, fine):
        shutil.rmtree(folder)
    call(train_prior, f"--out {larger} --resume --steps 2")
    assert read_config(larger)["step"] == 2 and read_config(larger)["model"]["coarse_ratio"] == 4
    assert (larger / "coarse_vq/model.safetensors").read_bytes() == (base / "vq/model.safetensors").read_bytes()
    sample = f"--device cpu --model {base} --enlarge {larger} --prompt red --n 2 --steps 3 --out {tmp_path / 'x.png'}"
    sample_cli.main(sample.split())
    with Image.open(tmp_path / "x.png") as im:
        assert im.size == (2 * 34 - 2, 32) and json.loads(im.text["settings"])["enlarge_steps"] == 8
        assert len(im.text["model"].split("+")) == 2
    make_vq(tmp_path / "other", seed=5)
    with pytest.raises(
        ValueError, match=f"{larger} learned the coarse codes of another .*--coarse_vq {larger}/coarse_vq"
    ):
        how = f"--init {larger} --vq {larger / 'vq'} --coarse_vq {tmp_path / 'other'} --out {tmp_path / 'no'}"
        call(train_prior, f"{flags.replace('--recipe muse', '')} {how} --steps 1")
    assert not (tmp_path / "no" / "text.model").exists()


@pytest.mark.parametrize(
    "change, message",
    [
        ({"mask": "row"}, "a masked prior sees all positions, which mask row does not; leave out --mask"),
        ({"label_smoothing": 1.5}, "label_smoothing 1.5 is not in"),
        ({"condition": "t5", "t5_hash": ""}, "nowhere is not a checkpoint folder"),
        ({"condition": "t5", "t5": "", "t5_hash": ""}, "--condition t5 needs --t5, the folder"),
        ({"condition": "coarse_codes"}, "coarse_codes stands beside a caption: use --condition encoder,coarse_codes"),
        ({"condition": "text,coarse_codes", "coarse_vq": "", "coarse_hash": ""}, "coarse_codes needs --coarse_vq"),
        ({"condition": "text,coarse_codes", "coarse_ratio": 3}, "4x4 codes are not a multiple of 3"),
    ],
    ids=str,
)
def test_impossible_settings_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        build(**GRID | change)


# --- the frozen T5 ---

CONFIG = dict(model_type="t5", feed_forward_proj="gated-gelu", vocab_size=96, d_model=12, d_kv=5, d_ff=14)
CONFIG |= dict(num_layers=2, num_heads=3, relative_attention_num_buckets=8, relative_attention_max_distance=10)
CONFIG |= dict(layer_norm_epsilon=1e-6)
CAPTIONS = ["a red circle", "two blue squares", "", "a red circle above a small blue square on a white background"]
PROCS = Processes("cpu", "fp32")


def weights():
    """Random weights under the names of the Hugging Face layout."""
    g = torch.Generator().manual_seed(3)

    def normal(*shape):
        return torch.randn(*shape, generator=g) * 0.4

    w = {"shared.weight": normal(96, 12), "encoder.final_layer_norm.weight": normal(12)}
    w["encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"] = normal(8, 3)
    for i in range(2):
        at = f"encoder.block.{i}.layer"
        w |= {f"{at}.0.SelfAttention.{k}.weight": normal(15, 12) for k in "qkv"}
        w |= {f"{at}.0.SelfAttention.o.weight": normal(12, 15), f"{at}.1.DenseReluDense.wo.weight": normal(12, 14)}
        w |= {f"{at}.1.DenseReluDense.wi_{k}.weight": normal(14, 12) for k in "01"}
        w |= {f"{at}.{k}.layer_norm.weight": normal(12) for k in "01"}
    return w


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A random encoder in two shards with their index; the decoder in them is to be ignored."""
    out, w, pieces = tmp_path_factory.mktemp("t5"), weights(), io.BytesIO()
    (out / "config.json").write_text(json.dumps(CONFIG))
    names = sorted(w)
    shards = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    index = {name: shard for shard, part in shards.items() for name in part}
    (out / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    for shard, part in shards.items():
        more = {"decoder.final_layer_norm.weight": torch.ones(12)}
        save_file({k: w[k] for k in part} | more, out / shard, metadata={"format": "pt"})
    ids = dict(pad_id=0, eos_id=1, unk_id=2, bos_id=-1)
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([c for c in CAPTIONS if c] * 9),
        model_writer=pieces,
        vocab_size=40,
        hard_vocab_limit=False,
        minloglevel=2,
        **ids,
    )
    (out / "spiece.model").write_bytes(pieces.getvalue())
    return out


def by_hand(w, ids):
    """One caption without pads (T,), position by position, in float64 -> (T, 12)."""
    w = {k: v.double() for k, v in w.items()}

    def norm(x, gain):
        return x / (x.square().mean() + 1e-6).sqrt() * gain

    def bucket(distance):  # of 8, far 10: 0 1 2 3 for keys before the query, 4 ... 7 for those after
        d = abs(distance)
        b = d if d < 2 else min(3, 2 + int(math.log(d / 2) / math.log(10 / 2) * 2))
        return b + (4 if distance > 0 else 0)

    table = w["encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"]
    x = [w["shared.weight"][i] for i in ids]
    for i in range(2):
        at = f"encoder.block.{i}.layer"
        h = [norm(v, w[f"{at}.0.layer_norm.weight"]) for v in x]
        q, k, v = ([w[f"{at}.0.SelfAttention.{n}.weight"] @ y for y in h] for n in "qkv")
        for a in range(len(x)):
            heads = []
            for j in range(3):
                part = slice(5 * j, 5 * j + 5)
                score = [q[a][part] @ k[b][part] + table[bucket(b - a), j] for b in range(len(x))]
                share = torch.stack(score).softmax(0)
                heads.append(sum(share[b] * v[b][part] for b in range(len(x))))
            x[a] = x[a] + w[f"{at}.0.SelfAttention.o.weight"] @ torch.cat(heads)
        for a in range(len(x)):
            y = norm(x[a], w[f"{at}.1.layer_norm.weight"])
            wi, gate = (w[f"{at}.1.DenseReluDense.wi_{n}.weight"] @ y for n in "10")
            gate = 0.5 * gate * (1 + torch.tanh(math.sqrt(2 / math.pi) * (gate + 0.044715 * gate**3)))
            x[a] = x[a] + w[f"{at}.1.DenseReluDense.wo.weight"] @ (gate * wi)
    return torch.stack([norm(v, w["encoder.final_layer_norm.weight"]) for v in x])


def test_t5_states_equal_a_loop_and_ignore_pads(folder):
    model, g = load_t5(folder), torch.Generator().manual_seed(1)
    ids, seen = torch.randint(2, 96, (2, 17), generator=g), torch.ones(2, 17, dtype=torch.bool)
    seen[1, 9:] = False
    states = model(ids, seen).double()
    # float32, two layers of products over at most 17 terms, states of size about 1
    assert torch.allclose(states[0], by_hand(weights(), ids[0].tolist()), atol=2e-5)
    assert torch.allclose(states[1, :9], by_hand(weights(), ids[1, :9].tolist()), atol=2e-5)


def test_t5_in_half_precision_survives_large_activations(folder):
    """T5's feed-forward layers exceed float16's 65,504; weights and the inputs of most products are halved."""
    model, half = load_t5(folder), load_t5(folder, torch.float16)
    ids, seen = torch.arange(2, 12)[None], torch.ones(1, 10, dtype=torch.bool)
    assert (half(ids, seen) - model(ids, seen)).abs().max() < 0.02
    for m in (model, half):
        for block in m.blocks:
            block.wo.weight.mul_(3000), block.wi_0.weight.mul_(30), block.wi_1.weight.mul_(30)
    x = model.embedding(ids).float()
    assert model.blocks[0](x, torch.zeros(1, 3, 10, 10)).abs().max() > 65504
    assert half(ids, seen).isfinite().all() and (half(ids, seen) - model(ids, seen)).abs().max() < 0.05


def test_captions_are_cut_padded_and_remembered(folder, tmp_path, monkeypatch):
    text = T5Text(folder, 7)
    states = text.states(CAPTIONS)
    assert states.shape == (4, 7, 12) and text.n_cut == sum(len(p) > 6 for p in text.sp.encode(CAPTIONS)) > 0
    ids = [*text.sp.encode(CAPTIONS[0])[:6], 1]
    alone = text.model(torch.tensor([ids]), torch.ones(1, len(ids)) > 0)[0]
    assert torch.allclose(states[0, : len(ids)], alone, atol=1e-5)
    assert states[:2].any(-1).sum(1).tolist() == [min(7, len(p) + 1) for p in text.sp.encode(CAPTIONS[:2])]
    assert not states[2].any()  # the empty caption: nothing to attend to
    text.remember(CAPTIONS, tmp_path, PROCS)
    again = T5Text(folder, 7)
    monkeypatch.setattr(again, "states", None)  # not called for what is in the cache
    again.remember(CAPTIONS, tmp_path, PROCS)
    for caption, expected in zip(CAPTIONS, states):
        assert torch.allclose(again.encode(caption), expected, atol=2e-3)  # the cache is float16
    sent = pickle.dumps(text)  # to a spawned worker: neither the model nor the states go with it
    assert len(sent) < len(pickle.dumps(text.sp)) + 3000
    assert pickle.loads(sent).encode(CAPTIONS[0]).equal(text.encode(CAPTIONS[0]))
    text.n_cut -= len(text.sp.encode(CAPTIONS[0])) > 6
    assert again.n_cut == text.n_cut - again.n_cut > 0  # counted each time that one is encoded: twice by `text`


def test_what_is_not_a_t5_is_refused(folder, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(CONFIG | {"feed_forward_proj": "relu"}))
    with pytest.raises(ValueError, match="is not a T5 v1.1 .*gated-gelu"):
        load_t5(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({k: v for k, v in CONFIG.items() if k != "d_ff"}))
    with pytest.raises(ValueError, match="lacks d_ff"):
        load_t5(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    with pytest.raises(ValueError, match="whole or in shards"):
        load_t5(tmp_path)
    save_file({"shared.weight": torch.zeros(96, 12)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="do not fit its config.json"):
        load_t5(tmp_path)
    copy = shutil.copytree(folder, tmp_path / "copy")
    (copy / "spiece.model").write_bytes((folder / "spiece.model").read_bytes()[:99])
    with pytest.raises(ValueError, match="no SentencePiece model"):
        T5Text(copy, 7)
    (copy / "spiece.model").unlink()
    with pytest.raises(OSError, match="spiece.model"):
        T5Text(copy, 7)


@pytest.mark.parametrize("kind", ["gpt", "masked"])
def test_a_prior_reads_t5_states(folder, kind):
    """Its settings come from the folder; the states are projected, and pads are hidden."""
    settings = dict(model=kind, condition="t5", t5=str(folder), t5_hash="", t5_width=0)
    model = big(build(**GPT2 | settings)).double()
    assert (model.cfg.t5_width, model.cfg.t5_hash) == (12, folder_hash(folder)) and not model.predicts_text
    condition = model.conditions["t5"]
    states = batch(model)["text"]
    memory = condition.memory({"text": states}, None)
    assert torch.allclose(memory, states @ condition.project.weight.t())
    assert condition.memory_seen({"text": states}).sum(1).tolist() == [3, 5, 5]
    assert prior_config(vars(model.cfg))[1] == model.cfg
    reader = type(condition).reader(model.cfg, "cpu")
    assert reader.encode("a red circle").shape == (5, 12)


def test_another_t5_than_a_priors_own_is_refused(folder, tmp_path):
    cfg = build(condition="t5", t5=str(folder), t5_hash="", t5_width=0).cfg
    copy = shutil.copytree(folder, tmp_path / "copy")
    moved = prior_config(vars(cfg) | {"t5": str(copy)})[1]
    assert type(build(condition="t5").conditions["t5"]).reader(moved, "cpu").hash == cfg.t5_hash
    (copy / "config.json").write_text(json.dumps(CONFIG | {"layer_norm_epsilon": 1e-5}))
    for other in (moved, prior_config(vars(cfg) | {"t5": "nowhere"})[1]):
        with pytest.raises(ValueError, match=f"the text encoder {cfg.t5_hash}, which is not in .*name its folder"):
            type(build(condition="t5").conditions["t5"]).reader(other, "cpu")

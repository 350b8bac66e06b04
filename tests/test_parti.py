"""Parti: sizes of WDSR; the encoder-decoder; two towers: their losses, retrieval, and the encoder they hand over.

StyleGAN's discriminator is in test_tokenizer_losses.py.
"""

import math

import pytest
import torch
import torch.nn.functional as F
from conftest import PRIOR_FLAGS
from priors import EMPTY, GPT2, batch, big, build
from processes import call, fork
from safetensors.torch import load_file
from torch.nn.parallel import DistributedDataParallel

import train_prior
from minit2i.checkpoint import read_config
from minit2i.gpt import prior_config
from minit2i.papers.parti import MAX_LOG_SCALE, Towers, hide_words, info_nce, is_word
from minit2i.train import Processes
from minit2i.vq import UPSAMPLERS, build_vq

TOWERS = dict(model="towers", n_encoder=1, n_layer=1, text_len=8, n_vocab=40, n_codes=33)


def captioned(n=8):
    """Captions of five words between begin and end token, then a pad; codes."""
    g = torch.Generator().manual_seed(0)
    text = torch.randint(3, 40, (n, 8), generator=g)
    text[:, 0], text[:, 6], text[:, 7] = 1, 2, 47
    return {"text": text, "codes": torch.randint(0, 33, (n, 6), generator=g)}


def towers(**changes):
    torch.manual_seed(0)
    return build(**TOWERS | changes)


# --- the super-resolution ---


@pytest.mark.parametrize("name, scale, size", [("wdsr", 2, 15e6), ("wdsr-x4", 4, 30e6)])
def test_wdsr_has_the_sizes_that_parti_names(name, scale, size):
    net = UPSAMPLERS[name](UPSAMPLERS[name].Config())
    assert abs(sum(w.numel() for w in net.parameters()) / size - 1) < 0.1
    assert net(torch.rand(1, 3, 4, 6)).shape == (1, 3, 4 * scale, 6 * scale)
    with torch.device("meta"):
        cfg = build_vq({"upsampler": name}).cfg
    assert cfg.upscale == scale, "chosen by its name alone"


# --- the encoder-decoder ---


@pytest.mark.parametrize("pos", ["learned", "rotary", "sequence"])
def test_the_encoder_reads_the_whole_caption(pos):
    model = big(build(condition="encoder", pos=pos, **GPT2)).double()
    encoder, x = model.conditions["encoder"].encoder, torch.randn(1, 5, 16, dtype=torch.float64, requires_grad=True)
    for t in range(5):
        (grad,) = torch.autograd.grad((encoder(x)[0, t] * torch.arange(16)).sum(), x)
        assert (grad.abs().sum(2) > 0).all()
    other = encoder(x.flip(1)).flip(1)
    assert not torch.allclose(other, encoder(x))  # positions matter
    longer = build(condition="encoder", pos=pos, text_len=6, **GPT2).double().conditions["encoder"].encoder
    longer.load_state_dict(encoder.state_dict())
    later = longer(torch.cat([x[:, :1], x], 1), seen=torch.arange(6)[None] > 0)[:, 1:]
    assert torch.allclose(later, encoder(x)), "positions are relative"
    assert len(encoder.blocks) == 2 and encoder.blocks[0].cross is None and model.blocks[0].cross is not None


def test_a_begin_token_stands_before_the_codes():
    model = big(build(condition="encoder"))
    inputs = batch(model)
    prefix, context = model.condition(inputs)
    assert model.layout == (1, 2, 3) and prefix.shape == (3, 1, 16) and prefix[0].equal(prefix[1])
    assert context.memory.equal(model.conditions["encoder"].encoder(model.embedding(inputs["text"])))
    assert model.positions()[:1].equal(model.conditions["encoder"].pos)
    assert model.logits(inputs)[0] is None and not hasattr(model, "text_head") and set(model(inputs)) == {"image"}


def test_layers_of_encoder_and_decoder():
    model = build(condition="encoder", n_encoder=3, n_layer=1)
    assert len(model.conditions["encoder"].encoder.blocks) == 3 and len(model.blocks) == 1
    assert build(condition="encoder").conditions["encoder"].encoder.norm is not build().norm


def other_pads(model, inputs):
    """The same batch where the pads' embeddings are others."""
    with torch.no_grad():
        model.embedding.weight[model.cfg.n_vocab : model.cfg.n_vocab + model.cfg.text_len] += 1
    return inputs


@pytest.mark.parametrize("pads", ["hidden", "learned"])
def test_hidden_pads_do_not_matter(pads):
    """Neither in the encoder nor in cross-attention, nor to the towers."""
    for model in (big(build(condition="encoder", pads=pads)), big(towers(pads=pads, text_len=5, n_vocab=11))):
        inputs = batch(model)

        def result():
            if isinstance(model, Towers):
                return torch.cat(model.features(inputs["text"], inputs["codes"] % 7))
            return model.logits(inputs)[1]

        before, _ = result(), other_pads(model, inputs)
        assert torch.allclose(result()[1:], before[1:], atol=1e-6), "only the first caption has pads"
        assert torch.allclose(result()[0], before[0], atol=1e-6) == (pads == "hidden")


# --- the towers' losses ---


def test_info_nce_against_closed_forms_and_a_loop():
    equal, apart = F.normalize(torch.ones(6, 8), dim=1), torch.eye(6)
    assert math.isclose(float(info_nce(equal, equal, 20.0)) / 6, math.log(6), rel_tol=1e-6)
    expected = math.log(1 + 5 * math.exp(-3))  # own logit 3, the five others 0
    assert math.isclose(float(info_nce(apart, apart, 3.0)) / 6, expected, rel_tol=1e-5)
    a, b = F.normalize(torch.randn(2, 4, 5, dtype=torch.float64), dim=-1)
    total = 0.0
    for i in range(4):
        for x, y in ((a, b), (b, a)):
            e = [math.exp(7 * float(x[i] @ y[j])) for j in range(4)]
            total -= math.log(e[i] / sum(e)) / 2
    assert math.isclose(float(info_nce(a, b, 7.0)), total, rel_tol=1e-12)


def test_the_scale_is_bounded():
    """CLIP sec. 2.5: it starts at 1 / 0.07 and is at most 100."""
    model = towers()
    assert math.isclose(model.scale().item(), 1 / 0.07, rel_tol=1e-5) and MAX_LOG_SCALE == math.log(100)
    torch.nn.init.constant_(model.log_scale, 9.0)
    assert math.isclose(model.scale().item(), 100, rel_tol=1e-5)


def test_words_are_neither_pads_nor_begin_nor_end():
    text = torch.tensor([[1, 5, 6, 7, 2, 45], [1, 5, 6, 8, 9, 2], [1, 41, 42, 43, 44, 45]])
    expected = [[0, 1, 1, 1, 0, 0], [0, 1, 1, 1, 1, 0], [0] * 6]  # with a pad, without, the empty caption
    assert is_word(text, 40).int().tolist() == expected


def test_hidden_words_are_berts():
    """15 % of the words; of these 80 % are masked, 10 % random, 10 % unchanged."""
    text = captioned(1)["text"].repeat(20_000, 1)
    read, target = hide_words(text, 40, 99, torch.Generator().manual_seed(1)).unbind(1)
    chosen = target >= 0
    assert not chosen[:, [0, 6, 7]].any() and target[chosen].equal(text[chosen])
    assert read[~chosen].equal(text[~chosen])
    # 100,000 words, 15,000 chosen: standard deviations of 0.0011 and at most 0.0033
    assert abs(float(chosen[:, 1:6].float().mean()) - 0.15) < 0.006
    assert abs(float((read[chosen] == 99).float().mean()) - 0.8) < 0.02
    kept = float((read[chosen] == text[chosen]).float().mean())  # also random words that happen to be the same
    assert abs(kept - 0.1 - 0.1 / 40) < 0.02
    other = read[chosen & (read != 99) & (read != text)]
    assert other.unique().numel() == 40 and other.max() < 40


def test_hidden_words_depend_on_each_captions_seed_alone():
    """Whichever process has it."""
    model, inputs = towers(), captioned()
    whole = model.corrupt(inputs, range(8))["hidden_words"]
    parts = [
        model.corrupt({k: v[4 * r : 4 * r + 4] for k, v in inputs.items()}, range(4 * r, 4 * r + 4)) for r in (0, 1)
    ]
    assert whole.equal(torch.cat([part["hidden_words"] for part in parts])) and whole.shape == (8, 2, 8)
    assert set(inputs) == {"text", "codes"}


def test_the_words_loss_against_a_loop():
    model, inputs = towers(), captioned()
    inputs = model.corrupt(inputs, range(8))
    read, target = inputs["hidden_words"].unbind(1)
    log_p = model.text_head(model.encoder(model.embed(read))).detach().double().log_softmax(2)
    places = (target >= 0).nonzero().tolist()
    expected = -sum(float(log_p[b, t, target[b, t]]) for b, t in places)
    assert math.isclose(model(inputs)["text"].item(), expected, rel_tol=1e-5)
    assert model.n_targets(inputs) == {"text": len(places), "image": 8}


def test_each_loss_reaches_its_own_parameters():
    """The contrast both towers and the temperature, the words the text tower alone; --embed_grad counts."""
    inputs = towers().corrupt(captioned(), range(8))
    grads = {}
    for name, share in (("image", 1.0), ("text", 1.0), ("text", 0.1)):
        model = towers(embed_grad=share)
        model(inputs)[name].backward()
        grads[name, share] = {k: w.grad for k, w in model.named_parameters() if w.grad is not None and w.grad.any()}
        last = {k.split(".")[0] for k in grads[name, share]}
        text = {"embedding", "encoder", "text_head"}
        everything = {k.split(".")[0] for k, _ in model.named_parameters()}
        assert last == (text if name == "text" else everything - {"text_head"})
    whole, less = (grads["text", share]["embedding.weight"] for share in (1.0, 0.1))
    assert torch.allclose(less, 0.1 * whole, rtol=1e-4, atol=1e-6 * whole.abs().max())


def losses_and_gradients():
    """One batch, each process a part of it -> summed losses, gradients."""
    p, model = Processes("cpu", "fp32"), towers()
    inputs = model.corrupt(captioned(), range(8))
    forward = DistributedDataParallel(model) if p.world > 1 else model
    part = slice(p.rank * 8 // p.world, (p.rank + 1) * 8 // p.world)
    losses = forward({k: v[part] for k, v in inputs.items()})
    (sum(losses.values()) * p.world).backward()
    return p.sum([losses["text"].item(), losses["image"].item()]), {k: w.grad for k, w in model.named_parameters()}


def test_two_processes_match_one():
    """Features are gathered: each caption is told from those of all processes."""
    (one, grads), (two, other) = losses_and_gradients(), fork(2, losses_and_gradients)
    for a, b in zip(one, two):
        assert math.isclose(a, b, rel_tol=1e-5)
    for name, grad in grads.items():
        assert torch.allclose(grad, other[name], rtol=1e-3, atol=1e-5 * float(grad.abs().max()) + 1e-7), name


# --- what the towers learn and hand over ---


def test_features_have_norm_1_and_ignore_pads():
    model, inputs = big(towers()), captioned()
    text, image = model.features(inputs["text"], inputs["codes"])
    for x in (text, image):
        assert x.shape == (8, 16) and torch.allclose(x.norm(dim=1), torch.ones(8), atol=1e-5)
    states = model.encoder(model.embed(inputs["text"]))
    moved = states.clone()
    moved[:, 7] += 1  # the pad's state is not in the mean
    assert model.text_feature(inputs["text"], moved).equal(model.text_feature(inputs["text"], states))
    score = model.score(inputs)
    assert torch.allclose(score, 1 - F.cosine_similarity(text, image), atol=1e-5) and score.unique().numel() == 8


def test_towers_find_what_they_learned():
    model, inputs = towers(), captioned()

    def means():
        with torch.no_grad():
            return {k: float(s) / int(n) for k, (s, n) in model.evaluate(model.corrupt(inputs, range(8))).items()}

    before = means()
    optimizer = torch.optim.AdamW(model.parameters(), 5e-3)
    for step in range(40):
        optimizer.zero_grad()
        losses = model(model.corrupt(inputs, range(8 * step, 8 * step + 8)))
        (losses["text"] / 6 + losses["image"] / 8).backward()
        optimizer.step()
    after = means()
    assert abs(before["text_loss"] - math.log(40)) < 0.3 and after["text_loss"] < before["text_loss"]
    assert after["retrieval"] == 1 > before["retrieval"] and after["image_loss"] < 0.3
    others = inputs | {"codes": inputs["codes"].roll(1, 0)}
    assert (model.score(inputs) < model.score(others)).all()


def test_evaluation_against_a_loop():
    model = big(towers()).double().requires_grad_(False)
    inputs = model.corrupt(captioned(), range(8))
    found, (text, image) = model.evaluate(inputs), model.features(inputs["text"], inputs["codes"])
    hits = sum(max(range(8), key=lambda j: float(text[i] @ image[j])) == i for i in range(8))
    assert found["retrieval"] == (hits, 8) and found["image_loss"][1] == 8
    assert torch.allclose(found["image_loss"][0], info_nce(text, image, model.scale()), rtol=1e-5)


def test_towers_hand_over_their_text_encoder():
    """And the embeddings of words and pads; codes keep their initialisation."""
    source = big(towers(n_encoder=2))
    target = build(condition="encoder", n_encoder=2, text_len=8, n_vocab=40, n_codes=33)
    before = {k: v.clone() for k, v in target.state_dict().items()}
    target.load_state_dict(Towers.tensors_for(source.state_dict(), target))
    for k, v in target.state_dict().items():
        if k.startswith("conditions.encoder.encoder."):
            assert v.equal(source.state_dict()[k.removeprefix("conditions.encoder.")])
        elif k == "embedding.weight":
            assert v[:48].equal(source.embedding.weight[:48]) and v[48:].equal(before[k][48:])
        else:
            assert v.equal(before[k])
    again = towers(n_encoder=2)
    again.load_state_dict(Towers.tensors_for(source.state_dict(), again))
    with pytest.raises(ValueError, match="use --condition encoder, --n_encoder as they have it"):
        Towers.tensors_for(source.state_dict(), build(text_len=8, n_vocab=40))
    deeper = build(condition="encoder", n_encoder=3, text_len=8, n_vocab=40, n_codes=33)
    with pytest.raises(ValueError, match="text encoder has no .*blocks.2.*: use --n_encoder as they have it"):
        Towers.tensors_for(source.state_dict(), deeper)
    with pytest.raises(RuntimeError, match="size mismatch|Unexpected key|Missing key"):
        other = build(condition="encoder", n_encoder=1, text_len=8, n_vocab=40, n_codes=33)
        other.load_state_dict(Towers.tensors_for(source.state_dict(), other))


@pytest.mark.parametrize("condition", ["encoder", "text,coarse"])
def test_towers_need_captions_as_they_are(condition):
    with pytest.raises(ValueError, match="towers read captions and codes side by side: leave out --condition"):
        build(model="towers", condition=condition)


def test_the_empty_caption_has_a_feature():
    """Its begin token is no word but counts in the mean."""
    model = big(build(model="towers"))
    text, image = model.features(EMPTY[None], batch(model, 1)["codes"])
    assert text.isfinite().all() and image.isfinite().all()
    assert prior_config(vars(model.cfg))[1] == model.cfg


@pytest.mark.parametrize("pads", ["hidden", "learned"])
def test_a_prior_starts_from_towers(images, vq_run, tmp_path, pads):
    """As the commands in parti.py do; the prior takes --pads from the towers, whose encoder it goes on with."""
    common = f"--data {images} --vq {vq_run} --cache {tmp_path / 'cache'} {PRIOR_FLAGS.replace('--mask dalle', '')}"
    call(train_prior, f"{common} --model towers --n_encoder 1 --pads {pads} --steps 2 --out {tmp_path / 'towers'}")
    start = f"{common} --init {tmp_path / 'towers'} --model gpt --condition encoder --mask conv --lr 0"
    call(train_prior, f"{start} --steps 1 --out {tmp_path / 'prior'}")
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in ("towers", "prior"))
    encoder = [k for k in one if k.startswith("encoder.")]
    assert len(encoder) > 5 and all(other[f"conditions.encoder.{k}"].equal(one[k]) for k in encoder)
    assert read_config(tmp_path / "prior")["model"]["pads"] == pads

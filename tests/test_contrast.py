"""Two towers: the losses against closed forms and two processes, retrieval on what was learned, the scripts end to end."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from processes import fork
from safetensors.torch import load_file
from test_train import call, losses, pictures, prior, vq  # noqa: F401 (fixtures)
from torch.nn.parallel import DistributedDataParallel

import sample
import train_prior
from minit2i.contrast import Contrast, evaluate_towers, hide_words, info_nce, is_word, mismatch
from minit2i.export import export
from minit2i.fid import pick_features
from minit2i.gpt import GPTConfig
from minit2i.sample import Painter, SampleConfig
from minit2i.train import Processes

CFG = GPTConfig(n_layer=1, n_encoder=1, n_head=2, n_embd=16, text_len=8, n_vocab=40, n_codes=33, grid_h=2, grid_w=3)
CFG = GPTConfig(**vars(CFG) | {"objective": "contrast"})


def batch(n=8):
    """Captions of five words between their marks, then a pad; codes."""
    g = torch.Generator().manual_seed(0)
    text = torch.randint(3, 40, (n, 8), generator=g)
    text[:, 0], text[:, 6], text[:, 7] = 1, 2, 47
    return text, torch.randint(0, 33, (n, 6), generator=g)


def model(cfg=CFG):
    torch.manual_seed(0)
    return Contrast(cfg)


# --- the losses ---


def test_contrast_equals_closed_forms_and_a_loop():
    same, apart = F.normalize(torch.ones(6, 8), dim=1), torch.eye(6)
    assert math.isclose(float(info_nce(same, same, 20.0)) / 6, math.log(6), rel_tol=1e-6)
    matched = math.log(1 + 5 * math.exp(-3))  # own logit 3, the five others 0
    assert math.isclose(float(info_nce(apart, apart, 3.0)) / 6, matched, rel_tol=1e-5)
    a, b = F.normalize(torch.randn(2, 4, 5), dim=-1)
    total = 0.0
    for i in range(4):
        for x, y in ((a, b), (b, a)):
            e = [math.exp(7 * float(x[i] @ y[j])) for j in range(4)]
            total -= math.log(e[i] / sum(e)) / 2
    assert math.isclose(float(info_nce(a, b, 7.0)), total, rel_tol=1e-4)


def test_hidden_words_are_those_of_bert():
    text = batch(1)[0].repeat(20_000, 1)
    read, target = hide_words(text, 40, 99, torch.Generator().manual_seed(1)).unbind(1)
    chosen = target >= 0
    assert is_word(text, 40)[0].tolist() == [False] + 5 * [True] + 2 * [False]
    assert not chosen[:, [0, 6, 7]].any() and torch.equal(target[chosen], text[chosen])
    assert torch.equal(read[~chosen], text[~chosen])
    assert abs(float(chosen[:, 1:6].float().mean()) - 0.15) < 0.005
    assert abs(float((read[chosen] == 99).float().mean()) - 0.8) < 0.02
    kept = float((read[chosen] == text[chosen]).float().mean())  # 10 %, and the random words that are the same
    assert abs(kept - 0.1 - 0.1 / 40) < 0.015
    full = torch.tensor([[1, 5, 6, 2], [1, 40, 41, 42]])  # without pads; the empty caption
    assert is_word(full, 40).tolist() == [[False, True, True, False], [False] * 4]


def test_the_gradient_reaches_both_towers_and_the_temperature():
    m, (text, codes) = model(), batch()
    shown = m.hide(text, torch.Generator().manual_seed(0))
    m(text, codes, None, shown)[1].backward()
    for name, w in m.named_parameters():
        assert (w.grad is None) == name.startswith("text_head"), name
        assert w.grad is None or w.grad.abs().sum() > 0, name
    m.zero_grad()
    m(text, codes, None, shown)[0].backward()
    got = {name.split(".")[0] for name, w in m.named_parameters() if w.grad is not None}
    assert got == {"embedding", "encoder", "text_head"}
    less = model(GPTConfig(**vars(CFG) | {"embed_grad": 0.1}))
    less(text, codes, None, shown)[0].backward()
    assert torch.allclose(less.embedding.weight.grad, 0.1 * m.embedding.weight.grad, atol=1e-6)


def gradients():
    """One step on the same batch, each process a part of it -> summed losses and the gradients."""
    p, m, (text, codes) = Processes("cpu"), model(), batch()
    shown = m.hide(text, torch.Generator().manual_seed(0))
    forward = DistributedDataParallel(m) if p.world > 1 else m
    part = slice(p.rank * 8 // p.world, (p.rank + 1) * 8 // p.world)
    words, contrast = forward(text[part], codes[part], None, shown[part])
    ((words + contrast) * p.world).backward()
    return p.sum([words.item(), contrast.item()]), {k: w.grad for k, w in m.named_parameters()}


def test_two_processes_equal_one():
    one, two = gradients(), fork(2, gradients)
    assert np.allclose(one[0], two[0], rtol=1e-5)
    for name, grad in one[1].items():
        assert torch.allclose(grad, two[1][name], rtol=1e-3, atol=1e-5), name


def test_the_same_words_are_hidden_whichever_process_has_them():
    text, codes = batch()
    cfg = train_prior.PriorTrainConfig(out="", batch_size=8)
    one = train_prior.hidden(model(), [(text, codes)], cfg, 3, SimpleNamespace(rank=0))[0]
    two = [
        train_prior.hidden(model(), [(text[4 * r : 4 * r + 4], codes)], cfg, 3, SimpleNamespace(rank=r))[0]
        for r in (0, 1)
    ]
    assert torch.cat(two).equal(one) and one.shape == (8, 2, 8)


def test_a_batch_is_learned_and_found():
    m, (text, codes) = model(), batch()
    rows, optimizer = list(zip(text, codes)), torch.optim.AdamW(m.parameters(), 5e-3)
    before = evaluate_towers(m, rows, 8)
    assert abs(before[0] - math.log(40)) < 0.3
    for step in range(40):
        torch.manual_seed(step)
        optimizer.zero_grad()
        words, contrast = m(text, codes, None, m.hide(text))
        (words / 6 + contrast / 8).backward()
        optimizer.step()
    words, contrast, found = evaluate_towers(m, rows, 8)
    assert found == 1 and contrast < 0.1 and words < before[0]
    assert (mismatch(m, text, codes) < mismatch(m, text, codes.roll(1, 0))).all()


def test_what_it_needs():
    for change in ({"n_encoder": 0}, {"low": 2, "grid_w": 4}, {"order": "image"}):
        with pytest.raises(ValueError, match="needs --n_encoder 1 or more|order image"):
            Contrast(GPTConfig(**vars(CFG) | change))


# --- the scripts ---

FLAGS = (
    "--objective contrast --n_encoder 1 --n_layer 1 --n_head 2 --n_embd 32 --size 32 --batch_size 8 --workers 0 "
    "--precision fp32 --log_every 1 --eval_size 8 --eval_every 2 --warmup 2 --text_len 16 --vocab_size 320".split()
)


@pytest.fixture(scope="module")
def towers(vq, prior, pictures):  # noqa: F811
    out, cache = prior.parent / "towers", prior.parent / "cache"
    call(train_prior, *FLAGS, "--data", pictures, "--vq", vq, "--cache", cache, "--out", out, "--steps", 4)
    return out


def test_resumed_it_goes_on_and_starts_a_prior(towers, vq, prior, pictures, tmp_path):  # noqa: F811
    common = ("--data", pictures, "--vq", vq, "--cache", prior.parent / "cache")
    out = tmp_path / "stopped"
    call(train_prior, *FLAGS, *common, "--out", out, "--steps", 4, "--save_every", 2)
    assert losses(out) == losses(towers)
    call(train_prior, *FLAGS, *common, "--out", out, "--steps", 6, "--resume")
    assert len(losses(out)) == 6

    out, small = tmp_path / "parti", tmp_path / "small"
    export(towers, small)  # a copy scores as they do
    judges = [Painter(folder, kind="contrast") for folder in (towers, small)]
    codes = torch.zeros(1, 16, dtype=torch.long)
    a, b = (mismatch(judge.prior, judge.ids(["a red circle"]), codes) for judge in judges)
    assert torch.allclose(a, b, atol=1e-2)
    own = [x.replace("contrast", "causal") for x in FLAGS]  # --init brings the rest of the towers' shape
    call(train_prior, *own, "--init", towers, *common, "--out", out, "--steps", 1, "--lr", 0, "--weight_decay", 0)
    before, after = (load_file(f / "model.safetensors") for f in (towers, out))
    same = [k for k in after if k.startswith("encoder.")]
    assert same and all(torch.equal(before[k], after[k]) for k in same)
    n = Painter(out).prior.cfg.n_vocab
    assert torch.equal(before["embedding.weight"][:n], after["embedding.weight"][:n])
    with pytest.raises(ValueError, match="use --n_encoder as they have it"):
        call(train_prior, *own, "--n_encoder", 0, "--init", towers, *common, "--out", tmp_path / "x", "--steps", 1)


def test_the_best_of_many_by_the_towers(towers, prior, tmp_path):  # noqa: F811
    painter, judge = Painter(prior), Painter(towers, kind="contrast")
    prompt = "a red circle"
    codes = next(iter(painter.draw([(0, prompt)], SampleConfig(n=5))))[2]
    loss = sample.code_losses(painter, judge, prompt, codes, 2)
    a, b = judge.prior.features(judge.ids([prompt]), codes.flatten(1))
    assert torch.allclose(loss, 1 - (a * b).sum(1), atol=1e-5) and loss.unique().numel() > 1
    flags = ("--model", prior, "--prompt", prompt, "--device", "cpu", "--n", 2, "--best_of", 5)
    call(sample, *flags, "--rerank", "contrastive", "--towers", towers, "--out", tmp_path / "out")
    for i in range(2):
        with Image.open(tmp_path / "out" / f"00000-a-red-circle-{i}.png") as im:
            assert abs(float(im.text["contrastive"]) - sorted(loss.tolist())[i]) < 1e-4
            best = painter.images(codes[loss.argsort()[i]][None])[0]
            assert np.array_equal(np.asarray(sample.to_pil(best)), np.asarray(im))


def test_the_picture_tower_gives_features_for_fid(towers):
    tower, images = pick_features(towers, torch.device("cpu")), torch.rand(3, 3, 32, 32) * 2 - 1
    expected = tower.painter.prior.image_feature(tower.painter.vq.encode(images).flatten(1))
    assert torch.allclose(tower(images), expected, atol=1e-5) and expected.shape == (3, tower.width)
    with pytest.raises(ValueError, match="use --size 32x32"):
        tower(images[..., :16])


@pytest.mark.parametrize(
    "script, flags, message",
    [
        ("sample", "--prompt x --best_of 4 --rerank contrastive", "--towers, a model of"),
        ("sample", "--prompt x --towers TOWERS", "--towers, a model of"),
        ("sample", "--prompt x --best_of 4 --rerank contrastive --towers PRIOR", "no pair of towers"),
        ("sample", "--prompt x --model TOWERS", "is not a prior"),
        ("train", "--accum 2", "use --accum 1"),
        ("train", "--strategy fsdp", "--strategy ddp"),
        ("train", "--init PRIOR", "starts from chance"),
        ("train", "--plan 2", "counts priors"),
    ],
)
def test_what_is_refused(script, flags, message, towers, prior, tmp_path):  # noqa: F811
    argv = [{"PRIOR": prior, "TOWERS": towers}.get(f, f) for f in flags.split()]
    with pytest.raises(ValueError, match=message):
        if script == "sample":
            call(sample, "--model", prior, "--device", "cpu", "--n", 2, *argv, "--out", tmp_path / "x.png")
        else:
            call(train_prior, *FLAGS, *argv, "--out", tmp_path / "x")

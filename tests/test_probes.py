"""Probes of language: the loss of text as training logs it, embeddings against a loop, encoders trained against untrained."""

import json

import pytest
import torch
from test_train import call, pictures, vq  # noqa: F401 (fixtures)

import train_prior
from minit2i import probes
from minit2i.contrast import Contrast
from minit2i.gpt import GPTConfig
from minit2i.sample import PRETRAINED
from minit2i.train import read_log

WIDTH = "--n_layer 1 --n_head 2 --n_embd 32"
FLAGS = f"{WIDTH} --batch_size 8 --workers 0 --precision fp32 --eval_size 99 --warmup 2 --text_len 16 --vocab_size 320"


@pytest.fixture(scope="module")
def folders(pictures, vq, tmp_path_factory):  # noqa: F811
    """A language model, a prior that starts from it, one that does not; two towers, a prior that starts from them."""
    root = tmp_path_factory.mktemp("probes")
    words = "the cat sat on the mat and the dog sat on the log".split()
    text = "\n\n".join(" ".join(words[(i * k) % 13] for k in range(1, 12)) for i in range(1, 300))
    (root / "book.txt").write_text(text)
    own = f"--data {pictures} --vq {vq} --cache {root}/cache --size 32"

    def train(name, flags):
        call(train_prior, *FLAGS.split(), *flags.split(), "--out", root / name)

    train("lm", f"--objective text --data {root}/book.txt --steps 12 --lr 0.01")
    train("fresh", f"{own} --init_lm {root}/lm/lm --steps 0 --text_len 20")
    train("chance", f"{own} --init_lm {root}/lm/lm --no-init_lm_weights --steps 2 --ema 0")
    train("towers", f"{own} --objective contrast --n_encoder 1 --steps 2 --lr 0.01 --ema 0")
    train("parti", f"{own} --init {root}/towers --objective causal --n_encoder 1 --mask conv --steps 0")
    return root


def measured(tmp_path, *argv):
    call(probes, *argv, "--device", "cpu", "--out", tmp_path / "out.json")
    return json.loads((tmp_path / "out.json").read_text())


def test_text_loss_is_what_training_logs_and_a_fresh_prior_has_it_too(folders, tmp_path):
    names = [str(folders / name) for name in ("lm", "fresh", "chance")]
    record = measured(tmp_path, "text", "--text", folders / "book.txt", "--model", *names)
    lm, fresh, chance = (record["figures"][name] for name in names)
    logged = read_log(folders / "lm" / "log.jsonl")[-1]["val_text_loss"]
    assert abs(lm["nats"] - logged) < 1e-4 and lm["step"] == 12
    assert abs(fresh["nats"] - lm["nats"]) < 1e-6 and chance["nats"] > lm["nats"] + 0.1
    assert len(record["model"]) == 3 and "probes" in record["command"] and (tmp_path / "out.png").exists()


def test_token_figures_equal_a_loop(folders, tmp_path):
    name = str(folders / "chance")
    record = measured(tmp_path, "tokens", "--model", name)["figures"]
    model = probes.load(name, "cpu")[0]
    c = model.cfg
    text, image = model.embedding.weight[: c.n_vocab].tolist(), model.embedding.weight[-c.n_codes :].tolist()

    def cosine(a, b):
        def dot(x, y):
            return sum(u * v for u, v in zip(x, y))

        return dot(a, b) / (dot(a, a) * dot(b, b)) ** 0.5

    figures = record[f"{name}, embedding"]
    expected = sum(max(cosine(a, b) for b in text) for a in image[:8]) / 8
    assert abs(probes.nearest(torch.tensor(image[:8]), torch.tensor(text)) - expected) < 1e-5
    expected = sum(max(cosine(a, b) for b in text[:40] if b is not a) for a in text[:40]) / 40
    assert abs(probes.nearest(torch.tensor(text[:40]), torch.tensor(text[:40]), 1) - expected) < 1e-5
    assert abs(figures["image_norm"] - sum(sum(x * x for x in row) ** 0.5 for row in image) / len(image)) < 1e-5
    assert abs(figures["image_to_text"] - probes.nearest(torch.tensor(image), torch.tensor(text))) < 1e-6
    assert record[f"{name}, output"]["text_norm"] != figures["text_norm"]


def test_a_prior_that_has_just_started_from_towers_knows_what_they_know(folders, tmp_path):
    names = [str(folders / name) for name in ("towers", "parti")]
    flags = "--text", folders / "book.txt", "--n", 24, "--steps", 3
    record = measured(tmp_path, "encoder", "--towers", names[0], "--model", names[1], *flags)
    towers, parti = (record["figures"][name] for name in names)
    assert towers == parti != record["figures"]["untrained"]
    assert towers["windows"] == 6 and 0 <= towers["text_words"] <= 1
    assert record["settings"]["steps"] == 3 and len(record["model"]) == 2


def test_new_heads_find_words_and_pictures_if_the_encoder_tells_them_apart():
    """Eight captions of one word five times, each with its picture; an encoder that sees no words is at chance."""
    cfg = GPTConfig(n_layer=1, n_encoder=1, n_head=2, n_embd=32, text_len=7, n_vocab=13, n_codes=9, grid_h=2, grid_w=2)
    towers = Contrast(GPTConfig(**vars(cfg) | {"objective": "contrast"}))
    text = torch.tensor([[1, k, k, k, k, k, 2] for k in range(5, 13)])
    codes = torch.randint(9, (8, 4))
    optimizer = torch.optim.AdamW(towers.parameters(), 1e-2)
    for _ in range(60):
        optimizer.zero_grad()
        words, contrast = towers(text, codes, None, towers.hide(text))
        (words / 6 + contrast / 8).backward()
        optimizer.step()
    towers.eval().requires_grad_(False)
    before, blind = {k: v.clone() for k, v in towers.state_dict().items()}, Contrast(towers.cfg).requires_grad_(False)
    blind.embedding.weight[:] = 0
    found = {}
    for name, other in (("sees", towers), ("blind", blind)):
        model = probes.with_encoder(towers, other)
        found[name] = probes.words_found(model, text, text, 40), probes.pictures_found(model, *[(text, codes)] * 2, 40)
    assert min(found["sees"]) > 0.7 and max(found["blind"]) < 0.4, found
    assert all(v.equal(before[k]) for k, v in towers.state_dict().items())  # only copies were trained


@pytest.mark.parametrize(
    "argv, message",
    [
        ("text --model {towers}", "towers is neither a language model nor a prior"),
        ("text --model {lm}/lm", "make a prior of a language model from elsewhere"),
        ("text --model {parti}", "predicts no text from the text before it"),
        ("text --model {lm} {shipped}", "has other tokens than"),
        ("tokens --model {lm}", "has no image tokens; a prior of --init_lm"),
        ("encoder --towers {towers} --model {fresh}", "has no text encoder that started from"),
        ("encoder --towers {lm} --model {fresh}", "no pair of towers"),
    ],
)
def test_folders_of_another_kind_are_refused(argv, message, folders):
    names = {k: folders / k for k in ("lm", "fresh", "towers", "parti")} | {"shipped": PRETRAINED}
    text = [] if argv.startswith("tokens") else ["--text", folders / "book.txt"]
    with pytest.raises(ValueError, match=message):
        call(probes, *argv.format(**names).split(), "--device", "cpu", *text)

"""Probes of language: text loss as training logs it, embeddings against a loop, encoders trained against untrained."""

import json

import pytest
import torch
from processes import call
from untrained import make_prior

from minit2i.checkpoint import load_model, read_config, save_tensors
from minit2i.experiments import probes
from minit2i.gpt import build_prior
from minit2i.papers.lm import LanguageModel
from minit2i.papers.parti import Towers
from minit2i.tokens import Text


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Untrained: a language model, two priors, two towers, and a prior whose encoder is the towers'."""
    root = tmp_path_factory.mktemp("probes")
    words = "a red circle above a blue square and a square above the circle".split()
    text = "\n\n".join(" ".join(words[(i * k) % 13] for k in range(1, 12)) for i in range(1, 300))
    (root / "book.txt").write_text(text)
    make_prior(root / "lm", std=0, model="language_model")
    make_prior(root / "prior", std=0, seed=1, text_len=20)
    make_prior(root / "towers", std=0, seed=2, model="towers", n_encoder=1)
    make_prior(root / "parti", std=0, seed=3, condition="encoder", n_encoder=1)
    parti = load_model(root / "parti", build_prior(read_config(root / "parti")["model"]))
    load_model(root / "towers", parti, Towers.tensors_for)
    save_tensors(root / "parti" / "model.safetensors", parti.state_dict())
    return root


def record_of(tmp_path, flags):
    call(probes, f"{flags} --device cpu --out {tmp_path / 'out.json'}")
    return json.loads((tmp_path / "out.json").read_text())


def test_text_loss_equals_a_loop_over_windows(folders, tmp_path):
    names = [str(folders / name) for name in ("lm", "prior")]
    record = record_of(tmp_path, f"text --text {folders / 'book.txt'} --model {' '.join(names)}")
    model, _, words = probes.load(names[0], "cpu")
    assert isinstance(model, LanguageModel)
    ids = probes.windows(folders / "book.txt", words, 16)[1]
    log_p = model.logits({"text": ids})[0].log_softmax(-1)
    losses = [-float(log_p[i, t, ids[i, t + 1]]) for i in range(len(ids)) for t in range(15)]
    assert record["figures"][names[0]]["nats"] == pytest.approx(sum(losses) / len(losses), abs=1e-4)
    assert record["figures"][names[1]]["nats"] == pytest.approx(5.7, abs=0.3)  # untrained: near ln 300
    assert len(record["model"]) == 2 and "probes" in record["command"] and (tmp_path / "out.png").exists()


def test_text_loss_does_not_depend_on_codes_or_text_len(folders):
    """A prior's text comes before its codes: longer positions filled with pads change nothing."""
    model, _, words = probes.load(folders / "prior", "cpu")
    ids = probes.windows(folders / "book.txt", words, 16)[1]
    whole = probes.text_loss(model, ids)
    x = model.trunk(model.embed(ids))  # the text alone
    loss = torch.nn.functional.cross_entropy(model.text_head(x[:, :-1]).mT, ids[:, 1:])
    assert whole == pytest.approx(float(loss), abs=1e-5)


def test_token_figures_equal_a_loop(folders, tmp_path):
    name = str(folders / "prior")
    record = record_of(tmp_path, f"tokens --model {name}")["figures"]
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


def test_a_prior_that_starts_from_towers_knows_what_they_know(folders, tmp_path):
    towers, parti = str(folders / "towers"), str(folders / "parti")
    flags = f"--text {folders / 'book.txt'} --n 24 --steps 3"
    record = record_of(tmp_path, f"encoder --towers {towers} --model {parti} {flags}")
    figures = record["figures"]
    assert figures[towers] == figures[parti] != figures["untrained"]
    assert figures[towers]["windows"] == 6 and 0 <= figures[towers]["text_words"] <= 1
    assert record["settings"]["steps"] == 3 and len(record["model"]) == 2


def test_new_heads_find_words_and_images_if_the_encoder_tells_them_apart():
    """Eight captions of one word five times, each with its image; an encoder that sees no words is at chance."""
    shape = dict(n_layer=1, n_head=2, n_embd=32, text_len=7, n_vocab=13, n_codes=9, grid_h=2, grid_w=2)
    towers = build_prior(shape | {"model": "towers", "n_encoder": 1})
    text = torch.tensor([[1, k, k, k, k, k, 2] for k in range(5, 13)])
    batch = {"text": text, "codes": torch.randint(9, (8, 4))}
    optimizer = torch.optim.AdamW(towers.parameters(), 1e-2)
    for step in range(60):
        optimizer.zero_grad()
        loss = towers.loss(towers.corrupt(batch, range(8 * step, 8 * step + 8)))
        (loss["text"] / 6 + loss["image"] / 8).backward()
        optimizer.step()
    towers.eval().requires_grad_(False)
    before, blind = {k: v.clone() for k, v in towers.state_dict().items()}, Towers(towers.cfg).requires_grad_(False)
    blind.embedding.weight[:] = 0
    found, pairs = {}, [(text, batch["codes"])] * 2
    for name, other in (("sees", towers), ("blind", blind)):
        model = probes.with_encoder(towers, other)
        found[name] = probes.words_found(model, text, text, 40), probes.images_found(model, *pairs, 40)
    assert min(found["sees"]) > 0.7 and max(found["blind"]) < 0.4, found
    assert all(v.equal(before[k]) for k, v in towers.state_dict().items())  # only copies were trained


@pytest.mark.parametrize(
    "flags, message",
    [
        ("text --model {towers}/vq", "is not a prior or language model"),
        ("text --model {parti}", "predicts no text from the text before it"),
        ("text --model {towers}", "predicts no text from the text before it"),
        ("text --model {lm} {other}", "has other tokens than"),
        ("tokens --model {lm}", "has no image tokens; a prior of --model llama"),
        ("encoder --towers {towers} --model {prior}", "has no text encoder that started from"),
        ("encoder --towers {prior} --model {parti}", "is no pair of towers"),
    ],
)
def test_folders_of_another_kind_are_refused(flags, message, folders, tmp_path):
    names = {k: folders / k for k in ("lm", "prior", "towers", "parti")} | {
        "other": make_prior(tmp_path / "other", std=0)
    }
    (tmp_path / "other" / "text.model").write_bytes(Text.train(["other words"] * 9, 270))
    text = "" if flags.startswith("tokens") else f"--text {folders / 'book.txt'}"
    with pytest.raises(ValueError, match=message):
        call(probes, f"{flags.format(**names)} {text} --device cpu")

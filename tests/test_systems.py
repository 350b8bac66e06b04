"""The six systems in one table."""

import json
import subprocess
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

import train_prior
import train_vq
from minit2i import systems
from minit2i.data import Folder
from minit2i.gpt import GPT, GPTConfig
from minit2i.recipes import RECIPES, defaults
from minit2i.vq import VQ, VQConfig
from test_train import call, pictures  # noqa: F401

SIZE = SimpleNamespace(
    size="64", n_codes=1024, vocab_size=512, vq_params=500_000, prior_params=1_000_000, vq="", prior=""
)


@pytest.mark.parametrize("name", RECIPES)
def test_systems_have_the_same_number_of_parameters(name):
    of_vq, of_prior = systems.widths(name, SIZE)
    with torch.device("meta"):
        vq = VQ(VQConfig(**defaults(name, (VQConfig,)) | of_vq | {"n_codes": 1024}))
        shape = {"n_vocab": 512, "n_codes": 1024, "grid_h": 8, "grid_w": 8}
        prior = GPT(GPTConfig(**defaults(name, (GPTConfig,)) | of_prior | shape))
    for model, target in ((vq, SIZE.vq_params), (prior, SIZE.prior_params)):
        assert abs(sum(w.numel() for w in model.parameters()) / target - 1) <= 0.1


def test_further_flags_count(monkeypatch):
    """Stride 4 has fewer layers, so it gets wider ones; a deeper prior gets narrower."""
    plain, more = (
        systems.widths("cogview", SimpleNamespace(**vars(SIZE) | flags))
        for flags in ({}, {"vq": "--stride 4 --steps 9", "prior": "--n_layer 12 --lr 1"})
    )
    assert more[0]["ch"] > plain[0]["ch"] and more[1]["n_embd"] < plain[1]["n_embd"]


def test_a_number_of_parameters_that_cannot_be_is_refused_before_anything_is_trained(pictures, tmp_path):  # noqa: F811
    with pytest.raises(ValueError, match="within 10 % of 1000 parameters; the nearest has"):
        systems.widths("cogview", SimpleNamespace(**vars(SIZE) | {"vq_params": 1000}))
    flags = "--out", tmp_path, "--data", pictures, "--recipes", "cogview", "--vq_params", 1000
    with pytest.raises(ValueError, match="of 1000 parameters"):
        call(systems, *flags)
    with pytest.raises(ValueError, match="needs two folders"):
        call(systems, *flags, "--compose", "scenes")
    assert not list(tmp_path.iterdir())


def test_rows_are_trained_once_measured_and_put_side_by_side(pictures, tmp_path, monkeypatch, capsys):  # noqa: F811
    trained = []

    def here(command):
        script = {"train_vq.py": train_vq, "train_prior.py": train_prior}[command[1].name]
        trained.append(command[1].name)
        call(script, *command[2:])
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(subprocess, "run", here)
    small = "--batch_size 4 --eval_size 4 --workers 0 --log_every 2"
    flags = (
        "--out",
        tmp_path,
        "--data",
        pictures,
        "--size",
        "16x24",
        "--n_codes",
        16,
        "--vocab_size",
        300,
        "--device",
        "cpu",
    )
    flags += "--vq_params", 120_000, "--prior_params", 400_000, "--compose", pictures
    flags += (
        "--vq",
        f"{small} --steps 2 --perceptual 0 --gan 0",
        "--prior",
        f"{small} --steps 2 --cache {tmp_path / 'cache'}",
    )
    call(systems, *flags, "--recipes", "taming")
    assert trained == ["train_vq.py", "train_prior.py"]
    call(systems, *flags, "--recipes", "taming,muse")
    assert len(trained) == 4, "the first row stands"
    table = [line.split("|") for line in (tmp_path / "table.md").read_text().splitlines()]
    assert [x.strip() for x in table[0]] == ["", "", "taming", "muse", ""] and {len(row) for row in table} == {5}
    assert "right concept, %" in {row[1].strip() for row in table} and "| taming | muse |" in capsys.readouterr().out
    row = json.loads((tmp_path / "muse" / "row.json").read_text())
    assert row["figures"]["seconds a picture"] > 0 and "muse" in row["asked"]["flags"][1]
    sheet = Image.open(tmp_path / "pictures.png")
    assert sheet.size == (60 + 24, 2 * 16) and len(json.loads(sheet.text["prompts"])) >= 1
    call(systems, *flags, "--recipes", "taming", "--prior", f"{small} --steps 3 --cache {tmp_path / 'cache'}")
    assert len(trained) == 6 and "from step 2 to 3" in capsys.readouterr().out, "other flags: it goes on"
    with pytest.raises(ValueError, match="goes on with the codes that .*vq had before; use another --out"):
        call(systems, *flags, "--recipes", "taming", "--vq", f"{small} --steps 4 --perceptual 0 --gan 0")


def test_a_picture_without_a_caption_gives_no_prompt(tmp_path):
    for name in ("a.png", "b.png", "b.txt"):
        (tmp_path / name).write_text("two\nlines")
    assert list(systems.captions(Folder(tmp_path), range(2))) == ["two", "lines"]


def test_an_unknown_recipe_is_refused(tmp_path):
    with pytest.raises(ValueError, match="recipe 'vae' is not known"):
        call(systems, "--out", tmp_path, "--recipes", "vae")

"""The six systems in one table: equal sizes, rows that are trained once, and the table."""

import json
import math
import subprocess
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from conftest import COMMON_FLAGS
from PIL import Image
from processes import call
from untrained import make_prior, make_vq

import train_prior
import train_vq
from minit2i.checkpoint import keep_copy
from minit2i.experiments import systems
from minit2i.experiments.systems import SystemsConfig, fit_width, widths
from minit2i.gpt import build_prior
from minit2i.papers import RECIPES
from minit2i.plot import save_image
from minit2i.train import n_params
from minit2i.vq import build_vq

CFG = SystemsConfig(out="x", n_codes=1024, vocab_size=512, vq_params=500_000, prior_params=1_000_000)


@pytest.mark.parametrize("name", RECIPES)
def test_systems_have_the_same_number_of_parameters(name):
    of_vq, of_prior = widths(name, CFG)
    with torch.device("meta"):
        vq = build_vq(RECIPES[name]["vq"] | of_vq | {"n_codes": 1024})
        shape = {"n_vocab": 512, "n_codes": 1024, "grid_h": 8, "grid_w": 8}
        prior = build_prior(RECIPES[name]["prior"] | of_prior | shape)
    assert abs(n_params(vq) / CFG.vq_params - 1) <= 0.1
    assert abs(n_params(prior) / CFG.prior_params - 1) <= 0.1


def test_further_flags_count():
    """Stride 4 has fewer layers, so it gets wider ones; a deeper prior gets narrower; a given quantizer wins."""
    plain = widths("cogview", CFG)
    more = widths("cogview", replace(CFG, vq="--stride 4 --steps 9", prior="--n_layer 12 --lr 1"))
    assert more[0]["ch"] > plain[0]["ch"] and more[1]["n_embd"] < plain[1]["n_embd"]
    settings = systems.model_settings(
        {"quantizer": "st"}, "--quantizer fsq --lr 1", systems.VQConfig, systems.QUANTIZERS
    )
    assert settings["quantizer"] == "fsq" and "lr" not in settings


def test_impossible_requests_are_refused_before_anything_is_trained(images, tmp_path):
    with pytest.raises(ValueError, match="within 10 % of 1000 parameters; the nearest has"):
        widths("cogview", replace(CFG, vq_params=1000))
    flags = f"--out {tmp_path} --data {images}"
    with pytest.raises(ValueError, match="of 1000 parameters"):
        call(systems, f"{flags} --recipes cogview --vq_params 1000")
    with pytest.raises(ValueError, match="needs two folders"):
        call(systems, f"{flags} --compose scenes")
    with pytest.raises(ValueError, match="recipe 'vae' is not known"):
        call(systems, f"{flags} --recipes vae")
    assert not list(tmp_path.iterdir())


def test_widths_that_a_model_cannot_have_are_skipped():
    def build(n):
        if n % 2:
            raise ValueError
        return torch.nn.Linear(n, 10, bias=False)

    assert fit_width(build, [range(1, 9), range(1, 99)], 200) == 18  # the first within 10 % of 200


def test_images_without_captions_are_refused(tmp_path):
    Image.new("RGB", (32, 32)).save(tmp_path / "a.png")
    with pytest.raises(ValueError, match="none of the 1 validation images .* has a caption"):
        call(systems, f"--out {tmp_path / 'out'} --data {tmp_path}")


@pytest.mark.slow
def test_rows_are_trained_once_measured_and_put_side_by_side(images, tmp_path, monkeypatch, capsys):
    trained = []

    def here(command):
        script = {"train_vq.py": train_vq, "train_prior.py": train_prior}[command[1].name]
        trained.append(command[1].name)
        call(script, " ".join(command[2:]))
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(subprocess, "run", here)
    small = COMMON_FLAGS.replace("--image_size 32 ", "").replace("--device cpu ", "")

    def run_main(recipes, vq="--steps 2", prior="--steps 2"):
        flags = f"--out {tmp_path} --data {images} --image_size 16x24 --n_codes 16 --vocab_size 300 --device cpu"
        flags += f" --vq_params 130000 --prior_params 520000 --compose {images} --recipes {recipes}"
        vq = f"{small} --perceptual none --discriminator none {vq}"
        prior = f"{small} --cache {tmp_path / 'cache'} {prior}"
        monkeypatch.setattr("sys.argv", ["systems", *flags.split(), "--vq", vq, "--prior", prior])
        systems.main()

    run_main("taming")
    assert trained == ["train_vq.py", "train_prior.py"]
    run_main("taming,muse")
    assert len(trained) == 4, "the first row stands"
    table = [line.split("|") for line in (tmp_path / "table.md").read_text().splitlines()]
    assert [x.strip() for x in table[0]] == ["", "", "taming", "muse", ""] and {len(row) for row in table} == {5}
    assert "right concept, %" in {row[1].strip() for row in table} and "| taming | muse |" in capsys.readouterr().out
    row = json.loads((tmp_path / "muse" / "row.json").read_text())
    assert row["figures"]["seconds/image"] > 0 and "muse" in row["asked"]["flags"][1]
    grid = Image.open(tmp_path / "images.png")
    assert grid.size == (60 + 24, 2 * 16) and len(json.loads(grid.text["prompts"])) >= 1
    run_main("taming", prior="--steps 3")
    assert len(trained) == 6 and "from step 2 to 3" in capsys.readouterr().out, "other flags: it resumes"
    with pytest.raises(ValueError, match="was trained on earlier codes of .*vq; use another --out"):
        run_main("taming", vq="--steps 4")


def test_a_finished_row_is_not_run_again(tmp_path, monkeypatch):
    runs, own = [], ({"ch": 8, "n_res": 1}, {"n_embd": 64, "n_head": 4})
    monkeypatch.setattr(systems, "run_script", lambda script, flags, out: runs.append((script, flags, out)))
    monkeypatch.setattr(systems, "file_hash", lambda path: "same")
    monkeypatch.setattr(systems, "measure", lambda *_: {"figures": {"PSNR, dB": 20.12}})
    cfg = replace(CFG, vq="--steps 2")
    row = systems.make_row("muse", tmp_path, own, ["a"], cfg)
    assert [script for script, *_ in runs] == ["train_vq.py", "train_prior.py"]
    flags = " ".join(runs[0][1])
    assert "--recipe muse --n_codes 1024 --ch 8 --n_res 1 --steps 2" in flags and runs[1][2] == tmp_path / "prior"
    assert systems.make_row("muse", tmp_path, own, ["a"], cfg) == row and len(runs) == 2
    systems.make_row("muse", tmp_path, own, ["a"], replace(cfg, prior="--steps 3"))
    assert len(runs) == 4, "other flags: it runs again"
    monkeypatch.setattr(systems, "file_hash", str)
    with pytest.raises(ValueError, match="was trained on earlier codes of .*vq; use another --out"):
        systems.make_row("muse", tmp_path, own, ["a"], replace(cfg, prior="--steps 4"))


def test_the_report_puts_rows_side_by_side(tmp_path):
    figures, learning = {"prior, M": 1.0, "PSNR, dB": 20.12}, [(160, 40.0), (320, 90.0)]
    rows = {name: {"figures": figures, "learning": learning} for name in ("taming", "muse")}
    for name in rows:
        log = tmp_path / name / "prior" / "log.jsonl"
        log.parent.mkdir(parents=True)
        log.write_text("".join(json.dumps({"step": step, "image_loss": 2.0 / step}) + "\n" for step in (1, 2)))
        save_image(tmp_path / name / "images.png", Image.new("RGB", (16, 8)), prompts="[]")
    table = systems.report(tmp_path, rows)
    assert table.splitlines()[2:] == ["| prior, M | 1 | 1 |", "| PSNR, dB | 20.1 | 20.1 |"]
    assert Image.open(tmp_path / "images.png").size == (76, 16) and (tmp_path / "curves.png").exists()
    assert (tmp_path / "accuracy.png").exists()


def test_priors_on_one_frozen_tokenizer(tmp_path, monkeypatch):
    """No tokenizer is trained; priors have its codes and equal sizes; the masked one gets more steps."""
    cfg = replace(CFG, tokenizer=str(make_vq(tmp_path / "vq", image_size="32")), masked_times=4, prior="--steps 10")
    cfg, runs = replace(cfg, image_size="32"), []
    monkeypatch.setattr(systems, "run_script", lambda script, flags, out: runs.append(" ".join([script, *flags])))
    monkeypatch.setattr(systems, "file_hash", lambda path: "same")
    monkeypatch.setattr(systems, "measure", lambda *_: {"figures": {}})
    for name in ("taming", "muse"):
        systems.make_row(name, tmp_path / name, systems.widths(name, cfg), ["a"], cfg)
    assert len(runs) == 2 and all(line.startswith("train_prior.py") for line in runs)
    assert all(f"--vq {cfg.tokenizer}" in line for line in runs)
    assert "--steps 10" in runs[0] and "--steps 40" in runs[1]
    with pytest.raises(ValueError, match="multiplies --steps"):
        call(systems, f"--out {tmp_path / 'out'} --masked_times 4")


def test_accuracy_is_measured_at_each_kept_checkpoint(tmp_path):
    make_prior(tmp_path, text_len=28, std=0)
    config = json.loads((tmp_path / "config.json").read_text()) | {"train": {"batch_size": 16}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    for step in (10, 20):
        keep_copy(tmp_path, tmp_path / f"step-{step:06d}")
    points = systems.learning(tmp_path, replace(CFG, device="cpu", prompts_per_category=1))
    assert [n for n, _ in points] == [160, 320] and all(0 <= accuracy <= 100 for _, accuracy in points)


def test_a_run_too_short_to_log_a_rate_has_no_time(tmp_path):
    (tmp_path / "log.jsonl").write_text('{"step": 2, "val_image_loss": 1.0}\n')
    assert math.isnan(systems.minutes(tmp_path, 100, "tokens_per_s"))

"""The grid of one tokenizer, and the comparison of many."""

import subprocess
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import VQ_FLAGS
from PIL import Image
from processes import call
from untrained import make_vq

import train_vq
from minit2i.checkpoint import load_vq, read_config
from minit2i.experiments import tokenizers
from minit2i.experiments.tokenizers import CompareConfig, code_colors, quality, table_row, tokenizer_grid, verdict
from minit2i.metrics import psnr
from minit2i.plot import read_log


def test_the_grid_of_a_tokenizer_shows_a_code_as_one_colour(tmp_path):
    vq, images = load_vq(make_vq(tmp_path)), torch.rand(20, 3, 24, 32) * 2 - 1
    counts = quality(vq, [images])[1]
    for tile in (0, 2):
        grid = tokenizer_grid(vq, images, counts, "text", tile)
        assert grid.size == (20 * 34 - 2, 4 * 26 - 2 + 150)
        cell = np.asarray(grid.crop((0, 3 * 26, 8, 3 * 26 + 8)))
        assert (cell == cell[0, 0]).all()


def test_quality_is_the_mean_over_images_whatever_the_batches(tmp_path):
    vq, images = load_vq(make_vq(tmp_path)), torch.rand(5, 3, 24, 32) * 2 - 1
    figures, counts = quality(vq, [images])
    parts, again = quality(vq, images.split(2))
    assert figures.keys() == parts.keys() and all(abs(figures[k] - parts[k]) < 1e-6 for k in parts)
    assert counts.equal(again) and counts.sum() == 5 * 12 and figures["n"] == 5
    assert abs(figures["psnr"] - float(psnr(vq.decode(vq.encode(images)), images).mean())) < 1e-4


def test_similar_codes_have_similar_colours(tmp_path):
    vq = load_vq(make_vq(tmp_path))
    vq.quantizer.codebook[:] = torch.linspace(0, 1, 32)[:, None] ** 2
    colors = code_colors(vq)
    assert colors.shape == (32, 3) and colors.min() == -1 and colors.max() == 1
    assert colors[:, 0].argsort().tolist() in (list(range(32)), list(range(31, -1, -1)))


def test_a_comparison_trains_tabulates_and_resumes(images, tmp_path, monkeypatch, capsys):
    calls = []

    def here(command):
        calls.append([str(c) for c in command[1:]])
        call(train_vq, " ".join(calls[-1][1:]))
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(subprocess, "run", here)
    flags = ["--data", str(images), *VQ_FLAGS.split(), "--eval_every", "2", "--out", str(tmp_path)]
    run_main(monkeypatch, flags, "--values", "ema,st --l2_norm", "--steps", "4", "--seeds", "2")
    rows = [line.split("|") for line in (tmp_path / "table.md").read_text().splitlines()[:4]]
    assert [r[1].strip() for r in rows] == ["quantizer", "---", "ema", "st --l2_norm"] and {len(r) for r in rows} == {9}
    assert (tmp_path / "table.md").read_text() in capsys.readouterr().out and len(calls) == 4
    runs = {path.name: read_config(path)["model"] for path in tmp_path.iterdir() if path.is_dir()}
    assert sorted(runs) == ["ema-0", "ema-1", "st-l2_norm-0", "st-l2_norm-1"] and runs["st-l2_norm-0"]["l2_norm"]
    last = [read_log(tmp_path / f"ema-{seed}" / "log.jsonl")[-1]["val_psnr"] for seed in (0, 1)]
    assert f" {sum(last) / 2:.2f} ({min(last):.2f} to {max(last):.2f}) " in rows[2] and min(last) < max(last)
    run_main(monkeypatch, flags, "--values", "ema", "--steps", "6")
    assert "from step 4 to 6" in capsys.readouterr().out


def run_main(monkeypatch, flags, *more):
    monkeypatch.setattr("sys.argv", ["tokenizers", *flags, *more])  # values may hold spaces
    tokenizers.main()


def test_values_become_flags_and_folders(tmp_path):
    runs = list(CompareConfig(out="x", values="ema,st --restart 0", seeds=2).runs())
    assert [str(folder) for *_, folder in runs] == ["x/ema-0", "x/st-restart-0-0", "x/ema-1", "x/st-restart-0-1"]
    assert runs[1][:2] == ("st --restart 0", ["--quantizer", "st", "--restart", "0", "--seed", "0"])
    runs = list(CompareConfig(out="x", vary="flip", values="off,on").runs())
    assert [flags[0] for _, flags, _ in runs] == ["--no-flip", "--flip"] and runs[0][2].name == "flip-off-0"
    for wrong in ("", "ema,"):
        with pytest.raises(ValueError, match="none may be empty"):
            list(CompareConfig(out="x", values=wrong).runs())
    with pytest.raises(ValueError, match="seeds 0 is not"):
        CompareConfig(out="x", seeds=0)


def test_a_run_with_other_flags_is_not_tabulated(tmp_path, monkeypatch):
    monkeypatch.setattr(subprocess, "run", lambda words: SimpleNamespace(returncode=0))
    for _ in range(2):
        tokenizers.run_script("train_vq.py", ["--data", "scenes", "--lr", "1e-3"], tmp_path / "ema-0")
    with pytest.raises(ValueError, match=r"ema-0 holds a run with other flags \(1e-3 2e-3\); use another --out"):
        tokenizers.run_script("train_vq.py", ["--data", "scenes", "--lr", "2e-3"], tmp_path / "ema-0")


def test_failures_are_named(tmp_path, monkeypatch):
    monkeypatch.setattr(subprocess, "run", lambda command: SimpleNamespace(returncode=1))
    with pytest.raises(ValueError, match="the run .*ema-0 failed"):
        call(tokenizers, f"--out {tmp_path}")
    monkeypatch.setattr(tokenizers, "CHECKOUT", tmp_path)
    with pytest.raises(ValueError, match="is not there; run this in a checkout"):
        call(tokenizers, f"--out {tmp_path}")
    with pytest.raises(ValueError, match="st logged no loss; use a --log_every"):
        table_row("st", [[{"step": 4, "val_psnr": 9.0}]])


def test_the_report_holds_a_row_and_a_curve_for_each_value(tmp_path):
    records = [{"step": s, "recon": 1 / s, "images_per_s": 9.0} for s in range(1, 21)]
    records.append({"step": 20, "val_psnr": 20.0, "val_ssim": 0.5, "code_use": 0.25, "val_perplexity": 3.0})
    (tmp_path / "log.jsonl").write_text("".join(f"{r}\n".replace("'", '"') for r in records))
    table = tokenizers.report(tmp_path, "quantizer", {"ema": [tmp_path]})
    loss = (1 / 19 + 1 / 20) / 2
    assert table.splitlines()[2] == f"| ema | {loss:.5f} | 20.00 | 0.500 | 25.0% | 3 | 9 |"
    assert table.splitlines()[-1].startswith("Undecided")
    assert Image.open(tmp_path / "curves.png").width == 2 * 560 and (tmp_path / "table.md").read_text() == table


def test_a_row_has_the_mean_and_the_range_of_its_seeds(tmp_path):
    """Of every measure; the loss is the mean of a run's last tenth."""
    runs = [
        [{"step": 1, "recon": x, "images_per_s": 9.0}, {"step": 1, "val_psnr": 20 + x, "val_ssim": x, "code_use": x}]
        for x in (0.25, 0.5)
    ]
    loss, psnr, ssim, use, perplexity = (cell.strip() for cell in table_row("ema", runs).split("|")[2:7])
    assert loss == "0.37500 (0.25000 to 0.50000)" and psnr == "20.38 (20.25 to 20.50)"
    assert ssim == "0.375 (0.250 to 0.500)" and use == "37.5% (25.0% to 50.0%)" and perplexity.startswith("nan")


def test_the_verdict_calls_a_difference_only_what_the_seeds_tell_apart():
    psnr = {"st": [20.0, 22.0], "ema": [21.0, 22.5], "fixed": [18.0, 20.5]}
    assert verdict(psnr) == (
        "every seed of ema is above those of fixed (by 2.50 dB); undecided, for the seeds overlap: ema or st (by 0.75 dB)."
    )
    assert verdict({"ema": [21.0, 22.0], "st": [1.0, 2.0]}) == "every seed of ema is above those of st (by 20.00 dB)."
    for few in ({"ema": [21.0], "st": [20.0]}, {"ema": [21.0, 22.0]}):
        assert verdict(few).startswith("Undecided")

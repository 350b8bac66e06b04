"""The sheet of one tokenizer and the comparison of many."""

import subprocess
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import train_vq
from minit2i import compare
from minit2i import vq as vq_module
from minit2i.checkpoint import read_config
from minit2i.sample import load_vq
from minit2i.train import read_log
from test_train import VQ_FLAGS, call, pictures, vq  # noqa: F401


@pytest.mark.parametrize("flags", [[], ["--size", "48x64", "--tile", 3]])
def test_a_sheet_of_a_tokenizer(vq, pictures, tmp_path, flags):  # noqa: F811
    out = tmp_path / "sheet.png"
    call(vq_module, "show", "--model", vq, "--images", pictures, "--out", out, "--n", 20, "--device", "cpu", *flags)
    sheet, (h, w) = Image.open(out), (48, 64) if flags else (32, 32)
    assert sheet.size == (20 * (w + 2) - 2, 4 * (h + 2) - 2 + 150)
    assert "24 pictures, PSNR" in sheet.text["text"] and "of 32 codes used" in sheet.text["text"]
    cell = np.asarray(sheet.crop((0, 3 * (h + 2), 8, 3 * (h + 2) + 8)))
    assert (cell == cell[0, 0]).all(), "a code is one colour, stride x stride pixels large"


def test_like_codes_have_like_colours(vq):  # noqa: F811
    model = load_vq(vq)
    model.quantizer.codebook[:] = torch.linspace(0, 1, 32)[:, None] ** 2
    colors = compare.code_colors(model)
    assert colors.shape == (32, 3) and colors.min() == -1 and colors.max() == 1
    order = colors[:, 0].argsort().tolist()
    assert order in (list(range(32)), list(range(31, -1, -1)))


def test_a_comparison_trains_tabulates_and_goes_on(pictures, tmp_path, monkeypatch, capsys):  # noqa: F811
    calls = []

    def here(command):
        calls.append([str(c) for c in command[1:]])
        call(train_vq, *command[2:])
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(subprocess, "run", here)
    flags = "--data", pictures, *VQ_FLAGS, "--eval_every", 2, "--out", tmp_path
    call(compare, *flags, "--values", "ema,st", "--steps", 4)
    rows = [line.split("|") for line in (tmp_path / "table.md").read_text().splitlines()]
    assert [r[1].strip() for r in rows] == ["quantizer", "---", "ema", "st"] and {len(r) for r in rows} == {9}
    assert float(rows[2][3]) > 0 and (tmp_path / "table.md").read_text() in capsys.readouterr().out
    assert Image.open(tmp_path / "curves.png").width == 2 * 560 and len(calls) == 2
    assert all("--resume" in c and c[0].endswith("train_vq.py") for c in calls)
    call(compare, *flags, "--values", "ema", "--steps", 6)
    assert "from step 4 to 6" in capsys.readouterr().out


def test_seeds_are_averaged_and_a_value_has_flags_of_its_own(pictures, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setattr(compare, "train", lambda script, flags, out: call(train_vq, *flags, "--out", out))
    flags = "--data", pictures, *VQ_FLAGS, "--eval_every", 2, "--out", tmp_path, "--steps", 2, "--restart", 0.2
    call(compare, *flags, "--values", "ema,st --restart 0 --l2_norm", "--seeds", 2)
    runs = {path.name: read_config(path)["model"] for path in tmp_path.iterdir() if path.is_dir()}
    assert sorted(runs) == ["ema-0", "ema-1", "st-restart-0-l2_norm-0", "st-restart-0-l2_norm-1"]
    assert [(c["restart"], c["l2_norm"]) for _, c in sorted(runs.items())] == [(0.2, False)] * 2 + [(0.0, True)] * 2
    last = [read_log(tmp_path / f"ema-{seed}" / "log.jsonl")[-1]["val_psnr"] for seed in (0, 1)]
    rows = (tmp_path / "table.md").read_text().splitlines()
    assert f"| {sum(last) / 2:.2f} ({min(last):.2f} to {max(last):.2f}) |" in rows[2] and min(last) < max(last)
    assert rows[3].startswith("| st --restart 0 --l2_norm |")


def test_a_failed_run_of_a_comparison_is_named(tmp_path, monkeypatch, capsys):
    calls = []
    monkeypatch.setattr(subprocess, "run", lambda command: calls.append(command) or SimpleNamespace(returncode=1))
    with pytest.raises(ValueError, match="the run .*ema-0 failed"):
        call(compare, "--out", tmp_path)
    with pytest.raises(ValueError, match="the run .*off-0 failed"):
        call(compare, "--out", tmp_path, "--vary", "l2_norm", "--values", "off,on")
    assert calls[1][2:4] == ["--no-l2_norm", "--seed"]
    with pytest.raises(ValueError, match="the run .*flip-off-0 failed"):  # not the run of another flag's `off`
        call(compare, "--out", tmp_path, "--vary", "flip", "--values", "off,on")
    for wrong in ("", "ema,"):
        with pytest.raises(ValueError, match="none may be empty"):
            call(compare, "--out", tmp_path, "--values", wrong)
    with pytest.raises(SystemExit):
        call(compare, "--out", tmp_path, "--seeds", 0)
    assert "argument --seeds: 0 is less than 1" in capsys.readouterr().err
    with pytest.raises(ValueError, match="st logged no loss; use a --log_every"):
        compare.row_of("st", [[{"step": 4, "val_psnr": 9.0}]])


def test_a_rising_curve_is_not_cut():
    """The last point alone is at the top; a loss's first ones may be."""
    image = np.asarray(compare.plot({"": [(x, float(x)) for x in range(40)]}, "").convert("L"))
    assert (image[24, 300:537] == 255).all() and image[24, 545:550].min() < 255
    falling = compare.plot({"": [(x, 1e3 if x < 4 else 40.0 - x) for x in range(40)]}, "")
    assert (np.asarray(falling.convert("L"))[168, 300:360] < 255).any(), "half of the height is for what comes later"

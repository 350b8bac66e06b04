"""Flags: precedence, parts, help, and errors that name the mend."""

import json
import re
from dataclasses import dataclass
from typing import Annotated

import pytest

from minit2i.config import Settings, Group, above, annotations, merge
from minit2i.data import DataConfig
from minit2i.flags import add_flags, describe, new_parser, parse_flags
from minit2i.train import TrainConfig


@dataclass(frozen=True)
class ModelConfig(Settings):
    kind: Annotated[str, "the kind of model"] = "plain"
    extras: Annotated[str, "several, joined by commas"] = "none"
    width: Annotated[int, "channels", above(0)] = 8
    deep: Annotated[bool, "more layers"] = False
    n_codes: int = 0  # filled in by the script


class Plain:
    pass


class Soft:
    @dataclass(frozen=True)
    class Config(Settings):
        group = "kind soft"
        tau: Annotated[float, "temperature", above(0)] = 1.0
        deep: Annotated[bool, "more layers"] = True  # another default for a setting of the core


class Extra:
    @dataclass(frozen=True)
    class Config(Settings):
        shift: Annotated[int, "pixels", Group("extra")] = 3


PARTS = {"kind": {"plain": Plain, "soft": Soft}, "extras": {"extra": Extra, "none": None}}
RECIPES = {"paper": {"width": 16, "lr": 0.1, "kind": "soft"}, "other": {"width": 24}}
SIZES = {"big": {"width": 64}}


@dataclass(frozen=True)
class Training(TrainConfig):
    model_size: Annotated[str, "a named size"] = ""


def parse(flags):
    return parse_flags("doc", (ModelConfig, DataConfig, Training), PARTS, RECIPES, SIZES, flags.split())


def save(folder, flags, state=True):
    """A run's folder as the scripts leave it."""
    model, data, train = parse(f"--out {folder} {flags}")
    folder.mkdir(parents=True)
    config = {"kind": "vq", "model": vars(model) | {"n_codes": 5}, "data": vars(data), "train": vars(train), "step": 0}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "model.safetensors").write_bytes(b"")
    if state:
        (folder / "state").mkdir()
        (folder / "state" / "resume.safetensors").write_bytes(b"")
    return folder


def test_later_settings_win(tmp_path, capsys):
    """defaults | recipe | size | saved | given."""
    model, data, train = parse("--out x")
    assert (model.width, model.kind, train.lr, data.workers) == (8, "plain", TrainConfig.lr, DataConfig.workers)
    model, _, train = parse("--out x --recipe paper --lr 0.5")
    assert (model.width, model.kind, model.tau, model.deep, train.lr) == (16, "soft", 1.0, True, 0.5)
    assert parse("--out x --recipe paper --model_size big")[0].width == 64
    assert parse("--out x --model_size big --width 9")[0].width == 9
    small = save(tmp_path / "small", "--width 12 --kind soft --tau 2 --lr 0.3", state=False)
    model, _, train = parse(f"--out x --init {small} --recipe other --tau 4")
    assert (model.width, model.tau, model.n_codes, train.lr) == (12, 4.0, 5, TrainConfig.lr)
    assert capsys.readouterr().out == f"the model of --init {small} wins over --recipe other's --width 24 (12)\n"
    assert parse(f"--out x --init {small} --model_size big")[0].width == 64, "a size given by hand is not dropped"
    (
        parse(f"--out x --init {small} --recipe other --width 12"),
        parse(f"--out x --init {small} --recipe paper --width 1"),
    )
    assert capsys.readouterr().out == "", "nothing is overruled"


def test_a_resumed_run_needs_no_flag_retyped(tmp_path):
    run = save(tmp_path / "run", "--width 12 --kind soft --tau 2 --lr 0.3 --data scenes:50 --recipe paper --no-deep")
    model, data, train = parse(f"--out {run} --resume --steps 7")
    assert (model.width, model.tau, model.deep, model.n_codes, data.data) == (12, 2.0, False, 5, "scenes:50")
    assert (train.lr, train.steps, train.resume, train.recipe) == (0.3, 7, True, "paper")
    parse(f"--out {run} --resume --recipe paper --width 12")  # the same is no change
    for flags, message in (
        ("--width 13", r"cannot change the model: --width 13 \(the run has 12\); use another --out"),
        ("--deep", r"--deep True \(the run has False\)"),
        ("--kind plain", r"--kind plain \(the run has soft\)"),
        ("--model_size big", r"--width 64 \(the run has 12\)"),
        ("--recipe other", r"cannot change --recipe other \(the run has 'paper'\)"),
        ("--init elsewhere", r"cannot change --init elsewhere \(the run has ''\)"),
    ):
        with pytest.raises(ValueError, match=message):
            parse(f"--out {run} --resume {flags}")
    assert parse(f"--out {tmp_path / 'new'} --resume")[2].resume is False, "nothing to resume: a new run"


def test_a_run_or_a_model_is_never_overwritten(tmp_path):
    run, model = save(tmp_path / "run", ""), save(tmp_path / "model", "", state=False)
    with pytest.raises(ValueError, match="already holds a run; add --resume to continue it, or use another --out"):
        parse(f"--out {run}")
    for resume in ("", "--resume"):
        with pytest.raises(ValueError, match="holds a model that cannot be resumed; use --init .*, or another --out"):
            parse(f"--out {model} {resume}")
    (model / "state").mkdir()  # emptied, to save space
    with pytest.raises(ValueError, match="there is no state/resume.safetensors in it"):
        parse(f"--out {model} --resume")
    (model / "state" / "first_save").touch()  # a run that was killed during its first save starts again
    assert not parse(f"--out {model} --resume")[2].resume
    with pytest.raises(ValueError, match="already holds a run"):
        parse(f"--out {model}")
    for name in ("config.json", "pytorch_model.bin", "diffusion_pytorch_model.safetensors"):  # of other programs
        (tmp_path / name).mkdir()
        (tmp_path / name / name).touch()
        with pytest.raises(ValueError, match=f"holds a model already \\({name}\\); use another folder"):
            parse(f"--out {tmp_path / name} --resume")
    with pytest.raises(ValueError, match="is the folder of --data, whose images"):
        parse(f"--out {tmp_path / 'images'} --data x,{tmp_path}/./images")
    config = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps(config | {"model": {"n_head": 3}}))
    for flags in (f"--out {run} --resume", f"--out x --init {run}"):
        with pytest.raises(ValueError, match="holds a run of the other stage"):
            parse(flags)


def test_parts_bring_their_settings():
    model = parse("--out x --kind soft --extras extra --shift 5")[0]
    assert (model.tau, model.shift) == (1.0, 5) and isinstance(model, ModelConfig)
    assert type(model) is merge(ModelConfig, Soft.Config, Extra.Config)
    assert not hasattr(parse("--out x")[0], "tau")


@pytest.mark.parametrize(
    "flags, message",
    [
        ("--tau 2", "--tau is a setting of --kind soft; add that, or leave --tau out"),
        ("--kind magic", "kind 'magic' is not known; use one of plain, soft"),
        ("--extras extra,magic", "extras 'magic' is not known; use one of extra, none"),
        ("--recipe magic", "recipe 'magic' is not known; use one of paper, other"),
        ("--model_size magic", "model_size 'magic' is not known; use one of big"),
        ("--kind soft --tau 0", "tau 0.0 is not a number above 0"),
        ("--width 0", "width 0 is not a number above 0"),
        ("--log_every 0", "log_every 0 is not a number of at least 1"),
        ("--steps -1", "steps -1 is not a number of at least 0"),
        ("--clip -1", "clip -1.0 is not a number of at least 0"),  # a negative norm would turn the gradient round
        ("--ema 2", "ema 2.0 is not in [0, 1]"),
        ("--lr nan", "lr nan is not a number of at least 0"),
        ("--beta2 1", "beta2 1.0 is not in [0, 0.999999]"),
        ("--seed 2147483648", "seed 2147483648 is not in [0, 2147483647]"),
        ("--restart_schedule", "--restart_schedule needs --resume"),
        ("--batch_size 7 --accum 2", "batch_size 7 does not divide into 2 micro-batches (processes x accum); use 8"),
    ],
)
def test_bad_flags_are_clear_errors(flags, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        parse(f"--out x {flags}")


def test_the_batch_divides_over_processes(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(ValueError, match="batch_size 32 does not divide into 3 micro-batches .*; use 33"):
        parse("--out x")


@pytest.mark.parametrize("flags", ["", "--out x --unknown 3", "--out x --wid 3", "--out x --precision fp64"])
def test_unknown_and_missing_flags_end_with_usage(flags, capsys):
    with pytest.raises(SystemExit):
        parse(flags)
    assert "usage:" in capsys.readouterr().err


def shown(flags, capsys):
    with pytest.raises(SystemExit) as end:
        parse(flags)
    assert not end.value.code
    return capsys.readouterr().out


def test_help_shows_the_flags_of_the_chosen_parts(capsys):
    text = shown("--help", capsys)
    for config in (ModelConfig, DataConfig, Training):
        for name, field in annotations(config).items():
            assert (f"--{name} " in text and field.help.split()[0] in text) != field.rare
    assert "--restart_schedule" in shown("--help all", capsys)
    assert (
        "--tau" not in text and "--n_codes" not in text and "the kind of model: plain, soft" in " ".join(text.split())
    )
    groups = [line[:-1] for line in text.splitlines() if re.fullmatch(r"[A-Z]\w+( \w+)?:", line)]
    assert groups == ["Common", "Run", "Data", "Model", "Optimizer", "Scale", "Half precision"]
    common = re.findall(r"^  --(\w+)", text[text.index("Common:") : text.index("Run:")], re.M)
    assert common == ["data", "out", "steps", "batch_size", "recipe", "resume"]
    assert "paper: --width 16 --lr 0.1 --kind soft" in text
    text = shown("--help --recipe paper", capsys)
    assert "--tau" in text and "kind soft:" in text and "[16]" in text, "defaults are those that would be used"


def test_describe_lists_the_resolved_settings():
    text = describe(parse("--out x --kind soft --no-compile"))
    assert (
        "--kind soft" in text and "--tau 1" in text and "--no-compile" in text and "DataConfig: --data scenes" in text
    )


def test_other_commands_make_flags_of_a_dataclass_too():
    parser = new_parser("doc")
    add_flags(parser, ModelConfig)
    assert parser.parse_args([]).width == 8 and parser.parse_args(["--deep"]).deep is True
    with pytest.raises(SystemExit):
        add_flags(parser := new_parser("doc"), TrainConfig)
        parser.parse_args([])  # --out is required

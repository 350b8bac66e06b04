"""The README is true: its commands exist with the flags it prints, its files are there, its functions too."""

import re
import shlex
from dataclasses import fields
from importlib import import_module
from pathlib import Path

import pytest
from torch.distributed.run import get_args_parser

from minit2i.data import DataConfig
from minit2i.gpt import GPTConfig
from minit2i.vq import VQConfig
from train_prior import PriorTrainConfig
from train_vq import VQTrainConfig

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
COMMANDS = [
    line.strip()
    for block in re.findall(r"```bash\n(.*?)```", README, re.S)
    for line in re.sub(r"\\\n\s*", "", block).splitlines()
    if "python " in line or "torchrun " in line
]


def known_flags(words):
    """Script or module of a command, as source text with all its config classes' fields."""
    path = next(w for w in words if w.endswith(".py") or w.startswith("minit2i."))
    file = ROOT / (path if path.endswith(".py") else path.replace(".", "/") + ".py")
    source = file.read_text()
    for name in re.findall(r" from minit2i\.(\w+) import \w+_command", source):  # its command line stands there
        source += (ROOT / "minit2i" / f"{name}.py").read_text()
    flags = set(re.findall(r'"--(\w+)"', source))
    for name in re.findall(r"\b(\w+Config)\b", source):
        for module in (
            "train_vq",
            "train_prior",
            "minit2i.vq",
            "minit2i.gpt",
            "minit2i.data",
            "minit2i.sample",
            "minit2i.train",
        ):
            config = getattr(import_module(module), name, None)
            flags |= set(getattr(config, "__dataclass_fields__", ()))
    return flags


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_use_flags_that_exist(command):
    for part in re.split(r"&&|;", command.split("#")[0]):
        words = shlex.split(part)
        if any(w.endswith(".py") or w.startswith("minit2i.") for w in words):
            own = words[max(i for i, w in enumerate(words) if w.endswith(".py") or w.startswith("minit2i.")) :]
            flags = {w[2:].split("=")[0].removeprefix("no-") for w in own if re.match(r"--\w[^ ]*$", w)}
            assert flags <= known_flags(words), flags - known_flags(words)


def test_pictures_and_files_are_there():
    for target in re.findall(r"\]\(([^)#]+)\)|src=\"([^\"]+)\"", README):
        target = next(t for t in target if t)
        if not target.startswith("http"):
            assert (ROOT / target).exists(), target


def test_functions_named_are_there():
    for module, name in re.findall(r"`(\w+)\.py:(\w+)", README):
        where = f"minit2i.{module}" if (ROOT / "minit2i" / f"{module}.py").exists() else module
        thing = import_module(where)
        assert hasattr(thing, name), f"{module}.py:{name}"


def test_torchrun_does_not_take_our_flags_for_its_own():
    """torchrun takes a flag after the script's name for an abbreviation of its own options (--local was one)."""
    theirs = [o.replace("-", "_") for o in get_args_parser()._option_string_actions]
    configs = VQConfig, GPTConfig, DataConfig, VQTrainConfig, PriorTrainConfig
    ours = [f.name for config in configs for f in fields(config)]
    assert any(o.startswith("__local") for o in theirs) and "steps" in ours
    assert not [f for f in ours if any(o.startswith(f"__{f}") for o in theirs)]

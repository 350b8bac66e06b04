"""The READMEs are true: commands parse, named functions, files and sections exist, the snippets run."""

import argparse
import ast
import os
import re
import shlex
import sys
import types
from dataclasses import fields
from importlib import import_module
from pathlib import Path

import pytest
import torch
from torch.distributed.run import get_args_parser

import train_prior
import train_vq
from minit2i import demo, flags, sample_cli, tokenizer_losses, vq
from minit2i.config import annotations
from minit2i.experiments import results, tokenizers
from minit2i.gpt import CONDITIONS, MODELS, GPTConfig
from minit2i.papers import PAPERS, RECIPES
from minit2i.sample import SHIPPED, SampleConfig

ROOT = Path(__file__).parent.parent
READMES = {name: ROOT / name for name in ("README.md", "minit2i/README.md", "minit2i/experiments/README.md")}
TEXTS = {name: path.read_text() for name, path in READMES.items()}
MAIN, RESULTS = TEXTS["README.md"], TEXTS["minit2i/experiments/README.md"]
PROGRAMS = ("train_vq.py", "train_prior.py", "sample.py")


def blocks(text, language):
    """The contents of a text's fenced blocks of a language."""
    return [body for word, body in re.findall(r"^```(\w*)\n(.*?)^```$", text, re.S | re.M) if word == language]


# --- commands ---


def command_lines(text):
    """The shell commands of a text, continued lines joined and variables replaced -> [str]."""
    found, variables = [], {}
    for block in blocks(text, "bash"):
        for line in re.sub(r"\s*\\\n\s*", " ", block).splitlines():
            if setting := re.match(r'(\w+)="(.*)"$', line):
                variables[setting[1]] = setting[2]
                continue
            found.append(re.sub(r"\$(\w+)", lambda m: variables.get(m[1], m[0]), line))
    return found


def programs(line):
    """The words of each Python program that a command line runs, from the script or module on, and its process count."""
    for part in re.split(r"&&|;(?!\S)", line):
        words = shlex.split(part, comments=True)
        for i, word in enumerate(words):
            if word in PROGRAMS or word.startswith("minit2i.") and words[i - 1] == "-m":
                before = dict(zip(words[:i], words[1:i]))
                yield words[i:], int(before.get("--nnodes", 1)) * int(before.get("--nproc_per_node", 1))
                break
        else:
            if "-c" in words:
                ast.parse(words[words.index("-c") + 1])


LINES = [(name, line) for name, text in TEXTS.items() for line in command_lines(text) if list(programs(line))]


class Parsed(Exception):
    """Raised once a command line has been parsed."""


READ_CONFIG = sample_cli.read_config


def named_config(folder):
    """config.json of a checkpoint folder; of one that does not exist, what its name says it is."""
    if Path(folder, "config.json").exists():
        return READ_CONFIG(folder)
    recipe = RECIPES.get(Path(folder).name, {"prior": {}})["prior"]
    model = next((name for name in MODELS if name in Path(folder).name), recipe.get("model", "gpt"))
    return {"kind": "prior", "model": {"model": model}}


@pytest.fixture
def parse_only(monkeypatch, tmp_path):
    """A function (words of a command, processes) that parses the command as its program does, and runs nothing."""
    parse_args, parse_flags = argparse.ArgumentParser.parse_args, flags.parse_flags

    def parsed(parser, argv=None):  # the experiments parse once; parse_flags and sample_cli go on to check more
        found = parse_args(parser, argv)
        if sys.argv[0] in PROGRAMS:
            return found
        raise Parsed

    def checked(*args, **how):
        parse_flags(*args, **how)
        raise Parsed

    def stop(*args):
        raise Parsed

    def run(words, world=1):
        monkeypatch.setenv("WORLD_SIZE", str(world))
        program = words[0]
        before, sys.argv = sys.argv, list(words)
        try:
            if program.startswith("minit2i.papers."):
                demo.demo(program.rpartition(".")[2], "", "")
            else:
                import_module("minit2i.sample_cli" if program == "sample.py" else program.removesuffix(".py")).main()
        except Parsed:
            return
        finally:
            sys.argv = before
        assert program in ("minit2i.experiments.results", "minit2i.experiments.tokenizers"), f"{program} ran"

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parsed)
    monkeypatch.setattr(flags, "read_saved", lambda given, resumed, every: {})  # of --init
    monkeypatch.setattr(train_vq, "parse_flags", checked)
    monkeypatch.setattr(train_prior, "parse_flags", checked)
    monkeypatch.setattr(sample_cli, "read_config", named_config)
    monkeypatch.setattr(sample_cli, "load", stop)
    monkeypatch.setattr(tokenizers, "run_script", lambda script, words, out: run([script, *words, "--out", str(out)]))
    monkeypatch.setattr(tokenizers, "report", lambda *args: "")
    return run


@pytest.mark.parametrize("readme, line", LINES)
def test_commands_parse(readme, line, parse_only):
    for words, world in programs(line):
        parse_only(words, world)


def test_commands_that_are_wrong_do_not_parse(parse_only):
    """The test above can fail."""
    for words in (
        "train_vq.py --out x --n_code 3",
        "train_vq.py --out x --kl_weight 1",
        "minit2i.experiments.bench --round 3",
    ):
        with pytest.raises((SystemExit, ValueError)):
            parse_only(words.split())


def test_commands_of_the_papers_parse(parse_only):
    for paper in PAPERS.values():
        commands = re.search(r"^Commands\n(.*?)\n\n", paper.__doc__, re.S | re.M)[1]
        for line in re.sub(r"\\\n\s*", "", commands).splitlines():
            for words, world in programs(re.sub(r"  +", "  # ", line.strip())):
                parse_only(words, world)


def flag_names():
    """Every flag of the scripts and of the experiments' config dataclasses and parsers."""
    parts = [GPTConfig, train_prior.PriorTrainConfig, vq.VQConfig, train_vq.VQDataConfig, train_vq.VQTrainConfig]
    for registry in (*vq.PARTS.values(), *tokenizer_losses.PARTS.values(), MODELS, CONDITIONS):
        parts += [part.Config for part in registry.values() if getattr(part, "Config", None)]
    parts += [SampleConfig, *(model.Sampling for model in MODELS.values() if model.Sampling)]
    names = {name for part in parts for name in annotations(part)}
    for file in (ROOT / "minit2i").rglob("*.py"):
        names |= set(re.findall(r'"--(\w+)"', file.read_text()))
    evaluate = import_module("minit2i.experiments.evaluate")
    return names | {name for command in evaluate.FLAGS.values() for name in command} | {"help"}


def test_flags_named_in_the_text_exist():
    known = flag_names()
    for name, text in TEXTS.items():
        text = re.sub(r"^```.*?^```", "", text, flags=re.S | re.M).replace("`--no-`", "")
        text = text.replace("--ntasks-per-node=1", "")  # Slurm's
        unknown = {flag.removeprefix("no-") for flag in re.findall(r"(?<!-)--(\w[\w-]*)", text)} - known
        assert not unknown, f"{name}: {unknown}"


def test_torchrun_does_not_take_our_flags_for_its_own():
    """torchrun takes a flag after the script's name for an abbreviation of its own options (--local was one)."""
    theirs = [o.replace("-", "_") for o in get_args_parser()._option_string_actions]
    ours = {f.name for c in (GPTConfig, train_prior.PriorTrainConfig, vq.VQConfig) for f in fields(c)}
    ours |= {f.name for c in (train_vq.VQDataConfig, train_vq.VQTrainConfig) for f in fields(c)}
    for registry in (*vq.PARTS.values(), *tokenizer_losses.PARTS.values(), MODELS, CONDITIONS):
        ours |= {
            name for part in registry.values() if getattr(part, "Config", None) for name in annotations(part.Config)
        }
    assert any(o.startswith("__local") for o in theirs) and "steps" in ours
    assert not [f for f in ours if any(o.startswith(f"__{f}") for o in theirs)]


# --- files, functions, sections ---


@pytest.mark.parametrize("readme", READMES)
def test_links_and_images_exist(readme):
    targets = re.findall(r"\]\(([^)#]+)\)|src=\"([^\"]+)\"", TEXTS[readme])
    for target in (a or b for a, b in targets):
        assert target.startswith("http") or (READMES[readme].parent / target).exists(), target


def test_every_image_is_used():
    used = {Path(target).name for text in TEXTS.values() for target in re.findall(r"\.readme/([\w.-]+)", text)}
    assert used == {path.name for path in (ROOT / ".readme").iterdir()}


def named(path, name):
    """The object that `path.py:name` names, path relative to minit2i/ or a script."""
    module = import_module(path.replace("/", ".") if path.startswith("train_") else f"minit2i.{path.replace('/', '.')}")
    thing = module
    for part in name.split("."):
        thing = getattr(thing, part)
    return thing


def test_functions_named_exist():
    found = [ref for text in TEXTS.values() for ref in re.findall(r"`([\w/]+)\.py:([\w.]+)`", text)]
    assert len(found) > 80
    for path, name in found:
        assert named(path, name) is not None


def test_functions_that_the_papers_name_exist():
    for paper in PAPERS.values():
        adds = re.search(r"^What it adds.*?\n(.*?)\n\n", paper.__doc__, re.S | re.M)[1]
        for path, name in re.findall(r"\b(\w+)\.py:([\w.]+)", adds):
            assert named(path if (ROOT / f"minit2i/{path}.py").exists() else f"papers/{path}", name) is not None


def test_results_that_the_papers_name_have_a_section():
    for name, paper in PAPERS.items():
        for section in re.findall(r'"([\w-]+)"', paper.__doc__.partition("results:")[2]):
            assert f"\n### {section}\n" in RESULTS, f"papers/{name}.py names the result {section!r}"


def test_the_tree_names_every_file():
    tree = next(block for block in blocks(MAIN, "") if "minit2i/\n" in block)
    lines = (re.findall(rf"^{' ' * depth}((?:\w+\.py )+) *\S", tree, re.M) for depth in (2, 4))
    core, papers = (" ".join(names).split() for names in lines)
    assert sorted(core) == sorted(p.name for p in (ROOT / "minit2i").glob("*.py") if p.name != "__init__.py")
    assert papers == [f"{name}.py" for name in PAPERS]
    tools = set(re.findall(r"\[(\w+\.py)\]\(\1\)", RESULTS))
    assert tools == {p.name for p in (ROOT / "minit2i/experiments").glob("*.py") if p.name != "__init__.py"}


def test_line_counts_of_the_map():
    """Rounded: within a tenth, or 20 lines."""
    rows = re.findall(r"^\| (\[.*?) \| (\d+) \|", TEXTS["minit2i/README.md"], re.M)
    assert len(rows) > 10
    for links, said in rows:
        paths = [ROOT / "minit2i" / target for target in re.findall(r"\]\(([\w/.]+)\)", links)]
        files = [file for path in paths for file in (path.glob("*.py") if path.is_dir() else [path])]
        n = sum(len(file.read_text().splitlines()) for file in files)
        assert abs(n - int(said)) <= max(20, n / 10), f"{links}: {n} lines"


# --- form ---


def test_the_root_readme_is_short():
    lines = MAIN.splitlines()
    assert len(lines) <= 250 and max(map(len, lines)) <= 120
    text = re.sub(r"^```.*?^```", "", MAIN, flags=re.S | re.M)
    paragraphs = [p for p in re.split(r"\n\s*\n", text) if not re.match(r"[|#!\d]", p.strip())]
    assert max(p.strip().count("\n") + 1 for p in paragraphs) <= 5


def test_results_stand_under_their_commands():
    """As `python -m minit2i.experiments.results` prints them: question, commands, table, answer."""
    sections = {part.partition("\n")[0]: part for part in re.split(r"^### ", RESULTS, flags=re.M)[1:]}

    def plain(text):
        return " ".join(re.sub(r"\\\n", " ", text).split())

    for name, result in results.read_results().items():
        section = plain(sections[name])
        assert results.table(result) in sections[name] and result["commit"] in section
        assert plain(result["question"]) in section and plain(result["answer"]) in section
        for line in result["command"]:
            if not line.startswith("#"):  # what the data is, is said once
                assert plain(line) in section, line


# --- "change one thing" ---


def patched(diff):
    """A diff of a file, context and added lines only -> the module's name, and a module of the patched source."""
    head, *lines = diff.splitlines()
    path = head.removeprefix("+++ ").partition(":")[0]
    source, at = (ROOT / path).read_text().splitlines(), 0
    for line in lines:
        if line.startswith("+"):
            source.insert(at, line[1:])
            at += 1
        else:
            at = source.index(line[1:], at) + 1
    module = types.ModuleType(f"patched_{Path(path).stem}")
    module.__file__ = str(ROOT / path)  # beside the shipped models
    exec(compile("\n".join(source) + "\n", path, "exec"), vars(module))
    return Path(path).stem, module


DIFFS = [f"+++ {part}" for block in blocks(MAIN, "diff") for part in re.split(r"^\+\+\+ ", block, flags=re.M)[1:]]
CHANGED = dict(map(patched, DIFFS))


def test_three_changes_are_shown():
    assert set(CHANGED) == {"attention", "vq", "sample"}


def test_the_shown_mask_works():
    attention = CHANGED["attention"]
    mask = attention.AttentionMask("blind", attention.Layout(2, 2, 2))
    expected = torch.tensor([[1, 0, 0, 0, 0, 0], [1, 1, 0, 0, 0, 0]] + [[1, 1, *row] for row in torch.eye(4).tolist()])
    assert mask.dense.equal(expected.bool())
    assert attention.layer_masks("causal,blind", 3) == ["causal", "blind", "causal"]
    q = torch.randn(1, 1, 6, 4)
    dense = attention.dense_attention(q, q, q, mask.dense)
    torch.testing.assert_close(attention.attend(q, q, q, mask), dense)


def test_the_shown_quantizer_works():
    quantizers = CHANGED["vq"]
    model = quantizers.build_vq(dict(quantizer="random", ch=8, n_res=1, n_codes=16, code_dim=4))
    before, images = model.quantizer.codebook.clone(), torch.rand(2, 3, 8, 8) * 2 - 1
    model.quantizer.start(model.latents(images).flatten(0, 2))
    assert model.quantizer.codebook.equal(before)
    maps, _, codes, loss = model(images, train=True)
    assert maps.shape == images.shape and codes.shape == (8,) and loss.isfinite()


def test_the_shown_filter_works():
    sample = CHANGED["sample"]
    probability = torch.tensor([0.5, 0.3, 0.15, 0.05])
    sampler = sample.Sampler(sample.SampleConfig(epsilon=0.2, temperature=1.0, top_p=1.0), [0])
    assert sampler.filter(probability.log()).isfinite().tolist() == [True, True, False, False]
    sampler = sample.Sampler(sample.SampleConfig(epsilon=0.9, temperature=1.0, top_p=1.0), [0])
    assert sampler.filter(probability.log()).isfinite().tolist() == [True, False, False, False]
    assert "epsilon" in annotations(sample.SampleConfig)


def test_the_pipeline_snippet_runs(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (snippet,) = blocks(MAIN, "python")
    exec(snippet, {})
    assert (SHIPPED / "scenes").is_dir() and os.path.getsize("star.png")

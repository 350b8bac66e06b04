"""The source itself: imports run one way, functions are short, what is public has a docstring."""

import ast
import re
import sys
from functools import cache
from pathlib import Path

import pytest

import minit2i

PACKAGE = Path(minit2i.__file__).parent
FILES = {
    "minit2i." + ".".join(path.relative_to(PACKAGE).with_suffix("").parts): path
    for path in sorted(PACKAGE.rglob("*.py"))
    if path != PACKAGE / "__init__.py"  # imports papers: everything imports it
}
FILES = {name.removesuffix(".__init__"): path for name, path in FILES.items()}
SCRIPTS = {name: PACKAGE.parent / f"{name}.py" for name in ("train_vq", "train_prior", "sample")}
TRAINING = {f"minit2i.{name}" for name in ("flags", "train", "resume", "parallel")}


@cache
def tree(path):
    return ast.parse(path.read_text(encoding="utf-8"))


def is_main(node):
    """if __name__ == "__main__": a module as a script, which imports what it likes."""
    return isinstance(node, ast.If) and ast.unparse(node.test) == "__name__ == '__main__'"


@cache
def imports(path):
    """The modules that a file imports, of this package and others, function bodies included."""
    found, nodes = set(), [*tree(path).body]
    while nodes:
        node = nodes.pop()
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            for alias in node.names:  # `from minit2i import gpt` is a module, `from minit2i.gpt import GPT` is not
                module = f"{node.module}.{alias.name}"
                found.add(module if module in FILES else node.module)
        elif not is_main(node):
            nodes += ast.iter_child_nodes(node)
    return frozenset(found)


def reached(*names):
    """All modules that some modules import, and those that these import."""
    found, todo = set(), [*names]
    while todo:
        for module in imports(FILES[todo.pop()]) - found:
            found.add(module)
            todo += [module] if module in FILES else []
    return found


def part(name):
    """core, papers or experiments."""
    return (name.split(".")[1:] if name.split(".")[1:2] in (["papers"], ["experiments"]) else ["core"])[0]


ALL = {**FILES, **SCRIPTS, "minit2i": PACKAGE / "__init__.py"}


def functions(path):
    """All functions of a file, methods and inner ones included."""
    return [node for node in ast.walk(tree(path)) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]


def test_imports_stand_at_the_top():
    """None is hidden in a function body."""
    found = []
    for name, path in ALL.items():
        for f in functions(path):
            found += [f"{name}:{n.lineno}" for n in ast.walk(f) if isinstance(n, ast.Import | ast.ImportFrom)]
    assert not found


def test_imports_run_in_no_circle():
    assert not [name for name in FILES if name in reached(name)]


def test_core_then_papers_then_experiments():
    """The core knows neither the papers nor what measures them, and nothing imports a script."""
    allowed = {"core": {"core"}, "papers": {"core", "papers"}, "experiments": {"core", "papers", "experiments"}}
    for name, path in FILES.items():
        own = [module for module in imports(path) if module.split(".")[0] == "minit2i"]
        assert {*map(part, own)} <= allowed[part(name)], name
        assert part(name) == "experiments" or not imports(path) & {*SCRIPTS}, name


def test_papers_do_not_train():
    """A paper's file serves training and sampling alike; later papers import earlier ones, not the reverse."""
    order = [f"minit2i.papers.{name}" for name in minit2i.papers.PAPERS]  # by publication
    assert {*order} == {name for name in FILES if part(name) == "papers"} - {"minit2i.papers"}
    for i, name in enumerate(order):
        assert not imports(FILES[name]) & (TRAINING | {*order[i:]}), name


KNOWN = {"gpt": {"attention", "fp16", "config"}, "vq": {"config", "collectives"}, "attention": set(), "fp16": set()}
KNOWN["tokenizer_losses"] = {"vq", "config", "collectives"}


@pytest.mark.parametrize("name", KNOWN)
def test_networks_stand_alone(name):
    """They know no flags, files, training or FSDP, however far one follows their imports."""
    own = {module for module in imports(FILES[f"minit2i.{name}"]) if module.split(".")[0] == "minit2i"}
    assert own <= {f"minit2i.{other}" for other in KNOWN[name]}
    found = reached(f"minit2i.{name}")
    assert "torch" in found and not found & (TRAINING | {"minit2i.checkpoint", "minit2i.data", "minit2i.sample"})
    assert not [module for module in found if module.startswith("torch.distributed.fsdp")]


def test_config_needs_the_standard_library_alone():
    assert {module.split(".")[0] for module in imports(FILES["minit2i.config"])} <= sys.stdlib_module_names


@pytest.mark.parametrize("word", ["masked", "captioner", "low", "contrast", "lm", "t5"])
def test_the_core_model_knows_no_paper(word):
    text = FILES["minit2i.gpt"].read_text(encoding="utf-8")
    assert not [line for line in text.splitlines() if re.search(rf"\b{word}\b", line, re.IGNORECASE)]


def test_functions_have_at_most_60_lines():
    long = [(name, f.name) for name, path in ALL.items() for f in functions(path) if f.end_lineno - f.lineno >= 60]
    assert not long


def test_what_is_public_has_a_docstring():
    """Modules, and their functions and classes; a main is explained by its module's."""
    missing = [name for name, path in ALL.items() if not ast.get_docstring(tree(path))]
    for name, path in ALL.items():
        for node in tree(path).body:
            public = isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name != "main" and node.name[0] != "_"
            missing += [f"{name}.{node.name}"] if public and not ast.get_docstring(node) else []
    assert not missing

"""Command-line flags from config dataclasses: one parse, and one line of precedence (see `parse_flags`)."""

import argparse
import os
import re
import sys
import textwrap
from dataclasses import MISSING, fields, replace
from pathlib import Path

from minit2i.checkpoint import check_free, first_save, has_state, read_config
from minit2i.config import annotations, known, merge, pick

COMMON = ("data", "vq", "out", "steps", "batch_size", "recipe", "resume")  # the flags that --help shows first
GROUPS = ("Common", "Run", "Data", "Model", "Loss", "Optimizer", "Scale", "Half precision")


def new_parser(doc, **settings):
    """An argparse parser whose --help shows a docstring unchanged; -1,1 is a value, as -1 is, and no flag."""
    style = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=doc, formatter_class=style, allow_abbrev=False, **settings)
    parser._negative_number_matcher = re.compile(r"-\d")
    return parser


def count(text):
    """The type of a flag that counts something: 1 or more."""
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is less than 1")
    return int(text)


def add_flags(parser, *configs, values={}, parts={}, rare=True):
    """A flag for every annotated field of the config dataclasses, under the headings of their groups.

    values: shown by --help instead of the class's defaults.  parts: {field: registry}, whose names --help lists.
    rare: whether --help shows the rare ones.
    """
    found = {}  # name -> (heading, Field, default); of two configs with one field, the first counts
    training = any("recipe" in annotations(config) for config in configs)
    for config in configs:
        defaults = {f.name: f.default for f in fields(config)}
        for name, field in annotations(config).items():
            heading = "Common" if training and name in COMMON else field.group
            found.setdefault(name, (heading, field, defaults[name]))
    order = sorted(found, key=lambda name: COMMON.index(name) if name in COMMON else len(COMMON))
    headings = [heading for heading, _, _ in found.values()]
    for heading in sorted(set(headings), key=[*GROUPS, *headings].index):
        group = parser.add_argument_group(heading)
        for name in (name for name in order if found[name][0] == heading):
            _, field, default = found[name]
            how = dict(choices=field.choices) if field.choices else dict(metavar=field.type.__name__.upper())
            how = dict(action=argparse.BooleanOptionalAction) if field.type is bool else how | dict(type=field.type)
            if parser.argument_default is not argparse.SUPPRESS:  # else only what is given appears in the result
                how |= dict(required=True) if default is MISSING else dict(default=default)
            names = f": {', '.join(parts[name])}" if name in parts else ""
            shown = values.get(name, default)
            shown = f" [{shown}]" if shown not in ("", MISSING) else ""
            text = (field.help + names + shown).replace("%", "%%") if rare or not field.rare else argparse.SUPPRESS
            group.add_argument(f"--{name}", help=text, **how)


def parse_flags(doc, configs, parts, recipes, sizes={}, argv=None):
    """argv -> an instance of each config dataclass; later ones of `defaults | recipe | size | saved | given` win.

    configs: dataclasses of the model, the data and the training.  parts: {field: registry}; the field names a class of
    the registry, or several joined by commas, and a class's `Config` (if any) joins the dataclass that has the field.
    recipes: {name: settings}; sizes: {name: settings}, for a flag --model_size.
    saved: with --resume all settings of the run in --out, with --init those of that folder's model.  The result's
    `resume` says whether there is a run to continue.
    ValueError for unknown names, flags that do not go together, and a folder that would lose a run or a model.
    """
    every = [getattr(part, "Config", None) for registry in parts.values() for part in registry.values()]
    every = [*configs, *dict.fromkeys(part for part in every if part)]
    parser = new_parser(doc, add_help=False, argument_default=argparse.SUPPRESS)
    add_flags(parser, *every)
    parser.add_argument("-h", "--help", nargs="?", const="usual", choices=("usual", "all"))
    given = vars(parser.parse_args(argv))
    helping = given.pop("help", "")
    if not helping and "out" not in given:
        parser.error("the following arguments are required: --out")
    resumed = not helping and check_folder(given)

    saved = read_saved(given, resumed, every)
    recipe = named("recipe", given.get("recipe", ""), recipes)
    size = named("model_size", given.get("model_size", recipe.get("model_size", "")), sizes)
    asked = "model_size" in given and given["model_size"] != saved.get(
        "model_size"
    )  # by hand: wins over --init's model
    values = recipe | size | saved | (size if asked else {}) | given
    if not (resumed or helping) and given.get("init"):
        say_conflicts(given, recipe, saved)
    chosen = [choose(config, values, parts) for config in configs]
    for name in given:
        if not any(name in annotations(config) for config in chosen):
            raise ValueError(f"--{name} is a setting of {owner(name, parts)}; add that, or leave --{name} out")
    if helping:
        show_help(doc, chosen, values, parts, recipes, helping == "all")
    result = [pick(config, values) for config in chosen]
    if resumed:
        check_resumed(given, saved, result[0])
    result[-1] = replace(result[-1], resume=resumed)
    check_batch(result[-1])
    return result


def named(field, name, table):
    """The settings that a name stands for, {} for ''."""
    return known(table, field, name) if name else {}


def choose(config, values, parts):
    """The config dataclass with the settings of those parts that its fields choose."""
    found = []
    for f in fields(config):
        names = values.get(f.name, f.default)
        for name in names.split(",") if f.name in parts and (names or f.default) else ():  # a default may name none
            found.append(getattr(known(parts[f.name], f.name, name), "Config", None))
    return merge(config, *found)


def owner(name, parts):
    """The flags that bring a part's setting, as text: '--quantizer gumbel'."""
    return " or ".join(
        f"--{field} {key}"
        for field, registry in parts.items()
        for key, part in registry.items()
        if (config := getattr(part, "Config", None)) and name in annotations(config)
    )


# --- runs that are already there ---------------------------------------------------------------------


def check_folder(given):
    """Whether --out has a run to continue.  ValueError if it has one, or a model, that would be overwritten."""
    out, resume = given["out"], given.get("resume", False)
    if has_state(out) or first_save(out).exists():
        if not resume:
            raise ValueError(f"{out} already holds a run; add --resume to continue it, or use another --out")
        return has_state(out)
    if any(os.path.realpath(out) == os.path.realpath(data) for data in given.get("data", "").split(",") if data):
        raise ValueError(f"--out {out} is the folder of --data, whose images a run's would be mixed with; use another")
    if Path(out, "model.safetensors").exists():
        why = f"there is no {Path('state', 'resume.safetensors')} in it"
        raise ValueError(f"{out} holds a model that cannot be resumed; use --init {out}, or another --out ({why})")
    check_free(out)
    if given.get("restart_schedule") and not resume:
        raise ValueError("--restart_schedule needs --resume: a new run's schedule starts at its first step")
    return False


def read_saved(given, resumed, configs):
    """The settings of the run that is resumed, or of the model that --init names."""
    folder = given["out"] if resumed else given.get("init")
    if not folder:
        return {}
    flag, known = "--out" if resumed else "--init", {f.name for config in configs for f in fields(config)}
    try:
        saved = read_config(folder, ("kind", "model", "data", "train"))
    except ValueError as e:
        raise ValueError(f"{flag} {e}") from None
    if not set(saved["model"]) <= known:
        raise ValueError(f"{flag} {folder} holds a run of the other stage, or of a newer version; use another folder")
    return saved["model"] | saved["data"] | saved["train"] if resumed else saved["model"]


def say_conflicts(given, recipe, saved):
    """Print which of a recipe's settings --init's model overrules."""
    lost = [f"{as_flag(k, v)} ({saved[k]})" for k, v in recipe.items() if saved.get(k, v) != v and k not in given]
    if lost and os.environ.get("RANK", "0") == "0":
        print(f"the model of --init {given['init']} wins over --recipe {given['recipe']}'s {', '.join(lost)}")


def check_resumed(given, saved, model):
    """ValueError if a flag would change how a resumed run began, or its model."""
    for name in ("recipe", "init", "train"):  # how the run began
        if given.get(name, "") not in ("", before := saved.get(name, "")):
            raise ValueError(
                f"--resume cannot change --{name} {given[name]} (the run has {before!r}); leave --{name} out"
            )
    before = pick(type(model), saved)
    changed = [f"--{k} {getattr(model, k)} (the run has {getattr(before, k)})" for k in changed_settings(model, before)]
    if changed:
        raise ValueError(f"--resume cannot change the model: {', '.join(changed)}; use another --out")


def changed_settings(model, before):
    """Names of the settings that differ between two configs of a model, but for a folder that its hash identifies
    (--t5): it may have moved."""
    return [k for k, v in vars(model).items() if v != getattr(before, k) and not hasattr(model, f"{k}_hash")]


def check_batch(cfg):
    """ValueError unless the batch divides into equal micro-batches."""
    parts = cfg.accum * int(os.environ.get("WORLD_SIZE", 1))
    if cfg.batch_size % parts:
        raise ValueError(
            f"batch_size {cfg.batch_size} does not divide into {parts} micro-batches (processes x accum); "
            f"use {cfg.batch_size // parts * parts + parts}"
        )


# --- --help and --dry_run ------------------------------------------------------------------------------


def as_flag(name, value):
    """A setting as it is typed: --name value, or --no-name."""
    if isinstance(value, bool):
        return f"--{name}" if value else f"--no-{name}"
    return f"--{name} {value:.4g}" if isinstance(value, float) else f"--{name} {value}"


def show_help(doc, configs, values, parts, recipes, rare):
    """Print the flags of the chosen parts and what each recipe sets, and exit."""
    epilog = ["--help all also shows rarely needed flags.", "recipes, whose settings are defaults:"]
    for name, settings in recipes.items():
        flags = " ".join(as_flag(k, v) for k, v in settings.items())
        epilog += textwrap.wrap(f"{name}: {flags}", 110, initial_indent="  ", subsequent_indent="      ")
    if parts:
        epilog.append(f"Other choices of {', '.join(f'--{name}' for name in parts)} have flags of their own:")
        epilog.append("give the choice together with --help.")
    epilog = "\n".join(epilog).replace("%", "%%")
    parser = new_parser(doc, epilog=epilog, argument_default=argparse.SUPPRESS)
    add_flags(parser, *configs, values=values, parts=parts, rare=rare)
    parser.print_help()
    sys.exit()


def describe(configs):
    """The resolved settings as text, a paragraph for each config; for --dry_run."""
    lines = []
    for cfg in configs:
        flags = " ".join(as_flag(k, v) for k, v in vars(cfg).items() if v != "")
        lines += textwrap.wrap(f"{type(cfg).__name__}: {flags}", 118, subsequent_indent="    ", break_on_hyphens=False)
    return "\n".join(lines)

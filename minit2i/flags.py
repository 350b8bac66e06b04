"""Flags from config dataclasses: a script's --help, recipes, and what a run that goes on has in its config.json."""

import argparse
import os
from dataclasses import asdict, fields, replace
from typing import get_type_hints

from minit2i.checkpoint import has_state, read_config
from minit2i.recipes import defaults, explain


def new_parser(doc, **how):
    """A parser whose --help shows a docstring as it is."""
    style = argparse.RawDescriptionHelpFormatter
    return argparse.ArgumentParser(description=doc, formatter_class=style, allow_abbrev=False, **how)


def count(text):
    """The type of a flag that counts something: 1 or more."""
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is less than 1")
    return int(text)


def add_flags(parser, config):
    """A flag for every field of a config dataclass that is Annotated[type, help, choices]; none for plain ones."""
    group = parser.add_argument_group(f"{config.__name__}: {config.__doc__.splitlines()[0]}")
    hints = get_type_hints(config, include_extras=True)
    for f in fields(config):
        if not hasattr(hints[f.name], "__metadata__"):
            continue
        kind, (text, *choices) = hints[f.name].__origin__, hints[f.name].__metadata__
        how = dict(choices=choices[0]) if choices else dict(metavar=kind.__name__.upper())
        how = dict(action=argparse.BooleanOptionalAction) if kind is bool else how | dict(type=kind)
        if f.default is f.default_factory:  # both MISSING
            group.add_argument(f"--{f.name}", help=text, required=True, **how)
        else:
            shown = f"{text} [{f.default}]".replace("%", "%%")
            group.add_argument(f"--{f.name}", help=shown, default=f.default, **how)


def pick(config, values):
    """The fields of a config dataclass out of a dict (or namespace) that may hold more."""
    values = values if isinstance(values, dict) else vars(values)
    return config(**{f.name: values[f.name] for f in fields(config) if f.name in values})


def parse_flags(doc, model, data, train, argv=None):
    """argv -> a config of each of the three dataclasses.  --recipe replaces their defaults (see recipes.py).

    With --resume the run's own config.json replaces the defaults, with --init (see `base`) the model's part of that one's,
    so that no flag needs retyping; its config has resume only if there is a run to continue.  ValueError if a flag would
    change the model of a resumed run.
    """
    configs = (train, data, model)
    parser = new_parser(doc, epilog=explain(configs).replace("%", "%%"))
    for config in configs:
        add_flags(parser, config)
    first_cfg = pick(train, parser.parse_args(argv))
    parser.set_defaults(**defaults(first_cfg.recipe, configs))
    args = parser.parse_args(argv)
    resumed, named = args.resume and has_state(args.out), pick(train, args).named
    parser.set_defaults(**named)
    folder = args.out if resumed else pick(train, args).base
    if folder:
        saved = read_config(folder)
        if not set(saved["model"]) <= {f.name for f in fields(model)}:
            raise ValueError(f"{folder} holds a run of the other stage, or of a newer version; use another folder")
        parser.set_defaults(**saved["model"] | ({} if resumed else named))
    if resumed:
        if first_cfg.recipe not in ("", before := saved["train"].get("recipe", "")):
            raise ValueError(
                f"--resume cannot change --recipe {first_cfg.recipe} (the run has {before!r}); leave it out"
            )
        parser.set_defaults(**saved["train"] | saved["data"] | {"resume": True})
        if named != pick(train, saved["train"]).named:  # then, if there is one, it was given now
            parser.set_defaults(**named)
        now, before = asdict(pick(model, parser.parse_args(argv))), asdict(pick(model, saved["model"]))
        changed = [f"--{k} {now[k]} (the run has {v})" for k, v in before.items() if now[k] != v]
        if changed:
            raise ValueError(f"--resume cannot change the model: {', '.join(changed)}; use another --out")
    elif has_state(args.out) and not args.resume:
        raise ValueError(f"{args.out} already holds a run; add --resume to continue it, or use another --out")
    args = parser.parse_args(argv)
    cfg = replace(pick(train, args), resume=resumed)
    check(cfg)
    return pick(model, args), pick(data, args), cfg


def check(cfg):
    """ValueError for settings that cannot work."""
    least = dict.fromkeys(("batch_size", "accum", "log_every", "eval_every", "eval_size", "save_every", "crops"), 1)
    for name, n in (least | dict.fromkeys(("steps", "warmup", "clip", "seed"), 0)).items():
        if getattr(cfg, name, n) < n:
            raise ValueError(f"{name} {getattr(cfg, name)} is less than {n}")
    for name in ("ema", "cond_drop", "bpe_dropout", "label_smoothing"):
        if not 0 <= getattr(cfg, name, 0) <= 1:
            raise ValueError(f"{name} {getattr(cfg, name)} is not in [0, 1]")
    parts = cfg.accum * (getattr(cfg, "plan", 0) or int(os.environ.get("WORLD_SIZE", 1)))
    if cfg.batch_size % parts:
        raise ValueError(
            f"batch_size {cfg.batch_size} does not divide into {parts} parts (processes x accum); "
            f"use {cfg.batch_size // parts * parts + parts}"
        )

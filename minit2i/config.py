"""Config dataclasses: a field carries its type, help, group, choices and bounds, and everything else is derived from
them.

    lr: Annotated[float, "peak learning rate", Group("Optimizer"), above(0)] = 1e-3

flags.py turns the annotated fields into command-line flags; plain fields (a vocabulary's size) are filled in by the
scripts. A frozen dataclass that inherits from Settings checks its own bounds when it is built, wherever that happens.
"""

import math
from dataclasses import dataclass, fields
from functools import cache
from typing import NamedTuple, get_type_hints


class Group(str):
    """The heading of --help that a field stands under."""


RARE = object()  # marks a field that only `--help all` shows


@dataclass(frozen=True)
class Bounds:
    """Numbers from `low` to `high`; open: `low` itself is not allowed."""

    low: float = -math.inf
    high: float = math.inf
    open: bool = False

    def check(self, name, value):
        if math.isfinite(value) and value <= self.high and (self.low < value if self.open else self.low <= value):
            return
        if self.high < math.inf:
            rule = f"in {'(' if self.open else '['}{self.low:.10g}, {self.high:.10g}]"
        else:
            rule = f"a number above {self.low:g}" if self.open else f"a number of at least {self.low:g}"
        raise ValueError(f"{name} {value} is not {rule}")


def at_least(low):
    """Numbers from `low` on."""
    return Bounds(low)


def above(low):
    """Numbers greater than `low`."""
    return Bounds(low, open=True)


def between(low, high, open=False):
    """Numbers from `low` to `high`; open: without `low`."""
    return Bounds(low, high, open)


class Field(NamedTuple):
    """What an annotation says: Annotated[type, help, Group(...), (choice, ...), bounds, RARE], all but type and help
    optional."""

    type: type
    help: str
    group: str
    choices: tuple | None
    bounds: Bounds | None
    rare: bool


@cache
def annotations(config):
    """The annotated fields of a config dataclass: {name: Field}; a class's attribute `group` heads its fields by
    default."""
    found = {}
    for owner in reversed(config.__mro__):  # the class nearest to `config` wins; a plain field takes a flag away
        own = vars(owner).get("__annotations__", {})
        hints = get_type_hints(owner, include_extras=True) if own else {}
        for name in own:
            found.pop(name, None)
            if hasattr(hints[name], "__metadata__"):
                text, *rest = hints[name].__metadata__
                given = {kind: x for x in rest for kind in (Group, tuple, Bounds) if isinstance(x, kind)}
                group = given.get(Group, getattr(owner, "group", "Model"))
                choices, bounds, rare = given.get(tuple), given.get(Bounds), any(x is RARE for x in rest)
                found[name] = Field(hints[name].__origin__, text, group, choices, bounds, rare)
    return {f.name: found[f.name] for f in fields(config) if f.name in found}


class Settings:
    """Base of all config dataclasses: choices and bounds are checked once, here."""

    def __post_init__(self):
        for name, field in annotations(type(self)).items():
            value = getattr(self, name)
            if field.choices and value not in field.choices:
                raise ValueError(f"{name} {value!r} is not known; use one of {', '.join(map(str, field.choices))}")
            if field.bounds:
                field.bounds.check(name, value)


@cache
def merge(config, *parts):
    """A config dataclass with the fields of `config` and of the dataclasses of its parts (a quantizer's, a
    condition's)."""
    parts = tuple(dict.fromkeys(part for part in parts if part is not None and not issubclass(config, part)))
    return dataclass(frozen=True)(type(config.__name__, (*parts, config), {})) if parts else config


def known(registry, what, name):
    """registry[name]; ValueError that lists the names if there is none."""
    if name not in registry:
        raise ValueError(f"{what} {name!r} is not known; use one of {', '.join(registry)}")
    return registry[name]


def pick(config, values):
    """A config built from those entries of a dict (or namespace) that are its fields; the others are ignored."""
    values = values if isinstance(values, dict) else vars(values)
    return config(**{f.name: values[f.name] for f in fields(config) if f.name in values})

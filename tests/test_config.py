"""Config dataclasses: annotations, bounds, merge and pick."""

import math
from dataclasses import FrozenInstanceError, dataclass
from typing import Annotated

import pytest

from minit2i.config import Settings, Group, above, annotations, at_least, between, merge, pick


@dataclass(frozen=True)
class Base(Settings):
    width: Annotated[int, "channels", at_least(1)] = 8
    rate: Annotated[float, "learning rate", Group("Optimizer"), above(0)] = 0.1
    share: Annotated[float, "a share", between(0, 1)] = 0.5
    part: Annotated[float, "a positive share", between(0, 1, open=True)] = 0.5
    kind: Annotated[str, "which", ("a", "b")] = "a"
    plain: int = 0


class Soft:
    @dataclass(frozen=True)
    class Config(Settings):
        group = "--kind soft"
        tau: Annotated[float, "temperature", above(0)] = 1.0


class Hard:
    @dataclass(frozen=True)
    class Config(Settings):
        width: Annotated[int, "channels", at_least(4)] = 16


def test_annotations_hold_type_help_group_choices_and_bounds():
    found = annotations(Base)
    assert list(found) == ["width", "rate", "share", "part", "kind"]
    assert (found["width"].type, found["width"].help, found["width"].group) == (int, "channels", "Model")
    assert found["rate"].group == "Optimizer" and found["kind"].choices == ("a", "b")
    assert found["width"].bounds == at_least(1) and found["kind"].bounds is None
    assert annotations(Soft.Config)["tau"].group == "--kind soft"


@pytest.mark.parametrize(
    "setting, good, bad, rule",
    [
        ("width", [1, 10**9], [0, -3], "a number of at least 1"),
        ("rate", [1e-9, 5.0], [0.0, -1.0], "a number above 0"),
        ("share", [0.0, 1.0], [-0.1, 1.1], "in [0, 1]"),
        ("part", [1e-9, 1.0], [0.0, 1.1], "in (0, 1]"),
    ],
)
def test_bounds(setting, good, bad, rule):
    for value in good:
        assert getattr(Base(**{setting: value}), setting) == value
    for value in [*bad, math.nan, math.inf, -math.inf]:
        with pytest.raises(ValueError) as e:
            Base(**{setting: value})
        assert str(e.value) == f"{setting} {value} is not {rule}"


def test_choices():
    assert Base(kind="b").kind == "b"
    with pytest.raises(ValueError, match="kind 'c' is not known; use one of a, b"):
        Base(kind="c")


def test_a_plain_field_takes_a_flag_away():
    @dataclass(frozen=True)
    class Fixed(Base):
        width: int = 0

    assert "width" not in annotations(Fixed) and Fixed().width == 0  # its bounds are gone, too
    assert annotations(Fixed)["rate"] == annotations(Base)["rate"]


def test_a_subclass_changes_default_and_bounds():
    @dataclass(frozen=True)
    class Wide(Base):
        width: Annotated[int, "more channels", at_least(64)] = 64

    assert list(annotations(Wide)) == list(annotations(Base)) and annotations(Wide)["width"].help == "more channels"
    with pytest.raises(ValueError, match="width 8 is not a number of at least 64"):
        Wide(width=8)


def test_merge_joins_the_fields_of_parts():
    both = merge(Base, Soft.Config, None)
    assert both is merge(Base, Soft.Config, None) and both.__name__ == "Base"
    assert set(annotations(both)) == {*annotations(Base), "tau"} and annotations(both)["tau"].group == "--kind soft"
    cfg = both(width=3, tau=0.5)
    assert (cfg.width, cfg.tau, cfg.plain) == (3, 0.5, 0) and isinstance(cfg, Base)
    with pytest.raises(ValueError, match="tau 0 is not a number above 0"):
        both(tau=0)
    assert merge(Base) is Base and merge(Base, None) is Base and merge(both, Soft.Config) is both
    wide = merge(Base, Hard.Config)
    assert wide().width == 16 and list(annotations(wide)).count("width") == 1
    with pytest.raises(ValueError, match="width 3 is not"):
        wide(width=3)


def test_pick_takes_a_configs_own_fields():
    assert pick(Base, {"width": 3, "plain": 4, "other": 5}) == Base(width=3, plain=4)
    assert pick(Base, merge(Base, Soft.Config)(width=3)) == Base(width=3)
    with pytest.raises(ValueError, match="width 0"):
        pick(Base, {"width": 0})


def test_configs_are_frozen():
    with pytest.raises(FrozenInstanceError):
        Base().width = 4

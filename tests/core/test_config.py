"""Configurations come from plain data strictly: every key is honoured or refused by name."""

import dataclasses
import enum
import json
import pathlib
from typing import Literal

import pytest

from meshloom.core.config import from_dict, load_toml, to_dict
from meshloom.core.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class Inner:
    width: int = 4
    kind: Literal["a", "b"] = "a"


class Speed(enum.Enum):
    SLOW = "slow"
    FAST = "fast"


@dataclasses.dataclass(frozen=True)
class Outer:
    name: str
    rate: float = 0.5
    layers: tuple[int, ...] = (1, 2)
    inner: Inner = Inner()
    maybe: Inner | None = None
    folder: pathlib.Path = pathlib.Path("runs")
    flag: bool = False
    speed: Speed = Speed.SLOW
    pair: tuple[int, str] = (1, "one")
    limits: int | float | str | None = None
    shares: dict[str, float] = dataclasses.field(default_factory=dict)

    def __post_init__(self):
        if not 0 <= self.rate <= 9:
            raise ConfigError(f"rate must lie in 0..9; got {self.rate}")


def test_round_trip_keeps_everything():
    first = Outer("x", 1.5, (3,), Inner(8, "b"), Inner(1), pathlib.Path("/a/b"), True)
    second = dataclasses.replace(first, speed=Speed.FAST, pair=(2, "two"), limits="none", shares={"a": 0.5})
    for config in (first, second):
        assert from_dict(Outer, json.loads(json.dumps(to_dict(config)))) == config


def test_integers_are_accepted_where_floats_are_wanted_but_not_bools():
    assert from_dict(Outer, {"name": "x", "rate": 2}).rate == 2.0
    with pytest.raises(ConfigError, match="rate must be float; got True"):
        from_dict(Outer, {"name": "x", "rate": True})


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"name": "x", "rat": 1}, r"unknown key 'rat'; did you mean 'rate'\?"),
        ({"name": "x", "inner": {"widht": 1}}, r"inner: unknown key 'widht'; did you mean 'width'\?"),
        ({"name": "x", "inner": {"kind": "c"}}, "inner: kind must be one of 'a', 'b'; got 'c'$"),
        ({"name": "x", "maybe": {"kind": 1}}, "maybe: kind must be one of 'a', 'b'; got 1$"),
        ({"name": "x", "speed": "medium"}, "speed must be one of 'slow', 'fast'; got 'medium'"),
        ({"name": "x", "pair": [1]}, r"pair must have 2 entries; got 1: \[1\]"),
        ({"name": "x", "limits": [1]}, r"limits must be int \| float \| str \| None; got \[1\]"),
        ({"name": "x", "shares": {"a": "b"}}, "shares.a must be float; got 'b'"),
        ({"name": "x", "folder": 1}, "folder must be Path; got 1"),
        ({"name": "x", "flag": 1}, "flag must be bool; got 1"),
        ({"name": "x", "rate": 10}, "run.toml: rate must lie in 0..9; got 10"),
        ({"name": 3}, "name must be str; got 3"),
        ({"name": "x", "layers": [1, "2"]}, r"layers\[1\] must be int; got '2'"),
        ({}, "missing name"),
        ({"name": "x", "inner": 3}, "Inner needs a table of keys, got 3"),
    ],
)
def test_bad_data_is_refused_with_place_value_and_remedy(data, message):
    with pytest.raises(ConfigError, match=message) as error:
        from_dict(Outer, data, where="run.toml")
    assert str(error.value).startswith("run.toml: ")


def test_file_overrides_base_key_by_key(tmp_path):
    path = tmp_path / "run.toml"
    path.write_text('rate = 0.25\n[inner]\nkind = "b"\n')
    base = Outer("base", inner=Inner(width=9))
    assert load_toml(Outer, path, base=base) == Outer("base", 0.25, inner=Inner(9, "b"))


def test_unreadable_and_malformed_files_are_named(tmp_path):
    with pytest.raises(ConfigError, match=r"cannot read .*absent\.toml: No such file"):
        load_toml(Outer, tmp_path / "absent.toml")
    path = tmp_path / "broken.toml"
    path.write_text("rate = = 1")
    with pytest.raises(ConfigError, match=r"broken\.toml is not valid TOML"):
        load_toml(Outer, path)

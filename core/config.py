"""Frozen dataclasses to and from plain data and TOML, strictly: every key is honoured or refused by name.

Knows nothing of what the configurations mean; their own `__post_init__` checks that.
"""

import dataclasses
import difflib
import enum
import pathlib
import tomllib
import types
import typing
from collections.abc import Iterable
from typing import Any

from meshloom.core.errors import ConfigError, MeshloomError


def nearest(name: str, valid: Iterable[str]) -> str:
    """A clause that helps with a misspelt name: the nearest valid one, or all of them."""
    valid = sorted(valid)
    match = difflib.get_close_matches(name, valid, n=1, cutoff=0.5)
    return f"did you mean {match[0]!r}?" if match else f"valid names: {', '.join(valid) or 'none'}"


def to_dict(config: Any) -> dict[str, Any]:
    """A dataclass as JSON-ready data: nested dataclasses become dicts, tuples lists, paths and enums strings."""
    return {field.name: _plain(getattr(config, field.name)) for field in dataclasses.fields(config)}


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return to_dict(value)
    if isinstance(value, tuple | list):
        return [_plain(each) for each in value]
    if isinstance(value, dict):
        return {key: _plain(each) for key, each in value.items()}
    if isinstance(value, pathlib.PurePath):
        return str(value)
    return value.value if isinstance(value, enum.Enum) else value


def from_dict[T](cls: type[T], data: Any, *, where: str = "config", base: T | None = None) -> T:
    """Builds a dataclass from plain data.

    Args:
        where: what to call the data in errors, such as the file's name.
        base: values of keys that `data` leaves out; without it, the class's defaults.
    Raises:
        ConfigError: a key is unknown (the nearest valid one is named), missing, or its value has another type.
        MeshloomError: what the class's own checks raise, with `where` put before the message.
    """
    if not isinstance(data, dict):
        raise ConfigError(f"{where}: {cls.__name__} needs a table of keys, got {data!r}")
    hints = typing.get_type_hints(cls)
    fields = {field.name: field for field in dataclasses.fields(cls) if field.init}  # type: ignore[arg-type]
    values = {}
    for key, value in data.items():
        if key not in fields:
            raise ConfigError(f"{where}: unknown key {key!r}; {nearest(key, fields)}")
        current = getattr(base, key, None)
        values[key] = _convert(hints[key], value, f"{where}: {key}", current)
    required = (dataclasses.MISSING, dataclasses.MISSING)
    missing = [n for n, f in fields.items() if n not in values and (f.default, f.default_factory) == required]
    if missing and base is None:
        raise ConfigError(f"{where}: missing {', '.join(missing)}")
    try:
        return cls(**values) if base is None else dataclasses.replace(base, **values)  # type: ignore[type-var]
    except MeshloomError as error:  # from __post_init__, which knows the fields but not where they came from
        raise type(error)(f"{where}: {error}") from error


def load_toml[T](cls: type[T], path: str | pathlib.Path, *, base: T | None = None) -> T:
    """Reads a dataclass from a TOML file; keys as in `from_dict`.

    Raises:
        ConfigError: the file cannot be read, is no TOML, or holds a key or value that is not valid.
    """
    try:
        data = tomllib.loads(pathlib.Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not valid TOML: {error}") from error
    return from_dict(cls, data, where=str(path), base=base)


def _convert(hint: Any, value: Any, where: str, current: Any = None) -> Any:
    """`value` as the annotation `hint` wants it, or a ConfigError that shows both."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Annotated:
        return _convert(arguments[0], value, where, current)
    if hint is Any:
        return value
    if origin in (typing.Union, types.UnionType):
        return _convert_union(arguments, hint, value, where, current)
    if origin is typing.Literal:
        if value in arguments:
            return value
        raise ConfigError(f"{where} must be one of {', '.join(map(repr, arguments))}; got {value!r}")
    if origin in (tuple, list) and isinstance(value, list | tuple):
        return _convert_sequence(origin, arguments, value, where)
    if origin is dict and isinstance(value, dict):
        return {key: _convert(arguments[1], each, f"{where}.{key}") for key, each in value.items()}
    if dataclasses.is_dataclass(hint):
        return value if isinstance(value, hint) else from_dict(hint, value, where=where, base=current)  # type: ignore
    if isinstance(hint, type) and issubclass(hint, enum.Enum):
        names = [member.value for member in hint]
        if value in names:
            return hint(value)
        raise ConfigError(f"{where} must be one of {', '.join(map(repr, names))}; got {value!r}")
    if hint is pathlib.Path and isinstance(value, str):
        return pathlib.Path(value)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    plain = origin or hint
    if isinstance(plain, type) and isinstance(value, plain) and not (isinstance(value, bool) and plain is not bool):
        return value
    raise ConfigError(f"{where} must be {_name(hint)}; got {value!r}")


def _convert_union(options: tuple[Any, ...], hint: Any, value: Any, where: str, current: Any) -> Any:
    if value is None and type(None) in options:
        return None
    errors = []
    for option in options:
        if option is type(None):
            continue
        try:
            return _convert(option, value, where, current)
        except ConfigError as error:
            errors.append(error)
    if len(errors) == 1:
        raise errors[0]
    raise ConfigError(f"{where} must be {_name(hint)}; got {value!r}")


def _convert_sequence(origin: Any, arguments: tuple[Any, ...], value: Any, where: str) -> Any:
    if origin is tuple and not (len(arguments) == 2 and arguments[1] is Ellipsis):
        if len(value) != len(arguments):
            raise ConfigError(f"{where} must have {len(arguments)} entries; got {len(value)}: {value!r}")
        return tuple(_convert(a, v, f"{where}[{i}]") for i, (a, v) in enumerate(zip(arguments, value, strict=True)))
    return origin(_convert(arguments[0], each, f"{where}[{i}]") for i, each in enumerate(value))


def _name(hint: Any) -> str:
    return hint.__name__ if isinstance(hint, type) and not typing.get_args(hint) else str(hint).replace("typing.", "")

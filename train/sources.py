"""Where text comes from: `documents` turns a name into documents that can be read again and again in one order.

Everything read is UTF-8. Nothing is skipped silently: a file that cannot be read as what it is ends with its name and
line. Knows no tokens.
"""

import dataclasses
import functools
import hashlib
import json
import pathlib
import re
import sysconfig
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from meshloom.core.errors import ConfigError

SUFFIXES = (".txt", ".md", ".py", ".jsonl")
# Folders of the standard library that are tests, or no part of it.
_NOT_LIBRARY = frozenset({"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"})


@dataclasses.dataclass(frozen=True)
class Documents:
    """Documents of one source.

    Attributes:
        name: for messages.
        identity: a digest that changes when the documents do.
        size: how much there is, in the units that `read` counts, for a progress bar; 0 is unknown.
        read: yields, in order, how much a document is of `size`, and its text.
    """

    name: str
    identity: str
    size: int
    read: Callable[[], Iterator[tuple[int, str]]]


def documents(source: str) -> Documents:
    """The documents of "stdlib", a folder, a file, or a Hugging Face data set "owner/name[:subset]".

    Raises:
        ConfigError: there is no such source, or nothing in it that can be read.
    """
    if source == "stdlib":
        return stdlib()
    path = pathlib.Path(source).expanduser()
    if path.is_dir():
        return _of_folder(path)
    if path.is_file():
        if path.suffix not in SUFFIXES:
            raise ConfigError(f"{path} is not a {_or(SUFFIXES)} file")
        return _of_files(str(path), path.parent, [path])
    if re.fullmatch(r"[\w.-]+/[\w.-]+(:[\w.-]+)?", source):
        return _of_data_set(source)
    raise ConfigError(
        f'there is no data {source!r}: give "stdlib", a folder or a {_or(SUFFIXES)} file, or a Hugging Face data set '
        f'as "owner/name" or "owner/name:subset"'
    )


def stdlib() -> Documents:
    """The source of this Python's standard library, without its tests: 12 MB in 750 files (Python 3.12)."""
    root = pathlib.Path(sysconfig.get_path("stdlib"))
    files = [each for each in sorted(root.rglob("*.py")) if not _NOT_LIBRARY & set(each.relative_to(root).parts)]
    return _of_files("the Python standard library", root, files)


def _of_folder(folder: pathlib.Path) -> Documents:
    def is_text(path: pathlib.Path) -> bool:
        hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)
        return path.suffix in SUFFIXES and not hidden and path.is_file()

    files = [each for each in sorted(folder.rglob("*")) if is_text(each)]
    if not files:
        raise ConfigError(f"{folder} holds no text: no {_or(SUFFIXES)} file in it or below")
    return _of_files(str(folder), folder, files)


def _of_files(name: str, root: pathlib.Path, files: list[pathlib.Path]) -> Documents:
    facts = [(each.relative_to(root).as_posix(), each.stat()) for each in files]
    identity = _digest([name, *((path, stat.st_size, stat.st_mtime_ns) for path, stat in facts)])
    size = sum(stat.st_size for _, stat in facts)
    if size == 0:
        raise ConfigError(f"{name} holds no text: its {len(files)} file(s) are empty")
    return Documents(name, identity, size, functools.partial(_read_files, files))


def _read_files(files: list[pathlib.Path]) -> Iterator[tuple[int, str]]:
    for path in files:
        if path.suffix == ".jsonl":
            yield from _read_json_lines(path)
        else:
            data = path.read_bytes()
            yield len(data), _decoded(data, path, 1)


def _read_json_lines(path: pathlib.Path) -> Iterator[tuple[int, str]]:
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            text = _decoded(line, path, number)
            if not text.strip():
                continue
            try:
                value = json.loads(text)
            except ValueError as error:
                raise ConfigError(f"{path}, line {number}: not valid JSON: {error}") from error
            if not isinstance(value, dict) or not isinstance(value.get("text"), str):
                found = ", ".join(value) if isinstance(value, dict) else type(value).__name__
                raise ConfigError(
                    f'{path}, line {number}: a line is an object with a string "text"; this one has: {found}'
                )
            yield len(line), value["text"]


def _decoded(data: bytes, path: pathlib.Path, first_line: int) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = first_line + data.count(b"\n", 0, error.start)
        raise ConfigError(
            f"{path}, line {line}: not UTF-8 text (byte 0x{data[error.start]:02x}); convert the file to UTF-8"
        ) from error


def _of_data_set(source: str) -> Documents:
    """The "train" split of a data set of the Hugging Face hub, through the package `datasets`."""
    try:
        import datasets
    except ImportError as error:
        raise ConfigError(
            f"{source!r} is no file or folder here, so it would be a Hugging Face data set; those need the package "
            "`datasets`: pip install datasets"
        ) from error
    name, _, subset = source.partition(":")
    try:
        rows: Any = datasets.load_dataset(name, subset or None, split="train")
    except Exception as error:  # datasets raises errors of many libraries: network, parsing, permissions
        first = str(error).strip().partition("\n")[0]
        raise ConfigError(f"the data set {source!r} cannot be loaded: {type(error).__name__}: {first}") from error
    if "text" not in rows.column_names:
        raise ConfigError(f'{source}: the column "text" is missing; there are: {", ".join(rows.column_names)}')
    identity = _digest([source, len(rows), str(rows.info.version), rows.info.dataset_size])
    return Documents(source, identity, len(rows), lambda: ((1, row["text"]) for row in rows))


def _digest(facts: Iterable[Any]) -> str:
    return hashlib.sha256(json.dumps(list(facts)).encode()).hexdigest()


def _or(names: Iterable[str]) -> str:
    *most, last = names
    return f"{', '.join(most)} or {last}"

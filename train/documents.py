"""Where texts come from: the standard library, files and folders, Hugging Face datasets.

Every source can be read again and again, in the same order; what is wrong with one is told by file and line.
"""

import dataclasses
import hashlib
import itertools
import json
import pathlib
import re
import sys
import sysconfig
from collections.abc import Callable, Iterator

from meshloom.core.errors import ConfigError

SUFFIXES = (".txt", ".md", ".py", ".jsonl")
# Tests, installed packages, and tables of characters: nothing that reads like the library's own code.
_NOT_STDLIB = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__", "lib2to3", "encodings"}


@dataclasses.dataclass(frozen=True)
class Documents:
    """Texts in a fixed order.

    Attributes:
        where: what to call them in messages.
        fingerprint: a hash of their content; equal only for equal texts.
        read: starts over and yields them.
    """

    where: str
    fingerprint: str
    read: Callable[[], Iterator[str]]


def find_documents(data: str) -> Documents:
    """The documents that `TrainConfig.data` names.

    Raises:
        ConfigError: there are none. Reading them raises it too: a file is not UTF-8, or not JSON lines with "text".
    """
    path = pathlib.Path(data).expanduser()
    if data == "stdlib":
        root = pathlib.Path(sysconfig.get_paths()["stdlib"])
        files = [f for f in sorted(root.rglob("*.py")) if not _NOT_STDLIB & set(f.relative_to(root).parts)]
        return _from_files(f"the standard library of Python {sys.version.split()[0]}", files, root)
    if path.is_file():
        if path.suffix not in SUFFIXES:
            raise ConfigError(f"data: {path} is no text Meshloom reads; it reads {', '.join(SUFFIXES)}")
        return _from_files(str(path), [path], path.parent)
    if path.is_dir():
        files = sorted(f for f in path.rglob("*") if f.suffix in SUFFIXES and f.is_file())
        if not files:
            raise ConfigError(f"data: the folder {path} holds no {', '.join(SUFFIXES)} file")
        return _from_files(str(path), files, path)
    if re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", data):
        return _from_hub(data)
    raise ConfigError(
        f'data: there is no file or folder {path}; data is also "stdlib", or a Hugging Face id (owner/name)'
    )


def _from_files(where: str, files: list[pathlib.Path], root: pathlib.Path) -> Documents:
    digest = hashlib.sha256()
    for file in files:
        with file.open("rb") as content:
            digest.update(str(file.relative_to(root)).encode() + b"\0")
            digest.update(hashlib.file_digest(content, "sha256").digest())
    return Documents(where, digest.hexdigest(), lambda: itertools.chain.from_iterable(map(_read_file, files)))


def _read_file(path: pathlib.Path) -> Iterator[str]:
    if path.suffix == ".jsonl":
        yield from _read_jsonl(path)
    else:
        yield _decode(path.read_bytes(), path, 1)


def _read_jsonl(path: pathlib.Path) -> Iterator[str]:
    with path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            text = _decode(line, path, number)
            if not text.strip():
                continue
            try:
                record = json.loads(text)
            except ValueError as error:
                raise ConfigError(f"data: {path}, line {number}: not valid JSON: {error}") from error
            if not isinstance(record, dict) or not isinstance(record.get("text"), str):
                held = f"keys {', '.join(record) or 'none'}" if isinstance(record, dict) else type(record).__name__
                raise ConfigError(f'data: {path}, line {number}: expected an object with a string "text"; got {held}')
            yield record["text"]


def _decode(content: bytes, path: pathlib.Path, first_line: int) -> str:
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        line = first_line + content[: error.start].count(b"\n")
        raise ConfigError(f"data: {path}, line {line}: not UTF-8 (byte 0x{content[error.start]:02x})") from error


def _from_hub(name: str) -> Documents:
    try:
        import datasets
    except ImportError as error:
        raise ConfigError(
            f"data: {name} is no file or folder here, so a Hugging Face dataset, and those need `pip install datasets`"
        ) from error
    try:
        table = datasets.load_dataset(name, split="train")
    except Exception as error:  # the library raises errors of requests, fsspec, pyarrow and its own
        raise ConfigError(f"data: Hugging Face dataset {name} cannot be read: {error}") from error
    if "text" not in table.column_names:
        raise ConfigError(f'data: dataset {name} has no column "text"; it has {", ".join(table.column_names)}')
    return Documents(name, f"{name} {table._fingerprint}", lambda: (row["text"] for row in table))

"""Text to a token file on disk: where documents come from, the tokenizer made from them, and the cache of their ids.

A corpus is one long array of ids; every document ends with the end-of-text id. The same documents and tokenizer always
give the same file, found again in the user's cache by a hash of both. Knows nothing of rows, batches or devices.
"""

import dataclasses
import hashlib
import itertools
import json
import os
import pathlib
import re
import shutil
import sys
import sysconfig
import tempfile
from collections.abc import Callable, Iterator

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from meshloom.core.compile import cache_folder
from meshloom.core.errors import ConfigError
from meshloom.models.tokenizer import Tokenizer

SUFFIXES = (".txt", ".md", ".py", ".jsonl")
# Tests, installed packages, and tables of characters: nothing that reads like the library's own code.
_NOT_STDLIB = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__", "lib2to3", "encodings"}


@dataclasses.dataclass(frozen=True)
class Documents:
    """Texts that can be read again and again, always in the same order.

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
        ConfigError: there are none, or a file is not UTF-8 or not JSON lines with "text"; names file and line.
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
    raise ConfigError(f'data: there is no file or folder {path}; data is also "stdlib", or a Hugging Face id (owner/name)')


def _from_files(where: str, files: list[pathlib.Path], root: pathlib.Path) -> Documents:
    digest = hashlib.sha256()
    for file in files:
        with file.open("rb") as content:
            digest.update(str(file.relative_to(root)).encode() + b"\0")
            digest.update(hashlib.file_digest(content, "sha256").digest())
    read = lambda: itertools.chain.from_iterable(map(_read_file, files))  # noqa: E731
    return Documents(where, digest.hexdigest(), read)


def _read_file(path: pathlib.Path) -> Iterator[str]:
    if path.suffix == ".jsonl":
        yield from _read_jsonl(path)
        return
    content = path.read_bytes()
    yield _decode(content, path, 1)


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
            f"data: {name} is no file or folder here, so it is a Hugging Face dataset, and those need `pip install datasets`"
        ) from error
    try:
        table = datasets.load_dataset(name, split="train")
    except Exception as error:  # the library raises errors of requests, fsspec, pyarrow and its own
        raise ConfigError(f"data: Hugging Face dataset {name} cannot be read: {error}") from error
    if "text" not in table.column_names:
        raise ConfigError(f'data: dataset {name} has no column "text"; it has {", ".join(table.column_names)}')
    return Documents(name, f"{name} {table._fingerprint}", lambda: (row["text"] for row in table))


@dataclasses.dataclass(frozen=True)
class Corpus:
    """Token ids of all documents, one after the other.

    Attributes:
        tokens: `[N]` unsigned ids, on disk.
        ends: int64 `[documents]`, the offset behind each document's last token.
        key: hash of documents and tokenizer.
    """

    tokens: np.ndarray
    ends: np.ndarray
    key: str


def tokenize(documents: Documents, tokenizer: Tokenizer, *, console: Console) -> Corpus:
    """The corpus of the documents, from the user's cache if it has been made before."""
    if not tokenizer.eos_ids:
        raise ConfigError("tokenizer: it has no end-of-text token to put between documents; train one: tokenizer=train")
    eos = min(tokenizer.eos_ids)
    identity = json.dumps([documents.fingerprint, hashlib.sha256(tokenizer.backend.to_str().encode()).hexdigest(), eos])
    key = hashlib.sha256(identity.encode()).hexdigest()[:24]
    folder = cache_folder() / "corpora" / key
    if not (folder / "ends.npy").is_file():
        _write(documents, tokenizer, eos, folder, console)
    dtype = _dtype(tokenizer)
    return Corpus(np.memmap(folder / "tokens.bin", dtype, mode="r"), np.load(folder / "ends.npy"), key)


def _dtype(tokenizer: Tokenizer) -> type[np.unsignedinteger]:
    return np.uint16 if tokenizer.vocab_size <= 2**16 else np.uint32


def _write(documents: Documents, tokenizer: Tokenizer, eos: int, folder: pathlib.Path, console: Console) -> None:
    """Fills the cache folder, which appears complete or not at all."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        partial = pathlib.Path(tempfile.mkdtemp(prefix=f"{folder.name}.", dir=folder.parent))
    except OSError as error:
        raise ConfigError(f"cannot write the token cache {folder.parent}: {error.strerror}; set XDG_CACHE_HOME") from error
    try:
        ends, total = [], 0
        with (partial / "tokens.bin").open("wb") as out:
            for ids in _encoded(documents, tokenizer, console):
                row = ids if ids and ids[-1] == eos else [*ids, eos]
                out.write(np.asarray(row, _dtype(tokenizer)).tobytes())
                total += len(row)
                ends.append(total)
        if not ends:
            raise ConfigError(f"data: {documents.where} holds no documents")
        np.save(partial / "ends.npy", np.asarray(ends, np.int64))
        try:
            os.rename(partial, folder)
        except OSError:  # another process was first, with the same content
            if not (folder / "ends.npy").is_file():
                raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _encoded(documents: Documents, tokenizer: Tokenizer, console: Console) -> Iterator[list[int]]:
    # Text that happens to spell a special token is text.
    before, tokenizer.backend.encode_special_tokens = tokenizer.backend.encode_special_tokens, True
    columns = [TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()]
    count = sum(1 for _ in documents.read())
    try:
        with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
            task = progress.add_task(f"tokenizing {documents.where}", total=count)
            for group in itertools.batched(documents.read(), 64):
                for encoding in tokenizer.backend.encode_batch(list(group)):
                    yield encoding.ids
                progress.advance(task, len(group))
    finally:
        tokenizer.backend.encode_special_tokens = before

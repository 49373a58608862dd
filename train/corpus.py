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
import shutil
import tempfile
from collections.abc import Iterator

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from meshloom.core.compile import cache_folder
from meshloom.core.errors import ConfigError
from meshloom.models.tokenizer import Tokenizer
from meshloom.train.documents import Documents


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
    """The corpus of the documents, from the user's cache if it has been made before.

    Raises:
        ConfigError: no documents, a tokenizer without an end of text, or a cache folder that cannot be written.
    """
    if not tokenizer.eos_ids:
        raise ConfigError("tokenizer: it has no end-of-text token to put between documents; train one: tokenizer=train")
    eos = min(tokenizer.eos_ids)
    identity = json.dumps([documents.fingerprint, hashlib.sha256(tokenizer.backend.to_str().encode()).hexdigest(), eos])
    key = hashlib.sha256(identity.encode()).hexdigest()[:24]
    folder = cache_folder() / "corpora" / key
    if not (folder / "ends.npy").is_file():
        _write(documents, tokenizer, eos, folder, console)
    return Corpus(np.memmap(folder / "tokens.bin", _dtype(tokenizer), mode="r"), np.load(folder / "ends.npy"), key)


def _dtype(tokenizer: Tokenizer) -> type[np.unsignedinteger]:
    return np.uint16 if tokenizer.vocab_size <= 2**16 else np.uint32


def _write(documents: Documents, tokenizer: Tokenizer, eos: int, folder: pathlib.Path, console: Console) -> None:
    """Fills the cache folder, which appears complete or not at all."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        partial = pathlib.Path(tempfile.mkdtemp(prefix=f"{folder.name}.", dir=folder.parent))
    except OSError as error:
        raise ConfigError(
            f"cannot write the token cache {folder.parent}: {error.strerror}; set XDG_CACHE_HOME"
        ) from error
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

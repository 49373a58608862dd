"""A corpus: documents as one long row of token ids on disk, made once and kept in the user's cache.

Each document is its tokens and then the end-of-text token. Every 50th document stands at the end of the row, where it
can be held out. The folder of a corpus appears under its name when it is complete, so a process that dies while it
tokenises leaves nothing that counts.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
import pathlib
import shutil
import tempfile
from collections.abc import Callable, Iterator

import numpy as np

from meshloom.core.checkpoint import check_writable
from meshloom.core.compile import cache_folder
from meshloom.core.errors import CheckpointError, ConfigError
from meshloom.models.tokenizer import Tokenizer, train_byte_bpe
from meshloom.train.sources import Documents

HELD_OUT_EVERY = 50
# Characters a tokenizer is trained on at most: merges hardly change beyond, and its word counts live in memory.
TOKENIZER_SAMPLE = 100_000_000
# Characters handed to the tokenizer at once; it spreads documents over the cores.
_GROUP = 1_000_000
_PARTIAL = ".partial-"

Advance = Callable[[int], None]


@dataclasses.dataclass(frozen=True)
class Corpus:
    """Token ids of all documents in a row.

    Attributes:
        tokens: uint16 or uint32 `[tokens]`, mapped from disk.
        ends: int64 `[documents]`, where each document ends in `tokens`.
        training_documents: how many stand before those that can be held out.
        fingerprint: digest of all tokens, the same wherever the corpus is made.
    """

    tokens: np.ndarray
    ends: np.ndarray
    training_documents: int
    fingerprint: str

    @property
    def training_tokens(self) -> int:
        """Tokens of the documents that are never held out."""
        return int(self.ends[self.training_documents - 1])


def train_tokenizer(documents: Documents, vocab_size: int) -> Tokenizer:
    """A byte-level BPE learned from the first 100 million characters; the same documents give the same one.

    Raises:
        ConfigError: as in reading the documents.
    """
    folder = cache_folder() / "tokenizers" / _key(documents.identity, vocab_size, TOKENIZER_SAMPLE)
    if not folder.is_dir():
        with _appearing(folder) as partial:
            train_byte_bpe(_sample(documents), vocab_size).save(partial)
    return Tokenizer.load(folder)


def _sample(documents: Documents) -> Iterator[str]:
    left = TOKENIZER_SAMPLE
    for _, text in documents.read():
        yield text
        left -= len(text)
        if left <= 0:
            return


def tokenise(documents: Documents, tokenizer: Tokenizer, advance: Advance = lambda amount: None) -> Corpus:
    """The corpus of the documents under a tokenizer, from the cache or made now.

    Args:
        advance: called with how much of `documents.size` has been done.
    Raises:
        ConfigError: as in reading the documents; the tokenizer has no end-of-text token; there is no text at all.
        CheckpointError: the cache cannot be written.
    """
    if not tokenizer.eos_ids:
        raise ConfigError("the tokenizer has no end-of-text token, which separates documents")
    folder = cache_folder() / "corpora" / _key(documents.identity, tokenizer.backend.to_str(), min(tokenizer.eos_ids))
    if not folder.is_dir():
        with _appearing(folder) as partial:
            _write(partial, documents, tokenizer, advance)
    facts = json.loads((folder / "corpus.json").read_text(encoding="utf-8"))
    tokens = np.memmap(folder / "tokens.bin", dtype=facts["dtype"], mode="r")
    return Corpus(tokens, np.load(folder / "ends.npy"), facts["training_documents"], facts["fingerprint"])


def _write(folder: pathlib.Path, documents: Documents, tokenizer: Tokenizer, advance: Advance) -> None:
    dtype = np.uint16 if tokenizer.vocab_size <= 2**16 else np.uint32
    lengths: dict[bool, list[int]] = {False: [], True: []}
    with (folder / "tokens.bin").open("w+b") as kept, tempfile.TemporaryFile(dir=folder) as held:
        for number, ids in enumerate(_encoded(documents, tokenizer, advance)):
            held_out = number % HELD_OUT_EVERY == HELD_OUT_EVERY - 1
            lengths[held_out].append(len(ids))
            (held if held_out else kept).write(np.asarray(ids, dtype).tobytes())
        held.seek(0)
        shutil.copyfileobj(held, kept)
        kept.seek(0)
        fingerprint = hashlib.file_digest(kept, "sha256").hexdigest()
    if not lengths[False]:
        raise ConfigError(f"{documents.name} holds no text: all its documents are empty")
    np.save(folder / "ends.npy", np.cumsum(lengths[False] + lengths[True], dtype=np.int64))
    facts = {
        "source": documents.name,
        "dtype": np.dtype(dtype).name,
        "training_documents": len(lengths[False]),
        "fingerprint": fingerprint,
    }
    (folder / "corpus.json").write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")


def _encoded(documents: Documents, tokenizer: Tokenizer, advance: Advance) -> Iterator[list[int]]:
    """Ids of each document that is not empty, its end included."""
    eos = min(tokenizer.eos_ids)
    for amount, texts in _groups(documents):
        for encoding in tokenizer.backend.encode_batch_fast(texts, add_special_tokens=True):
            yield [*encoding.ids, eos]
        advance(amount)


def _groups(documents: Documents) -> Iterator[tuple[int, list[str]]]:
    """Texts that are not empty, some at a time, with how much of `documents.size` they are."""
    amount, characters, texts = 0, 0, []
    for size, text in documents.read():
        amount, characters = amount + size, characters + len(text)
        if text:
            texts.append(text)
        if characters >= _GROUP:
            yield amount, texts
            amount, characters, texts = 0, 0, []
    if texts:
        yield amount, texts


@contextlib.contextmanager
def _appearing(folder: pathlib.Path) -> Iterator[pathlib.Path]:
    """A folder under a temporary name beside its own, renamed when the block ends well and removed when it does not."""
    check_writable(folder, 0)
    folder.parent.mkdir(parents=True, exist_ok=True)
    _remove_abandoned(folder.parent)
    partial = pathlib.Path(tempfile.mkdtemp(prefix=f"{_PARTIAL}{os.getpid()}-", dir=folder.parent))
    try:
        yield partial
        if not folder.is_dir():  # another process may have been first
            partial.rename(folder)
    except OSError as error:
        raise CheckpointError(f"{folder} could not be written: {error.strerror}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _remove_abandoned(folder: pathlib.Path) -> None:
    """Removes what processes of this machine that no longer live have left unfinished."""
    for partial in folder.glob(f"{_PARTIAL}*"):
        process = int(partial.name.removeprefix(_PARTIAL).partition("-")[0])
        try:
            os.kill(process, 0)
        except ProcessLookupError:
            shutil.rmtree(partial, ignore_errors=True)
        except PermissionError:
            continue  # lives, and is another user's


def _key(*facts: object) -> str:
    return hashlib.sha256("\0".join(map(str, facts)).encode()).hexdigest()[:32]

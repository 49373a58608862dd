"""Batches: the corpus cut into rows of equal length, shuffled, and dealt out by grain.

A row is a stretch of the corpus and may hold several documents: `segment_ids` numbers them from 1 (0 is padding),
`positions` restart in each, and `targets` is the next token, or `IGNORE` where that belongs to another document. Every
token but the first of a document is a target exactly once per epoch. The order depends on the seed alone, and where
an iterator stands is one small dictionary.

Knows no device: arrays are numpy, and a process sees only its own rows of each batch.

Shape legend: B rows of a batch, T tokens of a row.
"""

import dataclasses
from typing import Any

import grain
import numpy as np

from meshloom.core.errors import ConfigError
from meshloom.train.corpus import Corpus
from meshloom.train.objectives import IGNORE

Batch = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Rows:
    """The rows of a stretch of a corpus, by index: a random-access source for grain.

    Attributes:
        start, stop: the stretch, in tokens.
        length: tokens of a row. The last row is padded.
    """

    corpus: Corpus
    start: int
    stop: int
    length: int

    def __len__(self) -> int:
        # The last token of the stretch is a target only.
        return max(1, -(-(self.stop - self.start - 1) // self.length))

    def __getitem__(self, index: int) -> Batch:
        """tokens, targets, segment_ids and positions, each int32 `[T]`."""
        begin = self.start + int(index) * self.length
        end = min(begin + self.length, self.stop)
        places = np.arange(begin, min(end + 1, self.stop))
        tokens = self.corpus.tokens[places[0] : places[-1] + 1].astype(np.int32)
        document = np.searchsorted(self.corpus.ends, places, side="right")
        starts = np.concatenate(([0], self.corpus.ends))[document[0] : document[-1] + 1]
        row = end - begin
        targets = np.where(document[1:] == document[:-1], tokens[1:], IGNORE)
        segments = document[:row] - document[0]
        return {
            "tokens": self._padded(tokens[:row], 0),
            "targets": self._padded(targets[:row], IGNORE),
            "segment_ids": self._padded(segments + 1, 0),
            "positions": self._padded(places[:row] - np.maximum(starts[segments], begin), 0),
        }

    def _padded(self, values: np.ndarray, fill: int) -> np.ndarray:
        row = np.full(self.length, fill, np.int32)
        row[: len(values)] = values
        return row


def training_rows(corpus: Corpus, length: int, *, hold_out: bool) -> Rows:
    """Rows to train on: all documents, or all but those held out."""
    return Rows(corpus, 0, corpus.training_tokens if hold_out else int(corpus.ends[-1]), length)


def heldout_rows(corpus: Corpus, length: int) -> Rows:
    """Rows of the held-out documents.

    Raises:
        ConfigError: there are none, because the corpus has fewer than 50 documents.
    """
    if corpus.training_documents == len(corpus.ends):
        raise ConfigError(
            f"heldout_every needs documents to hold out, one in 50; the data has only {len(corpus.ends)}: "
            "give more documents, or heldout_every=0"
        )
    return Rows(corpus, corpus.training_tokens, int(corpus.ends[-1]), length)


class Batches:
    """Endless batches of rows, shuffled anew in each epoch; the state of the iterator can be saved and set.

    Every process takes its own rows of the same global batch, so that the state is the same in all of them.
    """

    def __init__(self, rows: Rows, batch_size: int, *, seed: int, process: int = 0, processes: int = 1):
        """
        Args:
            batch_size: rows over all processes.
        Raises:
            ConfigError: the processes do not share a batch evenly.
        """
        if batch_size % processes:
            raise ConfigError(f"batch_size={batch_size} must be a multiple of the {processes} processes")
        shuffled = grain.MapDataset.source(rows).shuffle(seed=seed).repeat()
        mine = shuffled[process::processes].batch(batch_size // processes)
        # Reading a row takes microseconds: one thread keeps a few batches ahead of the step.
        self._iterator = iter(mine.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=4)))

    def __next__(self) -> Batch:
        """tokens, targets, segment_ids and positions, each int32 `[B, T]`."""
        return next(self._iterator)

    def get_state(self) -> dict[str, Any]:
        """Where the iterator stands: plain data, such that `set_state` of it makes the next batch come again."""
        return self._iterator.get_state()

    def set_state(self, state: dict[str, Any]) -> None:
        self._iterator.set_state(state)

    def close(self) -> None:
        """Ends the thread that reads ahead."""
        self._iterator.close()


def heldout_batches(rows: Rows, batch_size: int, limit: int, *, process: int = 0, processes: int = 1) -> list[Batch]:
    """At most `limit` batches in order, the last one filled up with rows in which nothing is predicted."""
    each = batch_size // processes
    batches = []
    for first in range(0, min(len(rows), limit * batch_size), batch_size):
        indices = range(first + process * each, first + (process + 1) * each)
        held = [rows[i] if i < len(rows) else _nothing(rows.length) for i in indices]
        batches.append({name: np.stack([row[name] for row in held]) for name in held[0]})
    return batches


def _nothing(length: int) -> Batch:
    row = {name: np.zeros(length, np.int32) for name in ("tokens", "segment_ids", "positions")}
    return row | {"targets": np.full(length, IGNORE, np.int32)}

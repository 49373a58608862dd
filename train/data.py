"""From a corpus to batches: rows cut from the token stream, shuffled anew each epoch, forever.

The order depends on the seed alone; the iterator's state is a small JSON value that goes into every checkpoint. A row
holds pieces of one or more documents, numbered, so that attention and loss stay inside each. Knows no devices beyond
which share of each batch this process has.

Shape legend: B rows, T tokens per row that are predicted.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import grain
import jax
import numpy as np

from meshloom.core.errors import ConfigError
from meshloom.train.corpus import Corpus


@dataclasses.dataclass(frozen=True)
class Share:
    """Which of `count` equal slices of the rows of a batch a process holds, in ascending order."""

    slices: tuple[int, ...] = (0,)
    count: int = 1

    @classmethod
    def of(cls, slices: Sequence[int], count: int) -> "Share":
        """The same share in the fewest slices: neighbours that make up larger ones are one."""
        for size in range(len(slices), 1, -1):
            starts = slices[::size]
            in_order = [start + i for start in starts for i in range(size)]
            if count % size == 0 and all(start % size == 0 for start in starts) and in_order == list(slices):
                return cls(tuple(start // size for start in starts), count // size)
        return cls(tuple(slices), count)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Batch:
    """Rows of `T + 1` tokens: the first T are the input, the last T what is predicted.

    Attributes (int32 `[..., T + 1]`, of numpy, JAX, or abstract):
        tokens: ids; padding is 0.
        segment_ids: number of the document within its row, from 1; 0 is padding.
        positions: place within the document's part of the row, from 0.
    """

    tokens: Any
    segment_ids: Any
    positions: Any


class PackedRows:
    """The corpus as rows of `length + 1` tokens; neighbours share one token: each is predicted once an epoch."""

    def __init__(self, corpus: Corpus, length: int):
        self._corpus = corpus
        self._length = length

    def __len__(self) -> int:
        return max(len(self._corpus.tokens) - 2, 0) // self._length + 1

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        start = index * self._length
        stop = min(start + self._length + 1, len(self._corpus.tokens))
        offsets = np.arange(start, stop)
        document = np.searchsorted(self._corpus.ends, offsets, side="right")
        first_of_document = np.searchsorted(document, document, side="left")
        row = {name: np.zeros(self._length + 1, np.int32) for name in ("tokens", "segment_ids", "positions")}
        row["tokens"][: stop - start] = self._corpus.tokens[start:stop]
        row["segment_ids"][: stop - start] = document - document[0] + 1
        row["positions"][: stop - start] = np.arange(stop - start) - first_of_document
        return row


_ALL = Share()


class Batches:
    """An endless iterator over this process's share of every batch.

    Args:
        batch_size: rows per step, over all processes.
        parts: that a batch is computed in; of each, the process has the same slices of its rows, part after part.
        share: which slices of each part. What a device gets does not depend on the number of processes.
    Raises:
        ConfigError: the corpus has fewer rows than one batch, or a part does not divide into the slices.
    """

    def __init__(
        self,
        corpus: Corpus,
        *,
        length: int,
        batch_size: int,
        seed: int,
        parts: int = 1,
        share: Share = _ALL,
    ):
        rows = PackedRows(corpus, length)
        if len(rows) < batch_size:
            raise ConfigError(
                f"data: {len(corpus.tokens)} tokens make {len(rows)} rows of sequence_length={length}, too few for one "
                f"batch of batch_size={batch_size}; give more data, or a smaller batch or length"
            )
        if batch_size % (parts * share.count):
            raise ConfigError(
                f"batch_size={batch_size} rows in {parts} part(s) do not divide into {share.count} equal slices"
            )
        shuffled = grain.MapDataset.source(rows).seed(seed).shuffle().repeat()
        slices = _Picked(shuffled.batch(batch_size // (parts * share.count)), share)
        mine = slices.batch(parts * len(share.slices)).map(_joined)
        # A row is a slice of a memory map: one thread, a step or two ahead, hides all of it.
        reading = grain.ReadOptions(num_threads=1, prefetch_buffer_size=2)
        self._iterator = iter(mine.to_iter_dataset(reading))

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        return Batch(**next(self._iterator))

    def state(self) -> dict[str, Any]:
        """Where the iterator stands, as JSON."""
        return self._iterator.get_state()

    def restore(self, state: dict[str, Any]) -> None:
        """Goes on from a `state`."""
        self._iterator.set_state(state)

    def close(self) -> None:
        """Stops the reading thread."""
        self._iterator.close()


class _Picked(grain.MapDataset):
    """Of every `share.count` elements those that a share has."""

    def __init__(self, parent: grain.MapDataset, share: Share):
        super().__init__(parent)
        self._share = share

    def __len__(self) -> int:
        return len(self._parent) // self._share.count * len(self._share.slices)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        group, place = divmod(index, len(self._share.slices))
        return self._parent[group * self._share.count + self._share.slices[place]]


def _joined(parts: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """`[A, B, T + 1]` as `[A * B, T + 1]`."""
    return {name: rows.reshape(-1, rows.shape[-1]) for name, rows in parts.items()}

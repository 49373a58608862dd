"""One step's metadata as one int32 array: written by the host, read back inside the compiled program.

One transfer a step instead of eleven: on a GPU or TPU each costs ~50 us. Floats travel as their bits. Host and device
agree because both sides walk `StepShape.fields`.

T token rows (the bucket), S sequences, W pages per sequence.
"""

import dataclasses
import functools
import math

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Int

from meshloom.pallas_kernels import Ragged
from meshloom.serve.sampler import Draws
from meshloom.serve.scheduler import Chunk


@dataclasses.dataclass(frozen=True)
class StepShape:
    """Static shape of one step program."""

    tokens: int
    sequences: int
    pages: int

    @functools.cached_property
    def fields(self) -> dict[str, tuple[slice, tuple[int, ...]]]:
        """Name -> (where in the array, shape)."""
        shapes = {
            "tokens": (self.tokens,),
            "cu_q_lens": (self.sequences + 1,),
            "kv_lens": (self.sequences,),
            "num_seqs": (),
            "page_table": (self.sequences, self.pages),
            "top_k": (self.sequences,),
            "seeds": (self.sequences,),
            "floats": (3, self.sequences),
        }
        fields, start = {}, 0
        for name, shape in shapes.items():
            fields[name] = slice(start, start + math.prod(shape)), shape
            start += math.prod(shape)
        return fields

    @property
    def size(self) -> int:
        return next(reversed(self.fields.values()))[0].stop


@dataclasses.dataclass(frozen=True)
class Step:
    """A step inside the compiled program: token ids, where they lie, the row of each sequence that samples, and how."""

    tokens: Int[Array, "T"]
    ragged: Ragged
    rows: Int[Array, "S"]
    draws: Draws


def pack(shape: StepShape, chunks: list[Chunk]) -> np.ndarray:
    """int32[shape.size] for these chunks; unused entries are padding (kv_len 0, temperature 0)."""
    packed = np.zeros(shape.size, np.int32)
    field = {name: packed[where].reshape(form) for name, (where, form) in shape.fields.items()}
    tokens, table, kv_lens, cu_q_lens = (field[name] for name in ("tokens", "page_table", "kv_lens", "cu_q_lens"))
    floats = field["floats"].view(np.float32)
    end = 0
    for row, chunk in enumerate(chunks):
        sequence, start = chunk.sequence, end
        end += chunk.count
        first = sequence.computed
        tokens[start:end] = sequence.tokens[first : first + chunk.count]
        table[row, : len(sequence.pages)] = sequence.pages
        kv_lens[row] = first + chunk.count
        cu_q_lens[row + 1] = end
        draw = sequence.draw
        if draw.temperature:
            floats[:, row] = draw.temperature, draw.top_p, draw.min_p
            field["top_k"][row] = draw.top_k
            field["seeds"][row] = draw.seed
    cu_q_lens[len(chunks) + 1 :] = end
    packed[shape.fields["num_seqs"][0]] = len(chunks)
    return packed


def unpack(shape: StepShape, packed: Int[Array, "n"]) -> Step:
    """The inverse of `pack`, traced."""
    field = {name: packed[where].reshape(form) for name, (where, form) in shape.fields.items()}
    ragged = Ragged(
        kv_lens=field["kv_lens"],
        page_table=field["page_table"],
        cu_q_lens=field["cu_q_lens"],
        num_seqs=field["num_seqs"],
    )
    temperature, top_p, min_p = lax.bitcast_convert_type(field["floats"], jnp.float32)
    draws = Draws(
        temperature=temperature,
        top_p=top_p,
        top_k=field["top_k"],
        min_p=min_p,
        seeds=field["seeds"],
        positions=field["kv_lens"],
    )
    rows = jnp.maximum(field["cu_q_lens"][1:] - 1, 0)
    return Step(field["tokens"], ragged, rows, draws)

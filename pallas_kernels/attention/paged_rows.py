"""Rows of one head out of rows that hold all heads of one token after another, and back, in a TPU's fast memory.

A load with a stride takes lines of 128 words of 32 bits, and eight of them at once while the stride is at most eight:
tokens of more lines are kept in parts of eight. Of bfloat16 a line holds the rows of two heads, or where their number
is odd of two heads of neighbouring tokens. Elements of one byte are widened to float32 first.

Shape legend: r rows (tokens x heads), n tokens, W elements of a row.
"""

import math
from typing import Any

import jax.numpy as jnp
from jax.experimental.pallas import ds
from jax.experimental.pallas import tpu as pltpu

LANES = 128
_SUBLANES = 8


def _lines(heads: int, words: bool) -> int:
    """Lines of a token, or of a part of it; of two tokens where bfloat16 heads are odd."""
    lines = heads // 2 if words and heads % 2 == 0 else heads
    return _SUBLANES if lines % _SUBLANES == 0 else lines


class HeadRows:
    """A scratch that takes rows [r, W] of `heads` heads and gives those of one.

    Args:
        scratch: of the shape that `shape` says. heads: rows of a token. dtype: of the rows that are given.
    """

    def __init__(self, scratch: Any, heads: int, dtype: Any):
        self.scratch, self.heads, self.dtype = scratch, heads, dtype
        self.words = scratch.dtype == jnp.uint32
        self.lines = _lines(heads, self.words)

    @staticmethod
    def shape(tokens: int, heads: int, width: int, stored: Any, given: Any, *, several: tuple[int, ...] = ()) -> Any:
        """The scratch for rows that are stored as one type and given as another, or `several` of it: `pltpu.VMEM`."""
        words = stored == given == jnp.bfloat16
        lanes, lines, total = math.gcd(width, LANES), _lines(heads, words), tokens * heads // (2 if words else 1)
        parts = 1 if words and heads % 2 else total // tokens // lines
        shape = (*several, width // lanes, parts, total // parts, lanes)
        return pltpu.VMEM(shape, jnp.uint32 if words else jnp.float32)

    def put_all(self, rows: Any, start: int = 0) -> None:
        """Takes rows of all heads of whole tokens; `start` is the first row."""
        rows = pltpu.bitcast(rows, jnp.uint32) if self.words else rows.astype(jnp.float32)
        pieces, parts, _, lanes = self.scratch.shape
        start = start // (2 if self.words else 1) // parts
        count = rows.shape[0] // parts
        for piece in range(pieces):
            columns = rows[:, piece * lanes : (piece + 1) * lanes]
            by_part = columns.reshape(-1, parts, self.lines, lanes) if parts > 1 else columns
            for part in range(parts):
                mine = by_part[:, part].reshape(count, lanes) if parts > 1 else by_part
                self.scratch[piece, part, start : start + count] = mine

    def _strided(self, piece: int, part: Any, line: Any, count: int, stride: int) -> Any:
        where = ds(line, count, stride=stride) if stride > 1 else ds(line, count)
        return self.scratch.at[piece, part][where, :]

    def head(self, h: Any, tokens: int, start: Any = 0) -> Any:
        """Rows [n, W] of head h of `tokens` tokens from `start`, an even one."""
        pieces = range(self.scratch.shape[0])
        if self.words and self.heads % 2:
            rows = [self._of_odd_heads(piece, h, tokens, start) for piece in pieces]
            return pltpu.bitcast(jnp.concatenate(rows, axis=1), jnp.bfloat16)
        line = h // 2 if self.words else h
        part, line = line // self.lines, start * self.lines + line % self.lines
        rows = [self._strided(piece, part, line, tokens, self.lines) for piece in pieces]
        if self.words:
            down, up = jnp.uint32(16 * (h % 2)), jnp.uint32(16)
            rows = [pltpu.bitcast((words >> down) << up, jnp.float32) for words in rows]
        return jnp.concatenate(rows, axis=1).astype(self.dtype)

    def _of_odd_heads(self, piece: int, h: Any, tokens: int, start: Any) -> Any:
        """Words with the rows of two tokens, each from its own half of a line."""
        if self.heads == 1:
            return self._strided(piece, 0, start // 2, tokens // 2, 1)
        even = start * self.heads + h
        odd = even + self.heads
        low = self._strided(piece, 0, even // 2, tokens // 2, self.heads) >> jnp.uint32(16 * (even % 2))
        high = self._strided(piece, 0, odd // 2, tokens // 2, self.heads) >> jnp.uint32(16 * (odd % 2))
        return (low & jnp.uint32(0xFFFF)) | (high << jnp.uint32(16))

    def put_two(self, h: int, first: Any, second: Any, start: int = 0) -> None:
        """Takes rows [n, W], float32, of heads h and h + 1 of tokens from `start`, for `all`; h is even.

        Stores have no stride: eight tokens of eight lines lie line by line until `all` loads them across.
        """
        pieces, _, _, lanes = self.scratch.shape
        for piece in range(pieces):
            a, b = (x[:, piece * lanes : (piece + 1) * lanes] for x in (first, second))
            if self.words:
                a, b = (pltpu.bitcast(x.astype(jnp.bfloat16).astype(jnp.float32), jnp.uint32) for x in (a, b))
                found = {h // 2: (a >> jnp.uint32(16)) | (b & jnp.uint32(0xFFFF0000))}
            else:
                found = {h: a, h + 1: b}
            for line, rows in found.items():
                part, line = divmod(line, _SUBLANES)
                for token in range(0, rows.shape[0], _SUBLANES):
                    row = (start + token + line) * _SUBLANES
                    self.scratch[piece, part, row : row + _SUBLANES] = rows[token : token + _SUBLANES]

    def all(self, tokens: int, start: int = 0) -> Any:
        """Rows [r, W] of all heads of `tokens` tokens from `start` that `put_two` took; whole parts of eight lines."""
        pieces, parts, _, _ = self.scratch.shape
        found = []
        for token in range(start, start + tokens):
            row = token // _SUBLANES * _SUBLANES**2 + token % _SUBLANES
            for part in range(parts):
                across = [self._strided(piece, part, row, _SUBLANES, _SUBLANES) for piece in range(pieces)]
                found.append(jnp.concatenate(across, axis=1))
        rows = jnp.concatenate(found, axis=0)
        return pltpu.bitcast(rows, jnp.bfloat16) if self.words else rows.astype(self.dtype)

"""Text as it leaves the engine: decoded token by token, cut at stop strings that may straddle tokens.

Guarantees that no character of a stop string is ever emitted, that everything else is emitted as soon as it cannot
become part of one, and that the concatenation of what was emitted is the final text.
"""

from meshloom.models.tokenizer import IncrementalDecoder, Tokenizer


class OutputText:
    """The text of one request."""

    def __init__(self, tokenizer: Tokenizer | None, stop: tuple[str, ...]):
        self.text = ""
        self.stopped = False
        self._decoder = IncrementalDecoder(tokenizer) if tokenizer is not None else None
        self._stop = stop
        self._held = ""

    def push(self, token: int) -> str:
        """Text that has become certain with this token; `stopped` turns true when a stop string appeared."""
        return self._advance(self._decoder.push(token)) if self._decoder is not None else ""

    def finish(self) -> str:
        """The rest: an unfinished character, and what was held back in case it became a stop string."""
        if self.stopped or self._decoder is None:
            return ""
        text = self._advance(self._decoder.flush())
        return text if self.stopped else text + self._emit(len(self._held))

    def _advance(self, text: str) -> str:
        self._held += text
        # The stop string that is complete first counts, as if the text came character by character.
        found = [
            (self._held.find(stop) + len(stop), self._held.find(stop)) for stop in self._stop if stop in self._held
        ]
        if found:
            self.stopped = True
            return self._emit(min(found)[1])
        return self._emit(len(self._held) - self._undecided())

    def _undecided(self) -> int:
        """Length of the longest tail that begins a stop string."""
        longest = max((len(stop) for stop in self._stop), default=1) - 1
        for length in range(min(longest, len(self._held)), 0, -1):
            tail = self._held[-length:]
            if any(stop.startswith(tail) for stop in self._stop):
                return length
        return 0

    def _emit(self, length: int) -> str:
        certain, self._held = self._held[:length], self._held[length:]
        self.text += certain
        return certain

"""Which tokens run in the next step, and in which pages: integers in, integers out.

Guarantees, for any order of arrivals and aborts: a step never exceeds its token budget; no page is shared or leaked;
requests are admitted first come, first served; every admitted request finishes, because only the youngest running
sequence is ever preempted, so the oldest always advances, and a sequence that could not run alone is refused on
arrival. The order within a step is that of Sarathi-Serve (Agrawal et al. 2024): decodes, then prompts in progress,
then waiting prompts, so the time between two tokens of a stream is bounded by the budget. Knows nothing of arrays,
text, models or time.
"""

import dataclasses
from array import array
from collections import deque
from collections.abc import Sequence as Tokens

from meshloom.core.errors import RequestError
from meshloom.serve.blocks import PageAllocator
from meshloom.serve.request import Draw

GREEDY = Draw(temperature=0.0, top_p=1.0, top_k=0, min_p=0.0, seed=0)


class Sequence:
    """One request's tokens on their way through the cache.

    `tokens` is the prompt and all that was generated; the first `computed` of them have keys and values in `pages`.
    Both are int32 buffers, which the runner copies without looking at the elements.
    """

    __slots__ = ("computed", "draw", "id", "max_length", "pages", "prompt_length", "tokens")

    def __init__(self, id: int, prompt: Tokens[int], max_tokens: int, draw: Draw = GREEDY):
        self.id = id
        self.tokens = array("i", prompt)
        self.prompt_length = len(prompt)
        self.max_length = len(prompt) + max_tokens
        self.draw = draw
        self.computed = 0
        self.pages = array("i")

    @property
    def pending(self) -> int:
        """Tokens known but not yet in the cache; 1 while decoding."""
        return len(self.tokens) - self.computed


@dataclasses.dataclass(frozen=True)
class Chunk:
    """`count` tokens of a sequence, from its first uncomputed one; `samples` if they end with its last known one."""

    sequence: Sequence
    count: int
    samples: bool


class Scheduler:
    """Token budget, waiting queue and running list over one `PageAllocator`."""

    def __init__(self, *, num_pages: int, page_size: int, max_num_seqs: int, max_tokens_per_step: int):
        self.pages = PageAllocator(num_pages)
        self.page_size = page_size
        self.max_num_seqs = max_num_seqs
        self.max_tokens_per_step = max_tokens_per_step
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []  # in order of admission: the last is the youngest
        self.preemptions = 0

    @property
    def has_work(self) -> bool:
        return bool(self.waiting or self.running)

    def _pages_for(self, tokens: int) -> int:
        return -(-tokens // self.page_size)

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence; RequestError if it could not finish even alone."""
        need = self._pages_for(sequence.max_length)
        if need > self.pages.num_pages:
            raise RequestError(
                f"{sequence.max_length} tokens (prompt {sequence.prompt_length} + output "
                f"{sequence.max_length - sequence.prompt_length}) need {need} KV pages of {self.page_size} tokens; "
                f"the cache has {self.pages.num_pages}"
            )
        self.waiting.append(sequence)

    def remove(self, sequence: Sequence) -> None:
        """Forget a sequence, finished or aborted, and take its pages back."""
        if sequence in self.running:
            self.running.remove(sequence)
            self._release(sequence)
        else:
            self.waiting.remove(sequence)

    def schedule(self) -> list[Chunk]:
        """The next step's chunks; empty only when there is no work. Total tokens <= max_tokens_per_step."""
        chunks: list[Chunk] = []
        budget = self._schedule_decodes(chunks)
        for sequence in self.running:
            if budget and sequence.pending > 1:
                budget -= self._append_chunk(chunks, sequence, budget)
        while budget and self._admit():
            budget -= self._append_chunk(chunks, self.running[-1], budget)
        return chunks

    def commit(self, chunks: list[Chunk]) -> None:
        """Record that the step ran: its tokens are in the cache."""
        for chunk in chunks:
            chunk.sequence.computed += chunk.count

    def _schedule_decodes(self, chunks: list[Chunk]) -> int:
        # The loop runs over a shrinking list: preemption pops from its tail, at or behind the sequence being served.
        budget = self.max_tokens_per_step
        index = 0
        while index < len(self.running) and budget:
            sequence = self.running[index]
            if sequence.pending == 1 and self._grow(sequence):
                chunks.append(Chunk(sequence, 1, True))
                budget -= 1
            index += 1
        return budget

    def _append_chunk(self, chunks: list[Chunk], sequence: Sequence, budget: int) -> int:
        count = min(sequence.pending, budget)
        chunks.append(Chunk(sequence, count, count == sequence.pending))
        return count

    def _grow(self, sequence: Sequence) -> bool:
        """Make room for one more token, preempting from the youngest on; False if `sequence` itself had to go."""
        if sequence.computed < len(sequence.pages) * self.page_size:
            return True
        while not self.pages.free:
            youngest = self.running[-1]
            self._preempt(youngest)
            if youngest is sequence:
                return False
        sequence.pages.extend(self.pages.allocate(1))
        return True

    def _preempt(self, sequence: Sequence) -> None:
        """Drop its cache; it is first in line again and will recompute prompt and output as one prompt."""
        self.running.remove(sequence)
        self._release(sequence)
        self.waiting.appendleft(sequence)
        self.preemptions += 1

    def _admit(self) -> bool:
        """Start the sequence that has waited longest, with pages for all its known tokens.

        One page per running sequence stays free, so that a newcomer is not preempted by the next decode.
        """
        if not self.waiting or len(self.running) >= self.max_num_seqs:
            return False
        sequence = self.waiting[0]
        need = self._pages_for(len(sequence.tokens))
        if need + len(self.running) > self.pages.free:
            return False
        self.waiting.popleft()
        sequence.pages.extend(self.pages.allocate(need))
        self.running.append(sequence)
        return True

    def _release(self, sequence: Sequence) -> None:
        self.pages.release(sequence.pages)
        sequence.pages = array("i")
        sequence.computed = 0

"""Properties of the scheduler over random arrivals, lengths, aborts and sizes; the "model" is a counter."""

import dataclasses

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from meshloom.core.errors import RequestError
from meshloom.serve.scheduler import Scheduler, Sequence


@dataclasses.dataclass(frozen=True)
class Arrival:
    step: int
    prompt: int
    output: int
    aborted_after: int | None


@st.composite
def workloads(draw):
    page_size = draw(st.integers(1, 5))
    num_pages = draw(st.integers(1, 24))
    max_num_seqs = draw(st.integers(1, 6))
    budget = draw(st.integers(max_num_seqs, 24))
    capacity = page_size * num_pages
    arrivals = []
    for _ in range(draw(st.integers(1, 12))):
        prompt = draw(st.integers(1, max(1, capacity - 1)))
        output = draw(st.integers(1, max(1, capacity - prompt)))
        aborted = draw(st.none() | st.integers(0, 10))
        if prompt + output <= capacity:
            arrivals.append(Arrival(draw(st.integers(0, 20)), prompt, output, aborted))
    scheduler = Scheduler(
        num_pages=num_pages, page_size=page_size, max_num_seqs=max_num_seqs, max_tokens_per_step=budget
    )
    return scheduler, arrivals


def held_pages(scheduler):
    return [page for sequence in scheduler.running for page in sequence.pages]


def check_step(scheduler, chunks):
    assert chunks or not scheduler.has_work
    assert sum(chunk.count for chunk in chunks) <= scheduler.max_tokens_per_step
    assert len(chunks) <= scheduler.max_num_seqs
    assert len({chunk.sequence.id for chunk in chunks}) == len(chunks)
    held = held_pages(scheduler)
    assert len(held) == len(set(held))
    assert len(held) + scheduler.pages.free == scheduler.pages.num_pages
    assert not any(sequence.pages or sequence.computed for sequence in scheduler.waiting)
    for chunk in chunks:
        sequence, end = chunk.sequence, chunk.sequence.computed + chunk.count
        assert chunk.count >= 1
        assert end <= len(sequence.tokens)
        assert chunk.samples == (end == len(sequence.tokens))
        assert end <= len(sequence.pages) * scheduler.page_size
    running = [sequence.id for sequence in scheduler.running]
    assert running == sorted(running), "admission is first come, first served"
    waiting = [sequence.id for sequence in scheduler.waiting]
    assert waiting == sorted(waiting)
    assert not running or not waiting or running[-1] < waiting[0]


def simulate(scheduler, arrivals, limit=20_000):
    """Run to the end; ids in order of completion."""
    pending = sorted(enumerate(arrivals), key=lambda pair: pair[1].step)
    # Ids follow arrival, as the engine numbers them.
    queue = [(i, arrival) for i, (_, arrival) in enumerate(pending)]
    live, finished = {}, []
    for step in range(limit):
        while queue and queue[0][1].step <= step:
            i, arrival = queue.pop(0)
            live[i] = Sequence(i, [7] * arrival.prompt, arrival.output), arrival
            scheduler.add(live[i][0])
        for i, (sequence, arrival) in list(live.items()):
            if arrival.aborted_after is not None and step >= arrival.step + arrival.aborted_after:
                scheduler.remove(sequence)
                del live[i]
        chunks = scheduler.schedule()
        check_step(scheduler, chunks)
        scheduler.commit(chunks)
        for chunk in chunks:
            if chunk.samples:
                chunk.sequence.tokens.append(step)
                if len(chunk.sequence.tokens) == chunk.sequence.max_length:
                    scheduler.remove(chunk.sequence)
                    del live[chunk.sequence.id]
                    finished.append(chunk.sequence.id)
        if not queue and not live:
            return finished
    raise AssertionError(f"not finished after {limit} steps: {len(live)} live")


@settings(max_examples=300, deadline=None)
@given(workloads())
def test_everybody_finishes_and_no_page_is_leaked_or_shared(workload):
    scheduler, arrivals = workload
    finished = simulate(scheduler, arrivals)
    assert scheduler.pages.free == scheduler.pages.num_pages
    assert not scheduler.has_work
    assert len(set(finished)) == len(finished)
    never_aborted = {i for i, a in enumerate(sorted(arrivals, key=lambda a: a.step)) if a.aborted_after is None}
    assert never_aborted <= set(finished)


def test_decodes_come_first_then_running_prompts_then_waiting_ones():
    scheduler = Scheduler(num_pages=64, page_size=4, max_num_seqs=4, max_tokens_per_step=8)
    first, second, third = Sequence(0, [1] * 4, 8), Sequence(1, [1] * 12, 8), Sequence(2, [1] * 12, 8)
    scheduler.add(first)
    scheduler.add(second)
    chunks = scheduler.schedule()
    assert [(chunk.sequence.id, chunk.count, chunk.samples) for chunk in chunks] == [(0, 4, True), (1, 4, False)]
    scheduler.commit(chunks)
    first.tokens.append(1)
    scheduler.add(third)
    chunks = scheduler.schedule()
    assert [(chunk.sequence.id, chunk.count) for chunk in chunks] == [(0, 1), (1, 7)]
    scheduler.commit(chunks)
    first.tokens.append(1)
    chunks = scheduler.schedule()
    assert [(chunk.sequence.id, chunk.count, chunk.samples) for chunk in chunks] == [
        (0, 1, True),
        (1, 1, True),
        (2, 6, False),
    ]


def test_out_of_pages_the_youngest_gives_way_and_is_first_in_line_again():
    scheduler = Scheduler(num_pages=6, page_size=2, max_num_seqs=4, max_tokens_per_step=16)
    old, young, late = Sequence(0, [1] * 4, 8), Sequence(1, [1] * 4, 8), Sequence(2, [1] * 4, 8)
    for sequence in (old, young, late):
        scheduler.add(sequence)
    while not scheduler.preemptions:
        chunks = scheduler.schedule()
        scheduler.commit(chunks)
        for chunk in chunks:
            chunk.sequence.tokens.append(1)
    assert scheduler.running == [old]
    assert list(scheduler.waiting) == [young, late]
    assert young.computed == 0
    assert len(young.tokens) > 4, "what it generated is kept and recomputed"


def test_a_request_that_can_never_fit_is_refused_with_its_numbers():
    scheduler = Scheduler(num_pages=4, page_size=4, max_num_seqs=2, max_tokens_per_step=8)
    with pytest.raises(
        RequestError, match=r"17 tokens \(prompt 10 \+ output 7\) need 5 KV pages of 4 tokens; the cache has 4"
    ):
        scheduler.add(Sequence(0, [1] * 10, 7))

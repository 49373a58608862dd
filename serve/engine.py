"""Continuous batching over one model: requests in from any thread, deltas out as tokens are made.

Guarantees that every submitted request ends with exactly one delta that carries a `finish_reason`, whatever happens: a
step that raises fails the requests in it with the reason, an abort returns the pages before the next step, and the
worker cannot die without telling. The worker thread lives while there is work, so an idle engine costs nothing and can
be garbage-collected.
"""

import asyncio
import itertools
import logging
import queue
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Generator, Iterable, Sequence

import jax
import jax.numpy as jnp
from flax import nnx

from meshloom.core.compile import compile_count
from meshloom.core.errors import MeshloomError, ModelError, RequestError
from meshloom.models.config import DecoderConfig
from meshloom.models.language_model import LanguageModel
from meshloom.serve import scheduler
from meshloom.serve.config import EngineConfig
from meshloom.serve.metrics import EngineMetrics
from meshloom.serve.output import OutputText
from meshloom.serve.progress import progress_bar
from meshloom.serve.request import Completion, Delta, Draw, FinishReason, Request, SamplingParams, Usage
from meshloom.serve.runner import Runner
from meshloom.serve.sizing import size_cache, step_shapes
from meshloom.sharding.derive import derive_served

logger = logging.getLogger("meshloom.serve")

Prompt = str | Sequence[int]

GREEDY = SamplingParams()
Emit = Callable[[Delta], None]


class _Live:
    """A request between arrival and its last delta. Times are seconds of `time.perf_counter`, 0 until they happen."""

    def __init__(self, id: int, request: Request, emit: Emit, output: OutputText, stop_ids: frozenset[int]):
        self.id, self.request, self.emit, self.output, self.stop_ids = id, request, emit, output, stop_ids
        self.sequence = scheduler.Sequence(id, request.prompt, request.max_tokens, Draw.of(request.params))
        self.arrived = time.perf_counter()
        self.admitted = self.first_token = self.last_token = 0.0

    @property
    def generated(self) -> int:
        return len(self.sequence.tokens) - self.sequence.prompt_length


class Engine:
    """Serves one language model; all its step programs are compiled when the constructor returns.

    Args:
        lm: the model; its weights are used where they lie, without a copy.
        config: sizes.
        name: label of its metrics.
        quiet: no progress bars.

    Raises:
        ModelError: an encoder-decoder model, which has no paged step.
        ConfigError: sizes that do not go together.
    """

    def __init__(
        self, lm: LanguageModel, config: EngineConfig | None = None, *, name: str = "meshloom", quiet: bool = False
    ):
        if not isinstance(lm.config, DecoderConfig):
            raise ModelError(
                f"the engine serves decoder-only models; this one ({lm.config.family}) is an encoder-decoder: "
                "use lm.logits(tokens, decoder_tokens)"
            )
        self.lm = lm
        self.config = config = config or EngineConfig()
        self.metrics = EngineMetrics(name)
        self._quiet = quiet
        started = time.perf_counter()
        dtype = jnp.dtype(lm.module.embed.weight.dtype if config.cache_dtype == "model" else config.cache_dtype)
        weights = jax.tree.leaves(nnx.state(lm.module, nnx.Param))
        device = next(iter(weights[0].devices())) if lm.mesh is None else lm.mesh.devices.flat[0]
        self.cache = size_cache(lm.config, config, dtype, device.platform)
        shapes = step_shapes(config, self.cache.pages_per_sequence)
        self._runner = Runner(
            lm.module,
            shapes,
            num_pages=self.cache.num_pages,
            page_size=config.page_size,
            cache_dtype=dtype,
            cache_lanes=self.cache.lanes,
            mesh=lm.mesh,
            kv_heads_axis=None if lm.mesh is None else derive_served(lm.module, lm.mesh).kv_heads_spec,
        )
        with progress_bar("compiling", len(shapes), quiet=quiet) as advance:
            self._runner.compile(advance)
        self.start_up_seconds = time.perf_counter() - started
        self._scheduler = self._new_scheduler()
        self._live: dict[int, _Live] = {}
        self._ids = itertools.count()
        self._lock = threading.Lock()
        self._inbox: deque[Callable[[], None]] = deque()  # what other threads ask of the worker, done between steps
        self._worker: threading.Thread | None = None
        self._closed: str | None = None  # why no more requests are taken

    def _new_scheduler(self) -> scheduler.Scheduler:
        return scheduler.Scheduler(
            num_pages=self.cache.num_pages,
            page_size=self.config.page_size,
            max_num_seqs=self.config.max_num_seqs,
            max_tokens_per_step=self.config.max_tokens_per_step,
        )

    # For callers, from any thread.

    def prepare(self, prompt: Prompt, params: SamplingParams, *, add_special: bool = True) -> Request:
        """Encode and check a prompt.

        Args:
            add_special: add the tokenizer's begin token to a text; not to a rendered chat, which holds its own.

        Raises:
            RequestError: empty, too long, ids outside the vocabulary, or text for a model without tokenizer.
        """
        tokenizer = self.lm.tokenizer
        if tokenizer is None and (isinstance(prompt, str) or params.stop):
            raise RequestError("this model has no tokenizer: give prompts as token ids, and no stop strings")
        tokens = tokenizer.encode(prompt, add_special) if isinstance(prompt, str) else list(prompt)
        vocab, longest = self.lm.config.vocab_size, self.cache.max_model_len
        if not tokens:
            raise RequestError("the prompt is empty: at least one token is needed")
        if min(tokens) < 0 or max(tokens) >= vocab:
            raise RequestError(f"prompt token ids must lie in 0..{vocab - 1}; got {min(tokens)}..{max(tokens)}")
        wanted = params.max_tokens or max(longest - len(tokens), 1)
        if len(tokens) + wanted > longest:
            raise RequestError(
                f"this model's maximum context length is {longest} tokens; the request has {len(tokens) + wanted} "
                f"({len(tokens)} in the prompt, {wanted} to generate): shorten the prompt or lower max_tokens"
            )
        return Request(tokens, params, wanted)

    def submit(self, request: Request, emit: Emit) -> int:
        """Queue a request; `emit` is called in the worker thread for every delta and must not block. Returns its id.

        Raises:
            MeshloomError: the engine is closed.
        """
        tokenizer, params = self.lm.tokenizer, request.params
        eos = frozenset() if tokenizer is None or params.ignore_eos else tokenizer.eos_ids
        stop_ids = eos.union(params.stop_token_ids)
        live = _Live(next(self._ids), request, emit, OutputText(tokenizer, params.stop), stop_ids)
        self._ask(lambda: self._accept(live), new=True)
        return live.id

    def abort(self, id: int) -> None:
        """End a request; its last delta says "abort". No effect on one that has finished."""
        self._ask(lambda: self._abort(id))

    async def stream(self, *requests: Request) -> AsyncIterator[tuple[int, Delta]]:
        """Deltas of requests as they come, each with its request's index; leaving early, or being cancelled, aborts.

        Raises:
            MeshloomError: the engine failed while serving them, or is closed.
        """
        loop = asyncio.get_running_loop()
        deltas: asyncio.Queue[tuple[int, Delta]] = asyncio.Queue()

        def listener(index: int) -> Emit:
            def emit(delta: Delta) -> None:
                loop.call_soon_threadsafe(deltas.put_nowait, (index, delta))

            return emit

        unfinished = {index: self.submit(request, listener(index)) for index, request in enumerate(requests)}
        try:
            while unfinished:
                index, delta = await deltas.get()
                if delta.finish_reason is not None:
                    del unfinished[index]
                if delta.error is not None:
                    raise MeshloomError(delta.error)
                yield index, delta
        finally:
            for id in unfinished.values():
                self.abort(id)

    def iterate(self, *requests: Request) -> Generator[tuple[int, Delta], None, None]:
        """As `stream`, for callers without an event loop."""
        deltas: queue.SimpleQueue[tuple[int, Delta]] = queue.SimpleQueue()

        def listener(index: int) -> Emit:
            return lambda delta: deltas.put((index, delta))

        unfinished = {index: self.submit(request, listener(index)) for index, request in enumerate(requests)}
        try:
            while unfinished:
                index, delta = deltas.get()
                if delta.finish_reason is not None:
                    del unfinished[index]
                if delta.error is not None:
                    raise MeshloomError(delta.error)
                yield index, delta
        finally:
            for id in unfinished.values():
                self.abort(id)

    def generate(
        self, prompts: Iterable[Prompt], params: SamplingParams | Sequence[SamplingParams] = GREEDY
    ) -> list[Completion]:
        """Complete prompts (texts or token ids), in their order.

        Raises:
            RequestError: a prompt is refused; none is run.
            MeshloomError: the engine failed.
        """
        prompts = list(prompts)
        each = [params] * len(prompts) if isinstance(params, SamplingParams) else list(params)
        if len(each) != len(prompts):
            raise RequestError(f"{len(prompts)} prompts but {len(each)} SamplingParams; give one, or one for each")
        requests = [self.prepare(prompt, chosen) for prompt, chosen in zip(prompts, each, strict=True)]
        texts, reasons = [""] * len(requests), ["abort"] * len(requests)
        tokens: list[list[int]] = [[] for _ in requests]
        with progress_bar("generating", len(requests), quiet=self._quiet) as advance:
            for i, delta in self.iterate(*requests):
                texts[i] += delta.text
                tokens[i] += delta.token_ids
                if delta.finish_reason is not None:
                    reasons[i] = delta.finish_reason
                    advance("")
        usages = [Usage(len(request.prompt), len(made)) for request, made in zip(requests, tokens, strict=True)]
        return [Completion(*fields) for fields in zip(texts, tokens, reasons, usages, strict=True)]

    @property
    def free_pages(self) -> int:
        """Pages of the cache that no request holds."""
        return self._scheduler.pages.free

    @property
    def closed(self) -> str | None:
        """Why no more requests are taken; None while they are."""
        return self._closed

    def close(self, *, drain_seconds: float | int = 0) -> None:
        """Refuse new requests, wait up to `drain_seconds` for those running, abort the rest."""
        with self._lock:
            self._closed = self._closed or "the engine is closed"
            worker = self._worker
        if worker is not None:
            worker.join(drain_seconds)
            if worker.is_alive():
                self._ask(self._abort_all)  # behind every request that was submitted before
            worker.join()

    def __enter__(self) -> "Engine":
        return self

    def __exit__(self, *error) -> None:
        self.close()

    # The worker thread.

    def _ask(self, command: Callable[[], None], *, new: bool = False) -> None:
        with self._lock:
            if new and self._closed:
                raise MeshloomError(self._closed)
            self._inbox.append(command)
            if self._worker is None:
                self._worker = threading.Thread(target=self._work, name="meshloom-engine")
                self._worker.start()

    def _work(self) -> None:
        main = threading.main_thread()
        while True:
            with self._lock:
                commands = list(self._inbox)
                self._inbox.clear()
                if not commands and not self._live:
                    self._worker = None
                    return
            try:
                for command in commands:
                    command()
                if not main.is_alive():  # the interpreter is shutting down and waits for this thread
                    self._abort_all()
                if self._live:
                    self._step()
            except Exception as error:
                self._fail(error)
            self._show_occupancy()

    def _accept(self, live: _Live) -> None:
        try:
            self._scheduler.add(live.sequence)
        except RequestError as error:
            self._emit(live, Delta("", (), "error", str(error)))
        else:
            self._live[live.id] = live

    def _abort(self, id: int) -> None:
        if id in self._live:
            self._finish(self._live[id], "abort")

    def _abort_all(self) -> None:
        for live in list(self._live.values()):
            self._finish(live, "abort")

    def _step(self) -> None:
        preemptions = self._scheduler.preemptions
        chunks = self._scheduler.schedule()
        self.metrics.preemptions.inc(self._scheduler.preemptions - preemptions)
        now = time.perf_counter()
        for chunk in chunks:
            live = self._live[chunk.sequence.id]
            if not live.admitted:
                live.admitted = now
                self.metrics.queue_time.observe(now - live.arrived)
        compiles = compile_count()
        tokens = self._runner.step(chunks)
        self.metrics.compiles_after_ready.inc(compile_count() - compiles)
        self._scheduler.commit(chunks)
        now = time.perf_counter()
        for chunk, token in zip(chunks, tokens, strict=True):
            if chunk.samples:
                self._append(self._live[chunk.sequence.id], token, now)

    def _append(self, live: _Live, token: int, now: float) -> None:
        live.sequence.tokens.append(token)
        self.metrics.generation_tokens.inc()
        if live.first_token:
            self.metrics.inter_token_latency.observe(now - live.last_token)
        else:
            live.first_token = now
            self.metrics.prompt_tokens.inc(live.sequence.prompt_length)
            self.metrics.time_to_first_token.observe(now - live.arrived)
            self.metrics.prefill_time.observe(now - live.admitted)
        live.last_token = now
        if token in live.stop_ids:
            self._finish(live, "stop", (token,))
            return
        text = live.output.push(token)
        if live.output.stopped:
            self._finish(live, "stop", (token,), text)
        elif live.generated >= live.request.max_tokens:
            self._finish(live, "length", (token,), text)
        else:
            self._emit(live, Delta(text, (token,)))

    def _finish(self, live: _Live, reason: FinishReason, tokens: tuple[int, ...] = (), text: str = "") -> None:
        """Take the request out, and its pages back, and send its last delta."""
        del self._live[live.id]
        self._scheduler.remove(live.sequence)
        self.metrics.finished(reason)
        if live.first_token:
            self.metrics.decode_time.observe(live.last_token - live.first_token)
            self.metrics.e2e_latency.observe(live.last_token - live.arrived)
        self._emit(live, Delta(text + live.output.finish(), tokens, reason))

    def _emit(self, live: _Live, delta: Delta) -> None:
        try:
            live.emit(delta)
        except Exception:  # the listener is gone (its event loop closed): nobody is left to tell
            logger.warning("request %d is aborted: its listener failed", live.id, exc_info=True)
            live.emit = _ignore
            self._abort(live.id)

    def _fail(self, error: Exception) -> None:
        """A step raised: its requests end with the reason, and the engine starts over with an empty cache."""
        logger.error("a step failed; %d requests end with it", len(self._live), exc_info=error)
        self.metrics.step_failures.inc()
        failed, self._live = list(self._live.values()), {}
        self._scheduler = self._new_scheduler()
        try:
            self._runner.reset()
        except Exception as again:
            self._closed = f"the engine stopped: {type(again).__name__}: {again}"
            logger.critical(self._closed)
        for live in failed:
            self.metrics.finished("error")
            message = f"the engine failed while serving this request: {type(error).__name__}: {error}"
            self._emit(live, Delta(live.output.finish(), (), "error", message))

    def _show_occupancy(self) -> None:
        plan = self._scheduler
        self.metrics.running.set(len(plan.running))
        self.metrics.waiting.set(len(plan.waiting))
        self.metrics.cache_usage.set(1 - plan.pages.free / plan.pages.num_pages)


def _ignore(delta: Delta) -> None:
    pass

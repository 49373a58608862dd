"""The engine over a tiny model: the same tokens however they are batched, and no request without an end."""

import asyncio
import contextlib
import dataclasses
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import Mesh

from meshloom import pallas_kernels as kernels
from meshloom.core.compile import CompileGuard
from meshloom.core.errors import ConfigError, MeshloomError, ModelError, RequestError
from meshloom.models import sequence
from meshloom.models.config import EncoderDecoderConfig
from meshloom.models.decoder import Decoder
from meshloom.models.language_model import LanguageModel
from meshloom.pallas_kernels.dispatch import Target
from meshloom.serve.config import EngineConfig
from meshloom.serve.engine import Engine
from meshloom.serve.request import SamplingParams
from meshloom.sharding import derive

from .conftest import SMALL


def random_prompts(count, seed, longest=30):
    random = np.random.default_rng(seed)
    return [random.integers(1, 320, random.integers(1, longest + 1)).tolist() for _ in range(count)]


GREEDY = SamplingParams(max_tokens=24, ignore_eos=True)


@pytest.fixture(scope="module")
def prompts():
    return random_prompts(9, seed=0)


@pytest.fixture(scope="module")
def expected(lm, prompts):
    """Greedy continuations by full forward passes, without cache, bucket or batch."""
    forward = jax.jit(lambda tokens: lm.module(tokens)[0])

    def continue_one(tokens):
        tokens = list(tokens)
        for _ in range(GREEDY.max_tokens):
            padded = jnp.zeros((1, 64), jnp.int32).at[0, : len(tokens)].set(jnp.array(tokens))
            tokens.append(int(forward(padded)[0, len(tokens) - 1].argmax()))
        return tokens[-GREEDY.max_tokens :]

    return [continue_one(prompt) for prompt in prompts]


def test_the_oracle_is_not_trivial(expected):
    assert len({tuple(tokens) for tokens in expected}) == len(expected)
    assert all(len(set(tokens)) > 4 for tokens in expected)


@pytest.mark.parametrize(
    "config",
    [
        EngineConfig(buckets=(1, 8, 32), max_num_seqs=4, page_size=4),
        EngineConfig(buckets=(5,), max_num_seqs=5, page_size=3),  # every prompt in chunks, every step padded
        EngineConfig(buckets=(64, 256), max_num_seqs=9, page_size=16),  # everything at once
        EngineConfig(buckets=(1, 16), max_num_seqs=6, page_size=2, num_pages=30),  # too few pages: preemption
    ],
    ids=["usual", "tiny chunks", "one batch", "preemption"],
)
def test_tokens_do_not_depend_on_batch_chunking_or_bucket(lm, prompts, expected, config):
    with Engine(lm, config) as engine:
        assert [c.token_ids for c in engine.generate(prompts, GREEDY)] == expected
        backwards = engine.generate(prompts[::-1], GREEDY)
        assert [c.token_ids for c in backwards] == expected[::-1]
        assert [engine.generate([p], GREEDY)[0].token_ids for p in prompts[:2]] == expected[:2]
        assert engine.free_pages == engine.cache.num_pages
        preempted = engine.metrics.registry.get_sample_value(
            "meshloom:num_preemptions_total", {"model_name": "meshloom"}
        )
        assert (preempted > 0) == (config.num_pages == 30)


def test_tokens_do_not_depend_on_arrival_order(lm, engine, prompts, expected):
    async def one(index, delay):
        await asyncio.sleep(delay)
        tokens = []
        async for _, delta in engine.stream(engine.prepare(prompts[index], GREEDY)):
            tokens += delta.token_ids
        return tokens

    async def everybody():
        delays = np.random.default_rng(1).uniform(0, 0.1, len(prompts))
        return await asyncio.gather(*(one(i, delay) for i, delay in enumerate(delays)))

    assert asyncio.run(everybody()) == expected


def test_nothing_compiles_after_ready(engine, prompts):
    greedy, random = GREEDY, SamplingParams(max_tokens=7, temperature=0.9, top_p=0.8, top_k=9, min_p=0.01, stop="zz")
    with CompileGuard():
        engine.generate(prompts[:1], greedy)
        engine.generate(prompts, [greedy, random] * 4 + [random])
        engine.generate([[9] * length for length in range(1, 33)], SamplingParams(max_tokens=1))


def test_seeded_sampling_repeats_in_any_company(engine, prompts):
    params = SamplingParams(max_tokens=12, temperature=1.0, top_p=0.9, seed=7, ignore_eos=True)
    alone = engine.generate(prompts[:1], params)[0].token_ids
    others = SamplingParams(max_tokens=12, temperature=1.3, ignore_eos=True)
    together = engine.generate(prompts[:4][::-1], [others, others, others, params])[3].token_ids
    assert alone == together
    assert engine.generate(prompts[:1], SamplingParams(max_tokens=12, temperature=1.0, seed=8))[0].token_ids != alone


@pytest.mark.parametrize("scan", [False, True], ids=["unrolled", "scanned"])
def test_tokens_are_equal_on_a_tensor_parallel_mesh(lm, prompts, expected, scan):
    mesh = Mesh(np.array(jax.devices()[:2]), ("tensor",))
    config = dataclasses.replace(lm.config, scan_layers=scan)
    module = Decoder(config, rngs=nnx.Rngs(0))
    one_device = LanguageModel(module, config, lm.tokenizer)
    layout = derive(module, mesh)
    assert layout.kv_heads_spec == "tensor"
    sharded = nnx.clone(module)
    nnx.update(sharded, jax.device_put(nnx.state(sharded, nnx.Param), layout.shardings))
    with Engine(one_device, SMALL) as engine:
        reference = [c.token_ids for c in engine.generate(prompts, GREEDY)]
    with Engine(LanguageModel(sharded, config, lm.tokenizer, mesh=mesh), SMALL) as engine:
        assert [c.token_ids for c in engine.generate(prompts, GREEDY)] == reference


def test_stop_strings_end_the_text_and_are_not_part_of_it(engine, prompts):
    whole = engine.generate(prompts[:1], GREEDY)[0].text
    stop = whole[5:8]
    completion = engine.generate(prompts[:1], SamplingParams(max_tokens=24, ignore_eos=True, stop=stop))[0]
    assert completion.text == whole[: whole.index(stop)]
    assert completion.finish_reason == "stop"


def test_stop_tokens_end_the_text_and_count(engine, prompts, expected):
    params = SamplingParams(max_tokens=24, ignore_eos=True, stop_token_ids=(expected[0][6],))
    completion = engine.generate(prompts[:1], params)[0]
    assert completion.token_ids == expected[0][: expected[0].index(expected[0][6]) + 1]
    assert completion.finish_reason == "stop"
    assert completion.usage.completion_tokens == len(completion.token_ids)


def test_the_text_is_the_decoded_tokens(engine, prompts, tokenizer):
    for completion in engine.generate(prompts, GREEDY):
        assert completion.text == tokenizer.decode(completion.token_ids)
        assert completion.finish_reason == "length"
        assert completion.usage.total_tokens == completion.usage.prompt_tokens + 24


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ([1] * 60, r"maximum context length is 64 tokens; the request has 84 \(60 in the prompt, 24 to generate\)"),
        ([], "prompt is empty"),
        ([1, 320], r"must lie in 0..319; got 1..320"),
    ],
)
def test_prompts_that_cannot_run_are_refused(engine, prompt, message):
    with pytest.raises(RequestError, match=message):
        engine.generate([prompt], GREEDY)


def test_without_a_limit_a_request_fills_the_context(engine):
    completion = engine.generate([[5] * 10], SamplingParams(max_tokens=None, ignore_eos=True))[0]
    assert completion.usage.total_tokens == 64


def test_a_model_without_tokenizer_takes_token_ids_only(lm, prompts, expected):
    with Engine(LanguageModel(lm.module, lm.config, None), SMALL) as engine:
        completion = engine.generate(prompts[:1], GREEDY)[0]
        assert completion.token_ids == expected[0]
        assert completion.text == ""
        with pytest.raises(RequestError, match="no tokenizer"):
            engine.generate(["text"], GREEDY)


def test_an_encoder_decoder_is_refused(lm):
    with pytest.raises(ModelError, match="encoder-decoder"):
        Engine(LanguageModel(lm.module, EncoderDecoderConfig(), None))


def test_sizes_that_do_not_fit_are_refused_with_numbers(lm):
    with pytest.raises(ConfigError, match="max_model_len=100 exceeds the model's context of 64"):
        Engine(lm, EngineConfig(max_model_len=100))
    with pytest.raises(ConfigError, match=r"max_model_len=64 tokens do not fit a cache of 2 pages x 16 tokens = 32"):
        Engine(lm, EngineConfig(max_model_len=64, num_pages=2))
    with pytest.raises(ConfigError, match="must hold one token of each of max_num_seqs=32"):
        EngineConfig(buckets=(1, 16))


def wait_until(condition, seconds=20):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.01)


def test_leaving_a_stream_early_returns_its_pages(engine, prompts):
    async def leave():
        async with contextlib.aclosing(engine.stream(engine.prepare(prompts[0], GREEDY))) as stream:
            async for _ in stream:
                assert engine.free_pages < engine.cache.num_pages
                break

    asyncio.run(leave())
    wait_until(lambda: engine.free_pages == engine.cache.num_pages)


def test_a_request_still_waiting_can_be_aborted(engine, prompts):
    deltas = {}
    ids = [
        engine.submit(engine.prepare(p, GREEDY), lambda delta, i=i: deltas.setdefault(i, []).append(delta))
        for i, p in enumerate(prompts)
    ]
    engine.abort(ids[-1])
    wait_until(lambda: len(deltas) == len(ids) and all(d[-1].finish_reason for d in deltas.values()))
    assert deltas[len(ids) - 1][-1].finish_reason == "abort"
    assert all(d[-1].finish_reason == "length" for i, d in deltas.items() if i < len(ids) - 1)
    assert all(sum(delta.finish_reason is not None for delta in d) == 1 for d in deltas.values())


def test_a_failing_step_fails_its_requests_and_the_next_ones_run(lm, prompts, expected, monkeypatch, caplog):
    with Engine(lm, SMALL) as engine:
        step, calls = engine._runner.step, []

        def explode(chunks):
            calls.append(chunks)
            if len(calls) == 3:
                raise FloatingPointError("the device caught fire")
            return step(chunks)

        monkeypatch.setattr(engine._runner, "step", explode)
        with pytest.raises(MeshloomError, match="FloatingPointError: the device caught fire"):
            engine.generate(prompts, GREEDY)
        assert [c.token_ids for c in engine.generate(prompts, GREEDY)] == expected
        assert engine.free_pages == engine.cache.num_pages


def test_an_engine_that_cannot_start_over_says_so(lm, prompts, monkeypatch, caplog):
    with Engine(lm, SMALL) as engine:

        def explode(*_):
            raise RuntimeError("no memory")

        monkeypatch.setattr(engine._runner, "step", explode)
        monkeypatch.setattr(engine._runner, "reset", explode)
        with pytest.raises(MeshloomError, match="no memory"):
            engine.generate(prompts, GREEDY)
        with pytest.raises(MeshloomError, match="the engine stopped: RuntimeError: no memory"):
            engine.generate(prompts, GREEDY)


def test_a_listener_that_fails_takes_only_its_own_request(engine, prompts, expected, caplog):
    def broken(delta):
        raise RuntimeError("event loop is closed")

    engine.submit(engine.prepare(prompts[1], GREEDY), broken)
    assert engine.generate(prompts[:1], GREEDY)[0].token_ids == expected[0]
    wait_until(lambda: engine.free_pages == engine.cache.num_pages)


def test_an_idle_engine_has_no_thread(engine, prompts):
    engine.generate(prompts[:2], GREEDY)
    wait_until(lambda: not any(thread.name == "meshloom-engine" for thread in threading.enumerate()))


def slow_down(engine, monkeypatch):
    step = engine._runner.step

    def slow(chunks):
        time.sleep(0.05)
        return step(chunks)

    monkeypatch.setattr(engine._runner, "step", slow)


def test_a_closed_engine_ends_what_runs_and_refuses_the_rest(lm, prompts, monkeypatch):
    engine = Engine(lm, SMALL)
    slow_down(engine, monkeypatch)
    deltas = []
    engine.submit(engine.prepare(prompts[0], GREEDY), deltas.append)
    engine.close()
    assert deltas[-1].finish_reason == "abort"
    with pytest.raises(MeshloomError, match="closed"):
        engine.generate(prompts[:1], GREEDY)


def test_close_can_wait_for_what_runs(lm, prompts, expected):
    engine = Engine(lm, SMALL)
    deltas = []
    engine.submit(engine.prepare(prompts[0], GREEDY), deltas.append)
    engine.close(drain_seconds=30)
    assert [token for delta in deltas for token in delta.token_ids] == expected[0]


def test_kernels_of_an_engine_without_a_mesh_see_its_device(lm, monkeypatch):
    seen = []

    def paged_attention(*arguments, **options):
        seen.append(Target.of_mesh().platform)
        return kernels.paged_attention(*arguments, **options)

    monkeypatch.setattr(sequence, "paged_attention", paged_attention)
    assert lm.mesh is None
    with Engine(lm, dataclasses.replace(SMALL, page_size=8)):  # a shape of its own, which no other test has traced
        assert set(seen) == {"cpu"}

"""How fast the engine serves: random prompts of one length, greedy, a fixed number of tokens each, all at once.

Times are those of the engine in this process (offline): no HTTP, no text to encode. Compilation and a warm-up are not
measured.
"""

import time
from typing import Any

import jax.numpy as jnp
import numpy as np

from meshloom.models.language_model import LanguageModel
from meshloom.serve.config import BenchServeConfig
from meshloom.serve.engine import Engine
from meshloom.serve.progress import progress_bar
from meshloom.serve.request import SamplingParams


def bench_serve(config: BenchServeConfig, lm: LanguageModel) -> dict[str, Any]:
    """Run the benchmark on a loaded model; figures by name, times in seconds."""
    random = np.random.default_rng(config.seed)
    vocab = lm.config.vocab_size
    prompts = random.integers(0, vocab, (config.requests, config.input_len)).tolist()
    params = SamplingParams(max_tokens=config.output_len, ignore_eos=True)
    with Engine(lm, config.engine) as engine:
        requests = [engine.prepare(prompt, params) for prompt in prompts]
        engine.generate(prompts[:1], SamplingParams(max_tokens=min(8, config.output_len), ignore_eos=True))
        times: list[list[float]] = [[] for _ in requests]
        with progress_bar("tokens", config.requests * config.output_len) as advance:
            start = time.perf_counter()
            for index, _ in engine.iterate(*requests):
                times[index].append(time.perf_counter() - start)
                advance("")
        start_up = engine.start_up_seconds
    elapsed = max(stamps[-1] for stamps in times)
    output, total = config.requests * config.output_len, config.requests * (config.input_len + config.output_len)
    gaps = np.concatenate([np.diff(stamps) for stamps in times])
    return {
        "model": config.model,
        "weights": "int8" if lm.quantized else jnp.dtype(lm.module.embed.weight.dtype).name,
        "requests": config.requests,
        "input_len": config.input_len,
        "output_len": config.output_len,
        "elapsed_s": elapsed,
        "output_tokens_per_second": output / elapsed,
        "total_tokens_per_second": total / elapsed,
        "stream_tokens_per_second": float(1 / gaps.mean()) if gaps.size else None,
        "ttft_s": _percentiles(np.array([stamps[0] for stamps in times])),
        "itl_s": _percentiles(gaps) if gaps.size else None,
        "start_up_s": start_up,
    }


def _percentiles(seconds: np.ndarray) -> dict[str, float]:
    return {f"p{q}": float(np.percentile(seconds, q)) for q in (50, 90, 99)} | {"mean": float(seconds.mean())}

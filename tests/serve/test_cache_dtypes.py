"""Caches in fewer bits, served: their memory is what was promised, their logits are near, their tokens as stable."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from meshloom.core.errors import MeshloomError
from meshloom.core.topology import make_mesh
from meshloom.models.decoder import Decoder
from meshloom.models.language_model import LanguageModel
from meshloom.models.presets import PRESETS
from meshloom.pallas_kernels import Ragged
from meshloom.serve.config import EngineConfig
from meshloom.serve.engine import Engine
from meshloom.serve.request import SamplingParams
from meshloom.serve.sizing import size_cache
from meshloom.sharding import derive

from .conftest import CONFIG, SMALL

GREEDY = SamplingParams(max_tokens=12, ignore_eos=True)
PROMPTS = [np.random.default_rng(i).integers(1, CONFIG.vocab_size, 3 + 7 * i).tolist() for i in range(4)]
INT8 = dataclasses.replace(SMALL, cache_dtype="int8")


@pytest.mark.parametrize(("head_dim", "taken"), [(64, 64), (80, 128), (128, 128)])
def test_rows_on_a_tpu_are_whole_lanes_and_counted_as_such(head_dim, taken):
    config = dataclasses.replace(PRESETS["llama3-8b"], head_dim=head_dim)
    cpu, tpu = (size_cache(config, EngineConfig(), jnp.dtype("bfloat16"), platform) for platform in ("cpu", "tpu"))
    assert cpu.bytes_per_page == 16 * 32 * 2 * 8 * 2 * head_dim
    assert tpu.bytes_per_page == 16 * 32 * 2 * 8 * 2 * taken


def test_more_pages_fit_the_same_memory():
    def pages(dtype: str) -> int:
        return size_cache(PRESETS["llama3-8b"], EngineConfig(max_num_seqs=512), jnp.dtype(dtype), "cpu").num_pages

    # 128 numbers of a token and head: 256 bytes, or as many bits each and 4 bytes for their scale.
    plain = pages("bfloat16")
    assert plain == 2**29 // (16 * 32 * 2 * 8 * 256)
    assert (pages("int8"), pages("float8_e4m3fn")) == (int(plain * 256 / 132),) * 2
    assert pages("int4") == int(plain * 256 / 68)


@pytest.fixture(scope="module")
def int8_tokens(lm):
    with Engine(lm, INT8, quiet=True) as engine:
        held = sum(array.nbytes for array in engine._runner._cache)
        assert held == engine.cache.num_pages * engine.cache.bytes_per_page
        return [each.token_ids for each in engine.generate(PROMPTS, GREEDY)]


# The greatest error of a number, relative to the greatest of its row.
@pytest.mark.parametrize(("dtype", "step"), [("int8", 0.5 / 127), ("float8_e4m3fn", 2**-4), ("int4", 0.5 / 7)])
def test_logits_stay_near_those_without_a_cache(dtype, step):
    # Weights of the usual size: those of the fixture make scores so large that each query reads one key.
    config = dataclasses.replace(CONFIG, n_layers=1, init_scale=0.2)
    module = Decoder(config, rngs=nnx.Rngs(0))
    tokens = jnp.asarray(np.random.default_rng(0).integers(1, config.vocab_size, 32), jnp.int32)
    whole = Ragged(jnp.int32([32]), jnp.arange(8, dtype=jnp.int32)[None], jnp.int32([0, 32]), jnp.int32(1))
    exact = jax.nn.log_softmax(jax.jit(lambda: module(tokens[None])[0][0])())
    other = jax.nn.log_softmax(jax.jit(lambda: module(tokens, whole, module.init_cache(8, 4, dtype))[0])())
    divergence = jnp.mean(jnp.sum(jnp.exp(exact) * (exact - other), axis=-1))
    # KL divergence grows with the square of an error: 5 and 3 times it with the equal steps of int8 and int4 here, and
    # 0.3 times with those of float8, which are smaller for small numbers.
    assert 0 < divergence < 10 * step**2


def test_tokens_of_an_int8_cache_do_not_depend_on_chunks_pages_or_company(lm, int8_tokens):
    # Every prompt in chunks, and too few pages for all at once.
    config = EngineConfig(buckets=(5,), max_num_seqs=4, page_size=3, num_pages=16, cache_dtype="int8")
    with Engine(lm, config, quiet=True) as engine:
        assert [each.token_ids for each in engine.generate(PROMPTS, GREEDY)] == int8_tokens
        assert engine.free_pages == engine.cache.num_pages
        assert engine.metrics.registry.get_sample_value("meshloom:num_preemptions_total", {"model_name": "meshloom"})


def spread(lm, ways: int) -> LanguageModel:
    mesh = make_mesh({"tensor": ways}, jax.devices()[:ways])
    module = nnx.clone(lm.module)
    nnx.update(module, derive(module, mesh).place(nnx.state(module, nnx.Param)))
    return LanguageModel(module, lm.config, lm.tokenizer, mesh)


def test_on_a_mesh_each_device_has_the_scales_of_its_own_heads(lm, int8_tokens):
    with Engine(spread(lm, 2), INT8, quiet=True) as engine:
        assert [each.token_ids for each in engine.generate(PROMPTS, GREEDY)] == int8_tokens
        for array in engine._runner._cache:
            assert array.addressable_shards[0].data.nbytes == array.nbytes // 2


def test_what_cannot_be_kept_is_said(lm):
    with pytest.raises(MeshloomError, match="packs kv heads in pairs; got 1 on each of 2 devices: take int8"):
        Engine(spread(lm, 2), dataclasses.replace(SMALL, cache_dtype="int4"), quiet=True)

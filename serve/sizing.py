"""How many pages the KV cache gets, and how long a sequence may become: arithmetic over two configurations."""

import dataclasses

import jax
import jax.numpy as jnp

from meshloom.core.errors import ConfigError
from meshloom.models.config import DecoderConfig
from meshloom.pallas_kernels import KVPages
from meshloom.pallas_kernels.attention.pages import TPU_LANES
from meshloom.serve.config import EngineConfig
from meshloom.serve.packing import StepShape


@dataclasses.dataclass(frozen=True)
class CacheSize:
    """Attributes:
    num_pages: pages of the cache. max_model_len: longest prompt + output, in tokens; one such sequence always fits.
    pages_per_sequence: width of a page table. bytes_per_page: over all layers, keys and values with their scales.
    lanes: what rows of the cache are multiples of, see `KVPages.zeros`.
    """

    num_pages: int
    max_model_len: int
    pages_per_sequence: int
    bytes_per_page: int
    lanes: int


def size_cache(model: DecoderConfig, engine: EngineConfig, dtype: jnp.dtype, platform: str) -> CacheSize:
    """Settle the cache of a model on devices of this platform ("tpu", "cpu", ...).

    Raises:
        ConfigError: the cache holds no page or not one longest sequence, or the length exceeds the model's context.
    """
    page = engine.page_size
    lanes = TPU_LANES if platform == "tpu" else 1
    bytes_per_page = model.n_layers * page_bytes(model, page, dtype, lanes)
    wanted = engine.max_model_len or model.context
    if wanted > model.context:
        raise ConfigError(f"max_model_len={wanted} exceeds the model's context of {model.context} tokens")
    affordable = int(engine.kv_cache_memory * 2**30) // bytes_per_page
    num_pages = engine.num_pages or min(affordable, engine.max_num_seqs * -(-wanted // page))
    if num_pages < 1:
        raise ConfigError(
            f"kv_cache_memory={engine.kv_cache_memory} GiB holds no page: one takes {bytes_per_page} bytes "
            f"({page} tokens x {model.n_layers} layers)"
        )
    if engine.max_model_len is not None and num_pages * page < wanted:
        raise ConfigError(
            f"max_model_len={wanted} tokens do not fit a cache of {num_pages} pages x {page} tokens = "
            f"{num_pages * page}: raise kv_cache_memory or lower max_model_len"
        )
    length = min(wanted, num_pages * page)
    return CacheSize(num_pages, length, -(-length // page), bytes_per_page, lanes)


def page_bytes(model: DecoderConfig, page_size: int, dtype: jnp.dtype, lanes: int) -> int:
    """What one page takes in one layer, in bytes over all devices.

    Raises:
        MeshloomError: no cache of this type fits the model's kv heads.
    """
    sizes = 8, page_size, model.n_kv_heads, model.head_dim
    eight = jax.eval_shape(lambda: KVPages.zeros(*sizes, dtype, lanes=lanes))
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(eight)) // 8


def step_shapes(engine: EngineConfig, pages_per_sequence: int) -> list[StepShape]:
    """One shape per bucket; every sequence has at least one row, so a bucket of T rows holds at most T sequences."""
    return [StepShape(tokens, min(tokens, engine.max_num_seqs), pages_per_sequence) for tokens in engine.buckets]

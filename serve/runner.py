"""Turns a schedule into one call of one compiled program: module, then sampler, over a donated paged cache.

Guarantees that every program it can call is compiled before the first step, that a step transfers one array to the
device and one back, and that the module's state is flattened once. Sees chunks of integers, never a request or text;
the module it runs sees no mesh.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Int

from meshloom.core.compile import compile_ahead
from meshloom.core.topology import make_mesh
from meshloom.serve.packing import StepShape, pack, unpack
from meshloom.serve.sampler import sample
from meshloom.serve.scheduler import Chunk


class Runner:
    """The compiled step programs of one module, by bucket, and the cache they hand on.

    Args:
        module: a decoder with `__call__(tokens, layout, cache, rows)` and `init_cache(num_pages, page_size, dtype,
            shards, lanes)`; abstract weights are enough to `lower`.
        shapes: the step shapes to compile, ascending in tokens.
        num_pages, page_size, cache_dtype, cache_lanes: the cache, see `KVPages.zeros`.
        mesh, kv_heads_axis: devices the weights lie on, and the mesh axis that splits kv heads; None on one device.
    """

    def __init__(
        self,
        module: nnx.Module,
        shapes: list[StepShape],
        *,
        num_pages: int,
        page_size: int,
        cache_dtype: jnp.dtype,
        cache_lanes: int,
        mesh: Mesh | None = None,
        kv_heads_axis: str | None = None,
    ):
        self._shapes = shapes
        self._graphdef, state = nnx.split(module)
        self._leaves, self._treedef = jax.tree.flatten(state)
        self._cache_treedef: jax.tree_util.PyTreeDef | None = None
        shards = 1 if mesh is None or kv_heads_axis is None else mesh.shape[kv_heads_axis]
        self._make_cache = lambda: self._flat(module.init_cache(num_pages, page_size, cache_dtype, shards, cache_lanes))
        self._mesh, self._kv_heads_axis = mesh, kv_heads_axis
        self._programs: dict[int, Callable] = {}
        self._cache: list[Array] = []
        self._empty_cache: Callable[[], list[Array]] = self._make_cache

    def compile(self, advance: Callable[[str], None]) -> None:
        """Compile all programs and make the cache; `advance` hears of each program that is done."""
        shardings = [x.sharding for x in self._pages()]
        self._empty_cache = compile_ahead(self._make_cache, out_shardings=shardings)
        for shape in self._shapes:
            self._programs[shape.tokens] = self.lower(shape).compile()
            advance(f"step of {shape.tokens} tokens")
        self.reset()
        for shape in self._shapes:
            self._run(shape, [])  # the first run of a program is slow (buffers, page faults): not on a request's time

    def lower(self, shape: StepShape) -> jax.stages.Lowered:
        """The step program of a shape, ready for the compiler of the devices."""
        pages = self._pages()
        packed = jax.ShapeDtypeStruct((shape.size,), jnp.int32, sharding=self._replicated())
        results = self._replicated(), [x.sharding for x in pages]
        program = jax.jit(self._program(shape), donate_argnums=1, out_shardings=results)
        with jax.set_mesh(self._scope()):
            return program.lower(self._leaves, pages, packed)

    def _scope(self) -> Mesh:
        """The mesh by which kernels choose what runs: the one given, or that of the one device."""
        if self._mesh is not None:
            return self._mesh
        (device,) = {device for leaf in self._leaves for device in leaf.devices()}
        return make_mesh({"tensor": 1}, [device])

    def _pages(self) -> list[jax.ShapeDtypeStruct]:
        """The cache's arrays, as shapes with shardings."""
        return [
            jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=self._cache_sharding(x.shape))
            for x in jax.eval_shape(self._make_cache)
        ]

    def reset(self) -> None:
        """An empty cache; needed after a step that failed, which may have consumed the old one."""
        self._cache = []  # freed before its successor is made
        self._cache = self._empty_cache()

    def step(self, chunks: list[Chunk]) -> list[int]:
        """Run the chunks; one token id per chunk, meaningful where the chunk samples."""
        total = sum(chunk.count for chunk in chunks)
        shape = next(shape for shape in self._shapes if shape.tokens >= total and shape.sequences >= len(chunks))
        return self._run(shape, chunks)[: len(chunks)].tolist()

    def _run(self, shape: StepShape, chunks: list[Chunk]) -> np.ndarray:
        tokens, self._cache = self._programs[shape.tokens](self._leaves, self._cache, pack(shape, chunks))
        return np.asarray(tokens)

    def _program(self, shape: StepShape) -> Callable:
        def step(leaves: list, pages: list, packed: Int[Array, "n"]) -> tuple[Int[Array, "S"], list]:
            module = nnx.merge(self._graphdef, jax.tree.unflatten(self._treedef, leaves))
            cache = jax.tree.unflatten(self._cache_treedef, pages)
            step = unpack(shape, packed)
            logits, cache = module(step.tokens, layout=step.ragged, cache=cache, rows=step.rows)
            return sample(logits, step.draws), self._flat(cache)

        return step

    def _flat(self, cache) -> list[Array]:
        """The cache's arrays; its structure is the same in every step and remembered."""
        arrays, self._cache_treedef = jax.tree.flatten(cache)
        return arrays

    def _replicated(self) -> NamedSharding | None:
        return None if self._mesh is None else NamedSharding(self._mesh, PartitionSpec())

    def _cache_sharding(self, shape: tuple[int, ...]) -> NamedSharding | None:
        """Arrays of the cache are `[..., shards of the kv heads, rows, columns]`."""
        if self._mesh is None:
            return None
        return NamedSharding(self._mesh, PartitionSpec(*[None] * (len(shape) - 3), self._kv_heads_axis, None, None))

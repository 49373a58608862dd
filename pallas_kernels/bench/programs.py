"""The calls whose block sizes are searched: the bench's, and those of the presets' head sizes, widths and experts."""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp

from meshloom.core.bundles import Region
from meshloom.pallas_kernels import tuning
from meshloom.pallas_kernels.attention import Mask, mosaic_tpu, mosaic_tpu_backward
from meshloom.pallas_kernels.attention.kernel import Scoring
from meshloom.pallas_kernels.attention.paged import PagedScoring
from meshloom.pallas_kernels.attention.paged_mosaic_tpu import paged_attention_mosaic_tpu
from meshloom.pallas_kernels.attention.paged_schedule import Sizes as PagedSizes
from meshloom.pallas_kernels.attention.paged_schedule import own_limits, paged_key
from meshloom.pallas_kernels.attention.tuned import attention_key
from meshloom.pallas_kernels.attention.visits import Blocks
from meshloom.pallas_kernels.bench import attention, experts, paged, products
from meshloom.pallas_kernels.bench.figures import Cost
from meshloom.pallas_kernels.bench.search import Program
from meshloom.pallas_kernels.dispatch import Target
from meshloom.pallas_kernels.matmul.grouped.mosaic_tpu import MOSAIC_TPU
from meshloom.pallas_kernels.matmul.grouped.spec import GroupedSpec
from meshloom.pallas_kernels.matmul.grouped.tiles import (
    OuterTiles,
    Tiles,
    grouped_key,
    least_outer,
    least_tiles,
    outer_key,
)
from meshloom.pallas_kernels.matmul.quantized.blocks import Blocks as ProductBlocks
from meshloom.pallas_kernels.matmul.quantized.blocks import largest_blocks, matmul_key
from meshloom.pallas_kernels.matmul.quantized.formats import quantize
from meshloom.pallas_kernels.matmul.quantized.mosaic_tpu import quantized_matmul_mosaic
from meshloom.pallas_kernels.matmul.quantized.spec import MatmulSpec

# Head sizes of queries and values, windows, and whether rows are packed with documents, as in training: Gemma 3, whose
# layers take turns; Llama 3, Mixtral and Qwen3; SmolLM2.
ATTENTIONS = (
    ((256, 256), 1024, True),
    ((256, 256), 1024, False),
    ((128, 128), None, True),
    ((128, 128), None, False),
    ((256, 256), None, False),
    ((64, 64), None, False),
)
# Tokens that one schedule stands for, longest first; the backward kernel holds a head's queries in fast memory.
TOKENS = (32768, 16384, 8192, 4096, 2048)
MOST_HELD = 16384 * 128
# Under a causal mask square blocks, whose diagonal goes in strips: of 2048 x 1024 the pairs on the diagonal take 6,494
# bundles on v6e, of 1024 x 1024 2,397.
BLOCKS = ((512, 512),)
WINDOWED = ((512, 512), (512, 1024), (1024, 512), (256, 512))
# Numbers contracted and columns of products: the bench's, then Llama 3 8B's and Mixtral's.
SHAPES = ((4096, 4096), (4096, 14336), (14336, 4096))
# Rows, experts, numbers contracted and columns: Mixtral's projections up and down, and Qwen3-30B-A3B's.
EXPERTS = ((8192, 8, 4096, 14336), (8192, 8, 14336, 4096), (8192, 128, 2048, 768), (8192, 128, 768, 2048))

# Sequences of other decode steps that run the same instructions as the bench's.
ALIKE = (8, 16, 64)


def programs_of(op: str, *, apart: bool = False) -> list[Program]:
    """What is searched of an op of `OPS`; `apart` with one call each, as it takes to time them."""
    return list(OPS[op](apart))


def attention_programs(apart: bool) -> Iterator[Program]:
    """Causal attention of one head, both passes: what else a program has of heads and rows runs the same again.

    Packed rows are one document each, so that as many pairs are visited and tested as without: an upper bound.
    """
    for (dims, window, packed), by in itertools.product(ATTENTIONS, (0, 1)):
        tokens_of = [each for each in TOKENS if by == 0 or each * max(dims[0], 128) <= MOST_HELD]
        for tokens in [[each] for each in tokens_of] if apart else [tokens_of]:
            yield _attention(dims, Mask(window=window), packed, by, tokens)


def _attention(dims: tuple[int, int], mask: Mask, packed: bool, by: int, tokens: list[int]) -> Program:
    scoring = Scoring(dims[0] ** -0.5)
    module = (mosaic_tpu, mosaic_tpu_backward)[by]
    op = ("attention_forward", "attention_backward")[by]

    def arguments() -> tuple[Any, ...]:
        q, k, v, out = (jnp.ones((1, tokens[0], 1, dims[i]), jnp.bfloat16) for i in (0, 0, 1, 1))
        rows = jnp.ones((1, 1, tokens[0]), jnp.float32)
        ids = jnp.zeros((1, tokens[0]), jnp.int32) if packed else None
        return (q, k, v, ids) if by == 0 else (q, k, v, ids, rows, rows, out)

    def masked(ids: Any) -> Mask:
        return dataclasses.replace(mask, q_segments=ids, kv_segments=ids)

    def forward(q: Any, k: Any, v: Any, ids: Any) -> Any:
        return mosaic_tpu.forward(q, k, v, None, masked(ids), scoring, q.dtype)

    def backward(q: Any, k: Any, v: Any, ids: Any, lse: Any, delta: Any, d_out: Any) -> Any:
        return mosaic_tpu_backward.backward(q, k, v, None, masked(ids), scoring, lse, delta, d_out, q.dtype)

    def cost_of(count: int) -> Callable[[Any, Any], Cost | None]:
        def cost(regions: Any, sizes: Any) -> Cost | None:
            blocks = Blocks(count, count, **sizes)
            if max(blocks.block_q, blocks.block_kv) > count:
                return None
            return attention.kernel_cost(regions, blocks, mask, by, dims)

        return cost

    def key(count: int) -> str:
        q, v = (jax.ShapeDtypeStruct((1, count, 1, dim), jnp.bfloat16) for dim in dims)
        return attention_key(q, q, v, masked(q if packed else None), scoring)

    pairs = WINDOWED if mask.window else BLOCKS
    own = mosaic_tpu.blocks_of(tokens[0], tokens[0], module.BLOCK_Q, module.BLOCK_KV)
    return Program(
        op,
        key(tokens[0]),
        (forward, backward)[by],
        arguments,
        {"block_q": own.block_q, "block_kv": own.block_kv},
        [dict(zip(("block_q", "block_kv"), pair, strict=True)) for pair in pairs if max(pair) <= tokens[0]],
        {key(count): cost_of(count) for count in tokens},
    )


def quantized_programs(apart: bool) -> Iterator[Program]:
    """Rows in bfloat16 by int8 weights, rounded to int8, and by int4 ones, as they are."""
    for (size, columns), rows, (format, activations) in itertools.product(SHAPES, (512, 2048, 16), products.FORMATS):
        yield _product(rows, size, columns, format, activations)


def _product(rows: int, size: int, columns: int, format: str, activations: Any) -> Program:
    def arguments() -> tuple[Any, ...]:
        return jnp.ones((rows, size), jnp.bfloat16), quantize(jnp.ones((columns, size), jnp.float32), format)

    x, w = jax.eval_shape(arguments)
    spec = MatmulSpec(x.shape, w.shape, str(x.dtype), str(w.values.dtype), w.block, activations)
    own, held = largest_blocks(spec), products.bytes_of(w)
    assert own is not None  # or there is nothing to search
    at_once, across, chunk = own.rows, own.columns, own.chunk
    others = [
        (at_once, across, 2 * chunk),
        (at_once, across, chunk // 2),
        (at_once, 2 * across, chunk),
        (at_once, 2 * across, chunk // 2),
        (at_once, across // 2, chunk),
        (at_once // 2, 2 * across, chunk),
    ]
    names = ("rows", "columns", "chunk")
    return Program(
        "quantized_matmul",
        matmul_key(spec),
        lambda x, w: quantized_matmul_mosaic(x, w, activations=activations),
        arguments,
        dict(zip(names, (at_once, across, chunk), strict=True)),
        [dict(zip(names, each, strict=True)) for each in others if each[2] <= size],
        {matmul_key(spec): lambda regions, sizes: products.kernel_cost(regions, spec, ProductBlocks(**sizes), held)},
    )


def grouped_programs(apart: bool) -> Iterator[Program]:
    """Rows of experts in equal parts, by weights as they are stored; then gradients of rows."""
    for shape in EXPERTS:
        yield _grouped(*shape, transposed=True)
    for rows, groups, contracted, columns in EXPERTS:
        yield _grouped(rows, groups, columns, contracted, transposed=False)


def _grouped(rows: int, groups: int, contracted: int, columns: int, *, transposed: bool) -> Program:
    def arguments() -> tuple[Any, ...]:
        side = (columns, contracted) if transposed else (contracted, columns)
        x, w = jnp.ones((rows, contracted), jnp.bfloat16), jnp.ones((groups, *side), jnp.bfloat16)
        return x, w, jnp.full(groups, rows // groups, jnp.int32)

    spec = GroupedSpec(rows, groups, contracted, columns, "bfloat16", "bfloat16", transposed=transposed, spread=False)
    own = least_tiles(spec)
    assert own is not None  # or there is nothing to search
    at_once, across, part, chunk = vars(own).values()
    others = [
        Tiles(at_once, across, part, 2 * chunk),
        Tiles(at_once, across, part, chunk // 2),
        Tiles(2 * at_once, across, part, chunk),
        Tiles(2 * at_once, 1024, part, chunk),
        Tiles(at_once // 2, across, part, chunk),
        Tiles(at_once, 1024, part, chunk),
        Tiles(at_once, 2048, part // 2, chunk),
    ]
    key = grouped_key(spec)
    return Program(
        "grouped_matmul",
        key,
        lambda x, w, sizes: MOSAIC_TPU.product(x, w, sizes, transposed, Target.of_mesh()),
        arguments,
        vars(own),
        [vars(each) for each in dict.fromkeys(others) if each != own and each.columns <= columns],
        {key: lambda regions, sizes: experts.kernel_cost(regions, spec, Tiles(**sizes))},
    )


def outer_programs(apart: bool) -> Iterator[Program]:
    """Gradients of the same experts' weights."""
    for rows, groups, contracted, columns in EXPERTS:
        yield _outer(rows, groups, contracted, columns)


def _outer(rows: int, groups: int, contracted: int, columns: int) -> Program:
    def arguments() -> tuple[Any, ...]:
        d_out, x = jnp.ones((rows, columns), jnp.bfloat16), jnp.ones((rows, contracted), jnp.bfloat16)
        return d_out, x, jnp.full(groups, rows // groups, jnp.int32)

    spec = GroupedSpec(rows, groups, contracted, columns, "bfloat16", "bfloat16", transposed=True, spread=False)
    own = least_outer(rows, groups, columns, contracted, jnp.bfloat16)
    at_once, left, right, chunk = vars(own).values()
    others = [
        OuterTiles(2 * at_once, left, right, chunk),
        OuterTiles(2 * at_once, left, right, chunk // 2),
        OuterTiles(2 * at_once, left, right // 2, chunk),
        OuterTiles(at_once // 2, left, right, chunk),
        OuterTiles(at_once, left, right, chunk // 2),
        OuterTiles(at_once, left // 2, right, left // 2),
    ]
    key = outer_key(rows, groups, columns, contracted, jnp.bfloat16)
    return Program(
        "grouped_outer",
        key,
        lambda d_out, x, sizes: MOSAIC_TPU.outer(d_out, x, sizes, d_out.dtype, Target.of_mesh()),
        arguments,
        vars(own),
        [vars(each) for each in dict.fromkeys(others) if each != own],
        {key: lambda regions, sizes: experts.outer_cost(regions, spec, OuterTiles(**sizes))},
    )


def paged_programs(apart: bool) -> Iterator[Program]:
    """The bench's steps over pages: how many tokens are a block, and how many rows are multiplied at a time.

    Tiles of all steps of up to 64 rows are alike.
    """
    for step in paged.STEPS:
        others = ALIKE if step.rows == 1 else ()
        steps = [step, *(dataclasses.replace(step, sequences=sequences) for sequences in others)]
        for some in [[each] for each in steps] if apart else [steps]:
            yield _paged(some)


def _paged(steps: list[paged.Step]) -> Program:
    scoring, own = PagedScoring(paged.HEAD_DIM**-0.5), own_limits()
    tokens, rows, decode = own.values()
    if steps[0].rows == 1:
        others = [(tokens, rows, 2 * decode), (tokens, rows, decode // 2), (2 * tokens, rows, decode)]
        others.append((2 * tokens, rows, 2 * decode))
    else:
        others = [(tokens, rows // 2, decode), (2 * tokens, rows, decode), (2 * tokens, rows // 2, decode)]

    def key_and_cost(step: paged.Step) -> tuple[str, Callable[[list[Region], Any], Cost]]:
        q, _, _, pages, ragged = jax.eval_shape(functools.partial(paged.arguments, step))

        def cost(regions: list[Region], limits: Any) -> Cost:
            with tuning.overlay("paged_attention", limits):
                return paged.kernel_cost(regions, PagedSizes.of(q, pages, ragged, scoring), step)

        return paged_key(q, pages, scoring), cost

    costs = dict(map(key_and_cost, steps))
    return Program(
        "paged_attention",
        next(iter(costs)),
        lambda q, k, v, pages, ragged: paged_attention_mosaic_tpu(q, pages.write(k, v, ragged), ragged, scoring, None),
        functools.partial(paged.arguments, steps[0]),
        own,
        [dict(zip(own, each, strict=True)) for each in others],
        costs,
    )


# As `meshloom tune --op` names them.
OPS: dict[str, Callable[[bool], Iterator[Program]]] = {
    "attention": attention_programs,
    "quantized_matmul": quantized_programs,
    "grouped_matmul": grouped_programs,
    "grouped_outer": outer_programs,
    "paged_attention": paged_programs,
}

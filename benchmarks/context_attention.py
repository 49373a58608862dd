"""Attention over tokens that are spread over devices: as a ring, and as XLA alone spreads it; compiled, nothing runs.

    python benchmarks/context_attention.py
    python benchmarks/context_attention.py --target v6e:2x4 --tokens 65536

One causal call and its gradient, 32 heads and 8 kv heads of 128 in bfloat16, tokens over all devices: temporaries of a
device, and bytes of the results of its collectives. Below that, what a causal mask leaves each of 8 devices to do of
4,096 tokens in blocks of 64.
"""

import argparse

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
from rich.console import Console
from rich.table import Table

from meshloom.core.ahead import compiler_options, compilers_only, target_devices
from meshloom.core.program_report import compile_and_report
from meshloom.core.topology import make_mesh, parse_devices
from meshloom.pallas_kernels import Mask, attention
from meshloom.pallas_kernels.attention.context.layouts import LAYOUTS, critical_path, visited_blocks
from meshloom.pallas_kernels.attention.kernel import Scoring
from meshloom.pallas_kernels.attention.table import ATTENTION, attend

HEADS, KV_HEADS, HEAD_DIM = 32, 8, 128


def by_ring(q, k, v):
    """What `attention` does on a mesh with a `context` axis."""
    return attention(q, k, v, mask=Mask())


def by_xla(q, k, v):
    """The chunked implementation, spread by XLA."""
    chunked = next(each.run for each in ATTENTION if each.name == "chunked")
    return attend(chunked, Scoring(HEAD_DIM**-0.5, None), q, k, v, None, None, Mask())


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--target", default="v5e:2x4", help="devices, all of them in the ring")
    options.add_argument("--tokens", type=int, default=131_072)
    asked = options.parse_args()
    compilers_only()
    jax.config.update("jax_platforms", "cpu")
    where = parse_devices(asked.target)
    mesh = make_mesh({"context": where.count}, target_devices(where))
    sharding = NamedSharding(mesh, PartitionSpec(None, "context"))
    q, k, v = (
        jax.ShapeDtypeStruct((1, asked.tokens, heads, HEAD_DIM), jnp.bfloat16, sharding=sharding)
        for heads in (HEADS, KV_HEADS, KV_HEADS)
    )
    table = Table(title=f"attention and its gradient, {asked.tokens:,} tokens over {asked.target}")
    for heading in ("", "temporaries, GiB", "collectives, MiB"):
        table.add_column(heading)
    for run in (by_ring, by_xla):
        gradient = jax.grad(lambda *arrays, run=run: jnp.sum(run(*arrays).astype(jnp.float32)), argnums=(0, 1, 2))
        with Console(stderr=True).status(f"compiling {run.__name__}"), jax.set_mesh(mesh):
            lowered = jax.jit(gradient, out_shardings=(sharding,) * 3).lower(q, k, v)
            _, report = compile_and_report(lowered, dict(mesh.shape), compiler_options(where))
        moved = ", ".join(f"{kind} {size / 2**20:,.0f}" for kind, size in report.bytes_by_kind.items())
        table.add_row(run.__name__, f"{report.temporary_bytes / 2**30:.2f}", moved)
    Console().print(table)
    for layout in LAYOUTS:
        visited = visited_blocks(layout, 8, 4096, 64, Mask())
        each = visited.sum(axis=1)
        print(f"{layout}: {critical_path(visited)} blocks on the critical path, {each.min()} to {each.max()} a device")


if __name__ == "__main__":
    main()

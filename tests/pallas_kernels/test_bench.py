"""The kernel bench compares like with like."""

import dataclasses
import functools
import itertools
import json
import os
import subprocess
import sys

import pytest

from meshloom import cli
from meshloom.core.bundles import Region
from meshloom.kernel_bench import bench_kernels
from meshloom.pallas_kernels.attention.paged_schedule import Sizes
from meshloom.pallas_kernels.attention.visits import Blocks
from meshloom.pallas_kernels.bench import attention, collective, cpu, experts, paged, products, tokamax
from meshloom.pallas_kernels.matmul.grouped.tiles import OuterTiles, Tiles
from meshloom.pallas_kernels.matmul.quantized import blocks as quantized
from meshloom.pallas_kernels.matmul.quantized.spec import MatmulSpec
from tests.compilers import needs_tpu


def test_cycles_are_bundles_times_how_often_they_run():
    loop = Region(1, bundles=10, loops=True, matmuls={}, spills=0, fills=0)
    begin = Region(2, bundles=5, loops=False, matmuls={}, spills=0, fills=0)
    diagonal, partly, plain = (Region(3 + n, 100 * (n + 1), False, {"bf16": 4}, n, 0) for n in range(3))
    blocks = Blocks(512, 512, 128, 128)
    regions = [loop, begin, diagonal, partly, plain]
    figures = attention.pair_figures("op", "ours", regions, [4, 0, 6], blocks, 2, peak=100)
    assert figures.cycles == 4 * 100 + 6 * 300 + 10 * 10 + 4 * 5
    assert figures.tile_cycles == 300 / 2
    assert figures.peak_share == 100 / 150
    assert figures.spills == 2


def test_tokamax_tests_the_mask_in_the_longer_of_two_regions_and_in_pairs_on_the_diagonal_alone():
    begin = Region(1, bundles=5, loops=False, matmuls={}, spills=0, fills=0)
    plain, testing = (Region(n, bundles, False, {"bf16": 4}, n, 0) for n, bundles in ((2, 200), (3, 300)))
    figures = tokamax.figures([plain, begin, testing], "v6e", 7)
    assert figures.cycles == 6 * 200 + 4 * 300 + 4 * 5
    assert (figures.tile_cycles, figures.spills, figures.vmem) == (200 / 128, 2, 7)


@pytest.mark.parametrize("dtype", ["bf16", "s8"])
def test_no_product_is_faster_than_the_matrix_unit(dtype):
    region = Region(1, bundles=100, loops=False, matmuls={dtype: 64}, spills=0, fills=0)
    figures = attention.pair_figures("op", "peer", [region], [3], Blocks(128, 128, 128, 128), 2, peak=None)
    assert figures.cycles == 3 * 64 * 4


def test_rows_are_rounded_strip_by_strip_in_the_first_block_of_columns():
    ends = Region(1, bundles=5, loops=False, matmuls={}, spills=0, fills=0)
    rounding = Region(2, bundles=90, loops=True, matmuls={"s8": 2}, spills=1, fills=0)
    product = Region(3, bundles=100, loops=False, matmuls={"s8": 4}, spills=7, fills=0)
    spec = MatmulSpec((1024, 256), (512, 256), activations="int8")
    blocks = quantized.Blocks(rows=512, columns=256, chunk=128)
    figures = products._figures("op", [ends, rounding, product], spec, blocks, {"s8": 4}, held=512 * 256)
    strips = 512 // quantized.STRIP
    assert figures.cycles == 2 * 2 * (strips * 90 + 100) + 2 * 2 * 5
    assert figures.peak_share == 4 * 64 / figures.cycles
    assert figures.spills == 7
    rows = 1024 * (256 + 512) * 4
    assert figures.hbm == (rows + 2 * 512 * 256) / (rows + 512 * 256)


def test_a_weight_is_read_once_for_its_group_where_a_row_is_multiplied_whole():
    products = [Region(n, bundles, False, {"bf16": 4}, 1, 0) for n, bundles in ((1, 1000), (2, 900))]
    other = Region(3, bundles=10, loops=True, matmuls={}, spills=0, fills=0)
    looped = experts.kernel_cost([other, products[0]], experts.BENCH, Tiles(512, 1792, 4096, 1024))
    visits = 8192 // 512 + 8 - 1  # groups begin anywhere
    assert looped.cycles == visits * 8 * (4 * 1000 + 10)
    stepped = experts.kernel_cost([other, *products], experts.BENCH, Tiles(512, 1024, 1024, 1024))
    assert stepped.cycles == visits * 14 * (1000 + 3 * 900 + 4 * 10)
    x, w, out = 8192 * 4096, 8 * 14336 * 4096, 8192 * 14336
    assert looped.bytes == 2 * (8 * x + w + out)
    assert stepped.bytes == 2 * (14 * x * visits / 16 + visits * w / 8 + out)
    # The gradient of weights: 8 x 2 tiles, visits of two runs, 14 of them to tiles that groups share, the result once,
    # nothing for empty groups.
    empty, shared, written = (Region(n, bundles, False, {}, 0, 0) for n, bundles in ((4, 500), (5, 1200), (6, 400)))
    shared = dataclasses.replace(shared, matmuls={"bf16": 4})
    regions = [other, empty, products[0], shared, written]
    outer = experts.outer_cost(regions, experts.BENCH, OuterTiles(512, 1792, 2048, 896))
    assert outer.cycles == 8 * 2 * (2 * ((visits - 14) * 1000 + 14 * 1200) + visits * 10 + 8 * 400)
    assert outer.bytes == 2 * (2 * out + 8 * x + w)


def test_a_ring_multiplies_every_block_of_every_shard_and_begins_once():
    begin, product, beside = (
        Region(0, 50, False, {}, 0, 0),
        Region(1, 100, False, {"bf16": 4}, 3, 0),
        Region(2, 10, True, {}, 0, 0),
    )
    figures = collective._figures("op", 512, [begin, product, beside], 8 * 8, (10, 20, 30), {"bf16": 8}, None)
    assert figures.cycles == 50 + 64 * (100 + 10)
    assert figures.hbm == (10 + 8 * 20 + 30) / (10 + 20 + 30)
    assert figures.spills == 3


def test_regions_of_a_paged_kernel_run_as_often_as_the_loops_around_them():
    def region(bundles, depth, matmuls=0, copies=0):
        products = {"bf16": matmuls} if matmuls else {}
        return Region(next(numbers), bundles, depth > 1, products, 0, 0, depth, copies)

    def block():
        # Copies of 16 pages of 16 tokens start in one round: two of them for a block of 512.
        return [region(30, 2), region(200, 3, copies=32), region(9, 3, copies=2)]

    numbers = itertools.count()
    decode = [*block(), region(500, 3, 1)]
    tile = [*block(), *(region(bundles, 3, 1) for bundles in (2000, 1100, 1900)), region(600, 4, 1)]
    item, begin, end = region(7, 1), region(300, 2), region(40, 1, copies=1)
    regions = [region(1000, 0), item, *decode, end, begin, region(5, 1), *tile, region(90, 1), region(11, 0)]
    sizes = Sizes(32, 4, 8, 128, 128, False, 16, 32, 64, 256, None, None, 1.0, "bfloat16", 2048)
    once, whole = 1011, 30 + 2 * 200
    # 1,000 tokens: two blocks, the second with 31 pages, in four parts of 256.
    step = paged.Step("decode", sequences=3, rows=1, length=1000)
    assert paged.our_cycles(regions, sizes, step) == once + 3 * (7 + 40 + 2 * whole + 31 * 9 + 4 * 500)
    # Tiles end after 256, 512, 768 and 1,024 tokens.
    step = paged.Step("prefill", sequences=1, rows=1024, length=1024)
    items = 4 * (7 + 40 + 5 + 90 + 8 * 300) + (1 + 1 + 2 + 2) * whole
    assert paged.our_cycles(regions, sizes, step) == once + items + 8 * (2 * 2000 + 2 * 1100 + 2 * 1900)
    # Theirs visits all keys for every block of queries, and every sequence of a block of them.
    theirs = [region(3, 0), region(20, 1), region(30, 2), region(400, 3, 1), region(5, 4)]
    assert paged.their_cycles(theirs, 128, 512, step) == 3 + 8 * (20 + 30 + 2 * 405)
    step = paged.Step("decode", sequences=3, rows=1, length=1000)
    assert paged.their_cycles(theirs, 8, 512, step) == 3 + 20 + 3 * (30 + 2 * 405)


def test_our_visits_are_the_pairs_on_and_below_the_diagonal():
    assert attention.visits_of(Blocks(4096, 4096, 1024, 1024), by=0) == [4, 0, 6]
    assert attention.visits_of(Blocks(4096, 4096, 1024, 1024), by=1) == [4, 0, 6]


def test_the_cpu_is_timed_beside_xla(monkeypatch, capsys):
    small = functools.partial(cpu.kernels_on_cpu, tokens=64, size=64, rows=32)
    monkeypatch.setattr(cpu, "kernels_on_cpu", small)
    rows = bench_kernels(cli.BenchKernels(target="cpu"))["kernels"]
    assert len(rows) == cpu.CPU_ROWS
    assert [row["kernel"] for row in rows[:2]] == ["jax.nn.dot_product_attention", "meshloom chunked"]
    assert [row["kernel"] for row in rows[4:6]] == ["XLA, float32", "meshloom int8 by int8"]
    for row in rows:
        (peer,) = {each["seconds"] for each in rows if each["op"] == row["op"] and each["times_peer"] == 1.0}
        assert row["times_peer"] == peer / row["seconds"] > 0
    assert "times the peer" in capsys.readouterr().out


def test_an_unknown_target_is_answered_with_those_there_are(capsys):
    assert cli.main(["bench", "kernels", "--target", "v4"]) == 2
    assert "--target v4: kernels are compared for cpu, v5e, v6e, v5p, tpu7x" in capsys.readouterr().err


@pytest.mark.slow
@needs_tpu
@pytest.mark.parametrize(("target", "forward", "backward"), [("v6e", 0.72, 0.72), ("v5e", 0.88, 0.88)])
def test_attention_takes_no_more_cycles_than_splash_at_its_best(target, forward, backward):
    command = [sys.executable, "-m", "meshloom.cli", "bench", "kernels", "--target", target, "--json"]
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True, timeout=600)
    rows = json.loads(done.stdout)["kernels"]
    for op, share in (("attention forward", forward), ("attention backward", backward)):
        (ours,) = [row for row in rows if row["op"] == op and row["kernel"].startswith("meshloom")]
        theirs = [row for row in rows if row["op"] == op and row["kernel"].startswith("splash")]
        assert ours["cycles"] <= min(row["cycles"] for row in theirs)
        assert ours["spills"] <= min(row["spills"] for row in theirs)
        assert ours["peak_share"] >= share

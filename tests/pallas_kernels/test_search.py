"""A search keeps what is faster, counts what it leaves out, and its file is what programs read."""

import dataclasses
import functools
import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

from meshloom import cli
from meshloom.core.bundles import Region
from meshloom.core.errors import MeshloomError
from meshloom.core.hardware import CHIPS
from meshloom.core.topology import make_mesh
from meshloom.kernel_bench import ONE_CHIP
from meshloom.pallas_kernels import tuning
from meshloom.pallas_kernels.attention import Mask
from meshloom.pallas_kernels.attention.kernel import Scoring
from meshloom.pallas_kernels.attention.tuned import attention_key
from meshloom.pallas_kernels.attention.visits import Blocks
from meshloom.pallas_kernels.bench import attention, programs
from meshloom.pallas_kernels.bench.figures import Cost, cycle_rate
from meshloom.pallas_kernels.bench.search import Clock, Program, search, trials
from meshloom.pallas_kernels.tuning import tuned
from tests.compilers import needs_tpu

OWN, WIDE, TALL, HUGE = ({"block_q": q, "block_kv": kv} for q, kv in ((1, 1), (1, 2), (2, 1), (9, 9)))


def unknown(regions, sizes):
    """A cost by schedules, of which these tests have none."""


def program(*candidates, costs=("call",)):
    return Program("attention_forward", "call", jnp.cos, tuple, OWN, candidates, dict.fromkeys(costs, unknown))


def judged_by(seconds):
    """A judge that knows seconds by sizes, and has no room for others."""

    def judge(program, sizes):
        chosen = sizes or program.own
        if tuple(chosen.values()) not in seconds:
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Ran out of memory in memory space vmem")
        return dict.fromkeys(program.costs, seconds[tuple(chosen.values())])

    return judge


def test_the_fastest_candidate_wins_and_what_does_not_compile_is_counted():
    heard = []
    judge = judged_by({(1, 1): 4.0, (1, 2): 3.0, (2, 1): 2.0})
    (result,) = search([program(WIDE, TALL, HUGE)], judge, heard.append)
    assert (result.sizes, result.own_seconds, result.seconds, result.gain) == (TALL, 4.0, 2.0, 2.0)
    assert (result.tried, result.refused) == (2, {"no room": 1})
    assert len(heard) == trials([program(WIDE, TALL, HUGE)]) == 4


def test_of_equals_the_kernels_own_rule_wins():
    (result,) = search([program(WIDE, TALL)], judged_by({(1, 1): 2.0, (1, 2): 2.0, (2, 1): 2.0}), lambda label: None)
    assert result.sizes == OWN
    assert result.gain == 1.0


def test_sizes_that_a_kernel_refuses_are_counted_and_a_rule_that_fails_is_no_result():
    def refusing(program, sizes):
        if sizes is not None:
            raise MeshloomError("cannot have them")
        return {"call": 1.0}

    (result,) = search([program(WIDE)], refusing, lambda label: None)
    assert (result.tried, result.refused) == (0, {"not legal": 1})
    with pytest.raises(jax.errors.JaxRuntimeError):
        next(search([program(WIDE)], judged_by({}), lambda label: None))


def test_on_hardware_a_candidate_is_what_it_takes_to_run():
    """On this CPU, with a function that asks for its sizes as a kernel does: no TPU has run this."""
    asked = []

    def function(x):
        sizes = tuned("attention_forward", "call", lambda sizes: None) or OWN
        asked.append(sizes)
        return jax.lax.fori_loop(0, 3000 * sizes["block_q"] ** 3, lambda i, x: jnp.cos(x), x)

    slow = dataclasses.replace(
        program(TALL, WIDE, costs=("call", "of the same schedule")), function=function, arguments=lambda: (jnp.ones(8),)
    )
    clock = Clock(make_mesh({"fsdp": 1}, jax.devices()[:1]), runs=2, calls=2)
    results = list(search([slow], clock, lambda label: None))
    assert asked == [OWN, TALL, WIDE]
    assert [result.call for result in results] == ["call"]
    assert results[0].sizes != TALL


def test_a_kernel_takes_its_cycles_or_its_bytes_whichever_is_longer():
    assert cycle_rate("v6e") == pytest.approx(1.75e9, rel=0.001)
    assert cycle_rate("v5e") == pytest.approx(1.5e9, rel=0.002)
    assert Cost(1.75e9, 0.0).seconds("v6e") == pytest.approx(1, rel=0.001)
    assert Cost(1.0, CHIPS["v6e"].hbm_bandwidth * 2).seconds("v6e") == 2


def test_blocks_that_are_not_square_have_no_diagonal_of_their_own():
    assert attention.visits_of(Blocks(4096, 4096, 2048, 1024), by=0) == [4, 2]
    assert attention.visits_of(Blocks(4096, 4096, 1024, 2048), by=1) == [4, 2]
    regions = [Region(n, 100 * n, False, {"bf16": 1}, 0, 0) for n in (1, 2)]
    cost = attention.kernel_cost(regions, Blocks(4096, 4096, 2048, 1024), Mask(), 0, (128, 128))
    assert cost.cycles == 4 * 100 + 2 * 200


def test_keys_are_read_again_for_every_block_of_queries_but_where_a_run_goes_on_with_the_same():
    blocks = Blocks(2048, 2048, 1024, 1024)  # pairs (0, 0), (1, 0), (1, 1)
    rows = 2048 * (2 * 256 + 4)
    assert attention.hbm_bytes(blocks, Mask(), 0, (128, 128)) == rows + 2 * 2 * 1024 * 256
    assert attention.least_bytes(blocks, 0, (128, 128)) == rows + 2048 * 2 * 256
    whole = Blocks(1024, 1024, 1024, 1024)
    assert attention.hbm_bytes(whole, Mask(), 0, (64, 64)) == attention.least_bytes(whole, 0, (64, 64))


@functools.cache
def searched(op):
    return {(each.op, next(iter(each.costs))): each for each in programs.programs_of(op, apart=True)}


@pytest.mark.parametrize("chip", sorted(path.stem for path in tuning.SHIPPED.glob("*.json")))
def test_what_the_package_has_for_a_chip_is_legal_and_faster(chip):
    """Every entry is of a call that is searched, and its kernel takes it for that call."""
    assert chip in ONE_CHIP
    entries = tuning.read(tuning.shipped_file(chip))
    for op, calls in entries.items():
        by_call = searched(next(name for name in programs.OPS if op.startswith(name)))
        for call, found in calls.items():
            assert found.gain > 1.01
            program = by_call[op, call]
            with tuning.overlay(op, found.sizes):
                jax.eval_shape(program.function, *jax.eval_shape(program.arguments))


def test_what_training_on_packed_rows_asks_for_is_searched():
    q, kv = (jax.ShapeDtypeStruct((2, 4000, heads, 256), jnp.bfloat16) for heads in (8, 4))
    ids = jax.ShapeDtypeStruct((2, 4000), jnp.int32)
    key = attention_key(q, kv, kv, Mask(window=1024, q_segments=ids, kv_segments=ids), Scoring(1.0))
    searched = [program.op for program in programs.programs_of("attention") if key in program.costs]
    assert searched == ["attention_forward", "attention_backward"]


def test_an_unknown_target_or_op_is_answered_with_those_there_are(capsys):
    assert cli.main(["tune", "--target", "v4"]) == 2
    assert "--target v4: kernels are tuned for local, v5e, v6e, v5p, tpu7x" in capsys.readouterr().err
    assert cli.main(["tune", "--target", "v6e", "--op", "atention"]) == 2
    assert "did you mean 'attention'" in capsys.readouterr().err


def test_without_a_tpu_local_says_what_to_do(capsys):
    assert cli.main(["tune"]) == 2
    assert "kernels are tuned on TPUs, and this is cpu; for a TPU elsewhere name it: v5e" in capsys.readouterr().err


def test_a_damaged_file_is_found_before_the_search(tmp_path, capsys):
    file = tmp_path / "mine.json"
    file.write_text("{")
    assert cli.main(["tune", "--target", "v6e", "--out", str(file)]) == 2
    assert f"error: {file} does not hold block sizes of kernels" in capsys.readouterr().err


@pytest.mark.slow
@needs_tpu
def test_a_search_compiles_its_candidates_and_writes_what_programs_read(tmp_path):
    """In a process of its own: libtpu leaves schedules only if it is asked before it starts."""
    script = """
import dataclasses, sys
from meshloom import cli
from meshloom.pallas_kernels.bench import programs
one = dataclasses.replace(programs._product(512, 1024, 1024, "int8", "int8"),
                          candidates=[{"rows": 512, "columns": 256, "chunk": 512}])
programs.OPS = {"quantized_matmul": lambda apart: [one]}
sys.exit(cli.main(["tune", "--target", "v6e", "--op", "quantized_matmul", "--json", "--out", sys.argv[1]]))
"""
    command = [sys.executable, "-c", script, str(tmp_path / "mine.json")]
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True, timeout=300)
    answer = json.loads(done.stdout)
    (call,) = answer["calls"]
    assert call["tried"] == 1
    assert call["own_seconds"] >= call["seconds"] > 0
    assert (
        answer["kept"] == (call["gain"] > 1.01) == len(tuning.read(tmp_path / "mine.json").get("quantized_matmul", {}))
    )

"""Schedules of TPU kernels are read as the compiler wrote them."""

import json
import os
import subprocess
import sys

import pytest

from meshloom.core.bundles import Region, kernel_memory, kernel_regions, regions
from meshloom.core.errors import ConfigError
from tests.compilers import needs_tpu

SCHEDULE = """
LB: loop body
     0   :  { %s1 = smov 0 } /* Start region 1 */
   0x1 LB: > { %v2 = vld [vmem:[#allocation2_spill]]  ;;  %v3 = vmatmul.mubr.bf16.gmra.mxu0 %v1 } /* Start region 7 */
   0x2   : > { %9 = vmatmul.mubr.f32.vlgmr.msra.gmra.mxu1 %v2  ;;  %8 = vst [vmem:[#allocation4_spill] sm:$0xff] %v3 }
   0x3   : > { %10 = dma.hbm_to_vmem [thread:$0]  /*hbm=*/%s3 } /* End region 7 */
   0x4 PF: > { %8 = vst [vmem:[#allocation4] sm:$0xff] %v3 } /* Start region 9 :: End region 9 */
   0x5   :  { %s1 = smov 0 } /* End region 1 */
"""
MULTIPLIES = """
import sys
import jax, jax.numpy as jnp, numpy as np
from jax.experimental import pallas as pl
from meshloom.core.ahead import target_devices, compilers_only
from meshloom.core.bundles import dump_bundles
from meshloom.core.topology import parse_devices
dump_bundles(sys.argv[1])
compilers_only()
mesh = jax.sharding.Mesh(np.array(target_devices(parse_devices("v5e:1x1"))), ("x",))
x = jax.ShapeDtypeStruct((256, 256), jnp.bfloat16, sharding=jax.NamedSharding(mesh, jax.P()))

def multiply(x, y, out):
    out[...] = jnp.dot(x[...], y[...], preferred_element_type=jnp.float32)

run = pl.pallas_call(multiply, out_shape=jax.ShapeDtypeStruct(x.shape, jnp.float32), name="multiply")
jax.jit(run).lower(x, x).compile()
"""


def test_each_bundle_belongs_to_the_innermost_region():
    outside, loop, tail = regions(SCHEDULE)
    assert outside == Region(1, bundles=2, loops=False, matmuls={}, spills=0, fills=0)
    assert loop == Region(7, bundles=3, loops=True, matmuls={"bf16": 1, "f32": 1}, spills=1, fills=1, depth=1, copies=1)
    assert tail == Region(9, bundles=1, loops=False, matmuls={}, spills=0, fills=0, depth=1)


def test_a_region_that_the_compiler_never_began_may_end():
    ended = SCHEDULE.replace("End region 1 */", "End region 0 :: End region 1 */")
    assert regions(ended + "   0x6   :  {}\n")[1:] == regions(SCHEDULE)


def test_what_lies_in_fast_memory_whole_has_two_windows_there_as_if_it_did_not(tmp_path):
    report = {"hlo_breakdowns": {"copy.1": {"total_size": 5}, "jvp_flash_.3": {"total_size": 1000}}}
    (tmp_path / "1-TLP-02-vmem_report.html").write_text(f"<script>const DATA ={json.dumps(report)};</script>")
    window = "inlined_call_operand.vmem [shape: bf16[8,64]] /* The window shape is bf16[1,64], */"
    (tmp_path / "2-jvp_flash_.3-01-final_bundles.txt").write_text(f"0 : {{ {window} }} /* entry bundle: %flash */")
    assert kernel_memory(tmp_path, "flash") == 1000 + 2 * 64 * 2
    assert kernel_memory(tmp_path / "..", "flash") is None


def test_a_folder_without_the_kernel_is_named(tmp_path):
    with pytest.raises(ConfigError, match="no schedule of a kernel 'flash'"):
        kernel_regions(tmp_path, "flash")


@needs_tpu
def test_a_product_of_256_takes_the_array_as_many_pushes_as_it_has_tiles(tmp_path):
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", MULTIPLIES, str(tmp_path)]
    subprocess.run(command, env=environment, check=True, capture_output=True, timeout=120)
    (body,) = [each for each in kernel_regions(tmp_path, "multiply") if each.matmuls]
    assert all(path.name.endswith("final_bundles.txt") for path in tmp_path.glob("*multiply*"))
    # v5e: 16 rows of bfloat16 a push, against 128 x 128 weights.
    assert sum(body.matmuls.values()) == 256 // 16 * 2 * 2
    assert body.bundles >= sum(body.matmuls.values()) * 8 / 4

"""The training step of Meshloom beside MaxText's: compiled for the same TPUs, with no TPU, and read the same way.

    python benchmarks/against_maxtext.py --maxtext VENV/bin/python

VENV has MaxText: `pip install 'maxtext[tpu]==0.2.5'`, for Python 3.12. Same model, slice, mesh, batch (one row per
device) and full recomputation; weights and Adam's moments in float32, products in bfloat16. Twelve minutes on two idle
CPU cores.
"""

import argparse
import dataclasses
import json
import pathlib
import subprocess
import tempfile
from typing import Any

import jax
import jax.numpy as jnp
from rich.console import Console
from rich.progress import track
from rich.table import Table

from meshloom.core.ahead import compiler_options, compilers_only, target_devices
from meshloom.core.hlo import parse
from meshloom.core.program_report import collectives, compile_and_report
from meshloom.core.topology import make_mesh, mesh_text, parse_devices
from meshloom.models.source import abstract_module, resolve
from meshloom.planning import lowered_step
from meshloom.sharding.planner import plan_training
from meshloom.sharding.workload import TrainWorkload
from meshloom.train.config import TrainConfig


@dataclasses.dataclass(frozen=True)
class Case:
    """What both compile: `topology` is MaxText's name of `devices`, and mesh has its axes' names in both."""

    model: str
    devices: str
    topology: str
    mesh: dict[str, int]
    length: int


CASES = (
    Case("llama3-8b", "v5e:8x8", "v5e-64", {"fsdp": 64}, 2048),
    Case("llama3-8b", "v5e:8x8", "v5e-64", {"fsdp": 64}, 4096),
    Case("llama3-70b", "v5p:4x4x4", "v5p-128", {"fsdp": 64}, 4096),
    Case("mixtral-8x7b", "v5p:4x4x4", "v5p-128", {"fsdp": 64}, 4096),
)
# Runs MaxText's own ahead-of-time compiler, with its figures in JSON and the program that it made beside its output.
_MAXTEXT = """
import json, runpy, sys
import jax
told = jax.stages.Compiled.cost_analysis
def tell(compiled):
    memory, folder = compiled.memory_analysis(), sys.argv[-1].partition("=")[2]
    figures = [memory.argument_size_in_bytes, memory.total_allocation_bytes]
    json.dump(figures, open(folder + "/figures.json", "w"))
    open(folder + "/step.hlo", "w").write(compiled.as_text())
    return told(compiled)
jax.stages.Compiled.cost_analysis = tell
runpy.run_module("maxtext.trainers.pre_train.train_compile", run_name="__main__")
"""


@dataclasses.dataclass(frozen=True)
class Figures:
    """Bytes of one device: arguments, what is allocated beyond them, and what it sends in a step."""

    arguments: int
    temporaries: int
    sent: float


def ours(case: Case) -> Figures:
    """Meshloom's step."""
    where = parse_devices(case.devices)
    workload = TrainWorkload(where.count * case.length, case.length)
    config = resolve(case.model).config

    def module_of(remat: Any) -> Any:
        return abstract_module(dataclasses.replace(config, scan_layers=True, remat=remat), jnp.float32)

    found = plan_training(module_of, where, workload, mesh=case.mesh, remats=("full",))
    candidate = next(each for each in found if each.parts == 1)
    mesh = make_mesh(case.mesh, target_devices(where))
    lowered = lowered_step(config, mesh, candidate, workload, TrainConfig())
    compiled, report = compile_and_report(lowered, dict(mesh.shape), compiler_options(where))
    allocated = compiled.memory_analysis().total_allocation_bytes
    return Figures(report.argument_bytes, allocated - report.argument_bytes, report.sent_bytes)


def maxtext(case: Case, python: str) -> Figures:
    """MaxText's step, made by its own command."""
    find = "import importlib.util as u; print(u.find_spec('maxtext').submodule_search_locations[0])"
    package = subprocess.run([python, "-c", find], capture_output=True, text=True, check=True).stdout.strip()
    with tempfile.TemporaryDirectory() as folder:
        settings = {
            "model_name": case.model,
            "compile_topology": case.topology,
            "compile_topology_num_slices": 1,
            "per_device_batch_size": 1,
            "max_target_length": case.length,
            "remat_policy": "full",
            "enable_checkpointing": "false",
            "dataset_type": "synthetic",
            "run_name": "step",
        } | {f"ici_{axis}_parallelism": size for axis, size in case.mesh.items()}
        words = [f"{name}={value}" for name, value in settings.items()]
        command = [python, "-c", _MAXTEXT, f"{package}/configs/base.yml", *words, f"base_output_directory={folder}"]
        run = subprocess.run(command, capture_output=True, text=True)
        if not (figures := pathlib.Path(folder, "figures.json")).exists():
            raise SystemExit(f"MaxText did not compile {case.model}:\n{run.stderr[-2000:]}")
        arguments, allocated = json.loads(figures.read_text())
        program = parse(pathlib.Path(folder, "step.hlo").read_text())
    sent = sum(each.sent for each in collectives(program, case.mesh))
    return Figures(arguments, allocated - arguments, sent)


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--maxtext", required=True, metavar="PYTHON", help="of an environment that has MaxText")
    options.add_argument("--json", action="store_true")
    asked = options.parse_args()
    compilers_only()
    jax.config.update("jax_platforms", "cpu")
    table = Table(title="bytes per device and step, Meshloom / MaxText")
    for heading in ("case", "arguments, GB", "temporaries, GB", "ratio", "sent, GB", "ratio"):
        table.add_column(heading, justify="left" if heading == "case" else "right")
    results = []
    for case in track(CASES, "compiling, twice each", console=Console(stderr=True)):
        mesh = mesh_text(case.mesh)
        pair = ours(case), maxtext(case, asked.maxtext)
        results.append(
            dataclasses.asdict(case) | dict(zip(("meshloom", "maxtext"), map(dataclasses.asdict, pair), strict=True))
        )
        cells = [f"{case.model}, {case.devices}, {mesh}, rows of {case.length}"]
        cells.append(" / ".join(f"{each.arguments / 1e9:.2f}" for each in pair))
        for name in ("temporaries", "sent"):
            a, b = (getattr(each, name) for each in pair)
            cells += [f"{a / 1e9:.2f} / {b / 1e9:.2f}", f"{a / b:.2f}"]
        table.add_row(*cells)
    print(json.dumps(results)) if asked.json else Console().print(table)


if __name__ == "__main__":
    main()

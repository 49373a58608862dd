"""`verify`: a model's real training step on a mesh against the same step on one device.

The same weights and the same batch go through `make_step` and `compile_step` on both, and three things are compared:
the loss, the gradient of every parameter in every layer, and the parameters after one optimizer step. Gradients are
read from the step itself, by a link in front of the optimizer that keeps what passes through. The optimizer is held
against one device's, applied to the mesh's own gradients: Adam's first step is nearly a sign, which makes much of
little. How much two values may differ is measured, as `rounding` says.

Where they part, the forward pass is run once more with everything that a weight makes as its result (`taps`), on one
device and on the mesh, and the first that differs is named. If none does, what is named is the gradient that the
backward pass computes first: that of the last weight in forward order.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh

from meshloom.core.errors import ConfigError
from meshloom.core.topology import make_mesh
from meshloom.train.rounding import DRAWS, Expected, last_bits_moved
from meshloom.train.verify_program import Program, Subject
from meshloom.train.verify_report import Difference, MeshReport, Parting, VerifyReport


def verify(
    module: nnx.Module,
    meshes: Sequence[Mesh],
    *,
    length: int = 32,
    seed: int = 0,
    announce: Callable[[str], None] = lambda text: None,
) -> VerifyReport:
    """Compares the training step of `module` on each mesh with that on one device, in float32.

    Args:
        module: a decoder: from tokens `[B, T]` and `Packed` to logits `[B, T, V]` and something else; with weights, or
            abstract, to draw them from `seed`.
        meshes: each over the same number of devices, in all processes that take part.
        length: T, in tokens. There are two rows per device, of two documents and some padding each.
        announce: is told what comes next.
    Raises:
        ConfigError: no mesh, or one device computes a loss or gradient that is no finite number.
        ShardingError: a mesh does not suit the module.
    """
    if not meshes:
        raise ConfigError("verify compares meshes with one device; it was given none")
    subject = Subject.of(module, rows=2 * max(mesh.size for mesh in meshes), length=length, seed=seed)
    announce("one device")
    reference = Reference.measure(subject)
    reports = []
    for mesh in meshes:
        announce(", ".join(f"{axis}={size}" for axis, size in mesh.shape.items() if size > 1))
        reports.append(compare(reference, mesh))
    loss = float(reference.loss.tree["loss"])
    return VerifyReport(tuple(reports), loss, subject.size, meshes[0].size, jax.process_count())


@dataclasses.dataclass(frozen=True)
class Reference:
    """One device: its step, which can be run again; its loss and gradients; and weights whose last bits were moved."""

    program: Program
    loss: Expected
    gradient: Expected
    moved: Sequence[Any]

    @classmethod
    def measure(cls, subject: Subject) -> "Reference":
        """Runs the step with the weights as they are and moved.

        Raises:
            ConfigError: a result that is no finite number.
        """
        program = Program(subject, make_mesh({"data": 1}, jax.local_devices()[:1]))
        draws = np.random.default_rng(1)
        moved = [last_bits_moved(subject.params, draws) for _ in range(DRAWS)]
        outcomes = [program.run(params) for params in (subject.params, *moved)]
        losses = [{"loss": np.asarray(each.loss)} for each in outcomes]
        gradients = [jax.tree.map(np.asarray, each.gradient) for each in outcomes]
        for name, value in (losses[0] | subject.by_name(gradients[0])).items():
            if not np.isfinite(value).all():
                what = name if name == "loss" else f"gradient of {name}"
                raise ConfigError(f"the {what} is no finite number on one device, so there is nothing to compare with")
        gradient = Expected.of(gradients[0], gradients[1:], subject.by_name)
        return cls(program, Expected.of(losses[0], losses[1:]), gradient, moved)

    def updated(self, gradient: Any) -> Expected:
        """The parameters after this device's optimizer took `gradient`, which is on the host."""
        subject = self.program.subject
        optimizer = subject.optimizer

        @jax.jit
        def update(gradient: Any, params: Any) -> Any:
            updates, _ = optimizer.update(gradient, optimizer.init(params), params)
            return optax.apply_updates(params, updates)

        draws = np.random.default_rng(2)
        gradients = [gradient, *(last_bits_moved(gradient, draws) for _ in range(DRAWS))]
        first, *moved = (jax.tree.map(np.asarray, update(each, subject.params)) for each in gradients)
        return Expected.of(first, moved, subject.by_name)


def compare(reference: Reference, mesh: Mesh) -> MeshReport:
    """One mesh against one device."""
    subject = reference.program.subject
    program = Program(subject, mesh)
    outcome = program.run(subject.params)
    (loss,) = reference.loss.differences({"loss": outcome.loss})
    gradients = reference.gradient.differences(outcome.gradient)
    updates = reference.updated(program.gathered(outcome.gradient)).differences(outcome.params)
    report = MeshReport(dict(mesh.shape), loss, _worst(gradients), _worst(updates), None)
    if report.ok:
        return report
    return dataclasses.replace(report, parting=_parting(reference, program, report, gradients))


def _parting(reference: Reference, program: Program, report: MeshReport, gradients: Sequence[Difference]) -> Parting:
    forward = _forward(reference, program)
    if wrong := [each for each in forward if not each.ok]:
        return Parting("forward", wrong[0])
    if not report.loss.ok:
        return Parting("loss", report.loss)
    if wrong := [each for each in gradients if not each.ok]:
        last_use = {each.where: place for place, each in enumerate(forward)}
        return Parting("backward", max(wrong, key=lambda each: last_use.get(each.where, -1)))
    return Parting("optimizer", report.update)


def _forward(reference: Reference, program: Program) -> list[Difference]:
    """What weights make on one device and on the mesh, in forward order, as far as both programs make it."""
    subject, one_device = program.subject, reference.program.tapped()
    seen = program.tapped()(subject.params)
    runs = [one_device(params) for params in (subject.params, *reference.moved)]
    both = [name for name, value in runs[0].items() if name in seen and seen[name].shape == value.shape]
    # A dictionary would not keep its order through `jax.tree.map`.
    first, *moved = ([np.asarray(run[name]) for name in both] for run in runs)
    expected = Expected.of(first, moved, lambda values: dict(zip(both, values, strict=True)))
    found = expected.differences([seen[name] for name in both])
    return [dataclasses.replace(each, where=each.where.partition(" ")[0]) for each in found]


def _worst(differences: Sequence[Difference]) -> Difference:
    return max(differences, key=lambda each: each.excess)

"""Convolutions that XLA's partitioner computes wrongly on some meshes: found before they cost a training run.

Both were measured with jax 0.12.0 on simulated devices, with nothing of ours in the program.

* Where some axes of the mesh split a grouped convolution (its batch, its positions or its channels) and others leave it
  whole, the gradient of its weight is summed over the others as well: too large by as many times as these have devices.
  Values and the gradient of its input are right, and so is everything where each axis splits something or none does.
* Where `context` splits the positions of a convolution wider than one position, `tensor` the channels that it makes,
  and nothing the batch, its values are wrong near the ends of each device's positions and beyond.

It knows no other defects; `meshloom verify` compares a layout with one device.
"""

import math
from collections.abc import Mapping, Sequence

from meshloom.core.topology import BATCH_AXES
from meshloom.sharding.layout import Row
from meshloom.sharding.trace import Program
from meshloom.sharding.values import Step

# Splits what enters every layer, as the batch's axes do: by positions in a row.
_POSITIONS = ("context",)


def miscompiled(program: Program, rows: Sequence[Row], axes: Mapping[str, int]) -> dict[str, str]:
    """By name, the weights whose convolutions would be wrong, and how."""
    found: dict[str, str] = {}
    for step in program.steps:
        if step.equation is None or step.equation.primitive.name != "conv_general_dilated":
            continue
        for index in sorted(step.inputs[1].parameters):
            row = rows[index]
            if defect := _gradient(step, row, axes) or _values(step, row, axes):
                found[row.name] = defect
    return found


def _gradient(step: Step, row: Row, axes: Mapping[str, int]) -> str | None:
    splitting = {*BATCH_AXES, *_POSITIONS, *row.paired}
    times = math.prod(size for axis, size in axes.items() if axis not in splitting)
    if step.equation.params["feature_group_count"] == 1 or times in (1, math.prod(axes.values())):
        return None
    return (
        f"XLA's partitioner makes the gradient of this grouped convolution {times} times too large, because {times} "
        "devices do the same part of it. What would help: a mesh without a tensor axis, or a tensor axis that divides "
        "its channels"
    )


def _values(step: Step, row: Row, axes: Mapping[str, int]) -> str | None:
    def split(names: Sequence[str]) -> bool:
        return any(axes.get(axis, 1) > 1 for axis in names)

    spec = step.equation.params["dimension_numbers"].rhs_spec
    shape = step.equation.invars[1].aval.shape
    wide = any(shape[axis] > 1 for axis in spec[2:])
    if not (wide and split(_POSITIONS) and "tensor" in row.paired) or split(BATCH_AXES):
        return None
    return (
        "XLA's partitioner computes this convolution wrongly where context splits its positions, tensor its channels "
        "and nothing its batch. What would help: a mesh with data or fsdp, or without context"
    )

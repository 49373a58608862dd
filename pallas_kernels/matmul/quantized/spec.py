"""What a quantized product is told about its arrays: formats, what rows are rounded to, and which go together.

Shape legend: R rows, I contracted numbers, O columns of the result (rows of the weight).
"""

import dataclasses
from typing import Any, Literal

import jax
from jaxtyping import Array, Float

from meshloom.core.errors import MeshloomError
from meshloom.pallas_kernels.dispatch import Target, may_be_spread
from meshloom.pallas_kernels.matmul.qarray import QArray
from meshloom.pallas_kernels.matmul.quantized.formats import FORMATS, INT16, Format, round_to

Activations = Literal["float", "int16", "int8", "fp8", "mxfp4", "nvfp4"]

ROUNDED = {
    "int16": Format("int16", "int32", "float32", INT16, 1, None),
    "int8": FORMATS["int8"],
    "fp8": FORMATS["fp8"],
    "mxfp4": FORMATS["mxfp4"],
    "nvfp4": FORMATS["nvfp4"],
}
# By the dtypes of values and scales: what the rows may be rounded to, the first being what they are by default.
_TOGETHER = {
    ("int8", "float32"): ("int16", "int8", "float"),
    ("int4", "float32"): ("int16", "int8", "float"),
    ("float8_e4m3fn", "float32"): ("float", "fp8"),
    ("float4_e2m1fn", "float8_e8m0fnu"): ("float", "mxfp4"),
    ("float4_e2m1fn", "float8_e4m3fn"): ("float", "nvfp4"),
}


@dataclasses.dataclass(frozen=True)
class MatmulSpec:
    """What the choice of an implementation may look at.

    Attributes:
        x, w: shapes `[..., I]` and `[O, I]`.
        dtype: of x. values: dtype of the weight's values. block: rows and columns of the weight that share a scale.
        activations: what the rows are rounded to.
        spread: XLA may spread the arrays over devices.
    """

    x: tuple[int, ...]
    w: tuple[int, ...]
    dtype: str = "float32"
    values: str = "int8"
    block: tuple[int, int] = (1, 0)
    activations: str = "int16"
    spread: bool = False

    @classmethod
    def of(cls, x: Any, w: QArray, activations: str | None, target: Target) -> "MatmulSpec":
        """The spec of a call, from its arrays.

        Raises:
            MeshloomError: sizes differ, the weight is no matrix, or its format does not go with `activations`.
        """
        if x.shape[-1] != w.shape[-1]:
            raise MeshloomError(f"quantized_matmul: rows of x have {x.shape[-1]} numbers, rows of w {w.shape[-1]}")
        if len(w.shape) != 2:
            raise MeshloomError(f"quantized_matmul: w is one matrix [O, I]; got the shape {w.shape}")
        values = str(w.values.dtype)
        choices = _TOGETHER.get((values, str(w.scales.dtype)))
        if choices is None:
            raise MeshloomError(f"quantized_matmul: values in {values} with scales in {w.scales.dtype} are no format")
        if activations is None:
            activations = "float" if target.platform in ("tpu", "gpu", "cuda") else choices[0]
        if activations not in choices:
            raise MeshloomError(
                f"quantized_matmul: rows in {activations!r} do not go with weights in {values} whose scales are "
                f"{w.scales.dtype}; {', '.join(choices)} do"
            )
        return cls(x.shape, w.shape, str(x.dtype), values, w.block, activations, may_be_spread())

    @property
    def groups(self) -> int:
        """Scales along a row of the weight."""
        return self.w[1] // max(self.block[1], 1)


def round_rows(x: Float[Array, "R I"], activations: str, columns: int) -> QArray:
    """Every row rounded with scales of its own, so that its result depends on that row alone.

    Args:
        activations: one of `ROUNDED`.
        columns: numbers of a row of the weight that share a scale. Rows in fp8 have a scale for as many.
    """
    format = ROUNDED[activations]
    if activations == "fp8":
        format = dataclasses.replace(format, columns=columns)
    if activations != "nvfp4":
        return round_to(x, dataclasses.replace(format, rows=1))
    each_row = round_to(x[:, None, :], format)  # a stack of matrices of one row, each with a scale above its scales
    return jax.tree.map(lambda leaf: leaf[:, 0], each_row)

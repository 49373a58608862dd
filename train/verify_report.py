"""What a verification found: per mesh the largest differences, what rounding explains of them, and where they begin."""

import dataclasses
import math
from typing import Any, Literal

from rich.table import Table

from meshloom.core.topology import mesh_text


@dataclasses.dataclass(frozen=True)
class Difference:
    """The element in which a mesh and one device differ most, for what rounding would explain.

    Attributes:
        where: a parameter under its name in the unrolled model, such as `layers.3.mlp.up.weight`, or "loss".
        one_device, on_mesh: the two values. tolerance: the difference that rounding explains.
    """

    where: str
    one_device: float
    on_mesh: float
    tolerance: float

    @property
    def size(self) -> float:
        """Absolute difference; infinite where either value is no number."""
        size = abs(self.one_device - self.on_mesh)
        return math.inf if math.isnan(size) else size

    @property
    def ok(self) -> bool:
        """Whether rounding explains it."""
        return self.size <= self.tolerance

    @property
    def excess(self) -> float:
        """The difference in units of the tolerance: more than 1 is an error."""
        return self.size / self.tolerance if self.tolerance else math.inf if self.size else 0.0

    def to_json(self) -> dict[str, Any]:
        """Its fields and `difference`; None stands for what is no finite number."""
        values = {"one_device": self.one_device, "on_mesh": self.on_mesh, "difference": self.size}
        finite = {name: value if math.isfinite(value) else None for name, value in values.items()}
        return {"where": self.where, **finite, "tolerance": self.tolerance}


# Of a training step, in its order.
Stage = Literal["forward", "loss", "backward", "optimizer"]


@dataclasses.dataclass(frozen=True)
class Parting:
    """Where two programs part first.

    Attributes:
        stage: of the step. In the forward pass `at` is what the first operation with that weight makes, in the backward
            pass its gradient, in the optimizer its new value.
    """

    stage: Stage
    at: Difference

    def __str__(self) -> str:
        what = {
            "forward": f"forward pass, at {self.at.where}",
            "loss": "loss, after logits that agree",
            "backward": f"backward pass, at the gradient of {self.at.where}",
            "optimizer": f"optimizer, at {self.at.where}",
        }[self.stage]
        return f"{what}: {self.at.one_device:.7g} on one device, {self.at.on_mesh:.7g} on the mesh"


@dataclasses.dataclass(frozen=True)
class MeshReport:
    """One mesh against one device.

    Attributes:
        mesh: axis -> size. loss: in nats per token, on the mesh.
        gradient: of the parameter whose gradient differs most for its tolerance.
        update: of the parameter that differs most after a step with the mesh's own gradients.
        parting: None if all agree.
    """

    mesh: dict[str, int]
    loss: Difference
    gradient: Difference
    update: Difference
    parting: Parting | None

    @property
    def ok(self) -> bool:
        """Whether rounding explains all differences."""
        return self.loss.ok and self.gradient.ok and self.update.ok

    def to_json(self) -> dict[str, Any]:
        """The mesh's entry in `VerifyReport.to_json`."""
        parting = self.parting and {"stage": self.parting.stage, **self.parting.at.to_json()}
        parts = {name: getattr(self, name).to_json() for name in ("loss", "gradient", "update")}
        return {"mesh": self.mesh, "ok": self.ok, **parts, "first_parting": parting}


@dataclasses.dataclass(frozen=True)
class VerifyReport:
    """A model's training step on several meshes against one device.

    Attributes:
        devices, processes: how many there were. parameters: elements of the model that was run.
        loss: of one device, in nats per token.
        shrunk: field -> (as the model has it, as it was run), of a model that was made small to be verified.
    """

    meshes: tuple[MeshReport, ...]
    loss: float
    parameters: int
    devices: int
    processes: int
    shrunk: dict[str, tuple[Any, Any]] = dataclasses.field(default_factory=dict)

    @property
    def ok(self) -> bool:
        """Whether every mesh agrees with one device."""
        return all(mesh.ok for mesh in self.meshes)

    @property
    def program(self) -> str:
        """What was run, in words."""
        size = f"{self.parameters:,} parameters"
        if not self.shrunk:
            return f"the model itself, {size}"
        changes = ", ".join(f"{name} {_text(old)} -> {_text(new)}" for name, (old, new) in self.shrunk.items())
        return f"a model of the same program with {size}: {changes}"

    def to_json(self) -> dict[str, Any]:
        """What `meshloom verify --json` prints."""
        return {
            "ok": self.ok,
            "devices": self.devices,
            "processes": self.processes,
            "parameters": self.parameters,
            "shrunk": {name: list(change) for name, change in self.shrunk.items()},
            "loss": self.loss,
            "meshes": [mesh.to_json() for mesh in self.meshes],
        }

    def table(self, title: str) -> Table:
        """A row per mesh: differences, and in brackets what rounding explains."""
        table = Table(title=title, caption=f"Verified on {self.program}.", caption_justify="left")
        for heading in ("mesh", "loss", "gradient, worst", "update, worst", "verdict"):
            table.add_column(heading, overflow="fold")
        for mesh in self.meshes:
            name = mesh_text(mesh.mesh)
            cells = (f"{each.size:.1e} ({each.tolerance:.1e})" for each in (mesh.loss, mesh.gradient, mesh.update))
            loss, gradient, update = cells
            verdict = "[green]same[/]" if mesh.ok else f"[red]parts[/] in the {mesh.parting}"
            table.add_row(name, loss, f"{gradient} {mesh.gradient.where}", f"{update} {mesh.update.where}", verdict)
        return table


def _text(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)

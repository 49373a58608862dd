"""Candidates for people: the table behind `meshloom plan --explain-cost`, and a picture of memory and time."""

import dataclasses
import os
import pathlib
from collections.abc import Mapping, Sequence

from rich.table import Table

from meshloom.core.errors import ConfigError
from meshloom.core.program_report import ProgramReport
from meshloom.core.topology import mesh_text
from meshloom.sharding.cheapest import Purchase, RequestKind
from meshloom.sharding.explain import bytes_text
from meshloom.sharding.planner import Candidate
from meshloom.sharding.serving import ServeCandidate


def candidate_table(candidates: Sequence[Candidate], *, title: str) -> Table:
    """One line per candidate, best first."""
    table = Table(title=title)
    for heading in ("mesh", "remat"):
        table.add_column(heading)
    for heading in ("rows per device", "parts", "step", "MFU", "memory per device", "compiled", "fits"):
        table.add_column(heading, justify="right")
    for each in candidates:
        axes = mesh_text(each.mesh) or "one device"
        memory = f"{_size(each.memory.total)} of {_size(each.hbm_bytes)}"
        compiled = "" if each.compiled_bytes is None else _size(each.compiled_bytes)
        if each.compiled_step_time_s is not None:
            compiled += f", {_time(each.compiled_step_time_s)}"
        numbers = str(each.microbatch), str(each.parts), _time(each.step_time_s), f"{each.mfu:.1%}", memory
        table.add_row(axes, each.remat, *numbers, compiled, "yes" if each.fits else "no")
    return table


def compiled_table(candidates: Sequence[Candidate | ServeCandidate]) -> Table:
    """Collectives per device and step of the compiled candidates: predicted beside those in the compiled program."""
    table = Table(title="collectives per device and step, bytes of their results")
    for heading in ("mesh", "kind"):
        table.add_column(heading)
    for heading in ("predicted", "compiled", "over", "runs", "memory", "compile time"):
        table.add_column(heading, justify="right")
    for each in candidates:
        if isinstance(each, Candidate):
            if each.compiled is not None:
                _add_collectives(table, label(each), each.breakdown.bytes_by_kind, each.compiled)
            continue
        for step, report in (each.compiled or {}).items():
            tokens = each.batch if step == "decode" else each.compiled_tokens
            name = f"{serving_label(each)}: {step}, {tokens} tokens"
            _add_collectives(table, name, each.predicted_bytes(step), report)
    return table


def _add_collectives(table: Table, name: str, predicted: Mapping[str, float], report: ProgramReport) -> None:
    actual = report.bytes_by_kind
    figures = _size(report.peak_bytes), _time(report.compile_seconds)
    for number, kind in enumerate(sorted({*predicted, *actual}) or ["none"]):
        runs = [some for some in report.collectives if some.kind == kind]
        over = ", ".join(dict.fromkeys("+".join(some.axes) for some in runs))
        table.add_row(
            name if number == 0 else "",
            kind,
            _size(predicted.get(kind, 0)),
            _size(actual.get(kind, 0)),
            over,
            f"{sum(some.count for some in runs):.0f}",
            *(figures if number == 0 else ("", "")),
        )
    table.add_section()


def cost_table(candidate: Candidate) -> Table:
    """Where one candidate's step time and memory go, line by line."""
    breakdown, table = candidate.breakdown, Table(title=f"predicted cost of {label(candidate)}")
    for heading in ("what", "limit or level"):
        table.add_column(heading)
    for heading in ("FLOPs", "bytes", "time"):
        table.add_column(heading, justify="right")
    for group in breakdown.groups:
        table.add_row(group.name, group.bound, f"{group.flops:.3g}", _size(group.bytes), _time(group.seconds))
    table.add_row("optimizer update", "memory", "", "", _time(breakdown.optimizer_s), end_section=True)
    for each in breakdown.collectives:
        name = f"{each.kind} of {each.purpose} over {each.axis}, {each.count:.0f} x"
        table.add_row(name, each.level, "", _size(each.bytes), _time(each.seconds))
    table.add_row("collectives not behind compute", "", "", "", _time(breakdown.exposed_s), end_section=True)
    for name, amount in dataclasses.asdict(candidate.memory).items():
        if amount:
            table.add_row(f"memory: {name.replace('_', ' ')}", "", "", _size(amount), "")
    total = f"{_size(candidate.memory.total)} of {_size(candidate.hbm_bytes)}"
    table.add_row("step", "fits" if candidate.fits else "does not fit", "", total, _time(candidate.step_time_s))
    return table


def serving_table(candidates: Sequence[ServeCandidate], *, title: str) -> Table:
    """One line per way to serve, best first."""
    table = Table(title=title)
    table.add_column("mesh")
    for heading in (
        "batch",
        "KV",
        "weights",
        "first token",
        "per token",
        "output tok/s",
        "memory per device",
        "compiled",
        "in time",
    ):
        table.add_column(heading, justify="right")
    for each in candidates:
        axes = mesh_text(each.mesh) or "one device"
        memory = f"{_size(each.memory.total)} of {_size(each.hbm_bytes)}"
        times = _time(each.ttft_s), _time(each.tpot_s), f"{each.tokens_per_s:,.0f}"
        compiled = "" if each.compiled_bytes is None else _size(each.compiled_bytes)
        usable = "yes" if each.fits and each.meets_targets else "no"
        table.add_row(axes, str(each.batch), each.kv_dtype, each.weight_dtype, *times, memory, compiled, usable)
    return table


def purchase_table(purchase: Purchase, request_mix: Sequence[RequestKind], *, model: str) -> Table:
    """What to rent, and which share of each kind of requests goes where."""
    table = Table(title=f"cheapest for {model}: {purchase.cost_per_hour:,.2f} US dollars per hour, predicted")
    table.add_column("rent")
    for kind in request_mix:
        heading = f"{kind.input_length} in, {kind.output_length} out, {kind.per_second:g}/s"
        table.add_column(heading, justify="right")
    for name, count in purchase.counts.items():
        table.add_row(f"{count} x {name}", *(f"{share.get(name, 0):.0%}" for share in purchase.shares))
    return table


def check_chart(path: pathlib.Path, what: str = "chart") -> None:
    """Refuses what cannot become a picture, before minutes of work go into it; `what` it is, for the message.

    Raises:
        ConfigError: the folder does not exist or cannot be written to, or the suffix is of no picture format.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    formats = FigureCanvasAgg.filetypes
    if path.suffix.lstrip(".").lower() not in formats:
        raise ConfigError(
            f"cannot write the {what} to {path}: end it in .png, or in one of {', '.join(sorted(formats))}"
        )
    if not os.access(path.parent, os.W_OK):
        raise ConfigError(f"cannot write the {what} to {path}: there is no folder {path.parent} to write to")


def save_chart(candidates: Sequence[Candidate], path: str | pathlib.Path) -> None:
    """A PNG with a bar per candidate: its memory stack against the device's, and its step time."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 1.6 + 0.45 * len(candidates)), layout="constrained")
    FigureCanvasAgg(figure)
    memory, time = figure.subplots(1, 2, sharey=True)
    names = [label(each) for each in candidates]
    stacks = [dataclasses.asdict(each.memory) for each in candidates]
    parts = [name for name in stacks[0] if any(stack[name] for stack in stacks)]
    _stack(memory, names, {name: [stack[name] / 2**30 for stack in stacks] for name in parts})
    compiled = {label(each): each.compiled_bytes / 2**30 for each in candidates if each.compiled_bytes is not None}
    if compiled:
        memory.plot(list(compiled.values()), list(compiled), "kD", label="compiled")
    memory.axvline(candidates[0].hbm_bytes / 2**30, color="black", linestyle="--", label="device")
    memory.set_xlabel("memory per device (GiB)")
    groups = list(dict.fromkeys(group.name for each in candidates for group in each.breakdown.groups))
    seconds = {
        name: [sum(g.seconds for g in each.breakdown.groups if g.name == name) for each in candidates]
        for name in groups
    }
    seconds["optimizer"] = [each.breakdown.optimizer_s for each in candidates]
    seconds["exposed collectives"] = [each.breakdown.exposed_s for each in candidates]
    _stack(time, names, seconds)
    time.set_xlabel("step time (s)")
    memory.invert_yaxis()
    for axes in (memory, time):
        axes.legend(fontsize="x-small", loc="upper center", bbox_to_anchor=(0.5, -0.2), ncols=3)
    figure.suptitle("predicted; diamonds are the compiler's" if compiled else "predicted, not compiled")
    try:
        figure.savefig(path, dpi=120)
    except OSError as error:
        raise ConfigError(f"cannot write the chart to {path}: {error}") from error


def label(candidate: Candidate) -> str:
    """`fsdp=64,tensor=4 full x2`: mesh, remat, rows per device and part."""
    axes = mesh_text(candidate.mesh) or "one device"
    return f"{axes} {candidate.remat} x{candidate.microbatch}"


def serving_label(candidate: ServeCandidate) -> str:
    """`tensor=4 int8 x64`: mesh, weights, sequences of one replica."""
    return f"{mesh_text(candidate.mesh) or 'one device'} {candidate.weight_dtype} x{candidate.batch}"


def _stack(axes, names: list[str], parts: dict[str, list[float]]) -> None:
    left = [0.0] * len(names)
    for name, values in parts.items():
        axes.barh(names, values, left=left, label=name.replace("_", " "))
        left = [start + value for start, value in zip(left, values, strict=True)]


def _size(count: float | int) -> str:
    return bytes_text(round(count))


def _time(seconds: float) -> str:
    return f"{seconds:.3g} s" if seconds >= 1 else f"{seconds * 1e3:.3g} ms"

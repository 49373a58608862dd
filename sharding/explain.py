"""Layouts for people: the table of `meshloom plan`, and why one parameter lies as it does."""

from rich.table import Table

from meshloom.sharding.layout import Layout, Row


def explain(layout: Layout, name: str) -> str:
    """Spec, rule, bytes and reasons of the parameter `name`, dimension by dimension.

    Raises:
        ShardingError: there is no such parameter; the message lists the nearest names.
    """
    row = layout.row(name)
    mesh = " ".join(f"{axis}={size}" for axis, size in layout.mesh.shape.items())
    lines = [
        f"{row.name}  {row.dtype}{list(row.shape)}  on {mesh}",
        f"  {spec_text(row)}  by the {row.rule} rule"
        if row.rule != "replicated"
        else f"  {spec_text(row)}  replicated",
        f"  {bytes_text(row.bytes_per_device)} of {bytes_text(row.bytes_total)} per device",
    ]
    for dimension, choice in enumerate(row.choices):
        axes = ", ".join(choice.axes) or "whole"
        lines.append(f"  dimension {dimension} ({choice.size}, {choice.role}) {axes}: {choice.reason}")
    return "\n".join(lines)


def table(layout: Layout) -> Table:
    """All parameters: name, shape, roles, spec, rule, bytes per device."""
    axes = " ".join(f"{axis}={size}" for axis, size in layout.mesh.shape.items())
    result = Table(
        title=f"derived layout on {axes}", caption=f"{bytes_text(layout.bytes_per_device)} of parameters per device"
    )
    for heading in ("parameter", "shape", "roles", "spec", "rule"):
        result.add_column(heading, overflow="fold")
    result.add_column("per device", justify="right")
    for row in layout.rows:
        shape = " x ".join(map(str, row.shape))
        result.add_row(row.name, shape, " ".join(row.roles), spec_text(row), row.rule, bytes_text(row.bytes_per_device))
    return result


def spec_text(row: Row) -> str:
    """`P(tensor, None)`, `P((fsdp, context), None)`."""
    entries = (", ".join(choice.axes) or "None" for choice in row.choices)
    texts = (f"({entry})" if ", " in entry else entry for entry in entries)
    return f"P({', '.join(texts)})"


def bytes_text(count: int) -> str:
    """Bytes with a binary unit and three significant digits: `1.50 MiB`."""
    size, units = float(count), ["B", "KiB", "MiB", "GiB", "TiB"]
    while size >= 1024 and len(units) > 1:
        size /= 1024
        units.pop(0)
    return f"{count} B" if units[0] == "B" else f"{size:.3g} {units[0]}"

"""How a module's weights are spread over a mesh: derived from its traced program, never from names."""

from meshloom.sharding.derive import derive
from meshloom.sharding.explain import explain, table
from meshloom.sharding.layout import Choice, Layout, Row

__all__ = ["Choice", "Layout", "Row", "derive", "explain", "table"]

"""Every test runs on eight simulated CPU devices, with all jaxtyping annotations executed."""

import ast
import os

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["JAX_NUM_CPU_DEVICES"] = "8"

from jaxtyping import _import_hook, install_import_hook


class Outermost(_import_hook.JaxtypingTransformer):
    """Leaves functions within functions alone: their checks would be made anew at every call of the outer one."""

    def visit_FunctionDef(self, node: ast.FunctionDef):  # noqa: N802
        body, node.body = node.body, []
        super().visit_FunctionDef(node)
        node.body = body
        return node

    def visit_AsyncFunctionDef(self, node: ast.AsyncFunctionDef):  # noqa: N802
        return node


_import_hook.JaxtypingTransformer = Outermost  # the hook takes no transformer
install_import_hook("meshloom", "beartype.beartype")

"""Every test runs on eight simulated CPU devices, with all jaxtyping annotations executed.

Programs are compiled without most of LLVM's optimization, which takes longer than they run and is no part of what they
mean or send. Processes that tests start (commands, servers, runs) compile as they do for users.
"""

import ast
import os

import pytest

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["JAX_NUM_CPU_DEVICES"] = "8"

import jax
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
jax.config.update("jax_disable_most_optimizations", True)


@pytest.fixture(scope="session", autouse=True)
def block_sizes_are_those_of_the_package(tmp_path_factory):
    """Whatever `meshloom tune` found on this machine, programs that tests compile are everyone's."""
    from meshloom.pallas_kernels import tuning  # once its annotations are executed

    nothing = tmp_path_factory.mktemp("nothing_tuned")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tuning, "cache_folder", lambda: nothing)
        yield

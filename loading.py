"""`load`: a model from any source, its weights placed by the layout that `sharding` derives from its trace."""

from typing import Any

from flax import nnx
from jax.sharding import Mesh

from meshloom.models.language_model import LanguageModel
from meshloom.models.language_model import load as load_model
from meshloom.sharding.derive import derive_served


def load(
    source: str,
    *,
    dtype: Any = None,
    mesh: Mesh | None = None,
    scan_layers: bool | None = None,
    quantize: str | None = None,
) -> LanguageModel:
    """Loads a language model, tensor by tensor, onto one device or spread over a mesh.

    Args:
        source: "smollm2" (the embedded default), a preset such as "llama3-8b" (random weights), a Hugging Face id or
            folder, a `.gguf` file, or the folder of a training run.
        dtype: of the weights and so of the computation; None is float32 on the CPU and the files' own elsewhere.
        mesh: from `make_mesh`; every weight goes straight to its shards, by specs derived from the traced program.
        scan_layers: layers stacked and scanned, or unrolled, which decodes faster; None is unrolled, for a training
            run as it was trained.
        quantize: "int8" holds the weights in int8, a quarter of float32's memory; "auto" does so on a CPU if the files
            hold 8 bits or less themselves; None never.
    Raises:
        ModelError: the source is unknown or its files are not what they should be; every problem is named.
    """

    def placement(module: nnx.Module, example_inputs: tuple[Any, ...]) -> Any:
        return derive_served(module, mesh, *example_inputs).shardings

    options: dict[str, Any] = {"dtype": dtype, "scan_layers": scan_layers, "quantize": quantize}
    lm = load_model(source, placement=None if mesh is None else placement, **options)
    lm.mesh = mesh
    return lm

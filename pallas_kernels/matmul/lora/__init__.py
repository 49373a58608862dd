"""Rows of one batch through different low-rank adapters, which live in pages."""

import jax
from jaxtyping import Array, Float, Int

from meshloom.pallas_kernels.dispatch import Implementation, Target, select
from meshloom.pallas_kernels.matmul.lora import mosaic_tpu
from meshloom.pallas_kernels.matmul.lora.by_adapter import lora_matmul_by_adapter
from meshloom.pallas_kernels.matmul.lora.reference import lora_matmul_reference
from meshloom.pallas_kernels.matmul.lora.spec import LoraPages, LoraSpec

__all__ = ["LoraPages", "LoraSpec", "lora_matmul"]


def _by_adapter_why_not(spec: LoraSpec, target: Target) -> str | None:
    return None if spec.rows and spec.adapters and spec.most_rank else "there is nothing to multiply"


LORA_MATMUL = (
    Implementation("mosaic_tpu", mosaic_tpu.lora_matmul_mosaic_tpu, mosaic_tpu.why_not),
    Implementation("by_adapter", lora_matmul_by_adapter, _by_adapter_why_not),
    Implementation("reference", lora_matmul_reference, lambda spec, target: None),
)


@jax.named_scope("lora_matmul")
def lora_matmul(
    x: Float[Array, "M K"], lora: LoraPages, adapters: Int[Array, "M"], *, implementation: str | None = None
) -> Float[Array, "M N"]:
    """What each row's adapter adds to the product of its weight: scale x A^T B^T, zero where there is no adapter.

    Differentiable in x and in the pages, so that several adapters can be trained in one batch: its gradients, and where
    no kernel runs the product itself, are products of `grouped_matmul`, and run where and as that does.

    Args:
        lora: the adapters of this weight.
        adapters: the adapter of each row, in any order; a number outside of [0, L) is none, and such a row's result is
            exactly zero, whatever it holds.
        implementation: by name, for tests and benches; None chooses.
    Returns:
        In the common dtype of x and the pages.
    Source: Sheng et al. 2024, S-LoRA, sections 5.1 and 5.3; Chen et al. 2023, Punica, section 4 (rows by adapter).
    Raises MeshloomError when sizes differ, or the requested implementation declines.
    """
    spec = LoraSpec.of(x, lora, adapters)
    return select("lora_matmul", LORA_MATMUL, spec, Target.of_mesh(), implementation).run(x, lora, adapters)

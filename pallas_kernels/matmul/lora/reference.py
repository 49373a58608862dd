"""What a product with paged adapters means, adapter by adapter, in float32."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from meshloom.pallas_kernels.matmul.lora.spec import LoraPages


def lora_matmul_reference(x: Float[Array, "M K"], lora: LoraPages, adapters: Int[Array, "M"]) -> Float[Array, "M N"]:
    """Every row times the matrices of its adapter."""
    out = jnp.zeros((x.shape[0], lora.b.shape[1]))
    for adapter in range(lora.table.shape[0]):
        a, b = (each[0].astype(jnp.float32) for each in lora.of(jnp.array([adapter])))
        own = (adapters == adapter)[:, None]
        with jax.default_matmul_precision("highest"):
            y = lora.scales[adapter] * (jnp.where(own, x.astype(jnp.float32), 0.0) @ a.T) @ b
        out = jnp.where(own, y, out)
    return out.astype(jnp.result_type(x, lora.a, lora.b))

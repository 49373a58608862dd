"""A scanned and an unrolled stack are the same model; remat changes memory, not numbers; rows do not mix."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from meshloom.core.errors import ModelError
from meshloom.models.config import DecoderConfig, MoEConfig
from meshloom.models.decoder import Decoder
from meshloom.models.sequence import Packed
from meshloom.models.stack import parameter_slots

TINY = DecoderConfig(
    vocab_size=61, d_model=24, n_layers=5, n_heads=4, n_kv_heads=2, head_dim=8, d_ff=40, window=6, global_every=2
)


def moved(source: Decoder, config: DecoderConfig) -> Decoder:
    """A model of `config` with the weights of `source`, carried over by canonical name."""
    target = Decoder(config, rngs=nnx.Rngs(1))
    from_slots, to_slots = parameter_slots(source), parameter_slots(target)
    from_state, to_state = (dict(nnx.to_flat_state(nnx.state(m, nnx.Param))) for m in (source, target))
    assert from_slots.keys() == to_slots.keys()
    for name, slot in to_slots.items():
        origin = from_slots[name]
        value = from_state[origin.path][...]
        value = value if origin.index is None else value[origin.index]
        leaf = to_state[slot.path]
        leaf[...] = value if slot.index is None else leaf[...].at[slot.index].set(value)
    return target


def test_period_is_the_shortest_repeating_pattern():
    assert TINY.period == 2
    assert dataclasses.replace(TINY, window=None, global_every=0).period == 1
    assert dataclasses.replace(TINY, global_every=3).period == 3
    assert [spec.window for spec in TINY.layers] == [6, None, 6, None, 6]


def test_scanned_and_unrolled_stacks_agree_with_the_same_weights():
    unrolled = Decoder(TINY, rngs=nnx.Rngs(0))
    scanned = moved(unrolled, dataclasses.replace(TINY, scan_layers=True))
    assert (len(scanned.layers.scanned), len(scanned.layers.unrolled)) == (2, 1)
    tokens = jnp.arange(2 * 13).reshape(2, 13) % 61
    np.testing.assert_allclose(unrolled(tokens)[0], scanned(tokens)[0], atol=1e-5)


@pytest.mark.parametrize("scan", [False, True])
def test_remat_leaves_gradients_unchanged(scan):
    tokens = jnp.arange(2 * 9).reshape(2, 9) % 61

    def gradients(remat: str):
        model = Decoder(dataclasses.replace(TINY, scan_layers=scan, remat=remat), rngs=nnx.Rngs(0))
        graphdef, state = nnx.split(model)
        return jax.jit(jax.grad(lambda s: jnp.sin(nnx.merge(graphdef, s)(tokens)[0]).sum()))(state)

    plain = gradients("none")
    for remat in ("full", "dots"):
        for one, two in zip(jax.tree.leaves(plain), jax.tree.leaves(gradients(remat)), strict=True):
            np.testing.assert_allclose(one, two, rtol=1e-4, atol=1e-5)


def test_an_experts_row_does_not_depend_on_its_neighbours():
    model = Decoder(dataclasses.replace(TINY, moe=MoEConfig(4, 2, 16)), rngs=nnx.Rngs(0))
    tokens = jnp.arange(3 * 7).reshape(3, 7) % 61
    together, _ = model(tokens)
    np.testing.assert_allclose(together[1:2], model(tokens[1:2])[0], atol=1e-5)


def test_packed_documents_are_computed_as_if_alone():
    model = Decoder(TINY, rngs=nnx.Rngs(0))
    first, second = jnp.arange(8) % 61, (jnp.arange(5) + 20) % 61
    row = jnp.concatenate([first, second, jnp.zeros(3, jnp.int32)])[None]
    layout = Packed(
        jnp.asarray([[1] * 8 + [2] * 5 + [0] * 3], jnp.int32),
        jnp.asarray([[*range(8), *range(5), 0, 0, 0]], jnp.int32),
    )
    packed, _ = model(row, layout)
    np.testing.assert_allclose(packed[0, :8], model(first[None])[0][0], atol=1e-5)
    np.testing.assert_allclose(packed[0, 8:13], model(second[None])[0][0], atol=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"n_kv_heads": 3}, "n_kv_heads=3 must divide n_heads=4"),
        ({"n_layers": 0}, "n_layers must be at least 1; got 0"),
        ({"window": 0}, "window is a number of tokens >= 1, or None; got 0"),
        ({"window": None}, "global_every=2 needs a window"),
        ({"shared_norm": True}, "only meaningful with parallel"),
    ],
)
def test_nonsense_configurations_are_refused_with_their_numbers(change, message):
    with pytest.raises(ModelError, match=message):
        dataclasses.replace(TINY, **change)


def test_experts_chosen_must_exist():
    with pytest.raises(ModelError, match=r"top_k must lie in 1\.\.n_experts=4; got 5"):
        MoEConfig(4, 5, 16)

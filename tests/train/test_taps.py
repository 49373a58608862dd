"""Taps are what weights make where they first meet an activation, layer by layer, in forward order."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from meshloom.models.config import DecoderConfig
from meshloom.models.decoder import Decoder
from meshloom.train.taps import tapped

LAYERS, WIDTH = 3, 4
PARAMS = {
    "bias": jax.random.normal(jax.random.key(0), (LAYERS, WIDTH)),
    "last": jax.random.normal(jax.random.key(1), (WIDTH,)),
    "weight": jax.random.normal(jax.random.key(2), (LAYERS, WIDTH, WIDTH)),
}
X = jax.random.normal(jax.random.key(3), (2, WIDTH))


def scanned(params, x):
    def layer(x, each):
        weight, bias = each
        return jnp.tanh(x @ (2 * weight).T + bias), None

    x, _ = jax.lax.scan(layer, x, (params["weight"], params["bias"]))
    return x * params["last"]


def by_hand() -> list[tuple[str, np.ndarray]]:
    x, made = X, []
    for i in range(LAYERS):
        product = x @ (2 * PARAMS["weight"][i]).T
        made += [(f"weight[{i}]", product), (f"bias[{i}]", product + PARAMS["bias"][i])]
        x = jnp.tanh(made[-1][1])
    return [*made, ("last", x * PARAMS["last"])]


@pytest.mark.parametrize(
    "forward",
    [scanned, jax.jit(scanned), jax.checkpoint(scanned)],
    ids=["plain", "jit", "checkpoint"],
)
def test_a_scan_has_taps_of_every_layer_in_order(forward):
    taps = jax.jit(tapped(forward, sorted(PARAMS)))(PARAMS, X)
    assert [tap.name for tap in taps] == [name for name, _ in by_hand()]
    for tap, (_, value) in zip(taps, by_hand(), strict=True):
        np.testing.assert_allclose(tap.value, value, atol=1e-5)


def test_a_reversed_scan_runs_its_layers_from_the_last():
    def forward(params, x):
        return jax.lax.scan(lambda x, w: (x @ w, None), x, params["weight"], reverse=True)[0]

    taps = tapped(forward, ["weight"])({"weight": PARAMS["weight"]}, X)
    assert [tap.name for tap in taps] == ["weight[2]", "weight[1]", "weight[0]"]
    np.testing.assert_allclose(taps[0].value, X @ PARAMS["weight"][2], atol=1e-5)


def test_what_is_made_of_weights_or_of_activations_alone_is_no_tap():
    def forward(params, x):
        return jnp.exp(x) @ jnp.tanh(params["a"] @ params["b"])

    square = jnp.eye(WIDTH)
    (tap,) = tapped(forward, ["a", "b"])({"a": square, "b": square}, X)
    assert tap.name == "a"
    np.testing.assert_allclose(tap.value, forward({"a": square, "b": square}, X), atol=1e-6)


@pytest.mark.parametrize("scan_layers", [True, False], ids=["scanned", "unrolled"])
def test_every_weight_of_a_decoder_has_a_tap_and_the_last_is_the_logits(scan_layers):
    sizes = {"vocab_size": 32, "d_model": 16, "n_layers": 2, "n_heads": 2, "n_kv_heads": 1, "head_dim": 8, "d_ff": 32}
    module = Decoder(DecoderConfig(**sizes, scan_layers=scan_layers, tie_embeddings=False), rngs=nnx.Rngs(0))
    graphdef, params = nnx.split(module, nnx.Param)
    names = [".".join(map(str, path)) for path, _ in nnx.to_flat_state(params)]
    tokens = jnp.arange(10).reshape(2, 5)
    taps = jax.jit(tapped(lambda params, tokens: nnx.merge(graphdef, params)(tokens), names))(params, tokens)
    order = [tap.name for tap in taps]
    assert {name.partition("[")[0] for name in order} == set(names)
    assert order[0] == "embed.weight"
    assert order[-2:] == ["final_norm.weight", "unembed.weight"]
    layers = [f"layers.scanned.0.mlp.up.weight[{i}]" for i in range(2)]
    first, second = layers if scan_layers else [f"layers.unrolled.{i}.mlp.up.weight" for i in range(2)]
    assert order.index(first) < order.index(second)
    np.testing.assert_allclose(taps[-1].value, module(tokens)[0], atol=1e-5)

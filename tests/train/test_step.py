"""One step: accumulation, packing, decay, precision and meshes change what they should and nothing else."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from meshloom.core.topology import make_mesh
from meshloom.models.config import DecoderConfig
from meshloom.models.decoder import Decoder, Unembedding
from meshloom.models.sequence import Packed
from meshloom.models.source import abstract_module
from meshloom.pallas_kernels.attention.context.spreading import token_order
from meshloom.pallas_kernels.cross_entropy import spec as cross_entropy
from meshloom.sharding import derive
from meshloom.train.config import TrainConfig
from meshloom.train.data import Batch
from meshloom.train.objectives import next_token_loss, next_tokens
from meshloom.train.optimizer import decaying, make_optimizer, make_schedule
from meshloom.train.step import (
    abstract_batch,
    abstract_weights,
    arranged,
    fresh_weights,
    lower_step,
    make_step,
    place_batch,
)

MODEL = DecoderConfig(
    vocab_size=96, d_model=32, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=8, d_ff=64, scan_layers=True
)
ROWS, LENGTH = 8, 16
# No clipping and a large epsilon would hide differences; these are the defaults but for the rate.
CONFIG = TrainConfig(steps=10, learning_rate=1e-2)


def packed_batch(seed: int) -> Batch:
    """Rows of two documents and some padding, so that parts hold different numbers of tokens."""
    random = np.random.default_rng(seed)
    shape = (ROWS, LENGTH + 1)
    place = np.arange(LENGTH + 1)
    cut, end = random.integers(2, 8, (ROWS, 1)), random.integers(9, LENGTH + 2, (ROWS, 1))
    segments = np.where(place < cut, 1, np.where(place < end, 2, 0)).astype(np.int32)
    positions = np.where(place < cut, place, np.where(place < end, place - cut, 0)).astype(np.int32)
    tokens = random.integers(1, MODEL.vocab_size, shape, dtype=np.int32) * (segments > 0)
    return Batch(tokens.astype(np.int32), segments, positions)


def run(axes: dict[str, int], *, accumulation: int = 1, dtype=jnp.float32, steps: int = 3, loss: str | None = None):
    """Losses and the weights after a few steps."""
    count = int(np.prod(list(axes.values())))
    module = abstract_module(MODEL, jnp.float32)
    layout = derive(module, make_mesh(axes, jax.devices()[:count]))
    optimizer, schedule = make_optimizer(CONFIG, module), make_schedule(CONFIG)
    weights = fresh_weights(module, optimizer, layout, seed=0)
    batch = abstract_batch(layout, accumulation=accumulation, rows=ROWS, length=LENGTH)
    step = make_step(module, optimizer, schedule, dtype=dtype, layout=layout, loss=loss)
    compiled = lower_step(step, abstract_weights(module, optimizer, layout), batch, layout).compile()
    metrics = []
    for number in range(steps):
        placed = place_batch(packed_batch(number), layout, accumulation=accumulation)
        weights, reported = compiled(weights, placed, np.int32(number))
        metrics.append(jax.device_get(reported))
    return metrics, weights


@pytest.fixture(scope="module")
def big_batch():
    return run({"fsdp": 1})


def test_accumulation_equals_the_big_batch(big_batch):
    expected, expected_weights = big_batch
    metrics, weights = run({"fsdp": 1}, accumulation=4)
    for got, wanted in zip(metrics, expected, strict=True):
        assert got.tokens == wanted.tokens
        np.testing.assert_allclose(got.loss, wanted.loss, rtol=1e-6)
        np.testing.assert_allclose(got.grad_norm, wanted.grad_norm, rtol=1e-5)
    # The first Adam step is the gradient's sign: a mean weighted by rows instead of tokens is far outside of this.
    for got, wanted in zip(jax.tree.leaves(weights[0]), jax.tree.leaves(expected_weights[0]), strict=True):
        np.testing.assert_allclose(got, wanted, atol=2e-4)


def test_a_mesh_and_parts_change_rounding_only(big_batch):
    expected, _ = big_batch
    metrics, _ = run({"fsdp": 2, "tensor": 2}, accumulation=2)
    np.testing.assert_allclose([m.loss for m in metrics], [m.loss for m in expected], rtol=1e-5)


def test_a_loss_without_logits_changes_rounding_only(big_batch, monkeypatch):
    monkeypatch.setattr(cross_entropy, "CPU_BLOCK_LOGITS", 1)  # six blocks on one device, three on each of two
    expected, _ = big_batch
    for axes in ({"fsdp": 1}, {"fsdp": 2, "tensor": 2}):
        metrics, _ = run(axes, loss="chunked")
        np.testing.assert_allclose([m.loss for m in metrics], [m.loss for m in expected], rtol=1e-5)
        np.testing.assert_allclose([m.grad_norm for m in metrics], [m.grad_norm for m in expected], rtol=1e-4)


def test_tokens_in_zigzag_over_context_change_rounding_only(big_batch):
    expected, _ = big_batch
    metrics, _ = run({"fsdp": 2, "context": 2, "tensor": 2})
    np.testing.assert_allclose([m.loss for m in metrics], [m.loss for m in expected], rtol=1e-5)
    np.testing.assert_allclose([m.grad_norm for m in metrics], [m.grad_norm for m in expected], rtol=1e-4)


def test_tokens_come_in_zigzag_where_attention_is_a_ring():
    module, part = abstract_module(MODEL, jnp.float32), jax.tree.map(jnp.asarray, packed_batch(0))
    in_order, packed, targets = arranged(module, part)
    assert packed.order == "contiguous"
    np.testing.assert_array_equal(in_order, part.tokens[:, :-1])
    with jax.set_mesh(make_mesh({"context": 2, "fsdp": 4})):
        tokens, packed, moved = arranged(module, part)
        other_model = nnx.eval_shape(lambda: nnx.Linear(2, 2, rngs=nnx.Rngs(0)))
        assert arranged(other_model, part)[1].order == "contiguous"
    assert packed.order == "zigzag"
    quarters = [*range(4), *range(12, 16), *range(4, 12)]  # the first and the last for one device
    np.testing.assert_array_equal(tokens, in_order[:, quarters])
    np.testing.assert_array_equal(packed.positions, part.positions[:, quarters])
    np.testing.assert_array_equal(packed.segment_ids, part.segment_ids[:, quarters])
    np.testing.assert_array_equal(moved, targets[:, quarters])


@pytest.mark.parametrize(("length", "heads", "order"), [(16, 4, "zigzag"), (18, 4, "contiguous"), (8, 3, "contiguous")])
def test_no_zigzag_where_there_is_no_ring(length, heads, order):
    with jax.set_mesh(make_mesh({"context": 4, "tensor": 2})):
        assert token_order(length, heads) == order


def test_bfloat16_computes_over_float32_weights(big_batch):
    expected, _ = big_batch
    metrics, weights = run({"fsdp": 1}, dtype=jnp.bfloat16)
    assert {leaf.dtype for leaf in jax.tree.leaves(weights) if leaf.ndim} == {jnp.dtype("float32")}
    losses, wanted = [m.loss for m in metrics], [m.loss for m in expected]
    assert losses != wanted
    np.testing.assert_allclose(losses, wanted, rtol=1e-2)


def test_weights_are_drawn_in_their_shards_with_the_same_values():
    module = abstract_module(MODEL, jnp.float32)
    optimizer = make_optimizer(CONFIG, module)
    drawn = []
    for axes in ({"fsdp": 1}, {"fsdp": 4, "tensor": 2}):
        layout = derive(module, make_mesh(axes, jax.devices()[: int(np.prod(list(axes.values())))]))
        params, state = fresh_weights(module, optimizer, layout, seed=0)
        drawn.append(params)
        for leaf, sharding in zip(jax.tree.leaves(params), jax.tree.leaves(layout.shardings), strict=True):
            assert leaf.sharding == sharding
    for one, other in zip(*map(jax.tree.leaves, drawn), strict=True):
        np.testing.assert_array_equal(one, other)
    moments = [leaf for leaf in jax.tree.leaves(state) if leaf.shape == (MODEL.vocab_size, MODEL.d_model)]
    assert len(moments) == 2
    assert {leaf.sharding.spec for leaf in moments} == {layout.row("embed.weight").spec}


def test_norms_do_not_decay_even_when_stacked():
    module = abstract_module(MODEL, jnp.float32)
    names = [row.name for row in derive(module, make_mesh({"fsdp": 8})).rows]
    decays = dict(zip(names, jax.tree.leaves(decaying(module)), strict=True))
    assert {name for name, decay in decays.items() if not decay} == {name for name in names if "norm" in name}


def test_learning_rate_rises_then_falls_to_its_fraction():
    config = dataclasses.replace(CONFIG, steps=100, warmup_steps=10, final_lr_fraction=0.1)
    rates = np.array([float(make_schedule(config)(step)) for step in range(100)])
    np.testing.assert_allclose(rates[[0, 10, 99]], [1e-3, 1e-2, 1e-3], rtol=1e-5)
    assert np.all(np.diff(rates[:10]) > 0)
    assert np.all(np.diff(rates[10:]) < 0)
    constant = make_schedule(dataclasses.replace(config, schedule="constant"))
    assert float(constant(99)) == float(constant(10)) == pytest.approx(1e-2)


def test_loss_counts_only_next_tokens_of_the_same_document():
    logits = jax.random.normal(jax.random.key(0), (1, 5, 7))
    tokens = jnp.asarray([[1, 2, 3, 4, 5, 6]])
    segments = jnp.asarray([[1, 1, 1, 2, 2, 0]])
    identity = Unembedding(jnp.eye(7), None, None)
    total, count = next_token_loss(logits, identity, next_tokens(tokens, segments))
    each = optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:])[0]
    assert int(count) == 3
    np.testing.assert_allclose(total, each[jnp.asarray([0, 1, 3])].sum(), rtol=1e-6)
    assert next_token_loss(logits, identity, next_tokens(tokens, jnp.zeros_like(segments))) == (0.0, 0)


def test_a_packed_document_has_the_logits_it_has_alone():
    model = Decoder(MODEL, rngs=nnx.Rngs(1))
    first = jax.random.randint(jax.random.key(2), (1, 5), 1, 96)
    second = jax.random.randint(jax.random.key(3), (1, 7), 1, 96)
    layout = Packed(jnp.asarray([[1] * 5 + [2] * 7 + [0] * 4]), jnp.asarray([[*range(5), *range(7), *[0] * 4]]))
    packed, _ = model(jnp.concatenate([first, second, jnp.zeros((1, 4), jnp.int32)], axis=1), layout)
    alone, _ = model(second)
    np.testing.assert_allclose(packed[:, 5:12], alone, atol=2e-5)
    unpacked, _ = model(jnp.concatenate([first, second], axis=1))
    assert np.abs(unpacked[:, 5:12] - alone).max() > 1e-2  # the two do see each other when nobody says otherwise

"""A right program on a mesh is told from a wrong one, and the wrong one's first wrong layer is named."""

import dataclasses
import io
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec
from rich.console import Console

from meshloom.core.errors import ConfigError, ShardingError
from meshloom.core.topology import make_mesh
from meshloom.models.config import DecoderConfig, MoEConfig
from meshloom.models.presets import PRESETS
from meshloom.models.source import abstract_module
from meshloom.sharding.constrain import constrained, plain
from meshloom.train import rounding, verify_program
from meshloom.train.rounding import Expected, farthest_copy
from meshloom.train.verify import Reference, compare, verify
from meshloom.train.verify_program import Subject
from meshloom.train.verify_report import Difference, MeshReport, Parting, VerifyReport
from meshloom.verification import changes, proposed_meshes, shrunk, verify_model

SIZES = {"vocab_size": 96, "d_model": 32, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "head_dim": 8, "d_ff": 64}
DENSE = DecoderConfig(**SIZES, scan_layers=True, init_scale=0.2)


def of_axes(axes: dict[str, int]) -> jax.sharding.Mesh:
    return make_mesh(axes, jax.devices()[: math.prod(axes.values())])


@pytest.fixture(scope="module")
def dense() -> Reference:
    return Reference.measure(Subject.of(abstract_module(DENSE, jnp.float32), rows=8, length=16, seed=0))


def plant(monkeypatch, change):
    """The forward pass of every mesh gets its parameters from `change(params, mesh)`."""

    def planted(module, layout):
        forward = constrained(module, layout)
        if layout.mesh.size == 1:
            return forward
        return lambda params, *inputs: forward(change(params, layout.mesh), *inputs)

    monkeypatch.setattr("meshloom.train.step.constrained", planted)


def replace(params, path, change):
    """Parameters with one leaf changed."""
    flat = dict(nnx.to_flat_state(params))
    flat[path] = flat[path].replace(change(flat[path].get_value()))
    leaves = jax.tree.leaves(nnx.from_flat_state(flat.items()))
    return jax.tree.unflatten(jax.tree.structure(params), leaves)


@pytest.mark.parametrize(
    "axes",
    [{"data": 4}, {"fsdp": 2, "tensor": 2}, {"fsdp": 2, "context": 2}],
    ids=lambda axes: "-".join(axes),
)
def test_a_decoder_is_the_same_on_every_axis(dense, axes):
    report = compare(dense, of_axes(axes))
    assert report.ok
    assert report.parting is None
    # Far from the tolerance, which one more factor of rounding would not break; and not zero, or nothing was compared.
    assert max(each.excess for each in (report.loss, report.gradient, report.update)) < 0.5
    assert report.gradient.size > 0


def test_a_mixture_of_experts_is_the_same_with_its_experts_split_and_the_table_says_so():
    config = dataclasses.replace(DENSE, n_layers=1, tie_embeddings=False, moe=MoEConfig(4, 2, 32))
    console = Console(file=io.StringIO(), width=200)
    report = verify_model(config, jax.devices()[:4], mesh="fsdp=2,expert=2", console=console)
    assert report.ok
    assert (report.devices, report.meshes[0].mesh) == (4, {"fsdp": 2, "expert": 2})
    (row,) = [line for line in console.file.getvalue().splitlines() if "fsdp=2,expert=2" in line]
    assert "same" in row
    assert "a model of the same program with" in console.file.getvalue()
    assert report.shrunk == {"context": (2048, 64)}


def test_one_layer_scaled_by_a_thousandth_is_named(dense, monkeypatch):
    path = ("layers", "scanned", 0, "mlp", "up", "weight")
    plant(monkeypatch, lambda params, mesh: replace(params, path, lambda w: w.at[1].multiply(1.001)))
    report = compare(dense, of_axes({"fsdp": 2}))
    assert not report.ok
    assert (report.parting.stage, report.parting.at.where) == ("forward", "layers.1.mlp.up.weight")
    assert str(report.parting).startswith("forward pass, at layers.1.mlp.up.weight: ")
    assert report.parting.at.excess > 100
    assert report.gradient.excess > 100


def test_a_wrong_gradient_alone_is_named_in_the_backward_pass(dense, monkeypatch):
    @jax.custom_vjp
    def half_in_layer_0(w):
        return w

    half_in_layer_0.defvjp(lambda w: (w, None), lambda _, g: (g.at[0].multiply(0.5),))
    path = ("layers", "scanned", 0, "attention", "v", "weight")
    plant(monkeypatch, lambda params, mesh: replace(params, path, half_in_layer_0))
    report = compare(dense, of_axes({"fsdp": 2}))
    assert report.loss.ok
    assert not report.gradient.ok
    assert report.update.ok  # the optimizer did right by the gradient that it got
    assert (report.parting.stage, report.parting.at.where) == ("backward", "layers.0.attention.v.weight")


def test_copies_that_devices_hold_differently_are_found(dense, monkeypatch):
    def drifted(w, mesh):
        def drift(copy):
            return copy * (1 + 0.001 * jax.lax.axis_index("data"))

        spec = PartitionSpec()
        return jax.shard_map(drift, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False)(w)

    plant(monkeypatch, lambda params, mesh: replace(params, ("final_norm", "weight"), lambda w: drifted(w, mesh)))
    report = compare(dense, of_axes({"data": 2}))
    assert not report.ok
    assert (report.parting.stage, report.parting.at.where) == ("forward", "final_norm.weight")


def test_a_wrong_optimizer_is_told_from_a_wrong_gradient(dense, monkeypatch):
    right = verify_program.make_step

    def wrong(module, optimizer, schedule, *, layout, **options):
        def update(gradient, state, params):
            updates, state = optimizer.update(gradient, state, params)
            return jax.tree.map(lambda x: 1.01 * x, updates), state

        grown = optax.GradientTransformation(optimizer.init, update)
        return right(module, optimizer if layout.mesh.size == 1 else grown, schedule, layout=layout, **options)

    monkeypatch.setattr(verify_program, "make_step", wrong)
    report = compare(dense, of_axes({"fsdp": 2}))
    assert report.loss.ok
    assert report.gradient.ok
    assert report.parting.stage == "optimizer"
    assert report.parting.at == report.update


class Perceptron(nnx.Module):
    """Embeds tokens, two linear layers with a residual around each pair, logits."""

    def __init__(self, rngs: nnx.Rngs):
        def draw(*shape: int) -> nnx.Param:
            return nnx.Param(0.3 * jax.random.normal(rngs.params(), shape))

        self.embed, self.unembed = draw(48, 16), draw(48, 16)
        self.up = nnx.List([draw(32, 16) for _ in range(2)])
        self.down = nnx.List([draw(16, 32) for _ in range(2)])

    def __call__(self, tokens, layout=None, pair=lambda up, down, x: jax.nn.silu(x @ up.T) @ down.T):
        x = self.embed.get_value()[tokens]
        for up, down in zip(self.up, self.down, strict=True):
            x = x + pair(up.get_value(), down.get_value(), x)
        return x @ self.unembed.get_value().T, None


def test_a_forgotten_reduction_in_a_hand_written_program_is_found(monkeypatch):
    module = Perceptron(nnx.Rngs(0))
    reference = Reference.measure(Subject.of(module, rows=4, length=8, seed=0))
    made = []

    def by_hand(module, layout):
        if layout.mesh.size == 1:
            return plain(module)
        made.clear()
        graphdef, _ = nnx.split(module)

        def pair(up, down, x):
            made.append(up)
            reduces = len(made) != 2  # the second layer forgets to

            def local(up, down, x):
                part = jax.nn.silu(x @ up.T) @ down.T
                return jax.lax.psum(part, "tensor") if reduces else part

            specs = (PartitionSpec("tensor"), PartitionSpec(None, "tensor"), PartitionSpec())
            spread = jax.shard_map(local, mesh=layout.mesh, in_specs=specs, out_specs=PartitionSpec(), check_vma=False)
            return spread(up, down, x)

        return lambda params, tokens, packed: nnx.merge(graphdef, params)(tokens, packed, pair)

    monkeypatch.setattr("meshloom.train.step.constrained", by_hand)
    report = compare(reference, of_axes({"tensor": 2}))
    assert not report.ok
    assert report.parting.stage == "forward"
    assert report.parting.at.where == "down.1"


def test_no_number_on_one_device_is_refused():
    module = Perceptron(nnx.Rngs(0))
    module.unembed[...] = jnp.full((48, 16), jnp.inf)
    with pytest.raises(ConfigError, match="the loss is no finite number on one device"):
        verify(module, [of_axes({"data": 2})], length=8)


def test_a_number_that_is_none_on_the_mesh_is_an_error_that_fits_json():
    place = Difference("loss", 1.0, math.nan, 1e-6)
    assert place.size == math.inf
    assert not place.ok
    fine = Difference("a", 1.0, 1.0, 0.0)
    assert fine.ok
    mesh = MeshReport({"fsdp": 2}, place, fine, fine, Parting("loss", place))
    report = VerifyReport((mesh,), 1.0, 10, 2, 1)
    values = json.loads(json.dumps(report.to_json(), allow_nan=False))
    assert values["ok"] is False
    assert values["meshes"][0]["first_parting"]["stage"] == "loss"
    assert values["meshes"][0]["loss"]["on_mesh"] is None


def test_of_copies_the_farthest_is_compared():
    replicated = NamedSharding(of_axes({"data": 2}), PartitionSpec())
    copies = [jax.device_put(np.float32([1, x]), device) for x, device in zip((2, 5), jax.devices(), strict=False)]
    array = jax.make_array_from_single_device_arrays((2,), replicated, copies)
    np.testing.assert_array_equal(farthest_copy(array, np.float32([1, 2])), [1, 5])
    np.testing.assert_array_equal(farthest_copy(array, np.float32([0, 5])), [1, 2])


def test_tolerance_is_what_the_last_bits_do_in_the_median():
    value = np.float32([1.0, -2.0])
    moved = [{"a": value + np.float32(each)} for each in (1e-4, 3e-4, 0.5)]  # in the last a router changed its mind
    expected = Expected.of({"a": value}, moved)
    assert expected.tolerance["a"] == pytest.approx(rounding.FACTOR * 3e-4, rel=1e-2)
    (difference,) = expected.differences({"a": jnp.asarray(value) + jnp.asarray([0.0, 1e-2])})
    assert difference.one_device == -2
    assert difference.on_mesh == pytest.approx(-1.99)
    assert not difference.ok


def test_a_large_model_becomes_one_of_the_same_program():
    big = PRESETS["qwen3-30b-a3b"]
    small = shrunk(big, 8)
    assert (small.n_layers, small.moe.n_experts, small.moe.top_k, small.qk_norm) == (2, 16, 8, True)
    assert small.n_heads // small.n_kv_heads == big.n_heads // big.n_kv_heads
    assert changes(big, small)["moe.n_experts"] == (128, 16)
    gemma = shrunk(PRESETS["gemma3-4b"], 8)
    assert [layer.window for layer in gemma.layers] == [8, None, 8, None]
    assert gemma.local_rope == PRESETS["gemma3-4b"].local_rope


@pytest.mark.parametrize("name", [name for name, config in PRESETS.items() if isinstance(config, DecoderConfig)])
def test_what_divides_a_preset_divides_its_small_model(name):
    big, small = PRESETS[name], shrunk(PRESETS[name], 8)
    assert small.scan_layers
    for field in ("vocab_size", "d_model", "n_kv_heads", "d_ff"):
        assert math.gcd(getattr(small, field), 8) == math.gcd(getattr(big, field), 8), field
    weights = jax.tree.leaves(nnx.state(abstract_module(small, jnp.float32), nnx.Param))
    assert sum(leaf.size for leaf in weights) < 4e6


def test_a_small_model_stays_as_it_is():
    assert shrunk(dataclasses.replace(DENSE, context=64), 8) == dataclasses.replace(DENSE, context=64)


def test_meshes_are_proposed_for_each_axis_and_mixed():
    assert proposed_meshes(DENSE, 8) == [
        {"data": 8},
        {"fsdp": 8},
        {"context": 8},
        {"tensor": 8},
        {"data": 2, "fsdp": 2, "tensor": 2},
        {"fsdp": 2, "context": 2, "tensor": 2},
    ]
    experts = dataclasses.replace(DENSE, moe=MoEConfig(4, 2, 32))
    assert {"fsdp": 2, "expert": 4} in proposed_meshes(experts, 8)  # four experts, eight devices
    assert proposed_meshes(experts, 2) == [{"data": 2}, {"fsdp": 2}, {"expert": 2}, {"context": 2}, {"tensor": 2}]


def test_impossible_verifications_are_refused():
    with pytest.raises(ConfigError, match="encoder-decoder"):
        verify_model(PRESETS["t5-base"], jax.devices())
    with pytest.raises(ConfigError, match='simulate some: --devices "cpu:8"'):
        verify_model(DENSE, jax.devices()[:1])
    with pytest.raises(ConfigError, match="seed must be 0 or more; got -1"):
        verify_model(DENSE, jax.devices(), seed=-1)
    with pytest.raises(ShardingError, match="needs 4 devices; there are 8"):
        verify_model(DENSE, jax.devices(), mesh="fsdp=4")
    with pytest.raises(ConfigError, match="given none"):
        verify(abstract_module(DENSE, jnp.float32), [])

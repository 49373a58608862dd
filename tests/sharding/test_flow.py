"""What is said to move in a forward pass is what the compiler moves; and what nobody asked for is refused."""

import contextlib
import dataclasses
import math

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from jax.sharding import AbstractMesh

from meshloom.core.errors import ShardingError
from meshloom.core.topology import make_mesh
from meshloom.models.config import DecoderConfig, EncoderDecoderConfig, MoEConfig
from meshloom.models.decoder import Decoder
from meshloom.models.encoder_decoder import EncoderDecoder
from meshloom.models.presets import PRESETS
from meshloom.sharding import Layout, derive
from meshloom.sharding.algebra import BROADCAST, PARTIAL, Split
from meshloom.sharding.constrain import constrained
from meshloom.sharding.explain_flow import activations, explain_flow, parameter_flow
from meshloom.sharding.flow import Flow, flow, strict
from meshloom.sharding.trace import Program, trace
from tests.sharding import modules
from tests.sharding.hlo import bytes_by_kind

SIZES = {"vocab_size": 64, "d_model": 32, "n_layers": 2, "n_heads": 8, "n_kv_heads": 4, "head_dim": 8, "d_ff": 64}
SCANNED = DecoderConfig(**SIZES, scan_layers=True)
GPT2 = {"norm": "layer", "gated": False, "rope": None, "learned_positions": 32, "out_bias": True, "mlp_bias": True}
# Over three axes XLA gathers a tied table once for each use, over two axes once for both; that is not modelled.
UNTIED = DecoderConfig(**SIZES, tie_embeddings=False, scan_layers=True)
EXPERTS = DecoderConfig(**SIZES, moe=MoEConfig(4, 2, 32), scan_layers=True)
TOKENS = jax.ShapeDtypeStruct((8, 16), jnp.int32)
HIDDEN = jax.ShapeDtypeStruct((8, 16, modules.D), jnp.float32)


def decoder(config: DecoderConfig):
    return lambda: Decoder(config, rngs=nnx.Rngs(0))


def program_and_layout(make, example, **axes: int) -> tuple[Program, Layout]:
    module = nnx.eval_shape(make)
    mesh = AbstractMesh(tuple(axes.values()), tuple(axes))
    return trace(module, (example,)), derive(module, mesh, example)


def flow_of(make, example, **axes: int) -> Flow:
    return flow(*program_and_layout(make, example, **axes))


def compiled(make, example, *, in_scope: bool = False, **axes: int) -> jax.stages.Compiled:
    """The forward pass as training runs it: the residual stream constrained, weights and rows placed.

    Args:
        in_scope: the mesh is, so that operations may spread themselves over it, as experts and attention do.
    """
    module = nnx.eval_shape(make)
    layout = derive(module, make_mesh(axes, jax.devices()[: math.prod(axes.values())]), example)
    placed = layout.shardings, layout.batch_sharding(*example.shape[:2])
    with jax.set_mesh(layout.mesh) if in_scope else contextlib.nullcontext():
        forward = jax.jit(constrained(module, layout), in_shardings=placed).lower(nnx.state(module), example)
    return forward.compile()


@pytest.mark.parametrize("axes", [{"fsdp": 8}, {"fsdp": 4, "tensor": 2}, {"data": 2, "tensor": 4}], ids=str)
def test_a_dense_decoder_moves_the_bytes_that_the_compiler_moves(axes):
    make = decoder(SCANNED)
    said = flow_of(make, TOKENS, **axes)
    assert said.bytes_by_kind() == bytes_by_kind(compiled(make, TOKENS, **axes))
    assert said.bytes_by_kind()
    assert not said.silent


@pytest.mark.parametrize(
    ("config", "axes"),
    [
        (DecoderConfig(**SIZES), {"fsdp": 4, "tensor": 2}),
        (UNTIED, {"fsdp": 2, "context": 2, "tensor": 2}),
        (DecoderConfig(**SIZES | {"n_kv_heads": 2}, scan_layers=True), {"data": 2, "tensor": 4}),
        (DecoderConfig(**SIZES | {"n_kv_heads": 1}, scan_layers=True), {"data": 2, "tensor": 4}),
        (
            DecoderConfig(**SIZES | {"vocab_size": 67, "n_kv_heads": 8}, **GPT2, scan_layers=True),
            {"fsdp": 4, "tensor": 2},
        ),
        (DecoderConfig(**SIZES | {"n_kv_heads": 8}, **GPT2, parallel=True, scan_layers=True), {"fsdp": 4, "tensor": 2}),
        (UNTIED, {"fsdp": 2, "context": 4}),
    ],
    ids=[
        "unrolled",
        "three axes",
        "few kv heads",
        "one kv head",
        "gpt2, odd vocabulary",
        "parallel branches",
        "context",
    ],
)
def test_so_do_its_variants(config, axes):
    """Over context, keys and values go round a ring."""
    said = flow_of(decoder(config), TOKENS, **axes)
    assert said.bytes_by_kind() == bytes_by_kind(compiled(decoder(config), TOKENS, in_scope=True, **axes))
    assert ("collective_permute" in said.bytes_by_kind()) == ("context" in axes)
    assert not said.silent


def test_keys_of_an_encoder_and_a_decoder_with_biases_go_round_as_the_compiler_has_them():
    """In the encoder, in the decoder and between them, though the tokens of both have nothing to do with each other."""
    sizes = {name: SIZES[name] for name in ("vocab_size", "d_model", "n_heads", "head_dim", "d_ff")}
    config = EncoderDecoderConfig(**sizes, n_encoder_layers=2, n_decoder_layers=2, scan_layers=True)
    module, mesh = nnx.eval_shape(lambda: EncoderDecoder(config, rngs=nnx.Rngs(0))), make_mesh("context=8")
    layout = derive(module, mesh, TOKENS, TOKENS)
    said, rows = flow(trace(module, (TOKENS, TOKENS)), layout), layout.batch_sharding(*TOKENS.shape)
    with jax.set_mesh(mesh):
        forward = jax.jit(constrained(module, layout), in_shardings=(layout.shardings, rows, rows))
        program = forward.lower(nnx.state(module), TOKENS, TOKENS).compile()
    assert said.bytes_by_kind()["collective_permute"] == bytes_by_kind(program)["collective_permute"] > 0
    assert not said.silent


@pytest.mark.parametrize(("heads", "rings"), [(8, True), (6, False)])
def test_there_is_a_ring_where_heads_divide_as_attention_has_it(heads, rings):
    """XLA makes permutes of its own where there is none."""
    config = DecoderConfig(**SIZES | {"n_heads": heads, "n_kv_heads": heads}, tie_embeddings=False, scan_layers=True)
    axes = {"context": 2, "tensor": 4}
    assert ("collective_permute" in flow_of(decoder(config), TOKENS, **axes).bytes_by_kind()) == rings
    assert ("/ppermute" in compiled(decoder(config), TOKENS, in_scope=True, **axes).as_text()) == rings


@pytest.mark.parametrize("axes", [{"fsdp": 4, "tensor": 2}, {"context": 4, "tensor": 2}], ids=str)
@pytest.mark.parametrize("make", [modules.DenseGeneral, modules.LatentAttention, modules.ScannedBlocks, modules.MLP])
def test_so_do_modules_of_other_authors(make, axes):
    """Where keys and queries are of one size, it is the one that the compiler gathers over context as well."""
    assert flow_of(make, HIDDEN, **axes).bytes_by_kind() == bytes_by_kind(compiled(make, HIDDEN, **axes))


def test_a_weight_that_is_turned_at_each_use_is_gathered_at_each_use():
    said = flow_of(modules.SharedLayers, HIDDEN, fsdp=4, tensor=2)
    assert said.bytes_by_kind() == bytes_by_kind(compiled(modules.SharedLayers, HIDDEN, fsdp=4, tensor=2))


@pytest.mark.parametrize(
    "axes",
    [{"fsdp": 4, "expert": 2}, {"expert": 4, "tensor": 2}, {"fsdp": 2, "expert": 2, "tensor": 2}, {"fsdp": 8}],
    ids=str,
)
def test_experts_move_the_bytes_that_the_compiler_moves(axes):
    """They stay where they are: rows are gathered over `expert`, and a sum scattered over it ends it."""
    make = decoder(dataclasses.replace(EXPERTS, tie_embeddings=False))
    said = flow_of(make, TOKENS, **axes)
    assert said.bytes_by_kind() == bytes_by_kind(compiled(make, TOKENS, in_scope=True, **axes))
    assert not said.silent


def test_rows_and_sums_of_experts_are_told_with_their_weights_and_place():
    said = flow_of(decoder(EXPERTS), TOKENS, expert=4, tensor=2)
    rows = [each for each in said.conversions if each.origin.cause == "pair" and each.axes == ("expert",)]
    *gathered, scattered = rows
    whole = 8 * 16 * SIZES["d_model"] * 4
    assert [(each.collective, each.bytes) for each in gathered] == [
        ("all_gather", whole),
        *[("all_gather", 8 * 16 * 2 * 4)] * 2,  # weights and numbers of the experts of each row
    ]
    assert (scattered.collective, scattered.before, scattered.after) == ("reduce_scatter", PARTIAL, Split(0))
    (summed,) = [each for each in said.conversions if each.step == scattered.step and each.axes == ("tensor",)]
    assert summed.collective == "all_reduce"
    assert scattered.bytes == summed.bytes == whole / 4  # what is summed over `tensor` is a device's own rows
    assert {each.trips for each in (*rows, summed)} == {SIZES["n_layers"]}
    for each in (scattered, summed):
        assert "its own part of layers.scanned.0.mlp." in each.origin.reason


@pytest.mark.parametrize("axes", [{"fsdp": 4, "expert": 2}, {"expert": 4, "tensor": 2}], ids=str)
def test_experts_of_other_authors_stay_where_they_are(axes):
    """XLA left to itself gathers them over `expert`. It returns rows to their devices before it sums over experts where
    `tensor` splits nothing."""
    said = flow_of(modules.AllExperts, HIDDEN, **axes).bytes_by_kind()
    found = bytes_by_kind(compiled(modules.AllExperts, HIDDEN, **axes))
    assert found["all_gather"] == said["all_gather"]
    assert found == said or "tensor" not in axes


@pytest.mark.parametrize(
    "make", [modules.AllExperts, lambda: modules.Experts("one_hot"), lambda: modules.ScannedGroups(4)]
)
@pytest.mark.parametrize("axes", [{"fsdp": 4, "expert": 2}, {"expert": 4, "tensor": 2}], ids=str)
def test_rows_that_go_to_experts_of_other_authors_and_back_are_the_pair_rule_s(make, axes):
    said = strictly(make, **axes)
    moved = {(each.collective, each.origin.cause) for each in said.conversions if each.axes == ("expert",)}
    assert moved & {("all_gather", "pair"), ("all_to_all", "pair")}


def test_what_no_expert_needs_is_still_not_intended():
    said = flow_of(lambda: modules.Experts("ragged"), HIDDEN, fsdp=4, expert=2)
    assert any("`sort` needs it whole" in each.origin.reason for each in said.silent)


# -- why --


class Named(nnx.Module):
    """Something of a user's that is called as our attention is."""

    def __init__(self):
        self.query, self.key = modules.weight(modules.D, modules.D), modules.weight(modules.D, modules.D)

    def __call__(self, x):
        @jax.jit
        def attention(q, k):
            return jax.nn.softmax(q @ k.swapaxes(1, 2)) @ k

        return attention(x @ self.query, x @ self.key)


def test_what_a_function_of_a_user_s_is_called_decides_nothing():
    said = flow_of(Named, HIDDEN, fsdp=2, context=2)
    assert "collective_permute" not in said.bytes_by_kind()
    assert ("context", "all_gather") in {(each.origin.cause, each.collective) for each in said.conversions}


def test_every_conversion_of_a_decoder_has_its_rule():
    said = flow_of(decoder(SCANNED), TOKENS, fsdp=2, context=2, tensor=2)
    causes = {(each.origin.cause, each.collective, each.axes) for each in said.conversions}
    assert causes == {
        ("store", "all_gather", ("fsdp", "context")),
        ("store", "all_to_all", ("fsdp", "context")),
        ("vocab", "all_reduce", ("tensor",)),
        ("pair", "all_reduce", ("tensor",)),
        ("context", "collective_permute", ("context",)),
    }
    assert {each.trips for each in said.conversions} == {1, SIZES["n_layers"]}
    assert (
        "[8, 16, 4, 8] go round a ring"
        in {each.origin.cause: each.origin.reason for each in said.conversions}["context"]
    )


def test_a_conversion_names_the_line_of_the_module():
    said = flow_of(modules.MLP, HIDDEN, fsdp=4, tensor=2)
    first = modules.MLP.__call__.__code__.co_firstlineno
    assert {each.origin.source.rpartition("/")[2] for each in said.conversions} == {f"modules.py:{first + 1}"}


def test_placements_follow_a_pair():
    said = flow_of(modules.MLP, HIDDEN, fsdp=4, tensor=2)
    products = [step for step in said.program.steps if step.equation and step.equation.primitive.name == "dot_general"]
    made = [said.placements[step.outputs[0]] for step in products]
    assert made == [{"fsdp": Split(0), "tensor": Split(2)}, {"fsdp": Split(0), "tensor": PARTIAL}]
    assert said.placements[said.program.outputs[0]] == {"fsdp": Split(0)}


def test_the_logits_stay_split_by_vocabulary():
    said = flow_of(decoder(SCANNED), TOKENS, fsdp=4, tensor=2)
    assert said.placements[said.program.outputs[0]] == {"fsdp": Split(0), "tensor": Split(2)}


def test_a_softmax_over_a_split_dimension_reduces_two_numbers_a_row():
    class Probabilities(nnx.Module):
        def __init__(self):
            self.up, self.unembed = modules.weight(32, 32), modules.weight(64, 32)

        def __call__(self, x):
            return jax.nn.softmax((x + jax.nn.relu(x @ self.up)) @ self.unembed.T)

    said = flow_of(Probabilities, HIDDEN, tensor=4)
    rows = math.prod(HIDDEN.shape[:2])
    assert [(each.collective, each.bytes, each.origin.cause) for each in said.conversions] == [
        ("all_reduce", 4.0 * rows, "reduction")
    ] * 2
    assert said.bytes_by_kind() == bytes_by_kind(compiled(Probabilities, HIDDEN, tensor=4))


def test_two_partial_sums_that_are_added_are_reduced_once():
    class Twins(nnx.Module):
        """Two branches that are added before they join the residual."""

        def __init__(self):
            self.up, self.down = modules.weight(32, 64), modules.weight(64, 32)
            self.other_up, self.other_down = modules.weight(32, 64), modules.weight(64, 32)

        def __call__(self, x):
            return x + (jax.nn.relu(x @ self.up) @ self.down + jax.nn.relu(x @ self.other_up) @ self.other_down)

    assert [each.collective for each in flow_of(Twins, HIDDEN, tensor=4).conversions] == ["all_reduce"]


# -- strict --


class Shuffled(nnx.Module):
    """An MLP whose rows are mixed across the batch: what data parallelism does not expect."""

    def __init__(self):
        self.up, self.down = modules.weight(modules.D, modules.F), modules.weight(modules.F, modules.D)

    def __call__(self, x):
        x = x + jax.nn.relu(x @ self.up) @ self.down
        return jnp.sort(x, axis=0)


def strictly(make, above: int = 0, **axes: int) -> Flow:
    return strict(*program_and_layout(make, HIDDEN, **axes), above)


def test_strict_refuses_an_activation_that_is_gathered_and_names_the_line():
    line = Shuffled.__call__.__code__.co_firstlineno + 2
    with pytest.raises(
        ShardingError, match=rf"test_flow.py:{line}: an activation \[8, 16, 32\] is S\(0\) over fsdp"
    ) as e:
        strictly(Shuffled, fsdp=4)
    assert "`sort` needs it whole" in str(e.value)
    assert "all_gather over fsdp of 16 KiB on each device" in str(e.value)


def test_strict_passes_what_is_allowed_and_what_the_rules_intend():
    assert strictly(Shuffled, above=2**14, fsdp=4).silent
    assert not strictly(Shuffled, tensor=4).silent
    assert not strictly(modules.GroupedQuery, fsdp=2, tensor=4).silent


# -- explained --


def test_a_parameter_is_explained_by_its_collectives_and_the_runner_up():
    said = flow_of(modules.MLP, HIDDEN, fsdp=4, tensor=2)
    down = parameter_flow(said, "down")
    assert [(each.collective, each.axes) for each in down.conversions] == [
        ("all_gather", ("fsdp",)),
        ("all_reduce", ("tensor",)),
    ]
    (other,) = down.runners_up
    assert (other.axes, other.dimension, other.instead) == (("tensor",), 1, 0)
    assert other.bytes > 0
    explained = explain_flow(said, "down")
    assert "all_gather over fsdp (S(1) -> B), 4 KiB: down [64, 32] is stored over fsdp" in explained
    assert "tensor on dimension 0 instead of 1: " in explained


def test_a_stored_weight_would_be_gathered_as_well_from_its_other_dimension():
    said = flow_of(modules.MLP, HIDDEN, fsdp=4)
    (other,) = parameter_flow(said, "up").runners_up
    assert (other.axes, other.bytes, other.conversions) == (("fsdp",), 0.0, 0.0)


def test_a_vector_moves_nothing():
    assert "moves nothing" in explain_flow(flow_of(modules.MLP, HIDDEN, fsdp=4), "down_bias")


def test_an_activation_is_explained_by_line_and_by_scope():
    said = flow_of(decoder(SCANNED), TOKENS, fsdp=4, tensor=2)
    products = [each for each in activations(said, "mlp") if each.operator == "dot_general"]
    assert [each.placement for each in products] == ["fsdp S(0), tensor S(2)"] * 2 + ["fsdp S(0), tensor P"]
    assert products[-1].operands == ("fsdp S(0), tensor S(2)", "fsdp S(0), tensor S(1)")
    assert "made by `dot_general` of" in explain_flow(said, products[0].source)


def test_a_split_of_an_activation_has_its_rule_and_its_runner_up():
    said = flow_of(decoder(SCANNED), TOKENS, fsdp=4, tensor=2)
    up = next(each for each in activations(said, "mlp") if each.operator == "dot_general")
    whole = 4 * math.prod(up.shape)
    assert [(each.axis, each.dimension, each.role, each.rule, each.bytes) for each in up.alternatives] == [
        ("fsdp", 0, "batch", "as the batch is", whole / 2),
        ("tensor", 2, "inner", "by the pair rule", whole / 4),
    ]
    assert "tensor on dimension 2 (inner) by the pair rule; whole instead: an all_gather of 8 KiB" in str(up)


def test_an_unknown_name_is_answered_with_the_nearest():
    with pytest.raises(ShardingError, match=r"no parameter is named 'dwon'; nearest are down"):
        explain_flow(flow_of(modules.MLP, HIDDEN, fsdp=4), "dwon")
    with pytest.raises(ShardingError, match="named scopes are attention, mlp"):
        explain_flow(flow_of(decoder(SCANNED), TOKENS, fsdp=4), "moe")


# -- large models --


def test_llama_70b_gathers_an_eighth_of_its_weights_over_fsdp_and_reduces_161_times():
    """Two reductions a layer and one for the embedding."""
    example = jax.ShapeDtypeStruct((128, 4096), jnp.int32)
    config = dataclasses.replace(PRESETS["llama3-70b"], scan_layers=True)
    said = flow_of(lambda: Decoder(config, rngs=nnx.Rngs(0), param_dtype=jnp.bfloat16), example, fsdp=16, tensor=8)
    stored = sum(row.bytes_total for row in said.layout.rows if not row.is_vector and row.name != "embed.weight") / 8
    ids, rows = 4 * 128 * 4096, 2 * 128 * 4096 * 8192
    assert said.bytes_by_kind()["all_gather"] == stored + ids  # of the embedding, ids go to the columns
    assert said.bytes_by_kind()["all_to_all"] == rows / 16  # and rows come back
    reductions = [each for each in said.conversions if each.collective == "all_reduce"]
    assert sum(each.trips for each in reductions) == 161
    assert all(each.after == BROADCAST for each in reductions)
    assert not said.silent

"""Modules that mislead rules based on names or positions get the layout that an expert would choose."""

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from tests.sharding.modules import (
    EVERY_MODULE,
    HIDDEN,
    MLP,
    TOKENS,
    Adapter,
    Bert,
    Convolutions,
    D,
    DeepMLP,
    DenseGeneral,
    Embeddings,
    Experts,
    F,
    FusedGateUp,
    FusedQKV,
    GroupedQuery,
    LatentAttention,
    MultiQuery,
    N,
    ParallelBranches,
    RelativeBias,
    Renamed,
    RepeatedKV,
    Residual,
    ReusedNames,
    Rotary,
    ScannedBlocks,
    ScannedGroups,
    ScannedSquare,
    SharedLayers,
    ThroughControlFlow,
    V,
    layout_of,
    roles_of,
    specs_of,
    weight,
)


def test_mlp_is_split_along_its_inner_dimension():
    assert specs_of(MLP, HIDDEN, fsdp=2, tensor=4) == {
        "up": ("tensor", "fsdp"),
        "up_bias": ("tensor",),
        "down": ("fsdp", "tensor"),
        "down_bias": (None,),
    }
    assert roles_of(MLP, HIDDEN)["up"] == ("inner", "residual")


def test_without_a_tensor_axis_the_largest_dimension_is_stored():
    assert specs_of(MLP, HIDDEN, fsdp=8) == {
        "up": ("fsdp", None),
        "up_bias": (None,),
        "down": (None, "fsdp"),
        "down_bias": (None,),
    }


def test_data_splits_no_weight():
    assert all(not any(spec) for spec in specs_of(MLP, HIDDEN, data=8).values())


def test_plain_chain_is_split_pair_by_pair():
    example = jax.ShapeDtypeStruct((2, 64), jnp.float32)
    assert list(specs_of(DeepMLP, example, tensor=4).values()) == [("tensor", None), (None, "tensor")] * 2


def test_kv_heads_that_divide_are_split_with_the_query_heads():
    layout = layout_of(GroupedQuery, HIDDEN, fsdp=2, tensor=2)
    assert {row.name: tuple(row.spec) for row in layout.rows} == {
        "q": ("tensor", "fsdp"),
        "k": ("tensor", "fsdp"),
        "v": ("tensor", "fsdp"),
        "o": ("fsdp", "tensor"),
    }
    assert layout.kv_heads_spec == "tensor"


def test_fewer_kv_heads_than_the_axis_are_replicated_and_query_heads_still_split():
    layout = layout_of(GroupedQuery, HIDDEN, fsdp=2, tensor=4)
    assert {row.name: tuple(row.spec) for row in layout.rows} == {
        "q": ("tensor", "fsdp"),
        "k": (None, "fsdp"),
        "v": (None, "fsdp"),
        "o": ("fsdp", "tensor"),
    }
    assert layout.kv_heads_spec is None
    assert layout.row("k").roles == ("kv_heads", "residual")
    assert layout.row("q").roles == ("heads", "residual")


def test_a_head_is_never_cut():
    # 6 heads of 8: 48 rows divide by 4, the heads do not.
    specs = specs_of(lambda: GroupedQuery(heads=6, kv_heads=6), HIDDEN, tensor=4)
    assert all(spec == (None, None) for spec in specs.values())


def test_one_kv_head_is_replicated():
    layout = layout_of(MultiQuery, HIDDEN, fsdp=2, tensor=4)
    assert tuple(layout.row("q").spec) == ("tensor", "fsdp")
    assert tuple(layout.row("k").spec) == (None, "fsdp")
    assert tuple(layout.row("o").spec) == ("fsdp", "tensor")
    assert layout.kv_heads_spec is None


@pytest.mark.parametrize(("tensor", "kv"), [(4, "tensor"), (8, None)])
def test_repeated_keys_and_values_are_kv_heads(tensor, kv):
    layout = layout_of(RepeatedKV, HIDDEN, tensor=tensor)
    assert [tuple(layout.row(name).spec) for name in "qkvo"] == [
        ("tensor", None),
        (kv, None),
        (kv, None),
        (None, "tensor"),
    ]
    assert layout.row("k").roles == ("kv_heads", "residual")
    assert layout.kv_heads_spec == kv


@pytest.mark.parametrize("style", ["halves", "neighbours", "partial"])
def test_rotary_embedding_does_not_hide_the_heads(style):
    assert roles_of(lambda: Rotary(style), HIDDEN) == {
        "q": ("heads", "residual"),
        "k": ("kv_heads", "residual"),
        "v": ("kv_heads", "residual"),
        "o": ("residual", "heads"),
    }


def test_a_fused_qkv_in_blocks_is_never_split_across_the_boundary():
    # A contiguous split of [q | k | v] would give one device all of q: nothing over tensor, and neither for its pair.
    assert specs_of(lambda: FusedQKV("blocks"), HIDDEN, fsdp=2, tensor=4) == {
        "qkv": ("fsdp", None),
        "o": ("fsdp", None),
    }


def test_a_fused_weight_is_told_apart_and_its_cuts_are_named():
    layout = layout_of(lambda: FusedQKV("blocks"), HIDDEN, fsdp=2, tensor=4)
    assert layout.row("qkv").roles == ("heads", "residual")
    assert "not by the pair rule: the program cuts it open at 32, 64" in layout.row("qkv").choices[0].reason
    assert "the other side of its pair cannot be split" in layout.row("o").choices[1].reason


def test_a_fused_qkv_that_is_grouped_by_head_splits_like_heads():
    assert specs_of(lambda: FusedQKV("per_head"), HIDDEN, fsdp=2, tensor=4) == {
        "qkv": ("tensor", "fsdp"),
        "o": ("fsdp", "tensor"),
    }


def test_a_fused_qkv_with_its_own_dimension_for_the_parts_splits_like_heads():
    expected = {"qkv": (None, "tensor", "fsdp"), "o": ("fsdp", "tensor")}
    assert specs_of(lambda: FusedQKV("leading"), HIDDEN, fsdp=2, tensor=4) == expected


def test_a_fused_gate_up_is_never_split_across_the_boundary():
    assert specs_of(lambda: FusedGateUp(False), HIDDEN, fsdp=2, tensor=4) == {
        "gate_up": ("fsdp", None),
        "down": (None, "fsdp"),
    }
    assert specs_of(lambda: FusedGateUp(True), HIDDEN, fsdp=2, tensor=4) == {
        "gate_up": (None, "tensor", "fsdp"),
        "down": ("fsdp", "tensor"),
    }


def test_dense_general_weights_split_by_head():
    assert specs_of(DenseGeneral, HIDDEN, fsdp=2, tensor=4) == {
        "q": ("fsdp", "tensor", None),
        "k": ("fsdp", "tensor", None),
        "v": ("fsdp", "tensor", None),
        "o": ("tensor", None, "fsdp"),
    }
    uneven = specs_of(lambda: DenseGeneral(heads=6), HIDDEN, tensor=4)
    assert not any(axis for spec in uneven.values() for axis in spec)


def test_low_rank_pairs_split_by_head_and_not_by_rank():
    assert specs_of(LatentAttention, HIDDEN, fsdp=2, tensor=4) == {
        "q_a": (None, "fsdp"),
        "q_b": ("tensor", "fsdp"),
        "kv_a": (None, "fsdp"),
        "kv_b": ("tensor", "fsdp"),
        "o": ("fsdp", "tensor"),
    }


def test_a_low_rank_adapter_follows_the_weight_it_adapts():
    assert specs_of(Adapter, HIDDEN, tensor=4) == {
        "up": ("tensor", None),
        "a": (None, None),
        "b": ("tensor", None),
        "down": (None, "tensor"),
    }


def test_a_stacked_layer_axis_is_never_split():
    specs = specs_of(ScannedBlocks, HIDDEN, fsdp=2, tensor=2)
    assert specs == {
        "q": (None, "tensor", "fsdp"),
        "k": (None, "tensor", "fsdp"),
        "v": (None, "tensor", "fsdp"),
        "o": (None, "fsdp", "tensor"),
        "scale": (None, None),
        "gate": (None, "tensor", "fsdp"),
        "up": (None, "tensor", "fsdp"),
        "down": (None, "fsdp", "tensor"),
    }
    # Even where it is the largest dimension that divides.
    assert specs_of(lambda: ScannedBlocks(layers=512), HIDDEN, fsdp=2)["gate"] == (None, "fsdp", None)


def test_what_a_loop_carries_is_residual():
    example = jax.ShapeDtypeStruct((2, 64), jnp.float32)
    assert roles_of(ScannedSquare, example) == {"layers": ("stack", "residual", "residual")}
    assert specs_of(ScannedSquare, example, fsdp=2, tensor=2) == {"layers": (None, "fsdp", None)}


@pytest.mark.parametrize("dispatch", ["ragged", "one_hot"])
def test_experts_are_dealt_out_and_each_is_split_like_an_mlp(dispatch):
    assert specs_of(lambda: Experts(dispatch), HIDDEN, fsdp=2, tensor=2, expert=2) == {
        "router": (None, ("fsdp", "expert")),
        "gate": ("expert", "tensor", "fsdp"),
        "up": ("expert", "tensor", "fsdp"),
        "down": ("expert", "fsdp", "tensor"),
    }


@pytest.mark.parametrize("dispatch", ["ragged", "one_hot"])
def test_experts_that_do_not_divide_are_stored_as_other_weights_are(dispatch):
    layout = layout_of(lambda: Experts(dispatch, experts=6), HIDDEN, expert=4)
    assert {row.name: tuple(row.spec) for row in layout.rows} == {
        "router": (None, "expert"),
        "gate": (None, "expert", None),
        "up": (None, "expert", None),
        "down": (None, None, "expert"),
    }
    assert "6 experts do not divide over expert=4" in layout.row("up").choices[0].reason


@pytest.mark.parametrize("inputs", [1, 2], ids=["positions counted", "positions given"])
@pytest.mark.parametrize("tied", [True, False])
def test_a_vocabulary_is_split_and_a_position_table_is_not(tied, inputs):
    specs = specs_of(lambda: Embeddings(V, tied), *[TOKENS] * inputs, fsdp=2, tensor=4)
    assert specs["table"] == ("tensor", "fsdp")
    assert specs["positions"] == (None, "fsdp")
    assert tied or specs["unembed"] == ("tensor", "fsdp")


@pytest.mark.parametrize("tied", [True, False])
def test_an_odd_vocabulary_is_stored_along_the_other_dimension(tied):
    specs = specs_of(lambda: Embeddings(131, tied), TOKENS, fsdp=2, tensor=4)
    assert specs["table"] == (None, "fsdp")
    assert tied or specs["unembed"] == (None, "fsdp")
    assert specs["up"] == ("tensor", "fsdp")


def test_reused_names_mislead_nobody():
    assert specs_of(ReusedNames, TOKENS, fsdp=2, tensor=4) == {
        "wte": ("tensor", "fsdp"),
        "attn.c_attn.weight": (None, "fsdp"),
        "attn.c_attn.bias": (None,),
        "attn.c_proj.weight": ("fsdp", None),
        "attn.c_proj.bias": (None,),
        "mlp.c_fc.weight": ("fsdp", "tensor"),
        "mlp.c_fc.bias": ("tensor",),
        "mlp.c_proj.weight": ("tensor", "fsdp"),
        "mlp.c_proj.bias": (None,),
    }


def test_bert_calls_everything_dense():
    assert specs_of(Bert, TOKENS, TOKENS, fsdp=2, tensor=4) == {
        "word": ("tensor", "fsdp"),
        "position": (None, "fsdp"),
        "kind": (None, "fsdp"),
        **{f"attention.{name}.dense.weight": ("fsdp", "tensor") for name in ("query", "key", "value")},
        **{f"attention.{name}.dense.bias": ("tensor",) for name in ("query", "key", "value")},
        "attention.output.dense.weight": ("tensor", "fsdp"),
        "attention.output.dense.bias": (None,),
        "intermediate.dense.weight": ("fsdp", "tensor"),
        "intermediate.dense.bias": ("tensor",),
        "output.dense.weight": ("tensor", "fsdp"),
        "output.dense.bias": (None,),
        "pooler.dense.weight": ("fsdp", "tensor"),
        "pooler.dense.bias": ("tensor",),
        "classifier.weight": ("tensor", None),
        "classifier.bias": (None,),
    }


@pytest.mark.parametrize(("kv_heads", "kv"), [(8, "tensor"), (4, "tensor"), (2, None), (1, None)])
def test_stacked_groups_of_heads_and_experts(kv_heads, kv):
    layout = layout_of(lambda: ScannedGroups(kv_heads), HIDDEN, fsdp=2, tensor=4, expert=2)
    assert {row.name: tuple(row.spec) for row in layout.rows} == {
        "q": (None, ("fsdp", "expert"), "tensor", None),
        "k": (None, ("fsdp", "expert"), kv, None),
        "v": (None, ("fsdp", "expert"), kv, None),
        "o": (None, "tensor", None, ("fsdp", "expert")),
        "q_bias": (None, "tensor", None),
        "k_bias": (None, kv, None),
        "router": (None, ("fsdp", "expert"), None),
        "gate_up": (None, "expert", None, "tensor", "fsdp"),
        "down": (None, "expert", "fsdp", "tensor"),
    }
    assert layout.kv_heads_spec == kv


def multi_head_attention():
    return nnx.MultiHeadAttention(N, D, decode=False, rngs=nnx.Rngs(0))


def test_a_bias_of_heads_is_a_vector_in_two_dimensions():
    specs = specs_of(lambda: Residual(multi_head_attention()), HIDDEN, fsdp=2, tensor=2)
    for name in ("query", "key", "value"):
        assert specs[f"inner.{name}.kernel"] == ("fsdp", "tensor", None)
        assert specs[f"inner.{name}.bias"] == ("tensor", None)
    assert specs["inner.out.kernel"] == ("tensor", None, "fsdp")
    assert specs["inner.out.bias"] == (None,)
    stored = specs_of(lambda: Residual(multi_head_attention()), HIDDEN, fsdp=4)
    assert stored["inner.query.bias"] == (None, None)


def test_what_a_module_returns_is_split_only_with_the_weight_that_makes_it():
    alone = specs_of(multi_head_attention, HIDDEN, fsdp=2, tensor=2)
    assert alone["out.kernel"] == ("tensor", None, "fsdp")
    assert alone["out.bias"] == (None,)
    head = specs_of(lambda: nnx.Linear(D, V, rngs=nnx.Rngs(0)), HIDDEN, tensor=2)
    assert head == {"kernel": (None, "tensor"), "bias": ("tensor",)}


def test_a_table_that_is_added_is_stored_though_no_product_reads_it():
    class Positions(nnx.Module):
        def __init__(self):
            self.table, self.scale, self.mlp = weight(6, D), weight(D), MLP()

        def __call__(self, x):
            return self.mlp(x * self.scale + self.table[...])

    specs = specs_of(Positions, HIDDEN, fsdp=2)
    assert specs["table"] == (None, "fsdp")
    assert specs["scale"] == (None,)


@pytest.mark.parametrize(
    "inner",
    [
        lambda x: x * jax.random.normal(jax.random.clone(jax.random.key(0)), x.shape),
        lambda x: x * jax.scipy.special.expi(jnp.sinc(x)),
        lambda x: jnp.fft.fft(x).real,
        lambda x: x * jax.lax.approx_max_k(x, 2)[0][..., :1],
        lambda x: jnp.cumsum(jnp.sort(x, axis=1), axis=1) * jnp.argsort(x, axis=1),
        lambda x: x * jax.nn.one_hot(jnp.argmax(x, -1), x.shape[-1]),
        lambda x: jax.lax.platform_dependent(x, cpu=lambda x: x, default=lambda x: -x),
    ],
    ids=["clone", "polynomial", "fourier", "top", "sorted", "one_hot", "platform"],
)
def test_operations_between_two_weights_hide_nothing(inner):
    class Between(nnx.Module):
        def __init__(self):
            self.up, self.down = weight(F, D), weight(D, F)

        def __call__(self, x):
            return x + inner(x @ self.up.T) @ self.down.T

    layout = layout_of(Between, HIDDEN, fsdp=2)
    assert not layout.unknown
    assert layout.row("up").roles[1] == layout.row("down").roles[0] == "residual"


def test_a_shared_relative_bias_is_split_by_head():
    layout = layout_of(RelativeBias, HIDDEN, fsdp=2, tensor=4)
    assert tuple(layout.row("bias").spec) == ("fsdp", "tensor")
    for layer in "01":
        assert tuple(layout.row(f"layers.{layer}.qkv").spec) == (None, "tensor", None, "fsdp")
        assert tuple(layout.row(f"layers.{layer}.o").spec) == ("fsdp", "tensor")
    assert layout.kv_heads_spec == "tensor"


def test_layers_that_share_weights_keep_their_inner_dimension():
    assert roles_of(SharedLayers, HIDDEN) == {"up": ("inner", "residual"), "down": ("residual", "inner")}


@pytest.mark.parametrize("post_norm", [True, False])
def test_residuals_are_found_wherever_branches_join(post_norm):
    assert roles_of(lambda: ParallelBranches(post_norm), HIDDEN) == {
        "qkv": ("feature", "heads", "head_dim", "residual"),
        "o": ("residual", "heads"),
        "up": ("inner", "residual"),
        "down": ("residual", "inner"),
    }


def test_channels_of_convolutions_pair_like_features():
    example = jax.ShapeDtypeStruct((2, 8, 16, 16), jnp.float32)
    assert specs_of(Convolutions, example, fsdp=2, tensor=4) == {
        "widen": ("tensor", "fsdp", None, None),
        "depthwise": ("tensor", None, None, None),
        "narrow": ("fsdp", "tensor", None, None),
        "classes": (None, "fsdp"),
    }
    assert roles_of(Convolutions, example)["widen"][:2] == ("inner", "residual")


@pytest.mark.parametrize("flow", ["jit", "remat", "custom_vjp", "cond", "while", "fori_loop", "vmap", "shard_map"])
def test_control_flow_hides_nothing(flow):
    layout = layout_of(lambda: ThroughControlFlow(flow), HIDDEN, fsdp=2, tensor=4)
    assert [tuple(row.spec) for row in layout.rows] == [("fsdp", "tensor"), ("tensor", "fsdp")]
    assert layout.row("up").roles == ("inner", "residual")
    assert not layout.unknown


@pytest.mark.parametrize("name", EVERY_MODULE)
def test_names_decide_nothing(name):
    make, example = EVERY_MODULE[name]
    axes = {"fsdp": 2, "tensor": 4, "expert": 2}
    expected = list(specs_of(make, example, **axes).values())
    renamed = nnx.eval_shape(lambda: Renamed(make))
    specs = specs_of(lambda: Renamed(make), example, **axes)
    assert [specs[each] for each in renamed.order] == expected

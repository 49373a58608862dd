"""Modules that mislead rules based on names or positions, each with the layout that an expert would choose.

Shape legend: B batch, T tokens, D model, N heads, K kv heads, H head dim, F inner, E experts, V vocab, R rank.
"""

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from jax.sharding import AbstractMesh

from meshloom.sharding import derive

TOKENS = jax.ShapeDtypeStruct((2, 6), jnp.int32)
HIDDEN = jax.ShapeDtypeStruct((2, 6, 32), jnp.float32)
D, N, H, F, V = 32, 4, 8, 64, 128


def weight(*shape: int) -> nnx.Param:
    return nnx.Param(jnp.zeros(shape))


def layout_of(make, example, **axes: int):
    mesh = AbstractMesh(tuple(axes.values()), tuple(axes))
    return derive(nnx.eval_shape(make), mesh, example)


def specs_of(make, example, **axes: int) -> dict[str, tuple]:
    return {row.name: tuple(row.spec) for row in layout_of(make, example, **axes).rows}


def roles_of(make, example) -> dict[str, tuple]:
    return {row.name: row.roles for row in layout_of(make, example, fsdp=2).rows}


def norm(x):
    return x * jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-6)


def attend(q, k, v, bias=None):
    """Grouped-query attention over [B, T, N, H] and [B, T, K, H]."""
    q = q.reshape(*q.shape[:2], k.shape[2], -1, q.shape[-1])
    scores = jnp.einsum("btkgh,bskh->bkgts", q, k)
    if bias is not None:
        scores = scores + bias.reshape(k.shape[2], -1, *bias.shape[1:])
    out = jnp.einsum("bkgts,bskh->btkgh", jax.nn.softmax(scores, -1), v)
    return out.reshape(*out.shape[:2], -1, out.shape[-1])


class MLP(nnx.Module):
    def __init__(self):
        self.up, self.up_bias, self.down, self.down_bias = weight(F, D), weight(F), weight(D, F), weight(D)

    def __call__(self, x):
        return x + jax.nn.relu(x @ self.up.T + self.up_bias) @ self.down.T + self.down_bias


def test_mlp_is_split_along_its_inner_dimension():
    assert specs_of(MLP, HIDDEN, fsdp=2, tensor=4) == {
        "up": ("tensor", "fsdp"),
        "up_bias": ("tensor",),
        "down": ("fsdp", "tensor"),
        "down_bias": (None,),
    }
    assert roles_of(MLP, HIDDEN)["up"] == ("inner", "residual")


def test_without_a_tensor_axis_the_largest_dimension_is_stored():
    assert specs_of(MLP, HIDDEN, fsdp=8) == {"up": ("fsdp", None), "up_bias": (None,), "down": (None, "fsdp"), "down_bias": (None,)}


def test_data_splits_no_weight():
    assert all(not any(spec) for spec in specs_of(MLP, HIDDEN, data=8).values())


class DeepMLP(nnx.Module):
    """No residual: every inner dimension is produced and contracted."""

    def __init__(self):
        self.layers = nnx.List([weight(64, 64) for _ in range(4)])

    def __call__(self, x):
        for each in self.layers:
            x = jnp.tanh(x @ each.T)
        return x


def test_plain_chain_is_split_pair_by_pair():
    example = jax.ShapeDtypeStruct((2, 64), jnp.float32)
    assert list(specs_of(DeepMLP, example, tensor=4).values()) == [("tensor", None), (None, "tensor")] * 2


class GroupedQuery(nnx.Module):
    def __init__(self, heads=8, kv_heads=2, bias=False):
        self.q, self.k, self.v, self.o = weight(heads * H, D), weight(kv_heads * H, D), weight(kv_heads * H, D), weight(D, heads * H)

    def __call__(self, x):
        q, k, v = ((norm(x) @ each.T).reshape(*x.shape[:2], -1, H) for each in (self.q, self.k, self.v))
        return x + attend(q, k, v).reshape(*x.shape[:2], -1) @ self.o.T


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


class MultiQuery(GroupedQuery):
    def __init__(self):
        super().__init__(heads=8, kv_heads=1)


def test_one_kv_head_is_replicated():
    layout = layout_of(MultiQuery, HIDDEN, fsdp=2, tensor=4)
    assert tuple(layout.row("q").spec) == ("tensor", "fsdp")
    assert tuple(layout.row("k").spec) == (None, "fsdp")
    assert tuple(layout.row("o").spec) == ("fsdp", "tensor")
    assert layout.kv_heads_spec is None


class RepeatedKV(nnx.Module):
    """Grouped-query attention that repeats keys and values for every query head."""

    def __init__(self):
        self.q, self.k, self.v, self.o = weight(64, D), weight(32, D), weight(32, D), weight(D, 64)

    def __call__(self, x):
        q, k, v = ((x @ each.T).reshape(*x.shape[:2], -1, H) for each in (self.q, self.k, self.v))
        k, v = jnp.repeat(k, 2, axis=2), jnp.repeat(v, 2, axis=2)
        return x + attend(q, k, v).reshape(*x.shape[:2], -1) @ self.o.T


@pytest.mark.parametrize(("tensor", "kv"), [(4, "tensor"), (8, None)])
def test_repeated_keys_and_values_are_kv_heads(tensor, kv):
    layout = layout_of(RepeatedKV, HIDDEN, tensor=tensor)
    assert [tuple(layout.row(name).spec) for name in "qkvo"] == [("tensor", None), (kv, None), (kv, None), (None, "tensor")]
    assert layout.row("k").roles == ("kv_heads", "residual")
    assert layout.kv_heads_spec == kv


class Rotary(GroupedQuery):
    """Rotates halves of a head, or neighbours, or only its first half."""

    def __init__(self, style):
        super().__init__()
        self.style = style

    def __call__(self, x):
        def rotate(a):
            match self.style:
                case "halves":
                    first, second = jnp.split(a, 2, axis=-1)
                    return jnp.concatenate([first - second, second + first], -1)
                case "neighbours":
                    even, odd = a[..., ::2], a[..., 1::2]
                    return jnp.stack([even - odd, odd + even], -1).reshape(a.shape)
                case "partial":
                    first, second, rest = a[..., :2], a[..., 2:4], a[..., 4:]
                    return jnp.concatenate([first - second, second + first, rest], -1)

        q, k, v = ((x @ each.T).reshape(*x.shape[:2], -1, H) for each in (self.q, self.k, self.v))
        return x + attend(rotate(q), rotate(k), v).reshape(*x.shape[:2], -1) @ self.o.T


@pytest.mark.parametrize("style", ["halves", "neighbours", "partial"])
def test_rotary_embedding_does_not_hide_the_heads(style):
    assert roles_of(lambda: Rotary(style), HIDDEN) == {
        "q": ("heads", "residual"),
        "k": ("kv_heads", "residual"),
        "v": ("kv_heads", "residual"),
        "o": ("residual", "heads"),
    }


class FusedQKV(nnx.Module):
    def __init__(self, layout):
        self.layout = layout
        self.qkv, self.o = weight(*((3, N * H, D) if layout == "leading" else (3 * N * H, D))), weight(D, N * H)

    def __call__(self, x):
        rows = x.shape[:2]
        match self.layout:
            case "blocks":
                q, k, v = (each.reshape(*rows, N, H) for each in jnp.split(x @ self.qkv.T, 3, axis=-1))
            case "per_head":
                q, k, v = jnp.split((x @ self.qkv.T).reshape(*rows, N, 3 * H), 3, axis=-1)
            case "leading":
                q, k, v = (each.reshape(*rows, N, H) for each in jnp.einsum("btd,cnd->cbtn", x, self.qkv[...]))
        return x + attend(q, k, v).reshape(*rows, -1) @ self.o.T


def test_a_fused_qkv_in_blocks_is_never_split_across_the_boundary():
    # A contiguous split of [q | k | v] would give one device all of q: nothing over tensor, and neither for its pair.
    assert specs_of(lambda: FusedQKV("blocks"), HIDDEN, fsdp=2, tensor=4) == {"qkv": ("fsdp", None), "o": ("fsdp", None)}


def test_a_fused_qkv_that_is_grouped_by_head_splits_like_heads():
    assert specs_of(lambda: FusedQKV("per_head"), HIDDEN, fsdp=2, tensor=4) == {"qkv": ("tensor", "fsdp"), "o": ("fsdp", "tensor")}


def test_a_fused_qkv_with_its_own_dimension_for_the_parts_splits_like_heads():
    expected = {"qkv": (None, "tensor", "fsdp"), "o": ("fsdp", "tensor")}
    assert specs_of(lambda: FusedQKV("leading"), HIDDEN, fsdp=2, tensor=4) == expected


class FusedGateUp(nnx.Module):
    def __init__(self, stacked):
        self.gate_up, self.down = weight(*((2, F, D) if stacked else (2 * F, D))), weight(D, F)

    def __call__(self, x):
        both = jnp.einsum("btd,...fd->bt...f", x, self.gate_up[...])
        gate, up = (both[..., 0, :], both[..., 1, :]) if both.ndim == 4 else (both[..., :F], both[..., F:])
        return x + (jax.nn.silu(gate) * up) @ self.down.T


def test_a_fused_gate_up_is_never_split_across_the_boundary():
    assert specs_of(lambda: FusedGateUp(False), HIDDEN, fsdp=2, tensor=4) == {"gate_up": ("fsdp", None), "down": (None, "fsdp")}
    assert specs_of(lambda: FusedGateUp(True), HIDDEN, fsdp=2, tensor=4) == {
        "gate_up": (None, "tensor", "fsdp"),
        "down": ("fsdp", "tensor"),
    }


class DenseGeneral(nnx.Module):
    """Weights [D, N, H] and [N, H, D]."""

    def __init__(self, heads=N):
        self.q, self.k, self.v, self.o = weight(D, heads, H), weight(D, heads, H), weight(D, heads, H), weight(heads, H, D)

    def __call__(self, x):
        q, k, v = (jnp.einsum("btd,dnh->btnh", x, each[...]) for each in (self.q, self.k, self.v))
        return x + jnp.einsum("btnh,nhd->btd", attend(q, k, v), self.o[...])


def test_dense_general_weights_split_by_head():
    assert specs_of(DenseGeneral, HIDDEN, fsdp=2, tensor=4) == {
        "q": ("fsdp", "tensor", None),
        "k": ("fsdp", "tensor", None),
        "v": ("fsdp", "tensor", None),
        "o": ("tensor", None, "fsdp"),
    }
    uneven = specs_of(lambda: DenseGeneral(heads=6), HIDDEN, tensor=4)
    assert not any(axis for spec in uneven.values() for axis in spec)


class LatentAttention(nnx.Module):
    """Low-rank pairs for queries, keys and values (multi-head latent attention)."""

    def __init__(self, rank=16):
        self.q_a, self.q_b = weight(rank, D), weight(N * H, rank)
        self.kv_a, self.kv_b = weight(rank + 4, D), weight(N * 2 * H, rank)
        self.o = weight(D, N * H)
        self.rank = rank

    def __call__(self, x):
        rows = x.shape[:2]
        q = (norm(x @ self.q_a.T) @ self.q_b.T).reshape(*rows, N, H)
        latent, shared = jnp.split(x @ self.kv_a.T, [self.rank], axis=-1)
        k, v = jnp.split((norm(latent) @ self.kv_b.T).reshape(*rows, N, 2 * H), 2, axis=-1)
        shared = jnp.broadcast_to(shared[:, :, None], (*rows, N, 4))
        q, k = jnp.concatenate([q, q[..., :4]], -1), jnp.concatenate([k, shared], -1)
        return x + attend(q, k, v).reshape(*rows, -1) @ self.o.T


def test_low_rank_pairs_split_by_head_and_not_by_rank():
    assert specs_of(LatentAttention, HIDDEN, fsdp=2, tensor=4) == {
        "q_a": (None, "fsdp"),
        "q_b": ("tensor", "fsdp"),
        "kv_a": (None, "fsdp"),
        "kv_b": ("tensor", "fsdp"),
        "o": ("fsdp", "tensor"),
    }


class Adapter(nnx.Module):
    """A low-rank update beside a weight of an MLP."""

    def __init__(self):
        self.up, self.a, self.b, self.down = weight(F, D), weight(4, D), weight(F, 4), weight(D, F)

    def __call__(self, x):
        return x + jax.nn.relu(x @ self.up.T + (x @ self.a.T) @ self.b.T) @ self.down.T


def test_a_low_rank_adapter_follows_the_weight_it_adapts():
    assert specs_of(Adapter, HIDDEN, tensor=4) == {"up": ("tensor", None), "a": (None, None), "b": ("tensor", None), "down": (None, "tensor")}


class ScannedBlocks(nnx.Module):
    """Attention and MLP stacked [L, out, in] and scanned, under remat."""

    def __init__(self, layers=4):
        self.q, self.k, self.v, self.o = (weight(layers, *shape) for shape in [(64, D), (16, D), (16, D), (D, 64)])
        self.scale, self.gate, self.up, self.down = (weight(layers, *s) for s in [(D,), (F, D), (F, D), (D, F)])

    def __call__(self, x):
        @jax.checkpoint
        def layer(x, weights):
            q, k, v, o, scale, gate, up, down = weights
            normed = norm(x) * scale
            q, k, v = ((normed @ each.T).reshape(*x.shape[:2], -1, H) for each in (q, k, v))
            x = x + attend(q, k, v).reshape(*x.shape[:2], -1) @ o.T
            return x + (jax.nn.silu(x @ gate.T) * (x @ up.T)) @ down.T, None

        weights = (self.q, self.k, self.v, self.o, self.scale, self.gate, self.up, self.down)
        return jax.lax.scan(layer, x, tuple(each[...] for each in weights))[0]


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


class ScannedSquare(nnx.Module):
    """x <- tanh(W x): what a layer produces the next contracts, and so does the loop's carry."""

    def __init__(self):
        self.layers = weight(4, 64, 64)

    def __call__(self, x):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w.T), None), x, self.layers[...])[0]


def test_what_a_loop_carries_is_residual():
    example = jax.ShapeDtypeStruct((2, 64), jnp.float32)
    assert roles_of(ScannedSquare, example) == {"layers": ("stack", "residual", "residual")}
    assert specs_of(ScannedSquare, example, fsdp=2, tensor=2) == {"layers": (None, "fsdp", None)}


class Experts(nnx.Module):
    """Raw expert weights [E, F, D] behind a router, dispatched by sorting or by one-hot products."""

    def __init__(self, dispatch, experts=4):
        self.dispatch, self.experts = dispatch, experts
        self.router = weight(experts, D)
        self.gate, self.up, self.down = weight(experts, F, D), weight(experts, F, D), weight(experts, D, F)

    def __call__(self, x):
        tokens = x.reshape(-1, x.shape[-1])
        scores, chosen = jax.lax.top_k(jax.nn.softmax(tokens @ self.router.T), 1)
        if self.dispatch == "ragged":
            order = jnp.argsort(chosen[:, 0])
            sizes = jnp.bincount(chosen[:, 0], length=self.experts)
            gate, up, down = (jnp.swapaxes(each[...], 1, 2) for each in (self.gate, self.up, self.down))
            inner = jax.nn.silu(jax.lax.ragged_dot(tokens[order], gate, sizes)) * jax.lax.ragged_dot(tokens[order], up, sizes)
            y = jax.lax.ragged_dot(inner, down, sizes)[jnp.argsort(order)] * scores
        else:
            mask = jax.nn.one_hot(chosen[:, 0], self.experts)
            dispatched = jnp.einsum("te,td->etd", mask, tokens)
            inner = jnp.einsum("etd,efd->etf", dispatched, self.gate[...])
            inner = jax.nn.silu(inner) * jnp.einsum("etd,efd->etf", dispatched, self.up[...])
            y = jnp.einsum("etd,te->td", jnp.einsum("etf,edf->etd", inner, self.down[...]), mask * scores)
        return x + y.reshape(x.shape)


@pytest.mark.parametrize("dispatch", ["ragged", "one_hot"])
def test_experts_are_dealt_out_and_each_is_split_like_an_mlp(dispatch):
    assert specs_of(lambda: Experts(dispatch), HIDDEN, fsdp=2, tensor=2, expert=2) == {
        "router": (None, "fsdp"),
        "gate": ("expert", "tensor", "fsdp"),
        "up": ("expert", "tensor", "fsdp"),
        "down": ("expert", "fsdp", "tensor"),
    }


@pytest.mark.parametrize("dispatch", ["ragged", "one_hot"])
def test_experts_that_do_not_divide_are_replicated(dispatch):
    layout = layout_of(lambda: Experts(dispatch, experts=6), HIDDEN, expert=4)
    assert not any(axis for row in layout.rows for axis in row.spec)
    assert "6 experts do not divide over expert=4" in layout.row("up").choices[0].reason


class Embeddings(nnx.Module):
    def __init__(self, vocab, tied):
        self.table, self.positions, self.up, self.down = weight(vocab, D), weight(16, D), weight(F, D), weight(D, F)
        self.unembed = None if tied else weight(vocab, D)

    def __call__(self, tokens):
        x = self.table[tokens] + self.positions[jnp.arange(tokens.shape[1])]
        x = x + jax.nn.relu(x @ self.up.T) @ self.down.T
        return norm(x) @ (self.table if self.unembed is None else self.unembed).T


@pytest.mark.parametrize("tied", [True, False])
def test_a_vocabulary_is_split_and_a_position_table_is_not(tied):
    specs = specs_of(lambda: Embeddings(V, tied), TOKENS, fsdp=2, tensor=4)
    assert specs["table"] == ("tensor", "fsdp")
    assert specs["positions"] == (None, "fsdp")
    assert tied or specs["unembed"] == ("tensor", "fsdp")


@pytest.mark.parametrize("tied", [True, False])
def test_an_odd_vocabulary_is_stored_along_the_other_dimension(tied):
    specs = specs_of(lambda: Embeddings(131, tied), TOKENS, fsdp=2, tensor=4)
    assert specs["table"] == (None, "fsdp")
    assert tied or specs["unembed"] == (None, "fsdp")
    assert specs["up"] == ("tensor", "fsdp")


class Projection(nnx.Module):
    """[in, out] weight and bias, under the same two names everywhere."""

    def __init__(self, size_in, size_out):
        self.weight, self.bias = weight(size_in, size_out), weight(size_out)

    def __call__(self, x):
        return x @ self.weight + self.bias


class ReusedNames(nnx.Module):
    """GPT-2: `c_proj` closes both branches, and `weight` is [in, out]."""

    def __init__(self):
        self.wte = weight(V, D)
        self.attn = nnx.Dict(c_attn=Projection(D, 3 * N * H), c_proj=Projection(N * H, D))
        self.mlp = nnx.Dict(c_fc=Projection(D, F), c_proj=Projection(F, D))

    def __call__(self, tokens):
        x = self.wte[tokens]
        q, k, v = (each.reshape(*tokens.shape, N, H) for each in jnp.split(self.attn["c_attn"](x), 3, -1))
        x = x + self.attn["c_proj"](attend(q, k, v).reshape(*tokens.shape, -1))
        x = x + self.mlp["c_proj"](jax.nn.gelu(self.mlp["c_fc"](x)))
        return x @ self.wte.T


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


class RelativeBias(nnx.Module):
    """T5: one table of biases [buckets, N] for all layers."""

    def __init__(self):
        self.bias = weight(32, N)
        self.layers = nnx.List([nnx.Dict(qkv=weight(3, N, H, D), o=weight(D, N * H)) for _ in range(2)])

    def __call__(self, x):
        distance = jnp.arange(x.shape[1])[:, None] - jnp.arange(x.shape[1])
        bias = jnp.moveaxis(self.bias[jnp.clip(distance + 16, 0, 31)], -1, 0)
        for layer in self.layers:
            q, k, v = jnp.einsum("btd,cnhd->cbtnh", norm(x), layer["qkv"][...])
            x = x + attend(q, k, v, bias).reshape(*x.shape[:2], -1) @ layer["o"].T
        return x


def test_a_shared_relative_bias_is_split_by_head():
    layout = layout_of(RelativeBias, HIDDEN, fsdp=2, tensor=4)
    assert tuple(layout.row("bias").spec) == ("fsdp", "tensor")
    for layer in "01":
        assert tuple(layout.row(f"layers.{layer}.qkv").spec) == (None, "tensor", None, "fsdp")
        assert tuple(layout.row(f"layers.{layer}.o").spec) == ("fsdp", "tensor")
    assert layout.kv_heads_spec == "tensor"


class SharedLayers(nnx.Module):
    """ALBERT: one set of weights for all layers; what is produced again is still not residual."""

    def __init__(self):
        self.up, self.down = weight(F, D), weight(D, F)

    def __call__(self, x):
        for _ in range(3):
            x = x + jax.nn.relu(norm(x) @ self.up.T) @ self.down.T
        return x


def test_layers_that_share_weights_keep_their_inner_dimension():
    assert roles_of(SharedLayers, HIDDEN) == {"up": ("inner", "residual"), "down": ("residual", "inner")}


class ParallelBranches(nnx.Module):
    """GPT-J: attention and MLP read the same input; post-norm variants normalise the sum."""

    def __init__(self, post_norm):
        self.qkv, self.o, self.up, self.down = weight(3, N, H, D), weight(D, N * H), weight(F, D), weight(D, F)
        self.post_norm = post_norm

    def __call__(self, x):
        q, k, v = jnp.einsum("btd,cnhd->cbtnh", x, self.qkv[...])
        attention = attend(q, k, v).reshape(*x.shape[:2], -1) @ self.o.T
        if self.post_norm:
            x = norm(x + attention)
            return norm(x + jax.nn.relu(x @ self.up.T) @ self.down.T)
        return x + attention + jax.nn.relu(x @ self.up.T) @ self.down.T


@pytest.mark.parametrize("post_norm", [True, False])
def test_residuals_are_found_wherever_branches_join(post_norm):
    assert roles_of(lambda: ParallelBranches(post_norm), HIDDEN) == {
        "qkv": ("feature", "heads", "head_dim", "residual"),
        "o": ("residual", "heads"),
        "up": ("inner", "residual"),
        "down": ("residual", "inner"),
    }


class Convolutions(nnx.Module):
    """A residual pair of 3x3 convolutions [out, in, 3, 3] with a depthwise one between them, and a classifier."""

    def __init__(self):
        self.widen, self.depthwise, self.narrow, self.classes = weight(64, 8, 3, 3), weight(64, 1, 3, 3), weight(8, 64, 3, 3), weight(10, 8)

    def __call__(self, x):
        y = jax.lax.conv(x, self.widen[...], (1, 1), "SAME")
        y = jax.lax.conv_general_dilated(y, self.depthwise[...], (1, 1), "SAME", feature_group_count=64)
        x = x + jax.lax.conv(jax.nn.relu(y), self.narrow[...], (1, 1), "SAME")
        return jnp.mean(x, (2, 3)) @ self.classes.T


def test_channels_of_convolutions_pair_like_features():
    example = jax.ShapeDtypeStruct((2, 8, 16, 16), jnp.float32)
    assert specs_of(Convolutions, example, fsdp=2, tensor=4) == {
        "widen": ("tensor", "fsdp", None, None),
        "depthwise": ("tensor", None, None, None),
        "narrow": ("fsdp", "tensor", None, None),
        "classes": ("fsdp", None),
    }
    assert roles_of(Convolutions, example)["widen"][:2] == ("inner", "residual")


class Renamed(nnx.Module):
    """Another module under names that say nothing, in another order."""

    def __init__(self, make):
        self.graphdef, state = nnx.split(make())
        leaves, self.treedef = jax.tree.flatten(state)
        self.order = [f"w{(7 * i + 3) % len(leaves):03d}_{i * 37 % 11}" for i in range(len(leaves))]
        for name, leaf in zip(self.order, leaves, strict=True):
            setattr(self, name, nnx.Param(leaf))

    def __call__(self, *inputs):
        leaves = [getattr(self, name)[...] for name in self.order]
        return nnx.merge(self.graphdef, jax.tree.unflatten(self.treedef, leaves))(*inputs)


EVERY_MODULE = {
    "mlp": (MLP, HIDDEN),
    "deep": (DeepMLP, jax.ShapeDtypeStruct((2, 64), jnp.float32)),
    "grouped": (GroupedQuery, HIDDEN),
    "repeated": (RepeatedKV, HIDDEN),
    "fused": (lambda: FusedQKV("blocks"), HIDDEN),
    "latent": (LatentAttention, HIDDEN),
    "adapter": (Adapter, HIDDEN),
    "scanned": (ScannedBlocks, HIDDEN),
    "experts": (lambda: Experts("ragged"), HIDDEN),
    "embeddings": (lambda: Embeddings(V, False), TOKENS),
    "reused": (ReusedNames, TOKENS),
    "relative": (RelativeBias, HIDDEN),
}


@pytest.mark.parametrize("name", EVERY_MODULE)
def test_names_decide_nothing(name):
    make, example = EVERY_MODULE[name]
    axes = {"fsdp": 2, "tensor": 4, "expert": 2}
    expected = list(specs_of(make, example, **axes).values())
    renamed = nnx.eval_shape(lambda: Renamed(make))
    specs = specs_of(lambda: Renamed(make), example, **axes)
    assert [specs[each] for each in renamed.order] == expected

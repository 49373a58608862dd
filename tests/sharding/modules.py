"""Modules that mislead rules based on names or positions, and how tests ask for their layouts.

Shape legend: B batch, T tokens, D model, N heads, K kv heads, H head dim, F inner, E experts, V vocab, R rank.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import AbstractMesh, AxisType, PartitionSpec

from meshloom.sharding import Layout, derive

TOKENS = jax.ShapeDtypeStruct((2, 6), jnp.int32)
HIDDEN = jax.ShapeDtypeStruct((2, 6, 32), jnp.float32)
D, N, H, F, V = 32, 4, 8, 64, 128


def weight(*shape: int) -> nnx.Param:
    return nnx.Param(jnp.zeros(shape))


def layout_of(make, *examples, **axes: int) -> Layout:
    """The layout of the abstract module that `make` makes, on a mesh without devices."""
    mesh = AbstractMesh(tuple(axes.values()), tuple(axes))
    return derive(nnx.eval_shape(make), mesh, *examples)


def specs_of(make, *examples, **axes: int) -> dict[str, tuple]:
    return {row.name: tuple(row.spec) for row in layout_of(make, *examples, **axes).rows}


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


class Residual(nnx.Module):
    """`x + inner(x)`."""

    def __init__(self, inner):
        self.inner = inner

    def __call__(self, x):
        return x + self.inner(x)


class DeepMLP(nnx.Module):
    """No residual: every inner dimension is produced and contracted."""

    def __init__(self):
        self.layers = nnx.List([weight(64, 64) for _ in range(4)])

    def __call__(self, x):
        for each in self.layers:
            x = jnp.tanh(x @ each.T)
        return x


class GroupedQuery(nnx.Module):
    def __init__(self, heads=8, kv_heads=2, bias=False):
        self.q, self.k, self.v, self.o = (
            weight(heads * H, D),
            weight(kv_heads * H, D),
            weight(kv_heads * H, D),
            weight(D, heads * H),
        )

    def __call__(self, x):
        q, k, v = ((norm(x) @ each.T).reshape(*x.shape[:2], -1, H) for each in (self.q, self.k, self.v))
        return x + attend(q, k, v).reshape(*x.shape[:2], -1) @ self.o.T


class MultiQuery(GroupedQuery):
    def __init__(self):
        super().__init__(heads=8, kv_heads=1)


class RepeatedKV(nnx.Module):
    """Grouped-query attention that repeats keys and values for every query head."""

    def __init__(self):
        self.q, self.k, self.v, self.o = weight(64, D), weight(32, D), weight(32, D), weight(D, 64)

    def __call__(self, x):
        q, k, v = ((x @ each.T).reshape(*x.shape[:2], -1, H) for each in (self.q, self.k, self.v))
        k, v = jnp.repeat(k, 2, axis=2), jnp.repeat(v, 2, axis=2)
        return x + attend(q, k, v).reshape(*x.shape[:2], -1) @ self.o.T


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


class FusedGateUp(nnx.Module):
    def __init__(self, stacked):
        self.gate_up, self.down = weight(*((2, F, D) if stacked else (2 * F, D))), weight(D, F)

    def __call__(self, x):
        both = jnp.einsum("btd,...fd->bt...f", x, self.gate_up[...])
        gate, up = (both[..., 0, :], both[..., 1, :]) if both.ndim == 4 else (both[..., :F], both[..., F:])
        return x + (jax.nn.silu(gate) * up) @ self.down.T


class DenseGeneral(nnx.Module):
    """Weights [D, N, H] and [N, H, D]."""

    def __init__(self, heads=N):
        self.q, self.k, self.v, self.o = (
            weight(D, heads, H),
            weight(D, heads, H),
            weight(D, heads, H),
            weight(heads, H, D),
        )

    def __call__(self, x):
        q, k, v = (jnp.einsum("btd,dnh->btnh", x, each[...]) for each in (self.q, self.k, self.v))
        return x + jnp.einsum("btnh,nhd->btd", attend(q, k, v), self.o[...])


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


class Adapter(nnx.Module):
    """A low-rank update beside a weight of an MLP."""

    def __init__(self):
        self.up, self.a, self.b, self.down = weight(F, D), weight(4, D), weight(F, 4), weight(D, F)

    def __call__(self, x):
        return x + jax.nn.relu(x @ self.up.T + (x @ self.a.T) @ self.b.T) @ self.down.T


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


class ScannedSquare(nnx.Module):
    """x <- tanh(W x): what a layer produces the next contracts, and so does the loop's carry."""

    def __init__(self):
        self.layers = weight(4, 64, 64)

    def __call__(self, x):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w.T), None), x, self.layers[...])[0]


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
            inner = jax.nn.silu(jax.lax.ragged_dot(tokens[order], gate, sizes)) * jax.lax.ragged_dot(
                tokens[order], up, sizes
            )
            y = jax.lax.ragged_dot(inner, down, sizes)[jnp.argsort(order)] * scores
        else:
            mask = jax.nn.one_hot(chosen[:, 0], self.experts)
            dispatched = jnp.einsum("te,td->etd", mask, tokens)
            inner = jnp.einsum("etd,efd->etf", dispatched, self.gate[...])
            inner = jax.nn.silu(inner) * jnp.einsum("etd,efd->etf", dispatched, self.up[...])
            y = jnp.einsum("etd,te->td", jnp.einsum("etf,edf->etd", inner, self.down[...]), mask * scores)
        return x + y.reshape(x.shape)


class AllExperts(nnx.Module):
    """Every row through all experts, by products with [E, ...], weighted by a router."""

    def __init__(self):
        self.router, self.up, self.down = weight(D, 4), weight(4, F, D), weight(4, D, F)

    def __call__(self, x):
        scores = jax.nn.softmax(x @ self.router)
        inner = jax.nn.relu(jnp.einsum("btd,efd->btef", x, self.up[...]))
        return x + jnp.einsum("btef,edf,bte->btd", inner, self.down[...], scores)


class Embeddings(nnx.Module):
    def __init__(self, vocab, tied):
        self.table, self.positions, self.up, self.down = weight(vocab, D), weight(16, D), weight(F, D), weight(D, F)
        self.unembed = None if tied else weight(vocab, D)

    def __call__(self, tokens, positions=None):
        x = self.table[tokens] + self.positions[jnp.arange(tokens.shape[1]) if positions is None else positions]
        x = x + jax.nn.relu(x @ self.up.T) @ self.down.T
        return norm(x) @ (self.table if self.unembed is None else self.unembed).T


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


class Bert(nnx.Module):
    """`dense` everywhere: of queries, of what attention returns, and of both halves of the MLP; norms after sums."""

    def __init__(self):
        self.word, self.position, self.kind = weight(V, D), weight(16, D), weight(2, D)
        names = {"query": (D, N * H), "key": (D, N * H), "value": (D, N * H), "output": (N * H, D)}
        self.attention = nnx.Dict({name: nnx.Dict(dense=Projection(*sizes)) for name, sizes in names.items()})
        self.intermediate, self.output = nnx.Dict(dense=Projection(D, F)), nnx.Dict(dense=Projection(F, D))
        self.pooler = nnx.Dict(dense=Projection(D, D))
        self.classifier = Projection(D, 3)

    def __call__(self, tokens, kinds):
        x = norm(self.word[tokens] + self.position[jnp.arange(tokens.shape[1])] + self.kind[kinds])
        dense = {name: each["dense"] for name, each in self.attention.items()}
        q, k, v = (dense[name](x).reshape(*tokens.shape, N, H) for name in ("query", "key", "value"))
        x = norm(x + dense["output"](attend(q, k, v).reshape(*tokens.shape, -1)))
        x = norm(x + self.output["dense"](jax.nn.gelu(self.intermediate["dense"](x))))
        return self.classifier(jnp.tanh(self.pooler["dense"](x[:, 0])))


class ScannedGroups(nnx.Module):
    """Grouped-query attention stacked [L, D, N, H], and experts [L, E, 2F, D] with gate and up in one weight."""

    def __init__(self, kv_heads, layers=4, experts=4):
        self.q, self.o = weight(layers, D, 8, H), weight(layers, 8, H, D)
        self.k, self.v = weight(layers, D, kv_heads, H), weight(layers, D, kv_heads, H)
        self.q_bias, self.k_bias = weight(layers, 8, H), weight(layers, kv_heads, H)
        self.router = weight(layers, D, experts)
        self.gate_up, self.down = weight(layers, experts, 2, F, D), weight(layers, experts, D, F)

    def __call__(self, x):
        def layer(x, weights):
            q, k, v, o, q_bias, k_bias, router, gate_up, down = weights
            queries = jnp.einsum("btd,dnh->btnh", norm(x), q) + q_bias
            keys, values = jnp.einsum("btd,dkh->btkh", norm(x), k) + k_bias, jnp.einsum("btd,dkh->btkh", norm(x), v)
            x = x + jnp.einsum("btnh,nhd->btd", attend(queries, keys, values), o)
            scores, chosen = jax.lax.top_k(jax.nn.softmax(norm(x) @ router), 2)
            mask = (jax.nn.one_hot(chosen, router.shape[1]) * scores[..., None]).sum(-2)
            gate, up = jnp.einsum("btd,ecfd->cebtf", norm(x), gate_up)
            return x + jnp.einsum("ebtf,edf,bte->btd", jax.nn.silu(gate) * up, down, mask), None

        names = ("q", "k", "v", "o", "q_bias", "k_bias", "router", "gate_up", "down")
        return jax.lax.scan(layer, x, tuple(getattr(self, name)[...] for name in names))[0]


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


class SharedLayers(nnx.Module):
    """ALBERT: one set of weights for all layers; what is produced again is still not residual."""

    def __init__(self):
        self.up, self.down = weight(F, D), weight(D, F)

    def __call__(self, x):
        for _ in range(3):
            x = x + jax.nn.relu(norm(x) @ self.up.T) @ self.down.T
        return x


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


class Convolutions(nnx.Module):
    """A residual pair of 3x3 convolutions [out, in, 3, 3] with a depthwise one between them, and a classifier."""

    def __init__(self):
        self.widen, self.depthwise, self.narrow, self.classes = (
            weight(64, 8, 3, 3),
            weight(64, 1, 3, 3),
            weight(8, 64, 3, 3),
            weight(10, 8),
        )

    def __call__(self, x):
        y = jax.lax.conv(x, self.widen[...], (1, 1), "SAME")
        y = jax.lax.conv_general_dilated(y, self.depthwise[...], (1, 1), "SAME", feature_group_count=64)
        x = x + jax.lax.conv(jax.nn.relu(y), self.narrow[...], (1, 1), "SAME")
        return jnp.mean(x, (2, 3)) @ self.classes.T


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
    "all experts": (AllExperts, HIDDEN),
    "embeddings": (lambda: Embeddings(V, False), TOKENS),
    "reused": (ReusedNames, TOKENS),
    "relative": (RelativeBias, HIDDEN),
}


class ThroughControlFlow(nnx.Module):
    """The MLP inside one piece of control flow."""

    def __init__(self, flow):
        self.flow, self.up, self.down = flow, weight(F, D), weight(D, F)

    def __call__(self, x):
        def mlp(x, up, down):
            return x + jax.nn.relu(x @ up.T) @ down.T

        def with_gradient(x, up, down):
            function = jax.custom_vjp(mlp)
            function.defvjp(lambda *args: jax.vjp(mlp, *args), lambda pullback, g: pullback(g))
            return function(x, up, down)

        up, down = self.up[...], self.down[...]
        match self.flow:
            case "jit":
                return jax.jit(mlp)(x, up, down)
            case "remat":
                return jax.checkpoint(mlp)(x, up, down)
            case "custom_vjp":
                return with_gradient(x, up, down)
            case "cond":
                return jax.lax.cond(jnp.sum(x) > 0, mlp, lambda x, up, down: x, x, up, down)
            case "while":
                return jax.lax.while_loop(lambda x: jnp.sum(x) > 0, lambda x: mlp(x, up, down), x)
            case "fori_loop":
                return jax.lax.fori_loop(0, 3, lambda _, x: mlp(x, up, down), x)
            case "vmap":
                return jax.vmap(mlp, in_axes=(0, None, None))(x, up, down)
            case "shard_map":
                mesh = AbstractMesh((2,), ("rows",), axis_types=(AxisType.Auto,))
                specs = (PartitionSpec("rows"), PartitionSpec(), PartitionSpec())
                return jax.shard_map(mlp, mesh=mesh, in_specs=specs, out_specs=PartitionSpec("rows"))(x, up, down)

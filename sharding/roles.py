"""What every dimension of a weight is for, read from dataflow alone: never from a name or a size.

Roles, in the order in which they are claimed:

* *stack*: a scan runs over it (layers).
* *heads*, *kv_heads*: attention multiplies two activations; what weights produced and such a product has as a batch
  dimension are heads. It is certain where the product contracts what weights produced too (scores, over the
  *head_dim*), and else yields to *residual*. A free dimension of scores that lies beside the head_dim in a weight is
  heads as well: the query group of grouped-query attention, or all heads where there is one kv head. Weights with kv
  heads but without the group have *kv_heads*.
* *residual*: an addition (or a loop's carry) joins a value of this class with one that comes of the same value by
  contracting the class and producing it again. Attention and MLP read the residual stream and add to it; their inner
  dimensions never meet themselves like that.
* *head_dim*: the rest of an attention product: within a head.
* *expert*: picks one matrix of many: groups of a ragged product, batch of a product of an activation with a weight.
* *vocab*: rows that the inputs look up, or what the last weight produces for the output. Where several tables are
  looked up into one class (tokens, positions, token types) the largest has the vocabulary; to split the others would
  cost a reduction and save little.
* *inner*: one weight produces it, another contracts it.
* *batch*, *sequence*: the first and the other dimensions of the inputs.
* *feature*: none of these.

It knows nothing of meshes.
"""

import collections
import dataclasses
import functools
from typing import Literal

from meshloom.sharding.classes import Dim, constituents, leaves, leaves_of
from meshloom.sharding.trace import Program, Step
from meshloom.sharding.values import Dims, Kind, Lookup, Meeting, Product, Source, Value

Role = Literal[
    "stack", "heads", "kv_heads", "residual", "head_dim", "expert", "vocab", "inner", "batch", "sequence", "feature"
]
Uses = dict[Dim, set[int]]


@dataclasses.dataclass(frozen=True)
class Roles:
    """Roles of the leaves (finest factors) that occur in weights, and who uses them.

    Attributes:
        by_leaf: leaf -> role, with "heads" for every head dimension; `of` tells kv heads apart.
        produced, contracted, picked, looked_up: leaf -> indices of the parameters that produce it (as a free dimension
            of a product or the columns of a lookup), contract it, hold one matrix for each of its elements, or have it
            as rows that data looks up. Keys are in program order.
        shared_heads: head leaves that queries and keys have in common.
        joins: the steps at which the residual meets what was computed from it.
    """

    by_leaf: dict[Dim, Role]
    produced: Uses
    contracted: Uses
    picked: Uses
    looked_up: Uses
    shared_heads: frozenset[Dim]
    joins: tuple[Step, ...]
    _heads_in: tuple[frozenset[Dim], ...]
    _sets_with: dict[Dim, set[frozenset[Dim]]]

    def of(self, parameter: int, dim: Dim) -> Role:
        """Role of one dimension of parameter `parameter`: that of its outermost factor."""
        factors = self.factors(dim)
        role = self.by_leaf.get(factors[0], "feature") if factors else "feature"
        if role == "heads" and any(self._heads_in[parameter] < heads for heads in self._sets_with[factors[0]]):
            return "kv_heads"
        return role

    @functools.cached_property
    def multiplied(self) -> frozenset[int]:
        """Parameters that take part in a product or a lookup; others are added, multiplied by element, or not used."""
        return frozenset(
            parameter
            for uses in (self.produced, self.contracted, self.picked, self.looked_up)
            for users in uses.values()
            for parameter in users
        )

    def factors(self, dim: Dim) -> tuple[Dim, ...]:
        """The leaves of `dim`, outermost first; of its first part where only its parts have roles (a fused weight)."""
        factors = leaves(dim)
        while factors and factors[0] not in self.by_leaf and factors[0].parts:
            factors = leaves(factors[0].parts[min(factors[0].parts)])
        return factors


def infer(program: Program) -> Roles:
    """Reads the roles of a traced program."""
    produced, contracted, picked, looked_up, tables = _weight_uses(program.steps)
    in_weights = [{leaf for dim in each.dims for leaf in constituents(dim)} for each in program.parameters]
    batch = leaves_of(value.dims[0] for value in program.inputs if value.dims)
    sequence = leaves_of(dim for value in program.inputs for dim in value.dims[1:]) - contracted.keys()
    products = [
        step.fact
        for step in program.steps
        if isinstance(step.fact, Product) and all(value.kind == Kind.ACTIVATION for value in step.inputs[:2])
    ]
    residual, joins = _residual(program.steps)
    certain, shared, grouped = _heads(products, produced, in_weights)
    shared -= residual - certain
    heads = shared | (grouped - residual)
    returned = leaves_of(dim for value in program.outputs for dim in value.dims) & produced.keys()

    claims: list[tuple[Role, set[Dim]]] = [
        ("stack", leaves_of(program.stacks)),
        ("heads", certain),
        ("residual", residual),
        ("heads", shared | grouped),
        ("head_dim", _head_dims(products, heads) & produced.keys()),
        ("expert", set(picked)),
        ("vocab", _vocabularies(tables) | (returned - contracted.keys())),
        ("inner", {leaf for leaf in produced.keys() & contracted.keys() if len(produced[leaf] | contracted[leaf]) > 1}),
        ("batch", batch),
        ("sequence", sequence),
    ]
    by_leaf: dict[Dim, Role] = {}
    for role, members in claims:
        for leaf in members:
            by_leaf.setdefault(leaf, role)
    all_heads = {leaf for leaf, role in by_leaf.items() if role == "heads"}
    heads_in = tuple(frozenset(members & all_heads) for members in in_weights)
    sets_with: dict[Dim, set[frozenset[Dim]]] = collections.defaultdict(set)
    for together in heads_in:
        for leaf in together:
            sets_with[leaf].add(together)
    return Roles(
        by_leaf,
        produced,
        contracted,
        picked,
        looked_up,
        frozenset(shared),
        tuple(joins),
        heads_in,
        dict(sets_with),
    )


def _weight_uses(steps: tuple[Step, ...]) -> tuple[Uses, Uses, Uses, Uses, list[Lookup]]:
    """Who produces, contracts, is picked by and is looked up by each leaf, and the tables that the inputs look up."""
    produced: Uses = collections.defaultdict(set)
    contracted: Uses = collections.defaultdict(set)
    picked: Uses = collections.defaultdict(set)
    looked_up: Uses = collections.defaultdict(set)
    tables: list[Lookup] = []

    def note(uses: Uses, dims: Dims, weight: Value) -> None:
        for leaf in (leaf for dim in dims for leaf in constituents(dim)):
            uses[leaf] |= weight.parameters

    for step in steps:
        match step.fact:
            case Product(over, batch, lhs_free, rhs_free):
                for weight, other, free in zip(step.inputs[:2], step.inputs[1::-1], (lhs_free, rhs_free), strict=True):
                    if weight.kind == Kind.WEIGHT and other.kind == Kind.ACTIVATION:
                        note(produced, free, weight)
                        note(contracted, over, weight)
                        note(picked, batch, weight)
            case Lookup(rows, columns) as table if step.inputs[0].kind == Kind.WEIGHT:
                note(looked_up, rows, step.inputs[0])
                note(produced, columns, step.inputs[0])
                if step.inputs[1].kind == Kind.ACTIVATION:
                    tables.append(table)
    return dict(produced), dict(contracted), dict(picked), dict(looked_up), tables


def _vocabularies(tables: list[Lookup]) -> set[Dim]:
    """Rows of the largest table among those with the same columns."""
    largest: dict[frozenset[Dim], int] = {}
    for table in tables:
        columns = frozenset(leaves_of(table.columns))
        largest[columns] = max(largest.get(columns, 0), table.size)
    return {
        leaf
        for table in tables
        if table.size == largest[frozenset(leaves_of(table.columns))]
        for leaf in leaves_of(table.rows)
    }


def _heads(products: list[Product], produced: Uses, in_weights: list[set[Dim]]) -> tuple[set[Dim], set[Dim], set[Dim]]:
    """Batch dimensions of scores; of any product; free ones of scores that share a weight with the head dimension."""
    certain: set[Dim] = set()
    shared: set[Dim] = set()
    grouped: set[Dim] = set()
    for each in products:
        if not each.contracted:
            continue
        batch = leaves_of(each.batch) & produced.keys()
        shared |= batch
        if head_dim := leaves_of(each.contracted) & produced.keys():
            certain |= batch
            # A kernel's scratch memory may tie a block of keys to the head dimension: what is summed over is no head.
            free = (leaves_of((*each.lhs_free, *each.rhs_free)) & produced.keys()) - head_dim
            grouped |= {leaf for leaf in free if any(leaf in members and head_dim & members for members in in_weights)}
    return certain, shared, grouped


def _head_dims(products: list[Product], heads: set[Dim]) -> set[Dim]:
    """All but the heads of every product of two activations that has heads in it."""
    found: set[Dim] = set()
    for each in products:
        kept = leaves_of((*each.batch, *each.lhs_free, *each.rhs_free))
        if kept & heads:
            found |= (kept | leaves_of(each.contracted)) - heads
    return found


class _Ledger:
    """For every value, which classes it carries since which source, and which it had but gave up in a product with a
    weight.

    A source of a class is an input, a loop carry, a weight that produces it or a table that is looked up. Sets of
    sources are the bits of an int: an unrolled model has thousands, and a step is then a few machine words.
    """

    def __init__(self) -> None:
        self.live: dict[Value, int] = {}
        self.spent: dict[Value, int] = {}
        self.sources: dict[Dim, int] = collections.defaultdict(int)
        self._next = 1

    def enter(self, dims: Dims) -> int:
        """New sources, one for each leaf of `dims`."""
        bits = 0
        for leaf in leaves_of(dims):
            self.sources[leaf] |= self._next
            bits |= self._next
            self._next <<= 1
        return bits

    def of(self, dims: Dims) -> int:
        """All sources of the leaves of `dims`."""
        bits = 0
        for leaf in leaves_of(dims):
            bits |= self.sources.get(leaf, 0)
        return bits


def _residual(steps: tuple[Step, ...]) -> tuple[set[Dim], list[Step]]:
    """Leaves that are added to what was computed from them: carried from layer to layer; and where that happens."""
    ledger = _Ledger()
    residual: set[Dim] = set()
    joins: list[Step] = []
    for step in steps:
        live = spent = gained = 0
        for value in step.inputs:
            live |= ledger.live.get(value, 0)
            spent |= ledger.spent.get(value, 0)
        match step.fact:
            case Source():
                gained = ledger.enter(tuple(dim for value in step.outputs for dim in value.dims))
            case Lookup(_, columns):
                gained = ledger.enter(columns)
            case Product(over, _, lhs_free, rhs_free):
                kinds = [value.kind for value in step.inputs[:2]]
                if Kind.WEIGHT in kinds:
                    given_up = live & ledger.of(over)
                    live, spent = live & ~given_up, spent | given_up
                    gained = ledger.enter(lhs_free if kinds[0] == Kind.WEIGHT else rhs_free)
            case Meeting():
                a, b = step.inputs
                again = (ledger.live.get(a, 0) & ledger.spent.get(b, 0)) | (
                    ledger.live.get(b, 0) & ledger.spent.get(a, 0)
                )
                met = {leaf for leaf in leaves_of(step.outputs[0].dims) if again & ledger.sources.get(leaf, 0)}
                if met:
                    residual |= met
                    joins.append(step)
        for value in step.outputs:
            ledger.live[value] = live | gained
            ledger.spent[value] = spent
    return residual, joins

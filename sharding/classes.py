"""Classes of array dimensions: which dimensions of a program are one and the same, found by union-find with factors.

A `Dim` stands for one dimension of one or many arrays. `unify` says that two of them are the same. A reshape makes a
dimension a product of ordered factors, outermost first: the `N * H` rows of a query projection become `(N, H)`, and a
grouped-query reshape refines `N` to `(K, G)` wherever `N` occurs. A slice or a concatenation gives a dimension parts:
the `[q | k | v]` rows of a fused projection.

It knows nothing of arrays, primitives, parameters or meshes. All sizes are in elements.
"""

import math
from collections.abc import Iterable, Sequence


class Dim:
    """A class of dimensions of `size` elements; compare with `find(a) is find(b)`.

    Attributes:
        size: number of elements.
        factors: ordered factors that a reshape found, outermost first; empty for a leaf.
        parts: (start, size) -> the class of that stretch, for stretches that the program cuts out or joins.
        wholes: the dimensions that this one is a part of.
        windowed: read at offsets known only at run time.
    """

    __slots__ = ("_parent", "factors", "parts", "size", "wholes", "windowed")

    def __init__(self, size: int, factors: Sequence["Dim"] = ()):
        self.size = size
        self.factors = tuple(factors)
        self.parts: dict[tuple[int, int], Dim] = {}
        self.wholes: list[Dim] = []
        self.windowed = False
        self._parent: Dim = self

    def __repr__(self) -> str:
        root = find(self)
        inner = "*".join(map(repr, root.factors)) if root.factors else ""
        return f"{root.size}({inner})" if inner else f"{root.size}"


def find(dim: Dim) -> Dim:
    """The representative of the class of `dim`."""
    while dim._parent is not dim:
        dim._parent = dim._parent._parent
        dim = dim._parent
    return dim


def leaves(dim: Dim) -> tuple[Dim, ...]:
    """The finest known factors of `dim`, outermost first; empty for size 1, which cannot be split and ties nothing."""
    root = find(dim)
    if root.size == 1:
        return ()
    if not root.factors:
        return (root,)
    return tuple(leaf for factor in root.factors for leaf in leaves(factor))


def leaves_of(dims: Iterable[Dim]) -> set[Dim]:
    """All finest factors of several dimensions."""
    return {leaf for dim in dims for leaf in leaves(dim)}


def constituents(dim: Dim) -> tuple[Dim, ...]:
    """The leaves of `dim`, and those of its parts and of its factors' parts: all that a weight of these rows makes."""
    root = find(dim)
    if root.size == 1:
        return ()
    own = tuple(each for factor in root.factors for each in constituents(factor)) if root.factors else (root,)
    return own + tuple(each for piece in root.parts.values() for each in constituents(piece))


def unify(a: Dim, b: Dim) -> bool:
    """Declares `a` and `b` the same dimension, factor by factor and part by part. False where sizes differ: they stay
    apart."""
    a, b = find(a), find(b)
    if a is b:
        return True
    if a.size != b.size:
        return False
    if a.factors and not b.factors:
        a, b = b, a
    clashing = (leaves(a), leaves(b)) if a.factors else None
    a._parent = b
    b.windowed |= a.windowed
    b.wholes += a.wholes
    shared = [(part, b.parts[key]) for key, part in a.parts.items() if key in b.parts]
    b.parts = {**a.parts, **b.parts}
    a.parts = {}
    if clashing is not None:
        _align(*clashing)
    for part, other in shared:
        unify(part, other)
    return True


def _align(a: Iterable[Dim], b: Iterable[Dim]) -> None:
    """Unifies two factorizations of one dimension from the outermost inward, as far as they have a common refinement.

    `(N, H)` against `(K, G, H)` refines N to `(K, G)`; `(6, 4)` against `(4, 6)` has no common outer factor and stops
    there.
    """
    a, b = list(a), list(b)
    while a and b:
        x, y = a.pop(0), b.pop(0)
        if find(x).factors or find(y).factors:
            x, *rest_x = leaves(x)
            y, *rest_y = leaves(y)
            a, b = rest_x + a, rest_y + b
        if x.size > y.size:
            if not _refine(x, y.size):
                return
            x, rest = find(x).factors
            a.insert(0, rest)
        elif y.size > x.size:
            if not _refine(y, x.size):
                return
            y, rest = find(y).factors
            b.insert(0, rest)
        unify(x, y)


def _refine(leaf: Dim, outer: int) -> bool:
    """Makes a leaf the product of `outer` and the rest, if that divides."""
    leaf = find(leaf)
    if leaf.size % outer:
        return False
    leaf.factors = (Dim(outer), Dim(leaf.size // outer))
    return True


def product(dims: Sequence[Dim]) -> Dim:
    """The dimension that a row-major reshape makes of `dims`, outermost first."""
    real = [dim for dim in dims if dim.size != 1]
    return real[0] if len(real) == 1 else Dim(math.prod(dim.size for dim in real), real)


def regroup(dims: Sequence[Dim], sizes: Sequence[int]) -> list[Dim]:
    """The dimensions after a row-major reshape of `dims` to `sizes`; the total is the same.

    Dimensions that pass unchanged keep their class. Merged ones become products, split ones are refined. Where the
    boundaries of the two shapes do not nest, as in `[6, 4] -> [4, 6]`, the result is a new class.
    """
    if 0 in sizes:
        return [Dim(size) for size in sizes]
    source = [dim for dim in dims if dim.size != 1]
    result: list[Dim] = []
    target = list(sizes)
    while target:
        if target[0] == 1:
            result.append(Dim(target.pop(0)))
            continue
        taken, wanted = [source.pop(0)], [target.pop(0)]
        while (have := math.prod(dim.size for dim in taken)) != (want := math.prod(wanted)):
            if have < want:
                taken.append(source.pop(0))
            else:
                wanted.append(target.pop(0))
        result += taken if len(taken) == len(wanted) == 1 else _regroup_block(taken, wanted)
    return result


def _regroup_block(dims: Sequence[Dim], sizes: Sequence[int]) -> list[Dim]:
    rest = [leaf for dim in dims for leaf in leaves(dim)]
    result = []
    for size in sizes:
        taken: list[Dim] = []
        missing = size
        while missing > 1 and rest:
            leaf = rest.pop(0)
            if missing % leaf.size:
                if not (leaf.size % missing == 0 and _refine(leaf, missing)):
                    return [Dim(each) for each in sizes]
                leaf, remainder = find(leaf).factors
                rest.insert(0, remainder)
            taken.append(leaf)
            missing //= leaf.size
        result.append(product(taken) if taken else Dim(size))
    return result


def part(dim: Dim, start: int, size: int) -> Dim:
    """The class of the stretch `[start, start + size)` of `dim`: the same one whenever the same stretch is cut out
    again."""
    root = find(dim)
    if size == root.size:
        return root
    if (start, size) not in root.parts:
        _set_part(root, start, Dim(size))
    return root.parts[start, size]


def strided(dim: Dim, start: int, size: int, stride: int) -> Dim:
    """The class of every `stride`-th element from `start`: the outer factor where the strides tile `dim`, else a
    window."""
    if start < stride and size * stride == dim.size:
        return regroup([dim], [size, stride])[0]
    return window(dim, size)


def window(dim: Dim, size: int) -> Dim:
    """A new class of `size` elements read from `dim` at an offset known only at run time."""
    root = find(dim)
    if size == root.size:
        return root
    root.windowed = True
    return Dim(size)


def joined(dims: Sequence[Dim]) -> Dim:
    """The dimension that concatenates `dims` in order: what was cut apart and is joined in the same order is the old
    one again."""
    size = sum(dim.size for dim in dims)
    starts = [sum(dim.size for dim in dims[:i]) for i in range(len(dims))]
    pieces = [(start, dim) for start, dim in zip(starts, dims, strict=True) if dim.size]
    if len(pieces) == 1:
        return pieces[0][1]
    for whole in map(find, find(pieces[0][1]).wholes if pieces else ()):
        known = [whole.parts.get((start, dim.size)) for start, dim in pieces]
        if whole.size == size and all(
            has and find(has) is find(dim) for has, (_, dim) in zip(known, pieces, strict=True)
        ):
            return whole
    whole = Dim(size)
    for start, dim in pieces:
        _set_part(whole, start, dim)
    return whole


def _set_part(whole: Dim, start: int, piece: Dim) -> None:
    whole.parts[start, piece.size] = piece
    find(piece).wholes.append(whole)


def cuts(dim: Dim, ways: int) -> tuple[int, ...]:
    """Offsets at which the program cuts open what a split of `dim` in `ways` would split; a windowed one counts as cut
    at 0."""
    root = find(dim)
    offsets = {edge for start, size in root.parts for edge in (start, start + size)} - {0, root.size}
    if root.windowed:
        offsets.add(0)
    if offsets or not root.factors:
        return tuple(sorted(offsets))
    for factor in root.factors:
        if inner := cuts(factor, ways):
            return inner
        if ways <= factor.size:
            return ()
        ways //= factor.size
    return ()

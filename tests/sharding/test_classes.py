"""Classes of dimensions: reshape factors, parts of fused dimensions, and what unifies with what."""

from hypothesis import given
from hypothesis import strategies as st

from meshloom.sharding.classes import Dim, cuts, find, joined, leaves, part, product, regroup, strided, unify, window


def sizes(dim: Dim) -> list[int]:
    return [leaf.size for leaf in leaves(dim)]


def same(a: Dim, b: Dim) -> bool:
    return find(a) is find(b)


def test_a_split_dimension_becomes_ordered_factors():
    rows = Dim(96)
    heads, head_dim = regroup([rows], [12, 8])
    assert sizes(rows) == [12, 8]
    assert leaves(rows) == (find(heads), find(head_dim))


def test_merging_back_gives_the_same_factors():
    rows = Dim(96)
    (merged,) = regroup(regroup([rows], [12, 8]), [96])
    assert leaves(merged) == leaves(rows)


def test_a_later_reshape_refines_every_occurrence():
    queries, values = Dim(96), Dim(96)
    heads, _ = regroup([queries], [12, 8])
    regroup([values], [12, 8])
    unify(queries, values)
    regroup([heads], [4, 3])
    assert sizes(queries) == sizes(values) == [4, 3, 8]
    assert leaves(queries) == leaves(values)


def test_different_factors_of_one_dimension_meet_in_a_common_refinement():
    a, b = Dim(24), Dim(24)
    regroup([a], [2, 12])
    regroup([b], [6, 4])
    unify(a, b)
    assert sizes(a) == [2, 3, 4]


def test_factors_that_do_not_nest_tie_only_what_agrees():
    a, b = Dim(24), Dim(24)
    regroup([a], [4, 6])
    regroup([b], [6, 4])
    assert unify(a, b)
    assert same(a, b)


def test_a_reshape_whose_boundaries_do_not_nest_makes_new_classes():
    a, b = Dim(6), Dim(4)
    result = regroup([a, b], [4, 6])
    assert [dim.size for dim in result] == [4, 6]
    assert not same(result[0], b)
    assert not same(result[1], a)


def test_dimensions_of_size_one_tie_nothing():
    one, other = Dim(1), Dim(5)
    assert not unify(one, other)
    assert [dim.size for dim in regroup([Dim(1), other, Dim(1)], [5, 1])] == [5, 1]
    assert leaves(one) == ()


def test_sizes_that_differ_stay_apart():
    assert not unify(Dim(3), Dim(4))


def test_the_same_stretch_is_the_same_class():
    fused = Dim(12)
    assert same(part(fused, 0, 4), part(fused, 0, 4))
    assert not same(part(fused, 0, 4), part(fused, 4, 4))
    assert same(part(fused, 0, 12), fused)


def test_equal_dimensions_have_equal_parts():
    a, b = Dim(12), Dim(12)
    first, second = part(a, 4, 4), part(b, 4, 4)
    unify(a, b)
    assert same(first, second)


def test_what_is_cut_apart_and_joined_again_is_the_old_dimension():
    whole = Dim(8)
    first, second = part(whole, 0, 4), part(whole, 4, 4)
    assert same(joined([first, second]), whole)
    assert not same(joined([second, first]), whole)


def test_parts_of_a_join_are_its_pieces():
    gate, up = Dim(4), Dim(4)
    fused = joined([gate, up])
    assert same(part(fused, 4, 4), up)


def test_a_stride_that_tiles_is_the_outer_factor():
    head = Dim(8)
    even, odd = strided(head, 0, 4, 2), strided(head, 1, 4, 2)
    assert same(even, odd)
    assert sizes(head) == [4, 2]
    assert cuts(head, 2) == ()


def test_cuts_are_found_in_the_factor_that_would_be_split():
    rows = Dim(96)
    heads, head_dim = regroup([rows], [12, 8])
    part(head_dim, 0, 4)
    assert cuts(rows, 4) == ()
    part(heads, 0, 8)
    assert cuts(rows, 4) == (8,)
    blocks = Dim(16)
    window(blocks, 4)
    assert cuts(blocks, 2) == (0,)


def test_product_of_one_real_dimension_is_that_dimension():
    dim = Dim(7)
    assert product([Dim(1), dim, Dim(1)]) is dim


@given(st.lists(st.sampled_from([1, 2, 3, 4, 6]), min_size=1, max_size=4), st.randoms(use_true_random=False))
def test_any_reshape_keeps_sizes_and_the_total(shape, random):
    dims = [Dim(size) for size in shape]
    primes = [factor for size in shape for factor in {1: [], 2: [2], 3: [3], 4: [2, 2], 6: [2, 3]}[size]]
    target = [1]
    for prime in primes:
        if random.random() < 0.5:
            target.append(prime)
        else:
            target[-1] *= prime
    result = regroup(dims, target)
    assert [dim.size for dim in result] == target
    for dim in [*dims, *result]:
        total = 1
        for size in sizes(dim):
            total *= size
        assert total == dim.size

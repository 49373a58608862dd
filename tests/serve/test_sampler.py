"""The sampler against a numpy oracle that sorts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from meshloom.serve import sampler
from meshloom.serve.sampler import Draws


def draws(rows, *, temperature=1.0, top_p=1.0, top_k=0, min_p=0.0, seeds=None, positions=None) -> Draws:
    def column(value, dtype):
        return jnp.broadcast_to(jnp.asarray(value, dtype), (rows,))

    return Draws(
        temperature=column(temperature, jnp.float32),
        top_p=column(top_p, jnp.float32),
        top_k=column(top_k, jnp.int32),
        min_p=column(min_p, jnp.float32),
        seeds=jnp.arange(rows, dtype=jnp.int32) if seeds is None else column(seeds, jnp.int32),
        positions=column(0 if positions is None else positions, jnp.int32),
    )


def oracle(logits, temperature, top_p, top_k, min_p):
    """Probabilities of one row, by sorting, float64."""
    scaled = logits.astype(np.float64) / temperature
    p = np.exp(scaled - scaled.max())
    p[p < min_p] = 0
    order = np.argsort(-p, kind="stable")
    if top_k:
        p[p < p[order[min(top_k, len(p)) - 1]]] = 0
    if top_p < 1:
        mass = np.cumsum(p[order]) / p.sum()
        edge = p[order[np.searchsorted(mass, top_p)]]
        p[p < edge] = 0
    return p / p.sum()


CASES = [
    {"temperature": 1.0},
    {"temperature": 0.3},
    {"temperature": 1.5, "top_k": 5},
    {"temperature": 1.0, "top_p": 0.7},
    {"temperature": 1.0, "top_p": 1e-6},
    {"temperature": 1.0, "min_p": 0.2},
    {"temperature": 2.0, "top_p": 0.9, "top_k": 20, "min_p": 0.05},
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_exactly_the_right_tokens_are_kept(case):
    logits = np.random.default_rng(0).normal(size=(6, 700)).astype(np.float32) * 3
    scaled = jnp.asarray(logits / case["temperature"])
    weights = jnp.exp(scaled - scaled.max(axis=-1, keepdims=True))
    kept = np.asarray(sampler.keep(weights, draws(6, **case))) > 0
    full = {"top_p": 1.0, "top_k": 0, "min_p": 0.0} | case
    expected = np.stack([oracle(row, **full) > 0 for row in logits])
    np.testing.assert_array_equal(kept, expected)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_draws_follow_the_distribution(case):
    rows, logits = 20_000, np.random.default_rng(1).normal(size=300).astype(np.float32) * 2
    tokens = jax.jit(sampler.sample)(jnp.broadcast_to(logits, (rows, 300)), draws(rows, **case))
    expected = oracle(logits, **({"top_p": 1.0, "top_k": 0, "min_p": 0.0} | case)) * rows
    counts = np.bincount(np.asarray(tokens), minlength=300)
    assert not counts[expected == 0].any(), "a token outside the kept set was drawn"
    # Chi-square needs some 5 expected per cell: the rare tokens are one cell.
    common = expected >= 5
    observed = [*counts[common], counts[~common].sum()]
    wanted = [*expected[common], expected[~common].sum()]
    if wanted[-1] < 5:
        observed[-2:], wanted[-2:] = [sum(observed[-2:])], [sum(wanted[-2:])]
    if len(wanted) > 1:
        assert scipy.stats.chisquare(observed, wanted).pvalue > 1e-4


def test_temperature_zero_is_argmax_whatever_the_rest_says():
    logits = jnp.asarray(np.random.default_rng(2).normal(size=(5, 1000)), jnp.float32)
    tokens = sampler.sample(logits, draws(5, temperature=0.0, top_p=0.5, top_k=3))
    np.testing.assert_array_equal(tokens, np.argmax(logits, axis=-1))


def test_the_lowest_of_equal_logits_wins():
    logits = jnp.zeros((2, 50)).at[:, 10].set(1.0).at[:, 20].set(1.0)
    assert sampler.first_largest(logits).tolist() == [10, 10]


def test_a_row_does_not_feel_its_neighbours():
    logits = jnp.asarray(np.random.default_rng(3).normal(size=(4, 1000)), jnp.float32)
    together = draws(4, temperature=[0.0, 1.0, 0.7, 1.3], top_p=[1.0, 1.0, 0.5, 1.0], top_k=[0, 0, 0, 40], positions=9)
    sample = jax.jit(sampler.sample)
    tokens = sample(logits, together)
    for row in range(4):
        alone = Draws(*(field[row : row + 1] for field in together))
        assert sample(logits[row : row + 1], alone)[0] == tokens[row]


def test_seed_and_position_decide_the_draw():
    logits = jnp.zeros((64, 1000))
    sample = jax.jit(sampler.sample)
    one = sample(logits, draws(64, seeds=5, positions=jnp.arange(64)))
    again = sample(logits, draws(64, seeds=5, positions=jnp.arange(64)))
    other = sample(logits, draws(64, seeds=6, positions=jnp.arange(64)))
    np.testing.assert_array_equal(one, again)
    assert len(set(one.tolist())) > 50
    assert (one != other).mean() > 0.9


@pytest.mark.parametrize("uniform", [0.0, 0.25, 0.5, 1 - 2**-24])
def test_the_ends_of_the_distribution_never_yield_a_weightless_token(uniform):
    weights = jnp.zeros((1, 600)).at[0, jnp.array([3, 255, 256, 511])].set(jnp.array([1.0, 1e-7, 0.5, 1e-20]))
    token = int(sampler.invert_cdf(weights, jnp.array([uniform], jnp.float32))[0])
    assert weights[0, token] > 0

"""Decode over caches in fewer bits on TPUs: keys are multiplied as stored, no worse than products in bfloat16."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl

from meshloom.pallas_kernels import KVPages
from meshloom.pallas_kernels.attention.paged import PagedScoring
from meshloom.pallas_kernels.attention.paged_cases import PagedCase
from meshloom.pallas_kernels.attention.paged_mosaic_tpu import paged_attention_mosaic_tpu
from meshloom.pallas_kernels.attention.paged_mosaic_tpu_decode import _products_of_steps, _steps
from meshloom.pallas_kernels.attention.reference import paged_attention_reference

# A part of a block.
CASE = PagedCase((200,), (1,), 8, 2, 128, page_size=128, element="int8", dtype="bfloat16", padding=0)


@pytest.mark.parametrize(
    ("element", "options"),
    [
        ("int8", {}),
        ("int8", {"soft_cap": 3.0, "window": 33}),
        ("float8_e4m3fn", {"soft_cap": 3.0, "window": 33}),
        ("int4", {"soft_cap": 3.0, "window": 33}),
    ],
    ids=["int8", "int8_cap_window", "float8_cap_window", "int4_cap_window"],
)
def test_it_errs_no_more_than_twice_as_much_as_bfloat16(monkeypatch, element, options):
    monkeypatch.setattr(pl, "pallas_call", functools.partial(pl.pallas_call, interpret=True))
    q, k, v, pages, ragged = dataclasses.replace(CASE, element=element).step()
    # Heads of different loudness share nothing, and one of zeros weighs all keys alike.
    q = q * jnp.asarray([1, 0, 1e-3, 8, 1, 1, 1, 1], q.dtype)[:, None]
    pages = jax.jit(KVPages.write)(pages, k, v, ragged)
    scoring = PagedScoring(CASE.head_dim**-0.5, **options)
    values = jnp.linspace(-2, 2, CASE.heads)
    reference = jax.jit(lambda q, pages: paged_attention_reference(q, pages, ragged, scoring, values))
    exact = np.asarray(reference(q.astype(jnp.float32), pages))
    got = paged_attention_mosaic_tpu(q, pages, ragged, scoring, values)
    block = pages.gather(ragged.page_table).dequantized()
    naive = _in_bfloat16(q, *block, ragged.kv_lens, scoring, values)
    ours, theirs = (np.abs(np.asarray(x, np.float32) - exact).max() for x in (got, naive))
    assert ours <= 2 * theirs


def _in_bfloat16(q, k, v, lengths, scoring, sinks):
    """One row of each sequence [S, N, H] over keys [S, c, K, H], operands and weights rounded to bfloat16."""
    group = q.shape[1] // k.shape[2]
    k, v = (jnp.repeat(x, group, axis=2).astype(jnp.bfloat16) for x in (k, v))
    scores = jnp.einsum("snh,scnh->snc", q, k, preferred_element_type=jnp.float32) * scoring.scale
    if scoring.soft_cap is not None:
        scores = scoring.soft_cap * jnp.tanh(scores / scoring.soft_cap)
    distance = lengths[:, None] - 1 - jnp.arange(k.shape[1])
    allowed = (distance >= 0) & (distance < (scoring.window or k.shape[1]))
    scores = jnp.where(allowed[:, None], scores, -1e30)
    scores = jnp.concatenate([scores, jnp.broadcast_to(sinks[:, None], (*scores.shape[:2], 1))], axis=2)
    weights = jax.nn.softmax(scores)[..., :-1].astype(jnp.bfloat16)
    return jnp.einsum("snc,scnh->snh", weights, v, preferred_element_type=jnp.float32).astype(jnp.bfloat16)


def test_steps_hold_what_bfloat16_holds():
    rng = np.random.default_rng(0)
    q = jnp.asarray(rng.normal(size=(32, 128)) * 10.0 ** rng.integers(-9, 9, size=(32, 1)), jnp.bfloat16)
    k = jnp.asarray(rng.integers(-127, 128, size=(64, 128)), jnp.int8)
    steps, unit = _steps(q)
    exact = np.asarray(q, np.float64) @ np.asarray(k, np.float64).T
    got = np.asarray(_products_of_steps(steps, k), np.float64) * np.asarray(unit, np.float64)
    # Half a step each of 128 elements.
    assert np.all(np.abs(got - exact) <= 0.51 * np.asarray(unit) * np.abs(np.asarray(k, np.float64)).sum(1))


def test_float8_is_multiplied_as_it_is_stored():
    q, _, _, pages, ragged = jax.eval_shape(dataclasses.replace(CASE, element="float8_e4m3fn").step)
    call = functools.partial(paged_attention_mosaic_tpu, scoring=PagedScoring(1.0), sinks=None)
    program = str(jax.make_jaxpr(call)(q, pages, ragged))
    stored = re.findall(r"(\w+):f8_e4m3fn\[", program)
    factors = re.findall(r"dot_general\[.*?\] \w+ (\w+)$", program, re.DOTALL | re.MULTILINE)
    assert len(stored) == 2
    assert sorted(factors) == sorted(stored)

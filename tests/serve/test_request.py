import pytest

from meshloom.core.errors import RequestError
from meshloom.serve.request import Draw, SamplingParams


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"temperature": -0.5}, r"temperature must lie in \[0, 100\]; got -0.5"),
        ({"temperature": float("nan")}, "temperature must lie in"),
        ({"top_p": 0}, r"top_p must lie in \(0, 1\]; got 0.0"),
        ({"top_k": -1}, "top_k .* got -1"),
        ({"min_p": 1.5}, r"min_p must lie in \[0, 1\]; got 1.5"),
        ({"max_tokens": 0}, "max_tokens must be at least 1; got 0"),
        ({"stop": ("a", "")}, r"non-empty strings; got \['a', ''\]"),
        ({"stop": ("x",) * 17}, "at most 16 stop strings; got 17"),
        ({"seed": 2**64}, "64-bit"),
        ({"stop_token_ids": (-2,)}, r"stop_token_ids must be >= 0; got \[-2\]"),
    ],
)
def test_nonsense_is_refused_with_the_value(fields, message):
    with pytest.raises(RequestError, match=message):
        SamplingParams(**fields)


def test_integers_and_single_strings_are_taken_as_meant():
    params = SamplingParams(temperature=1, stop="end")
    assert params.temperature == 1.0
    assert params.stop == ("end",)


def test_a_given_seed_is_the_same_draw_and_none_is_not():
    assert Draw.of(SamplingParams(seed=2**40)) == Draw.of(SamplingParams(seed=2**40))
    assert len({Draw.of(SamplingParams()).seed for _ in range(8)}) > 1
    assert all(0 <= Draw.of(SamplingParams(seed=seed)).seed < 2**31 for seed in (-1, -(2**63), 2**63 - 1))

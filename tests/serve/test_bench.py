import json

import pytest

from meshloom.core.errors import ConfigError
from meshloom.serve.bench import bench_serve
from meshloom.serve.config import BenchServeConfig

from .conftest import SMALL


@pytest.mark.parametrize("requests", [1, 5])
def test_figures_are_complete_and_agree_with_each_other(lm, requests):
    config = BenchServeConfig(model="tiny", requests=requests, input_len=6, output_len=4, engine=SMALL)
    figures = json.loads(json.dumps(bench_serve(config, lm)))
    assert figures["output_tokens_per_second"] == pytest.approx(requests * 4 / figures["elapsed_s"])
    assert figures["total_tokens_per_second"] == pytest.approx(requests * 10 / figures["elapsed_s"])
    for name in ("ttft_s", "itl_s"):
        assert set(figures[name]) == {"p50", "p90", "p99", "mean"}
        assert 0 < figures[name]["p50"] <= figures[name]["p99"] <= figures["elapsed_s"]


def test_what_cannot_be_measured_is_refused():
    with pytest.raises(ConfigError, match="input_len must be at least 1; got 0"):
        BenchServeConfig(input_len=0)
    with pytest.raises(ConfigError, match="--offline"):
        BenchServeConfig(offline=False)

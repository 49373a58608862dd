"""Caches of tests live and die with the session, and several tests look at one finished run."""

import pytest

from meshloom.train.loop import Run, train
from tests.train.runs import tiny_config


@pytest.fixture(autouse=True, scope="session")
def own_cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def finished(own_cache, tmp_path_factory) -> tuple[Run, object]:
    """A run of 12 steps over fsdp=4,tensor=2, and its configuration."""
    config = tiny_config(tmp_path_factory.mktemp("finished"), steps=12)
    return train(config), config

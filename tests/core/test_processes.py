"""The environment says where a process belongs, or is refused, and nobody waits forever for the others."""

import socket

import pytest

from meshloom.core.errors import ConfigError
from meshloom.core.processes import ADDRESS, COUNT, INDEX, Place, any_process, check_agreement, joined, meet, place_of


def test_three_variables_say_where_a_process_belongs():
    assert place_of({ADDRESS: "10.0.0.1:1234", COUNT: "4", INDEX: "3"}) == Place("10.0.0.1", 1234, 4, 3)


@pytest.mark.parametrize(
    ("environment", "place"),
    [
        ({}, None),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "1"}, None),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "2"}, "detected"),
        ({ADDRESS: "auto"}, "detected"),
    ],
    ids=["nothing", "one task", "two tasks", "auto"],
)
def test_launchers_are_left_to_jax(environment, place):
    assert place_of(environment) == place


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({COUNT: "2"}, f"{COUNT} set without {ADDRESS}, {INDEX}"),
        ({ADDRESS: "host", COUNT: "2", INDEX: "0"}, "host:port of process 0; got 'host'"),
        ({ADDRESS: "host:0", COUNT: "2", INDEX: "0"}, "got 'host:0'"),
        ({ADDRESS: "host:1", COUNT: "two", INDEX: "0"}, "a whole number of at least 1; got 'two'"),
        ({ADDRESS: "host:1", COUNT: "2", INDEX: "2"}, r"must lie in 0\.\.1"),
    ],
)
def test_incomplete_or_impossible_places_are_refused(environment, message):
    with pytest.raises(ConfigError, match=message):
        place_of(environment)


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("", 0))
        return free.getsockname()[1]


def test_an_absent_first_process_is_an_error_after_the_wait():
    with pytest.raises(ConfigError, match=r"process 1 could not meet process 0 at 127\.0\.0\.1"):
        meet(Place("127.0.0.1", free_port(), 2, 1), seconds=0.3)


def test_absent_others_are_named_by_the_first_process():
    with pytest.raises(ConfigError, match=r"of 3 processes, 1, 2 did not come within 0\.3 s"):
        meet(Place("127.0.0.1", free_port(), 3, 0), seconds=0.3)


def test_a_process_alone_agrees_with_itself():
    assert joined() == (0, 1)
    assert any_process(True)
    assert not any_process(False)
    check_agreement({"seed": 1})

"""A configuration that makes no sense is refused with its numbers; one that would change a run, with its fields."""

import dataclasses

import pytest

from meshloom.core.config import to_dict
from meshloom.core.errors import ConfigError
from meshloom.train.config import ArchitectureConfig, TrainConfig, continuity_errors


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"batch_size": 8, "accumulation": 3}, "batch_size=8 rows cannot be computed in accumulation=3"),
        ({"steps": 0}, "steps must be at least 1; got 0"),
        ({"vocab_size": 256}, "at least 257.*got 256"),
        ({"learning_rate": float("nan")}, "learning_rate must be a positive number; got nan"),
        ({"beta2": 1.0}, r"beta2 must lie in \[0, 1\); got 1.0"),
        ({"steps": 10, "warmup_steps": 11}, r"0\.\.steps=10; got 11"),
        ({"final_lr_fraction": 1.5}, "got 1.5"),
        ({"weight_decay": -0.1}, "got -0.1"),
        ({"seed": -1}, "got -1"),
    ],
)
def test_nonsense_is_refused_with_its_numbers(values, message):
    with pytest.raises(ConfigError, match=message):
        TrainConfig(**values)


def test_heads_that_do_not_divide_are_refused():
    with pytest.raises(ConfigError, match=r"n_kv_heads=3 must divide architecture\.n_heads=8"):
        ArchitectureConfig(n_kv_heads=3)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"learning_rate": 1.0}, ["learning_rate: 0.001 -> 1.0"]),
        ({"architecture": ArchitectureConfig(d_ff=64)}, ["architecture.d_ff: 768 -> 64"]),
        ({"seed": 1, "batch_size": 4}, ["batch_size: 8 -> 4", "seed: 0 -> 1"]),
        ({"steps": 400}, ["steps: 300 -> 400"]),
        ({"keep": 5, "log_every": 2, "checkpoint_every": 7, "devices": "cpu:8", "mesh": "fsdp=8"}, []),
    ],
)
def test_changes_that_break_continuity_are_named(changes, named):
    before = TrainConfig()
    assert continuity_errors(to_dict(before), to_dict(dataclasses.replace(before, **changes))) == named


def test_only_a_rate_that_ignores_their_number_lets_steps_grow():
    fixed = TrainConfig(schedule="constant", warmup_steps=10)
    assert continuity_errors(to_dict(fixed), to_dict(dataclasses.replace(fixed, steps=900))) == []
    relative = TrainConfig(schedule="constant")
    assert continuity_errors(to_dict(relative), to_dict(dataclasses.replace(relative, steps=900)))

"""Which accelerators serve a mix of requests at least cost: an integer programme over types and counts, types mixed.

Every offer (a device string such as "v5e:2x2") is planned for every kind of request within the target times. How many
of each to rent, and which share of each kind goes where, is then a mixed integer programme for HiGHS (Griggs et al.
2024, Melange): the load put on an offer is at most what its count can take.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from flax import nnx

from meshloom.core.errors import ConfigError, ShardingError
from meshloom.core.hardware import chip_named
from meshloom.core.topology import parse_devices
from meshloom.sharding.serving import ServeCandidate, plan_serving
from meshloom.sharding.workload import ServeWorkload


@dataclasses.dataclass(frozen=True)
class RequestKind:
    """Requests of one size, arriving `per_second` on average."""

    input_length: int
    output_length: int
    per_second: float | int

    def __post_init__(self) -> None:
        if min(self.input_length, self.output_length) < 1 or self.per_second <= 0:
            raise ConfigError(f"a kind of requests has lengths and a rate greater than 0; got {self}")


@dataclasses.dataclass(frozen=True)
class Slo:
    """Most seconds to the first token and per further token."""

    ttft_s: float | int
    tpot_s: float | int


@dataclasses.dataclass(frozen=True)
class Purchase:
    """What to rent.

    Attributes:
        counts: device string -> how many, without those of which none is wanted. cost_per_hour: US dollars.
        shares: per kind of request, device string -> the share of it that goes there.
    """

    counts: dict[str, int]
    cost_per_hour: float
    shares: tuple[dict[str, float], ...]


def cheapest(
    module: nnx.Module,
    request_mix: Sequence[RequestKind],
    slo: Slo,
    chips: Sequence[str],
    prices: Mapping[str, float | int] | None = None,
    *,
    plan: Callable[..., list[ServeCandidate]] = plan_serving,
) -> Purchase:
    """The cheapest accelerators for the mix.

    Args:
        module: abstract, as for `plan_serving`.
        chips: device strings on offer, each of which is one replica group: "v5e:2x2", "h100:2".
        prices: chip name -> US dollars per device and hour, over the table's.
        plan: how one offer is planned; by default for all number formats, whether an engine has them or not.
    Raises:
        ConfigError: an unknown chip, or nothing on offer. ShardingError: a kind that no offer serves within the times.
    """
    if not request_mix or not chips:
        raise ConfigError("cheapest needs at least one kind of request and one device string, e.g. v5e:2x2")
    rates = np.array([[_rate(module, kind, slo, text, plan) for text in chips] for kind in request_mix])
    for kind, row in zip(request_mix, rates, strict=True):
        if not row.any():
            raise ShardingError(
                f"none of {', '.join(chips)} serves {kind.input_length} tokens in and {kind.output_length} out within "
                f"{slo.ttft_s} s to the first token and {slo.tpot_s} s per token; offer more devices each, or allow "
                "more time"
            )
    hourly = np.array([_price(text, prices or {}) for text in chips])
    return solve(rates, np.array([kind.per_second for kind in request_mix], float), hourly, chips)


def solve(rates: np.ndarray, wanted: np.ndarray, hourly: np.ndarray, names: Sequence[str]) -> Purchase:
    """The integer programme: requests/s by kind and offer, requests/s wanted by kind, dollars per hour by offer.

    Variables: a count per offer, integer, and the share of each kind on each offer.
    """
    from scipy.optimize import Bounds, LinearConstraint, milp  # a second to import, for this one function

    kinds, offers = rates.shape
    shares = kinds * offers
    # Each kind is served in full ...
    served = np.hstack([np.zeros((kinds, offers)), np.kron(np.eye(kinds), np.ones((1, offers)))])
    # ... and no offer is loaded beyond its count.
    load = np.divide(wanted[:, None], rates, out=np.zeros_like(rates), where=rates > 0)
    loaded = np.hstack([-np.eye(offers), np.hstack([np.diag(row) for row in load])])
    possible = (rates > 0).astype(float).ravel()
    result = milp(
        np.concatenate([hourly, np.zeros(shares)]),
        constraints=[LinearConstraint(served, 1, 1), LinearConstraint(loaded, -np.inf, 0)],
        bounds=Bounds(0, np.concatenate([np.full(offers, np.inf), possible])),
        integrality=np.concatenate([np.ones(offers), np.zeros(shares)]),
    )
    if not result.success:
        raise ShardingError(f"no purchase was found: {result.message}")
    counts = np.round(result.x[:offers]).astype(int)
    split = result.x[offers:].reshape(kinds, offers)
    return Purchase(
        {name: int(count) for name, count in zip(names, counts, strict=True) if count},
        float(counts @ hourly),
        tuple({name: float(part) for name, part in zip(names, row, strict=True) if part > 1e-9} for row in split),
    )


def _rate(
    module: nnx.Module, kind: RequestKind, slo: Slo, text: str, plan: Callable[..., list[ServeCandidate]]
) -> float:
    """Requests/s that one offer serves within the times, 0 if none."""
    workload = ServeWorkload(kind.input_length, kind.output_length, ttft_s=slo.ttft_s, tpot_s=slo.tpot_s)
    devices = parse_devices(text)
    chip_named(devices.platform)  # an unknown chip is an error and not an offer that serves nothing
    try:
        best = plan(module, devices, workload, limit=1)[0]
    except ShardingError:  # too small for the model
        return 0.0
    return best.requests_per_s if best.meets_targets else 0.0


def _price(text: str, prices: Mapping[str, float | int]) -> float:
    devices = parse_devices(text)
    price = prices.get(devices.platform, chip_named(devices.platform).price_per_hour)
    if price is None:
        raise ConfigError(f"nobody lists a price of {devices.platform}; give one, in dollars per device and hour")
    if not math.isfinite(price) or price <= 0:
        raise ConfigError(f"the price of {devices.platform} must be greater than 0 dollars per hour; got {price}")
    return float(price * devices.count)

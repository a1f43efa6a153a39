"""Rates that explain the measured steps best: least squares over four physical parameters.

The parameters are how fast products run, how fast memory streams, and how long the host needs for an
operation and for a call of a compiled block; a step is predicted with its host as fast as it was
measured to be then. No step has a factor of its own, and none of the model's constants moves.

    minimise  Σ_i (ln p_i(θ) / t_i)² / σ²  +  Σ_j θ_j² / τ_j²

with p_i the predicted and t_i the measured seconds of step i, and θ_j the logarithm of rate j over
where it starts: at what single kernels measured, or else at the profile's figure. σ is how well the
model of a step can do at best; τ how far the rates of a whole step may lie from those of single
kernels or of a host of the same kind, so that one dry run moves little and many decide. Solved by
Gauss-Newton with derivatives by differences.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from sftplan.cost.outside import graphs_bytes
from sftplan.cost.time import time_of
from sftplan.errors import SftplanError
from sftplan.facts.calibration import FITTED, with_rates
from sftplan.facts.captured import is_captured, waits_for_mask
from sftplan.facts.hardware import Source
from sftplan.facts.resolve import resolve_model
from sftplan.facts.strategy import (
    Allocator,
    Attention,
    Checkpointing,
    Loss,
    Offload,
    Optimizer,
    Precision,
    Strategy,
)
from sftplan.facts.workload import LengthStatistics, Workload
from sftplan.plan.evaluator import make_tapes
from sftplan.step.chip import HOPPER

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from sftplan.facts.calibration import Calibration, Observation
    from sftplan.facts.hardware import Hardware
    from sftplan.facts.model import ModelShape

STEP_SIGMA = (
    0.08  # what the time model leaves unexplained of a step, as a share: about its mean error
)
# How far a rate may lie from where it starts. GPUs of one kind differ by a few percent; hosts, and one host an
# hour later, by a quarter; figures that nobody measured by as much.
TAU_GPU, TAU_HOST, TAU_ASSUMED = 0.05, 0.25, 0.25
ON_HOST = ("dispatch_scale", "compiled_dispatch_scale")
MOST_LOG = math.log(2.0)  # a rate beyond half or twice its start is no correction any more
ROUNDS = 12
DIFFERENCE = 0.01
KINDS: dict[str, Callable[[Any], Any]] = {
    "precision": Precision, "offload": Offload, "checkpointing": Checkpointing, "attention": Attention,
    "loss": Loss, "optimizer": Optimizer, "allocator": Allocator,
}  # fmt: skip


def fitted_rates(calibration: Calibration, hardware: Hardware) -> dict[str, float]:
    """The fitted rates by name; empty without dry runs that can be predicted."""
    start = with_rates(hardware, replace(calibration, fitted={}), where="")
    steps = [(found, each) for each in calibration.observations if (found := predictor(each))]
    if not steps:
        return {}
    taus = [_tau(name, start) for name in FITTED]

    def residuals(theta: Sequence[float]) -> list[float]:
        machine = scaled(start, theta)
        return [
            math.log(predict(beside_host(machine, start, each.host_scale)) / each.step_s)
            for predict, each in steps
        ]

    theta = minimised(residuals, taus, sigma=STEP_SIGMA)
    return {name: getattr(scaled(start, theta).rates, name) for name in FITTED}


def _tau(name: str, start: Hardware) -> float:
    if name in ON_HOST:
        return TAU_HOST
    return TAU_GPU if start.rates.sources.get(name) is Source.MEASURED else TAU_ASSUMED


def scaled(hardware: Hardware, theta: Sequence[float]) -> Hardware:
    """The hardware with each fitted rate times e^θ."""
    rates: dict[str, Any] = {
        name: getattr(hardware.rates, name) * math.exp(value)
        for name, value in zip(FITTED, theta, strict=True)
    }
    return replace(hardware, rates=replace(hardware.rates, **rates))


def beside_host(machine: Hardware, start: Hardware, host_scale: float | None) -> Hardware:
    """The machine as its host was when a step was measured, which `start` has at another time."""
    if host_scale is None:
        return machine
    since = host_scale / start.rates.dispatch_scale
    rates = replace(machine.rates, dispatch_scale=machine.rates.dispatch_scale * since)
    return replace(machine, rates=rates)


def predictor(observation: Observation) -> Callable[[Hardware], float] | None:
    """Seconds of an observed step on any rates; None where its model is not to be had any more."""
    job = _job_of(observation)
    if job is None:
        return None
    model, strategy, workload = job
    passes = make_tapes(model, workload).passes(strategy, HOPPER, 1)
    captured = is_captured(strategy, model, workload.seq_len)
    waits = waits_for_mask(strategy, model, workload.seq_len)

    def predict(hardware: Hardware) -> float:
        seconds = time_of(
            passes, strategy, model, hardware, captured=captured, waits_for_mask=waits
        ).step_s
        assert seconds is not None
        return seconds

    return predict


def graphs_of(observation: Observation) -> int:
    """Bytes that CUDA graphs took beside an observed step, none where its model is not to be had any more."""
    job = _job_of(observation)
    if job is None:
        return 0
    model, strategy, workload = job
    return graphs_bytes(strategy, 1, captured=is_captured(strategy, model, workload.seq_len))


def _job_of(observation: Observation) -> tuple[ModelShape, Strategy, Workload] | None:
    """What was observed; None where its model is not to be had any more."""
    try:
        model = resolve_model(observation.model)
    except SftplanError:
        return None
    knobs = observation.strategy.items()
    strategy = Strategy(**{name: KINDS[name](v) if name in KINDS else v for name, v in knobs})
    return model, strategy, workload_of(observation.workload)


def workload_of(fields: dict[str, Any]) -> Workload:
    """The workload in an observation."""
    lengths = fields.get("lengths")
    if lengths is not None:
        known = {field.name for field in dataclasses.fields(LengthStatistics)}
        lengths = {name: value for name, value in lengths.items() if name in known}
        for name in ("target_maxima", "histogram"):
            lengths[name] = tuple(tuple(pair) for pair in lengths.get(name, ()))
        lengths = LengthStatistics(**lengths)
    return Workload(seq_len=fields["seq_len"], global_batch=fields["global_batch"], lengths=lengths)


def minimised(
    residuals: Callable[[Sequence[float]], list[float]], taus: Sequence[float], *, sigma: float
) -> list[float]:
    """θ at the least Σ r²/σ² + Σ θ²/τ², each |θ| at most `MOST_LOG`.

    >>> [round(x, 4) for x in minimised(lambda t: [t[0] - 0.1, t[0] + t[1] - 0.3], [10.0, 10.0], sigma=0.01)]
    [0.1, 0.2]
    """
    theta = [0.0] * len(taus)
    for _ in range(ROUNDS):
        here = residuals(theta)
        columns = []
        for j in range(len(theta)):
            beside = [value + (DIFFERENCE if i == j else 0.0) for i, value in enumerate(theta)]
            columns.append(
                [(b - a) / DIFFERENCE for a, b in zip(here, residuals(beside), strict=True)]
            )
        matrix = [[_dot(a, b) / sigma**2 for b in columns] for a in columns]
        right = []
        for j, tau in enumerate(taus):
            matrix[j][j] += 1 / tau**2
            right.append(-_dot(columns[j], here) / sigma**2 - theta[j] / tau**2)
        change = solved(matrix, right)
        theta = [max(-MOST_LOG, min(MOST_LOG, t + c)) for t, c in zip(theta, change, strict=True)]
        if max(abs(c) for c in change) < 1e-5:
            break
    return theta


def _dot(a: Sequence[float], b: Sequence[float]) -> float:
    return sum(x * y for x, y in zip(a, b, strict=True))


def solved(matrix: Sequence[Sequence[float]], right: Sequence[float]) -> list[float]:
    """x of A·x = b by Gaussian elimination with pivots.

    >>> solved([[2.0, 1.0], [1.0, 3.0]], [3.0, 5.0])
    [0.8, 1.4]
    """
    rows = [[*row, value] for row, value in zip(matrix, right, strict=True)]
    size = len(rows)
    for i in range(size):
        pivot = max(range(i, size), key=lambda r: abs(rows[r][i]))
        rows[i], rows[pivot] = rows[pivot], rows[i]
        for r in range(i + 1, size):
            factor = rows[r][i] / rows[i][i]
            rows[r] = [a - factor * b for a, b in zip(rows[r], rows[i], strict=True)]
    x = [0.0] * size
    for i in reversed(range(size)):
        x[i] = (rows[i][-1] - _dot(rows[i][i + 1 : -1], x[i + 1 :])) / rows[i][i]
    return x

"""Times of the steps that training would take, in rounds with a look at the host between them.

A step that waits for its host is as uneven as the host, which others use too: over seconds, so that one round
may meet it fast or slow. Short rounds then go on, a reading of the host after each, until both means are known.
"""

from __future__ import annotations

import gc
import math
import statistics
import time
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from sftplan.train.inputs import prefetched
from sftplan.train.step import Reading
from sftplan.verify.host_rate import HostProbe
from sftplan.verify.phases import Clock, phase_seconds

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from sftplan.data.batches import Batches
    from sftplan.train.inputs import Layout, Ready
    from sftplan.train.step import Outcome, Stepper

EVEN = 0.02  # spread of a round's steps over their mean where they wait for nobody
KNOWN = 0.02  # standard error of the mean over rounds
LEAST_ROUNDS = 6
SHORT_STEPS = 4  # of a round after the first: steps and readings of the host are to meet it alike
MOST_STEPS = 2000  # of all rounds


@dataclass(frozen=True, slots=True, kw_only=True)
class Timing:
    """How steps are timed: so many in a round, after the first few; more rounds for `most_s` seconds."""

    steps: int
    unsteady: int
    most_s: float


def typical_steps(
    timing: Timing, stepper: Stepper, batches: Batches, layout: Layout, *,
    step: Callable[[Stepper, Ready], Outcome], rank: int,
) -> dict[str, Any]:  # fmt: skip
    """Seconds of a step and its phases, tokens per second, and how slow the host was beside them."""
    device = stepper.device
    source = prefetched(batches, layout, device, start=(0, 0), rank=rank)
    begun = time.perf_counter()
    rounds: list[_Round] = []
    probe = HostProbe(device) if device.type == "cuda" else None  # else the host is the device
    hosts = [probe.scale()] if probe else []
    gc.collect()
    while True:
        lead, count = timing.unsteady, timing.steps
        if rounds:
            lead, count = 1, min(SHORT_STEPS, timing.steps)
        found = _round(source, stepper, lead + count, step)
        found.clock.drop(lead - 1)  # the end of the last one is where the first interval begins
        del found.tokens[:lead]
        rounds.append(found)
        hosts += [probe.scale()] if probe else []
        seconds = [each.clock.step_seconds() for each in rounds]
        taken = sum(len(each.clock.steps) for each in rounds) + lead + count
        over = time.perf_counter() - begun >= timing.most_s or taken >= MOST_STEPS
        if over or (is_known(seconds) and (is_even(seconds[0]) or is_mean_known(hosts))):
            break
    clocks = [each.clock for each in rounds]
    return {
        "loss": rounds[-1].loss,
        "step_s": statistics.fmean(statistics.median(each) for each in seconds),
        "step_seconds": [value for each in seconds for value in each],
        "phase_s": phase_seconds(clocks),
        "tokens_per_s": sum(sum(each.tokens) for each in rounds) / sum(map(sum, seconds)),
        "host_scale": statistics.fmean(hosts) if hosts else None,
    }


def is_known(rounds: Sequence[Sequence[float]]) -> bool:
    """Whether more rounds would tell nothing new of a step's seconds.

    >>> is_known([[0.100, 0.101, 0.100]]), is_known([[0.100, 0.140, 0.120]])
    (True, False)
    >>> is_known([[0.10, 0.14], [0.12, 0.12], [0.13, 0.11]] * 2), is_known([[0.10, 0.14], [0.15, 0.16]] * 3)
    (True, False)
    """
    if len(rounds) == 1:
        return is_even(rounds[0])
    return len(rounds) >= LEAST_ROUNDS and is_mean_known([statistics.median(r) for r in rounds])


def is_even(seconds: Sequence[float]) -> bool:
    """Whether these steps wait for nobody."""
    return len(seconds) < 2 or statistics.stdev(seconds) <= EVEN * statistics.fmean(seconds)


def is_mean_known(values: Sequence[float]) -> bool:
    """Whether the standard error of their mean is small; that of none is."""
    if len(values) < 2:
        return True
    error = statistics.stdev(values) / math.sqrt(len(values))
    return error <= KNOWN * statistics.fmean(values)


@dataclass(slots=True)
class _Round:
    clock: Clock
    tokens: list[int]
    loss: float = math.nan


def _round(
    source: Iterator[Ready], stepper: Stepper, count: int, step: Callable[[Stepper, Ready], Outcome]
) -> _Round:
    """Steps, each read one behind as training does; the device is idle when they end."""
    found = _Round(Clock(stepper.device), [])
    shown = stepper.mark

    def mark(phase: str) -> None:
        shown(phase)
        found.clock.mark(phase)

    marked = replace(stepper, mark=mark)
    pending: Reading | None = None
    for _ in range(count):
        asked = time.perf_counter()
        ready = next(source)
        found.clock.begin(time.perf_counter() - asked)
        outcome = step(marked, ready)
        if pending is not None:
            pending.values()
        pending = Reading(outcome.loss)
        found.tokens.append(ready.step.num_tokens)
    assert pending is not None
    found.loss = pending.values()[0]
    return found

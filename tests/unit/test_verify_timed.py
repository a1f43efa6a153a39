"""Rounds of timed steps, on a clock that the test moves."""

# ruff: noqa: TID253
from __future__ import annotations

from dataclasses import dataclass
from itertools import cycle, repeat
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
import torch

from sftplan.train.step import unmarked
from sftplan.verify import phases, timed
from sftplan.verify.timed import LEAST_ROUNDS, Timing, typical_steps

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

STEPS, UNSTEADY = 4, 2


@dataclass
class Time:
    """What stands in for the module of that name."""

    now_s: float = 0.0

    def perf_counter(self) -> float:
        return self.now_s


@dataclass
class Stepper:
    """What the rounds need of a stepper."""

    device: torch.device
    mark: Callable[[str], None] = unmarked


def found(
    monkeypatch: pytest.MonkeyPatch, seconds: Iterable[float], *, most_s: float
) -> dict[str, Any]:
    """Times of steps that take these seconds, one after the other."""
    time, coming = Time(), iter(seconds)
    ready = SimpleNamespace(inputs=None, step=SimpleNamespace(num_tokens=10))
    monkeypatch.setattr(phases, "time", time)
    monkeypatch.setattr(timed, "time", time)
    monkeypatch.setattr(timed, "prefetched", lambda *_, **__: repeat(ready))

    def step(stepper: Any, _: Any) -> Any:
        stepper.mark("forward")
        time.now_s += next(coming)
        stepper.mark("end")
        return SimpleNamespace(loss=torch.zeros(()))

    timing = Timing(steps=STEPS, unsteady=UNSTEADY, most_s=most_s)
    stepper: Any = Stepper(torch.device("cpu"))
    nothing: Any = None
    return typical_steps(timing, stepper, nothing, nothing, step=step, rank=0)


def test_even_steps_take_one_round_and_the_first_ones_do_not_count(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    times = found(monkeypatch, [9.0, 5.0, *repeat(1.0, STEPS)], most_s=1000.0)
    assert times["step_seconds"] == [1.0] * STEPS
    assert times["phase_s"]["forward"] == times["step_s"] == 1.0
    assert times["tokens_per_s"] == 10.0
    assert times["host_scale"] is None


def test_uneven_ones_go_on_until_their_mean_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    times = found(monkeypatch, cycle([1.0, 1.2, 0.8, 1.0, 1.0]), most_s=1000.0)
    assert len(times["step_seconds"]) == LEAST_ROUNDS * STEPS
    assert times["step_s"] == pytest.approx(1.0, abs=0.02)


def test_a_host_that_changes_its_pace_is_met_at_both(monkeypatch: pytest.MonkeyPatch) -> None:
    fast, slow = [1.0, 1.1, 0.9, 1.0, 1.0], [2.0, 2.1, 1.9, 2.0, 2.0]
    times = found(monkeypatch, cycle([*fast, *slow]), most_s=200.0)
    assert times["step_s"] == pytest.approx(1.5, abs=0.1)


@pytest.mark.parametrize("most_s", [0.0, 13.0])
def test_rounds_end_with_their_time(monkeypatch: pytest.MonkeyPatch, most_s: float) -> None:
    times = found(monkeypatch, cycle([1.0, 2.0, 3.0]), most_s=most_s)
    assert len(times["step_seconds"]) == (STEPS if not most_s else 2 * STEPS)

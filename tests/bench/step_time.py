"""Predicted against measured step times, row by row.

    python tests/bench/step_time.py [CSV ...]

Without a file it takes tests/published/h200_plain_loop.csv.
"""

from __future__ import annotations

import sys
from itertools import combinations
from pathlib import Path

from rows import OURS, name_of, read_rows, strategy_of

from sftplan.cost.estimate import StepTime
from sftplan.cost.passes import Passes
from sftplan.cost.time import time_of
from sftplan.facts.profiles import load_hardware
from sftplan.facts.resolve import resolve_model
from sftplan.step.batch import Batch
from sftplan.step.few import few_layers
from sftplan.step.simulate import steady

APART = 1.1  # pairs that differ by less are no test of the order


def predicted(row: dict[str, str]) -> StepTime:
    model = resolve_model(row["model"])
    strategy, length = strategy_of(row), int(row["seq_len"])
    few = few_layers(model, strategy, length)
    batch = Batch(rows=strategy.micro_batch, length=length, num_targets=0)
    tape = steady(few.model, few.strategy, batch)
    return time_of(Passes(tape, few.times), strategy, model, load_hardware("h200-sxm"))


def in_order(times: list[tuple[float, float]]) -> float:
    """The share of pairs, measured more than a tenth apart, whose predictions stand in the same order."""
    apart = [(a, b) for a, b in combinations(times, 2) if max(a[0], b[0]) > APART * min(a[0], b[0])]
    return sum((a[0] < b[0]) == (a[1] < b[1]) for a, b in apart) / len(apart)


def report(path: Path) -> None:
    times = []
    for row in read_rows(path):
        time, measured = predicted(row), float(row["step_s"])
        assert time.step_s is not None
        times.append((measured, time.step_s))
        parts = (time.compute_s, time.memory_s, time.dispatch_s, time.optimizer_s)
        shares = " ".join(f"{1e3 * (part or 0.0):7.1f}" for part in parts)
        error = time.step_s / measured - 1
        print(
            f"{name_of(row)} {1e3 * measured:8.1f} {1e3 * time.step_s:8.1f} ms {error:+7.1%} {shares}"
        )
    errors = sorted(abs(p / m - 1) for m, p in times)
    print(
        f"{path.name}: {len(errors)} rows, mean |error| {100 * sum(errors) / len(errors):.1f} %, median "
        f"{100 * errors[len(errors) // 2]:.1f} %, worst {100 * errors[-1]:.1f} %; order right in {100 * in_order(times):.1f} % of pairs"
    )


def main() -> None:
    for path in [Path(argument) for argument in sys.argv[1:]] or [OURS]:
        report(path)


if __name__ == "__main__":
    main()

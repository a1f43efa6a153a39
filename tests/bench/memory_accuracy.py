"""Predicted against measured memory, row by row.

    python tests/bench/memory_accuracy.py [CSV ...]

Without a file it takes tests/published/h200_plain_loop.csv. A CSV of the measuring loop's own columns
(model, seq, mb, prec, ckpt, ..., peak_alloc, peak_reserved) is read as well.
"""

from __future__ import annotations

import sys
from pathlib import Path
from statistics import mean

from rows import OURS, name_of, read_rows, strategy_of

from sftplan.cost.allocator import replay
from sftplan.facts.catalogue import builtin
from sftplan.step.batch import Batch
from sftplan.step.few import few_layers
from sftplan.step.repeat import expand
from sftplan.step.simulate import simulate


def errors(row: dict[str, str]) -> tuple[float, float]:
    """Relative errors of allocated and reserved memory."""
    model, length = builtin(row["model"]), int(row["seq_len"])
    strategy = strategy_of(row)
    few = few_layers(model, strategy, length)
    batch = Batch(rows=strategy.micro_batch, length=length, num_targets=0)
    tape = simulate(few.model, few.strategy, batch, times=few.times)
    events = expand(tape, few.times)
    peak = replay(events.events, events.sizes, expandable=row["allocator"] == "expandable")
    return (
        peak.peak_allocated_bytes / int(row["peak_allocated_bytes"]) - 1,
        peak.peak_reserved_bytes / int(row["peak_reserved_bytes"]) - 1,
    )


def main() -> None:
    """Print a row per case and the mean and the worst of each file and allocator."""
    summary: list[str] = []
    for path in [Path(a) for a in sys.argv[1:]] or [OURS]:
        found: dict[str, list[tuple[float, float]]] = {}
        for row in read_rows(path):
            allocated, reserved = errors(row)
            found.setdefault(row["allocator"], []).append((allocated, reserved))
            print(f"{name_of(row)} allocated {allocated:+8.3%}  reserved {reserved:+7.2%}")
        for allocator, pairs in found.items():
            a, r = [abs(x) for x, _ in pairs], [abs(y) for _, y in pairs]
            summary.append(
                f"{path.name}, {allocator}, {len(pairs)} rows: allocated mean {mean(a):.3%}, worst {max(a):.2%}; "
                f"reserved mean {mean(r):.2%}, worst {max(r):.2%}"
            )
    print(*summary, sep="\n")


if __name__ == "__main__":
    main()

"""The trace without a GPU against rows that an H200 measured: the plain loop of h200_loop.py.

    python tests/bench/trace_accuracy.py [CSV ...]

Without a file it takes tests/published/h200_plain_loop.csv and h200_fresh.csv. Every row is traced in
full, two steps of the real transformers model; seconds and the largest resident memory come last.
"""

from __future__ import annotations

import resource
import sys
import time
import warnings
from pathlib import Path
from statistics import mean

import h200_loop
from rows import OURS, name_of, read_rows

from sftplan.cost.allocator import replay
from sftplan.step.chip import HOPPER
from sftplan.verify.trace.run import STEPS, ZERO_GRAD, Trace, recording, trace_of

FRESH = OURS.parent / "h200_fresh.csv"
PRECISIONS = {"fp32": "fp32", "bf16-mixed": "amp", "fp16-mixed": "fp16amp", "bf16-true": "bf16"}


def case_of(row: dict[str, str]) -> h200_loop.Case:
    """The row as the measuring loop calls it; fp16's scaler waits for the device and holds nothing."""
    return h200_loop.Case(
        row["model"], int(row["seq_len"]), int(row["micro_batch"]), PRECISIONS[row["precision"]],
        int(row["checkpointing"] == "full"), row["attention"], int(row["accumulation"]),
        float(row["max_grad_norm"]),
    )  # fmt: skip


def trace_loop(case: h200_loop.Case) -> Trace:
    """Two steps of the plain loop."""
    with recording(HOPPER) as recorder:
        step = h200_loop.Step(case, h200_loop.build(case))
        step.scaler = None
        for _ in range(STEPS):
            recorder.mark("forward")
            step(lambda name: recorder.mark(FOLLOWING[name]))
        return trace_of(recorder)


FOLLOWING = {
    "forward": "backward", "backward": "forward", "clip": "optimizer", "optimizer": ZERO_GRAD,
    "zero_grad": "start",
}  # fmt: skip


def main() -> None:
    """Print a row per case and the mean and the worst of each file."""
    warnings.filterwarnings("ignore")
    summary, longest = [], (0.0, "")
    for path in [Path(a) for a in sys.argv[1:]] or [OURS, FRESH]:
        errors: list[tuple[float, float]] = []
        for row in read_rows(path):
            start = time.perf_counter()
            trace = trace_loop(case_of(row))
            seconds = time.perf_counter() - start
            longest = max(longest, (seconds, row["model"]))
            peak = replay(trace.events, trace.sizes, expandable=row["allocator"] == "expandable")
            errors.append((
                peak.peak_allocated_bytes / int(row["peak_allocated_bytes"]) - 1,
                peak.peak_reserved_bytes / int(row["peak_reserved_bytes"]) - 1,
            ))  # fmt: skip
            print(
                f"{name_of(row)} allocated {errors[-1][0]:+8.3%}  reserved {errors[-1][1]:+7.2%} {seconds:6.1f} s",
                flush=True,
            )
        a, r = ([abs(pair[i]) for pair in errors] for i in (0, 1))
        summary.append(
            f"{path.name}, {len(errors)} rows: allocated mean {mean(a):.3%}, worst {max(a):.2%}; "
            f"reserved mean {mean(r):.2%}, worst {max(r):.2%}"
        )
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(
        *summary,
        f"slowest {longest[0]:.1f} s ({longest[1]}); {resident:.2f} GiB resident",
        sep="\n",
    )


if __name__ == "__main__":
    main()

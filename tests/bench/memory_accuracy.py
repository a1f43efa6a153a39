"""Predicted against measured memory, row by row.

    python tests/bench/memory_accuracy.py [CSV ...]

Without a file it takes tests/published/h200_plain_loop.csv. A CSV of the measuring loop's own columns
(model, seq, mb, prec, ckpt, ..., peak_alloc, peak_reserved) is read as well.
"""

from __future__ import annotations

import csv
import sys
from pathlib import Path
from statistics import mean

from sftplan.cost.allocator import replay
from sftplan.facts.catalogue import builtin
from sftplan.facts.strategy import Attention, Checkpointing, Precision, Strategy
from sftplan.step.batch import Batch
from sftplan.step.repeat import expand
from sftplan.step.simulate import few_layers, simulate

OURS = Path(__file__).parent.parent / "published" / "h200_plain_loop.csv"
PRECISIONS = {
    "fp32": "fp32",
    "amp": "bf16-mixed",
    "fp16amp": "fp16-mixed",
    "bf16": "bf16-true",
}


def translated(row: dict[str, str]) -> dict[str, str]:
    """A row in our own columns."""
    if "peak_allocated_bytes" in row:
        return row
    return {
        "model": row["model"],
        "seq_len": row["seq"],
        "micro_batch": row["mb"],
        "precision": PRECISIONS[row["prec"]],
        "checkpointing": "full" if row["ckpt"] == "1" else "none",
        "attention": row["attn"],
        "accumulation": row["accum"] or "1",
        "max_grad_norm": row["clip"] or "0",
        "allocator": row.get("allocator", "default"),
        "peak_allocated_bytes": row["peak_alloc"],
        "peak_reserved_bytes": row["peak_reserved"],
    }


def errors(row: dict[str, str]) -> tuple[float, float]:
    """Relative errors of allocated and reserved memory."""
    model, length = builtin(row["model"]), int(row["seq_len"])
    strategy = Strategy(
        precision=Precision(row["precision"]),
        checkpointing=Checkpointing(row["checkpointing"]),
        attention=Attention(row["attention"]),
        micro_batch=int(row["micro_batch"]),
        accumulation=int(row["accumulation"]),
        attention_dropout="model",
        max_grad_norm=float(row["max_grad_norm"]),
    )
    few = few_layers(model, length)
    batch = Batch(rows=strategy.micro_batch, length=length, num_targets=0)
    tape = simulate(few or model, strategy, batch)
    events = expand(tape, model.num_layers) if few else tape
    peak = replay(events.events, events.sizes, expandable=row["allocator"] == "expandable")
    return (
        peak.peak_allocated_bytes / int(row["peak_allocated_bytes"]) - 1,
        peak.peak_reserved_bytes / int(row["peak_reserved_bytes"]) - 1,
    )


def main() -> None:
    """Print a row per case and the mean and the worst of each file and allocator."""
    summary: list[str] = []
    for path in [Path(a) for a in sys.argv[1:]] or [OURS]:
        with path.open() as file:
            rows = [translated(r) for r in csv.DictReader(file) if r.get("status", "ok") == "ok"]
        found: dict[str, list[tuple[float, float]]] = {}
        for row in rows:
            allocated, reserved = errors(row)
            found.setdefault(row["allocator"], []).append((allocated, reserved))
            print(
                f"{row['model']:<16}{row['seq_len']:>5}{row['micro_batch']:>4} {row['precision']:<11}"
                f"{row['checkpointing']:<5}{row['attention']:<6}x{row['accumulation']} {row['allocator']:<11}"
                f"allocated {allocated:+8.3%}  reserved {reserved:+7.2%}"
            )
        for allocator, pairs in found.items():
            a, r = [abs(x) for x, _ in pairs], [abs(y) for _, y in pairs]
            summary.append(
                f"{path.name}, {allocator}, {len(pairs)} rows: allocated mean {mean(a):.3%}, worst {max(a):.2%}; "
                f"reserved mean {mean(r):.2%}, worst {max(r):.2%}"
            )
    print(*summary, sep="\n")


if __name__ == "__main__":
    main()

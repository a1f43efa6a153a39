"""Rows of measured steps, in the columns of tests/published or of the measuring loop itself."""

from __future__ import annotations

import csv
from pathlib import Path

from sftplan.facts.strategy import Allocator, Attention, Checkpointing, Precision, Strategy

OURS = Path(__file__).parent.parent / "published" / "h200_plain_loop.csv"
PRECISIONS = {"fp32": "fp32", "amp": "bf16-mixed", "fp16amp": "fp16-mixed", "bf16": "bf16-true"}


def read_rows(path: Path) -> list[dict[str, str]]:
    """The rows that ran through, in our own columns."""
    with path.open() as file:
        return [translated(r) for r in csv.DictReader(file) if r.get("status", "ok") == "ok"]


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
        "step_s": row["step_s"],
    }


def strategy_of(row: dict[str, str]) -> Strategy:
    """The plain loop as a strategy."""
    return Strategy(
        precision=Precision(row["precision"]),
        checkpointing=Checkpointing(row["checkpointing"]),
        attention=Attention(row["attention"]),
        micro_batch=int(row["micro_batch"]),
        accumulation=int(row["accumulation"]),
        allocator=Allocator(row["allocator"]),
        attention_dropout="model",
        max_grad_norm=float(row["max_grad_norm"]),
    )


def name_of(row: dict[str, str]) -> str:
    """A case in a line of fixed width."""
    return (
        f"{row['model']:<16}{row['seq_len']:>5}{row['micro_batch']:>4} {row['precision']:<11}"
        f"{row['checkpointing']:<5}{row['attention']:<6}x{row['accumulation']} {row['allocator']:<11}"
    )

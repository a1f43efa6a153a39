"""The end of a run in a few lines."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sftplan.units import format_count, format_gib

if TYPE_CHECKING:
    from collections.abc import Mapping


def run_text(run: Mapping[str, Any], out: str) -> str:
    """Steps, losses, speed, memory, and where the model is.

    >>> print(run_text({"steps": 60, "tokens": 30000, "loss": 1.25, "memory": {}}, "runs/demo"))
    steps      60, 30.0 K tokens
    loss       1.2500
    model      runs/demo/final
    """
    rows = [("steps", f"{run['steps']:,}, {format_count(run['tokens'])} tokens")]
    if run.get("loss") is not None:
        rows.append(("loss", f"{run['loss']:.4f}"))
    if run.get("eval_loss") is not None:
        rows.append(("held out", f"{run['eval_loss']:.4f} on responses, "
                                 f"{run['eval_loss_all_tokens']:.4f} on all tokens"))  # fmt: skip
    if run.get("tokens_per_s") is not None:
        mfu = run.get("mfu_fraction")
        share = "" if mfu is None else f", {100 * mfu:.1f} % of the GPU's peak"
        rows.append(("speed", f"{format_count(run['tokens_per_s'])} tokens/s{share}"))
    memory = run.get("memory") or {}
    if memory.get("peak_reserved_bytes") is not None:
        reserved = format_gib(memory["peak_reserved_bytes"])
        predicted = format_gib(memory["predicted_reserved_bytes"])
        rows.append(("memory", f"{reserved} GiB reserved, {predicted} predicted"))
    if run.get("skipped_steps"):
        rows.append(("skipped", f"{run['skipped_steps']:,} steps"))
    rows.append(("model", f"{out}/final"))
    return "\n".join(f"{name:<10} {value}" for name, value in rows)

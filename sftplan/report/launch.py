"""The end of a run in a few lines."""

from __future__ import annotations

import math
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
    if run.get("clip_fraction") is not None:
        rows.append(("clipped", f"{100 * run['clip_fraction']:.0f} % of the steps"))
    for number, row in enumerate(run.get("grad_norm_by_response_length") or ()):
        rows.append(("|gradient|" if number == 0 else "", _norm_text(row)))
    rows.append(("model", f"{out}/final"))
    return "\n".join(f"{name:<10} {value}" for name, value in rows)


def _norm_text(row: Mapping[str, Any]) -> str:
    """Gradient norm of the steps whose responses have up to so many tokens in the mean.

    >>> _norm_text({"response_tokens_up_to": 64, "steps": 12, "grad_norm_mean": 0.5,
    ...             "grad_norm_variance": 0.04})
    '0.50 ± 0.20 in 12 steps with responses of up to 64 tokens'
    """
    deviation = math.sqrt(row["grad_norm_variance"])
    return (
        f"{row['grad_norm_mean']:.2f} ± {deviation:.2f} in {row['steps']:,} steps with responses "
        f"of up to {row['response_tokens_up_to']:,} tokens"
    )

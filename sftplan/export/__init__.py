"""A plan as other tools' configuration: one pure function per tool, from a plan to text."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from sftplan.errors import UsageError, did_you_mean

if TYPE_CHECKING:
    from sftplan.plan.record import Plan

# Module `sftplan.export.<name>` holds `render(plan) -> str`.
FORMATS = ("deepspeed", "accelerate", "trl", "axolotl", "llamafactory", "slurm", "skypilot")


def render_export(plan: Plan, target: str) -> str:
    """The configuration of a plan for the tool `target`, with its final newline."""
    if target not in FORMATS:
        message = f"no format {target!r}"
        hint = did_you_mean(target, FORMATS) or f"formats: {', '.join(FORMATS)}"
        raise UsageError(message, hint)
    text = importlib.import_module(f"sftplan.export.{target}").render(plan)
    assert isinstance(text, str)
    return text

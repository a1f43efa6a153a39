"""The file of `accelerate launch --config_file`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sftplan.export.arguments import header
from sftplan.export.yaml import render_yaml

if TYPE_CHECKING:
    from sftplan.plan.record import Plan


def render(plan: Plan) -> str:
    """The YAML; with DeepSpeed it names the file that `--to deepspeed` writes."""
    return render_yaml(plan.launch.accelerate, header(plan))

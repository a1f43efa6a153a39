"""DeepSpeed's JSON configuration. Keys: https://www.deepspeed.ai/docs/config-json/."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from sftplan.errors import UsageError

if TYPE_CHECKING:
    from sftplan.plan.record import Plan


def render(plan: Plan) -> str:
    """The file for `--deepspeed`."""
    if not plan.launch.deepspeed:
        message = "this plan does without DeepSpeed: ZeRO-0 and no offload"
        raise UsageError(message, "plan with `--zero 2` or `--offload optimizer` to use it")
    return json.dumps(plan.launch.deepspeed, indent=2) + "\n"

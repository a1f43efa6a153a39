"""DeepSpeed's JSON configuration. Keys: https://www.deepspeed.ai/docs/config-json/."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from sftplan.errors import UsageError
from sftplan.facts.strategy import Precision

if TYPE_CHECKING:
    from sftplan.plan.record import Plan


AUTOCAST = {Precision.FP16_MIXED: "float16", Precision.BF16_MIXED: "bfloat16"}


def render(plan: Plan) -> str:
    """The file for `--deepspeed`: what `launch` uses, and autocast, which its own step does itself."""
    if not plan.launch.deepspeed:
        message = "this plan does without DeepSpeed: ZeRO-0 and no offload"
        raise UsageError(message, "plan with `--zero 2` or `--offload optimizer` to use it")
    settings = dict(plan.launch.deepspeed)
    low = AUTOCAST.get(plan.strategy.precision)
    if low is not None:
        settings["torch_autocast"] = {"enabled": True, "dtype": low}
    return json.dumps(settings, indent=2) + "\n"

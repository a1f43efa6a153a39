"""TRL's `trl sft --config`. Keys: https://huggingface.co/docs/trl/sft_trainer, SFTConfig."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sftplan.export.arguments import (
    ATTENTION_NAMES,
    DATA_PLACEHOLDER,
    DEEPSPEED_FILE,
    OUT_PLACEHOLDER,
    batch_arguments,
    header,
    model_reference,
    weights_dtype,
)
from sftplan.export.yaml import render_yaml

if TYPE_CHECKING:
    from sftplan.plan.record import Plan


def render(plan: Plan) -> str:
    """The YAML of `trl sft`."""
    settings: dict[str, object] = {
        "model_name_or_path": model_reference(plan),
        "dtype": weights_dtype(plan),
        "attn_implementation": ATTENTION_NAMES[plan.strategy.attention],
        "dataset_name": DATA_PLACEHOLDER,
        "output_dir": OUT_PLACEHOLDER,
        "max_length": plan.inputs.workload.seq_len,
        "packing": plan.strategy.packing,
        "completion_only_loss": True,
        **batch_arguments(plan),
    }
    if plan.launch.deepspeed:
        settings["deepspeed"] = DEEPSPEED_FILE
    return render_yaml(settings, header(plan), "trl sft --config trl.yaml")

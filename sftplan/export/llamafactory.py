"""LLaMA-Factory's YAML. Keys: examples/train_full/ of hiyouga/LLaMA-Factory."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sftplan.export.arguments import (
    DATA_PLACEHOLDER,
    DEEPSPEED_FILE,
    OUT_PLACEHOLDER,
    batch_arguments,
    header,
    model_reference,
)
from sftplan.export.yaml import render_yaml
from sftplan.facts.strategy import Attention, Checkpointing, Precision

if TYPE_CHECKING:
    from sftplan.plan.record import Plan

_ATTENTION = {Attention.EAGER: "disabled", Attention.SDPA: "sdpa", Attention.VARLEN: "fa2"}


def render(plan: Plan) -> str:
    """The YAML of `llamafactory-cli train`."""
    chosen = plan.strategy
    arguments = batch_arguments(plan)
    del arguments["gradient_checkpointing"]  # it is on unless it is disabled under its own name
    settings: dict[str, object] = {
        "model_name_or_path": model_reference(plan),
        "stage": "sft",
        "do_train": True,
        "finetuning_type": "full",
        "dataset": DATA_PLACEHOLDER,
        "template": "default",
        "cutoff_len": plan.inputs.workload.seq_len,
        "packing": chosen.packing,
        "neat_packing": chosen.packing,
        "flash_attn": _ATTENTION[chosen.attention],
        "output_dir": OUT_PLACEHOLDER,
        **arguments,
        "disable_gradient_checkpointing": chosen.checkpointing is Checkpointing.NONE,
        "pure_bf16": chosen.precision is Precision.BF16_TRUE,
    }
    if plan.launch.deepspeed:
        settings["deepspeed"] = DEEPSPEED_FILE
    return render_yaml(settings, header(plan), "llamafactory-cli train llamafactory.yaml")

"""Axolotl's YAML. Keys: https://docs.axolotl.ai/docs/config-reference.html."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sftplan.export.arguments import (
    DATA_PLACEHOLDER,
    DEEPSPEED_FILE,
    OPTIMIZER_NAMES,
    OUT_PLACEHOLDER,
    header,
    is_bf16,
    is_fp16,
    model_reference,
)
from sftplan.export.yaml import render_yaml
from sftplan.facts.strategy import Attention, Checkpointing

if TYPE_CHECKING:
    from sftplan.plan.record import Plan

_SWITCHES = {
    Attention.EAGER: "eager_attention",
    Attention.SDPA: "sdp_attention",
    Attention.VARLEN: "flash_attention",
}


def render(plan: Plan) -> str:
    """The YAML of `axolotl train`."""
    chosen, work = plan.strategy, plan.inputs.workload
    settings: dict[str, object] = {
        "base_model": model_reference(plan),
        "datasets": [{"path": DATA_PLACEHOLDER, "type": "alpaca"}],
        "output_dir": OUT_PLACEHOLDER,
        "sequence_len": work.seq_len,
        "sample_packing": chosen.packing,
        "pad_to_sequence_len": chosen.packing,
        "train_on_inputs": False,
        "micro_batch_size": chosen.micro_batch,
        "gradient_accumulation_steps": chosen.accumulation,
        "num_epochs": work.epochs,
        "optimizer": OPTIMIZER_NAMES[chosen.optimizer],
        "max_grad_norm": chosen.max_grad_norm,
        "bf16": is_bf16(plan),
        "fp16": is_fp16(plan),
        "tf32": False,
        _SWITCHES[chosen.attention]: True,
        "gradient_checkpointing": chosen.checkpointing is not Checkpointing.NONE,
        "torch_compile": chosen.compile,
    }
    if plan.launch.deepspeed:
        settings["deepspeed"] = DEEPSPEED_FILE
    return render_yaml(settings, header(plan), "axolotl train axolotl.yaml")

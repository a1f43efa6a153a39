"""What trainers built on transformers' TrainingArguments call the knobs of a plan.

References:
    https://huggingface.co/docs/transformers/main_classes/trainer, TrainingArguments.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from sftplan.facts.strategy import Attention, Checkpointing, Optimizer, Precision

if TYPE_CHECKING:
    from sftplan.plan.record import Plan

# varlen is our own packing attention; what these trainers have for packed rows is FlashAttention.
ATTENTION_NAMES = {
    Attention.EAGER: "eager",
    Attention.SDPA: "sdpa",
    Attention.VARLEN: "flash_attention_2",
}
OPTIMIZER_NAMES = {Optimizer.ADAMW: "adamw_torch_fused", Optimizer.ADAMW_8BIT: "adamw_8bit"}
DATA_PLACEHOLDER = "DATA"
OUT_PLACEHOLDER = "OUT"
DEEPSPEED_FILE = "deepspeed.json"


def header(plan: Plan) -> str:
    """Where a file is from."""
    return f"by {plan.created_by}: {' '.join(plan.command)}"


def weights_dtype(plan: Plan) -> str:
    """The type in which weights are loaded."""
    lossy = plan.strategy.precision in (Precision.BF16_MASTER, Precision.BF16_TRUE)
    return "bfloat16" if lossy else "float32"


def is_bf16(plan: Plan) -> bool:
    """Whether products are taken in bfloat16."""
    return plan.strategy.precision.value.startswith("bf16")


def is_fp16(plan: Plan) -> bool:
    """Whether products are taken in float16."""
    return plan.strategy.precision is Precision.FP16_MIXED


def batch_arguments(plan: Plan) -> dict[str, object]:
    """Batch, clipping, checkpointing and precision in TrainingArguments' names."""
    chosen = plan.strategy
    return {
        "per_device_train_batch_size": chosen.micro_batch,
        "gradient_accumulation_steps": chosen.accumulation,
        "num_train_epochs": plan.inputs.workload.epochs,
        "max_grad_norm": chosen.max_grad_norm,
        "optim": OPTIMIZER_NAMES[chosen.optimizer],
        "bf16": is_bf16(plan),
        "fp16": is_fp16(plan),
        "gradient_checkpointing": chosen.checkpointing is not Checkpointing.NONE,
        "torch_compile": chosen.compile,
    }


def environment(plan: Plan) -> dict[str, str]:
    """The environment of the run."""
    return dict(plan.launch.env)


def model_reference(plan: Plan) -> str:
    """What a trainer is told to load: the hub id, the path, or at least the name."""
    model = plan.inputs.model
    return model.hub_id or (model.name if model.source == "builtin" else model.source)

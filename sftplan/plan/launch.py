"""How a plan is started: the command line, the environment, DeepSpeed's and accelerate's settings.

References:
    [DS] https://www.deepspeed.ai/docs/config-json/ for every key below.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from sftplan.facts.buckets import (
    ALLGATHER_BUCKET_ELEMENTS,
    PERSISTENCE_ELEMENTS,
    PREFETCH_BUCKET_ELEMENTS,
    REDUCE_BUCKET_ELEMENTS,
    SUB_GROUP_ELEMENTS,
    live_elements,
    overlaps,
    reuse_elements,
)
from sftplan.facts.strategy import Allocator, Offload, Precision
from sftplan.plan.record import Launch

if TYPE_CHECKING:
    from sftplan.facts.strategy import Strategy
    from sftplan.plan.record_inputs import StrategyRecord

NVME_PATH = "/local_nvme"  # unless launch is told another


def _offload_settings(offload: Offload, stage: int) -> dict[str, object]:
    if offload is Offload.NONE:
        return {}
    device = "nvme" if offload is Offload.NVME else "cpu"
    place: dict[str, object] = {"device": device, "pin_memory": True}
    if offload is Offload.NVME:
        place["nvme_path"] = NVME_PATH
    settings: dict[str, object] = {"offload_optimizer": place}
    if offload is not Offload.OPTIMIZER and stage == 3:
        settings["offload_param"] = dict(place)
    return settings


def _zero_settings(
    stage: int, offload: Offload, num_gpus: int, block_elements: int
) -> dict[str, object]:
    settings: dict[str, object] = {
        "stage": stage,
        "contiguous_gradients": True,
        "overlap_comm": overlaps(stage, num_gpus, offloads=offload is not Offload.NONE),
        "reduce_bucket_size": REDUCE_BUCKET_ELEMENTS,
        "allgather_bucket_size": ALLGATHER_BUCKET_ELEMENTS,
    }
    if stage == 3:
        settings |= {
            "sub_group_size": SUB_GROUP_ELEMENTS,
            "stage3_prefetch_bucket_size": PREFETCH_BUCKET_ELEMENTS,
            "stage3_param_persistence_threshold": PERSISTENCE_ELEMENTS,
            "stage3_max_live_parameters": live_elements(block_elements),
            "stage3_max_reuse_distance": reuse_elements(block_elements),
            "stage3_gather_16bit_weights_on_model_save": True,
        }
    return settings | _offload_settings(offload, stage)


def _precision_settings(precision: Precision) -> dict[str, object]:
    """The weights' type. Autocast is the step's own: DeepSpeed's would sum gradients in 16 bits."""
    low = precision in (Precision.BF16_MASTER, Precision.BF16_TRUE)
    return {"bf16": {"enabled": True}} if low else {}


def deepspeed_settings(
    strategy: Strategy | StrategyRecord, num_gpus: int, *, block_elements: int = 0
) -> dict[str, object]:
    """DeepSpeed's configuration [DS]; empty when the strategy does without DeepSpeed.

    `block_elements` are the parameters of the model's largest block.
    """
    if strategy.zero == 0 and strategy.offload is Offload.NONE:
        return {}
    return {
        "train_batch_size": strategy.micro_batch * strategy.accumulation * num_gpus,
        "train_micro_batch_size_per_gpu": strategy.micro_batch,
        "gradient_accumulation_steps": strategy.accumulation,
        "gradient_clipping": strategy.max_grad_norm,
        "zero_allow_untested_optimizer": True,
        **_precision_settings(strategy.precision),
        "zero_optimization": _zero_settings(
            strategy.zero, strategy.offload, num_gpus, block_elements
        ),
    }


def accelerate_settings(
    strategy: Strategy | StrategyRecord, *, gpus_per_node: int, num_nodes: int
) -> dict[str, object]:
    """What `accelerate config` would have asked for."""
    deepspeed = strategy.zero > 0
    num_gpus = gpus_per_node * num_nodes
    kind = "DEEPSPEED" if deepspeed else "MULTI_GPU" if num_gpus > 1 else "NO"
    mixed = {Precision.FP16_MIXED: "fp16", Precision.BF16_MIXED: "bf16"}
    settings: dict[str, object] = {
        "compute_environment": "LOCAL_MACHINE",
        "distributed_type": kind,
        "num_machines": num_nodes,
        "num_processes": num_gpus,
        "machine_rank": 0,
        "main_training_function": "main",
        "use_cpu": False,
    }
    if deepspeed:
        return settings | {"deepspeed_config": {"deepspeed_config_file": "deepspeed.json"}}
    return settings | {"mixed_precision": mixed.get(strategy.precision, "no")}


def launch_argv(*, gpus_per_node: int, num_nodes: int) -> list[str]:
    """The command that starts one node's processes."""
    if gpus_per_node * num_nodes == 1:
        return ["python", "-m", "sftplan.train"]
    nodes = (
        ["--standalone"]
        if num_nodes == 1
        else [f"--nnodes={num_nodes}", "--rdzv-backend=c10d", "--rdzv-endpoint=$MASTER_ADDR:29500"]
    )
    return ["torchrun", *nodes, f"--nproc-per-node={gpus_per_node}", "-m", "sftplan.train"]


def build_launch(
    strategy: Strategy, *, gpus_per_node: int, num_nodes: int, block_elements: int = 0
) -> Launch:
    """Everything that starts the run of a strategy."""
    expandable = strategy.allocator is Allocator.EXPANDABLE
    return Launch(
        argv=launch_argv(gpus_per_node=gpus_per_node, num_nodes=num_nodes),
        env={"PYTORCH_ALLOC_CONF": "expandable_segments:True"} if expandable else {},
        deepspeed=deepspeed_settings(
            strategy, gpus_per_node * num_nodes, block_elements=block_elements
        ),
        accelerate=accelerate_settings(strategy, gpus_per_node=gpus_per_node, num_nodes=num_nodes),
    )

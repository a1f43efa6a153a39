"""How a plan is started: the command line, the environment, DeepSpeed's and accelerate's settings.

References:
    [DS] https://www.deepspeed.ai/docs/config-json/ for every key below.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from sftplan.facts.strategy import Allocator, Offload, Precision
from sftplan.plan.record import Launch

if TYPE_CHECKING:
    from sftplan.facts.strategy import Strategy
    from sftplan.plan.record_inputs import StrategyRecord

# DeepSpeed's own defaults, written out so that the plan and the run mean the same buffers.
REDUCE_BUCKET_ELEMENTS = 500_000_000
ALLGATHER_BUCKET_ELEMENTS = 500_000_000
PREFETCH_BUCKET_ELEMENTS = 50_000_000
PERSISTENCE_THRESHOLD_ELEMENTS = 100_000
MAX_LIVE_ELEMENTS = 1_000_000_000
SUB_GROUP_ELEMENTS = 1_000_000_000

MIXED_DTYPES = {Precision.FP16_MIXED: "float16", Precision.BF16_MIXED: "bfloat16"}


def _offload_settings(offload: Offload, stage: int) -> dict[str, object]:
    if offload is Offload.NONE:
        return {}
    device = "nvme" if offload is Offload.NVME else "cpu"
    place: dict[str, object] = {"device": device, "pin_memory": True}
    if offload is Offload.NVME:
        place["nvme_path"] = "/local_nvme"
    settings: dict[str, object] = {"offload_optimizer": place}
    if offload is not Offload.OPTIMIZER and stage == 3:
        settings["offload_param"] = dict(place)
    return settings


def _zero_settings(stage: int, offload: Offload) -> dict[str, object]:
    settings: dict[str, object] = {
        "stage": stage,
        "contiguous_gradients": True,
        "overlap_comm": stage == 3,
        "reduce_bucket_size": REDUCE_BUCKET_ELEMENTS,
        "allgather_bucket_size": ALLGATHER_BUCKET_ELEMENTS,
    }
    if stage == 3:
        settings |= {
            "sub_group_size": SUB_GROUP_ELEMENTS,
            "stage3_prefetch_bucket_size": PREFETCH_BUCKET_ELEMENTS,
            "stage3_param_persistence_threshold": PERSISTENCE_THRESHOLD_ELEMENTS,
            "stage3_max_live_parameters": MAX_LIVE_ELEMENTS,
            "stage3_max_reuse_distance": MAX_LIVE_ELEMENTS,
            "stage3_gather_16bit_weights_on_model_save": True,
        }
    return settings | _offload_settings(offload, stage)


def _precision_settings(precision: Precision) -> dict[str, object]:
    match precision:
        case Precision.FP32:
            return {}
        case Precision.FP16_MIXED | Precision.BF16_MIXED:
            return {"torch_autocast": {"enabled": True, "dtype": MIXED_DTYPES[precision]}}
        case Precision.BF16_MASTER:
            return {"bf16": {"enabled": True}}
        case Precision.BF16_TRUE:
            lossy = {"bf16_master_weights_and_grads": True, "bf16_optimizer_states": True}
            return {"bf16": {"enabled": True, **lossy}}


def deepspeed_settings(strategy: Strategy | StrategyRecord, num_gpus: int) -> dict[str, object]:
    """DeepSpeed's configuration [DS]; empty when the strategy does without DeepSpeed."""
    if strategy.zero == 0 and strategy.offload is Offload.NONE:
        return {}
    return {
        "train_batch_size": strategy.micro_batch * strategy.accumulation * num_gpus,
        "train_micro_batch_size_per_gpu": strategy.micro_batch,
        "gradient_accumulation_steps": strategy.accumulation,
        "gradient_clipping": strategy.max_grad_norm,
        "zero_allow_untested_optimizer": True,
        **_precision_settings(strategy.precision),
        "zero_optimization": _zero_settings(strategy.zero, strategy.offload),
    }


def accelerate_settings(
    strategy: Strategy | StrategyRecord, *, gpus_per_node: int, num_nodes: int
) -> dict[str, object]:
    """What `accelerate config` would have asked for."""
    deepspeed = deepspeed_settings(strategy, gpus_per_node * num_nodes)
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


def build_launch(strategy: Strategy, *, gpus_per_node: int, num_nodes: int) -> Launch:
    """Everything that starts the run of a strategy."""
    expandable = strategy.allocator is Allocator.EXPANDABLE
    return Launch(
        argv=launch_argv(gpus_per_node=gpus_per_node, num_nodes=num_nodes),
        env={"PYTORCH_ALLOC_CONF": "expandable_segments:True"} if expandable else {},
        deepspeed=deepspeed_settings(strategy, gpus_per_node * num_nodes),
        accelerate=accelerate_settings(strategy, gpus_per_node=gpus_per_node, num_nodes=num_nodes),
    )

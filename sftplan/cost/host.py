"""Host memory of one machine: the processes, what is offloaded, and the saving of a checkpoint."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sftplan.cost.estimate import HostMemory
from sftplan.facts.params import num_parameters
from sftplan.facts.strategy import Offload, Precision

if TYPE_CHECKING:
    from sftplan.facts.model import ModelShape
    from sftplan.facts.strategy import Strategy

# What a host holds beyond before for one rank with torch, transformers, DeepSpeed and CUDA loaded:
# 1.93 to 1.97 GB beside an H200 (2026-11).
PROCESS_BYTES = 1_950_000_000
FP32_BYTES = 4


def host_memory(
    model: ModelShape, strategy: Strategy, num_gpus: int, gpus_per_node: int
) -> HostMemory:
    """Peak bytes of one host over all its ranks.

    Offloaded, per parameter: fp32 master weights and two moments, an fp32 gradient (stages 1 and 2
    pin it twice: __init__ and initialize_optimizer_states of DeepSpeed 0.19's stage_1_and_2.py), and a
    pinned copy in the model's type; with parameters offloaded, those. Under stage 3 the first rank
    alone has the whole model before it is cut up, which weighs what a checkpoint being saved does.
    inductor's workers come on top while a first step compiles.
    """
    count = num_parameters(model)
    low = strategy.precision in (Precision.BF16_MASTER, Precision.BF16_TRUE)
    size = 2 if low else FP32_BYTES
    here = count * gpus_per_node // num_gpus
    by_category = {"processes": PROCESS_BYTES * gpus_per_node}
    if strategy.offload is not Offload.NONE:
        by_category["optimizer"] = 3 * FP32_BYTES * here
        by_category["gradients"] = (1 if strategy.zero == 3 else 2) * FP32_BYTES * here
        by_category["pinned copies"] = size * here
    if strategy.offload in (Offload.ALL, Offload.NVME):
        by_category["weights"] = size * here
    if strategy.offload is Offload.NVME:
        del by_category["optimizer"]
    by_category["checkpoint being saved"] = size * count
    return HostMemory(peak_bytes=sum(by_category.values()), by_category=by_category)

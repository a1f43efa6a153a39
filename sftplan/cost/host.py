"""Host memory of one machine: the processes, what is offloaded, and the saving of a checkpoint."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sftplan.cost.estimate import HostMemory
from sftplan.facts.params import num_parameters
from sftplan.facts.strategy import Offload, Precision
from sftplan.units import GIB

if TYPE_CHECKING:
    from sftplan.facts.model import ModelShape
    from sftplan.facts.strategy import Strategy

# Resident memory of one rank with torch, transformers and CUDA loaded. Assumed, to be measured.
PROCESS_BYTES = 3 * GIB
FP32_BYTES = 4


def host_memory(
    model: ModelShape, strategy: Strategy, num_gpus: int, gpus_per_node: int
) -> HostMemory:
    """Peak bytes of one host over all its ranks.

    Offloaded, per parameter: fp32 master weights and two moments, an fp32 gradient, and a pinned
    copy in the model's type (DeepSpeed 0.19, stage_1_and_2.py); with parameters offloaded, those.
    """
    count = num_parameters(model)
    low = strategy.precision in (Precision.BF16_MASTER, Precision.BF16_TRUE)
    size = 2 if low else FP32_BYTES
    here = count * gpus_per_node // num_gpus
    by_category = {"processes": PROCESS_BYTES * gpus_per_node}
    if strategy.offload is not Offload.NONE:
        by_category["optimizer"] = 3 * FP32_BYTES * here
        by_category["gradients"] = FP32_BYTES * here
        by_category["pinned copies"] = size * here
    if strategy.offload in (Offload.ALL, Offload.NVME):
        by_category["weights"] = size * here
    if strategy.offload is Offload.NVME:
        del by_category["optimizer"]
    by_category["checkpoint being saved"] = size * count
    return HostMemory(peak_bytes=sum(by_category.values()), by_category=by_category)

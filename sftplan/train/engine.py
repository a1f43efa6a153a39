"""DeepSpeed made ready: imported without its talk, its process group joined, its host optimizer built."""

from __future__ import annotations

import importlib
import logging
import os
import sys
import warnings
from typing import TYPE_CHECKING, Any

import torch
from torch import distributed

from sftplan.errors import NotReadyError
from sftplan.facts.strategy import Offload
from sftplan.train.launch import BUILD_HINT

if TYPE_CHECKING:
    from collections.abc import Mapping

    from sftplan.plan.record_inputs import StrategyRecord
    from sftplan.train.settings import Settings


def uses_deepspeed(strategy: StrategyRecord) -> bool:
    """Whether the run goes through DeepSpeed's engine."""
    return strategy.zero > 0 or strategy.offload is not Offload.NONE


def load_deepspeed(device: torch.device) -> Any:
    """The library, writing on standard error and only what went wrong.

    Raises:
        NotReadyError: It is not installed, or cannot be imported.
    """
    if device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            deepspeed: Any = importlib.import_module("deepspeed")
    except ImportError as error:
        message = f"ZeRO and offload need DeepSpeed: {error}"
        raise NotReadyError(message, "`pip install 'sftplan[train]'`") from None
    # What it calls of torch.distributed has new names since 2.13, and it says so at every call.
    warnings.filterwarnings("ignore", "`torch.distributed", FutureWarning)
    deepspeed.utils.logger.setLevel(logging.ERROR)
    for handler in deepspeed.utils.logger.handlers:
        handler.setStream(sys.stderr)
    return deepspeed


def join_group(deepspeed: Any, device: torch.device) -> None:
    """DeepSpeed asks torch.distributed for everything, of a single process too."""
    backend = "gloo" if device.type == "cpu" else "nccl"
    if not distributed.is_initialized():
        store = torch._C._distributed_c10d.HashStore()
        distributed.init_process_group(backend, store=store, rank=0, world_size=1)
    for name, value in (
        ("RANK", distributed.get_rank()),
        ("WORLD_SIZE", distributed.get_world_size()),
        ("LOCAL_RANK", device.index or 0),
    ):
        os.environ.setdefault(name, str(value))
    if device.type == "cpu":  # its shared-memory kernels would be compiled for a rehearsal
        backends: Any = importlib.import_module("deepspeed.comm.torch")
        backends.build_shm_op = lambda: None
    deepspeed.init_distributed(dist_backend=backend, auto_mpi_discovery=False, verbose=False)


def build_cpu_adam() -> None:
    """Compile DeepSpeed's optimizer for the host, once per machine and version: about a minute.

    Raises:
        NotReadyError: It cannot be compiled here.
    """
    adam = importlib.import_module("deepspeed.ops.op_builder").CPUAdamBuilder()
    try:
        adam.load(verbose=False)
    except Exception as error:
        cause = str(error.__cause__ or error).strip().splitlines()[-1]
        message = f"DeepSpeed's optimizer for the host cannot be compiled: {cause}"
        raise NotReadyError(message, BUILD_HINT) from error


def make_optimizer(
    groups: list[dict[str, Any]], strategy: StrategyRecord, settings: Settings, device: torch.device
) -> torch.optim.Optimizer:
    """torch's fused AdamW, or DeepSpeed's where states live beside another processor than weights."""
    options: dict[str, Any] = {
        "lr": settings.learning_rate,
        "betas": (settings.beta1, settings.beta2),
        "eps": settings.epsilon,
    }
    if strategy.offload is Offload.NONE or device.type == "cpu":
        return torch.optim.AdamW(groups, fused=True, **options)
    build_cpu_adam()
    adam = importlib.import_module("deepspeed.ops.adam").DeepSpeedCPUAdam
    made: torch.optim.Optimizer = adam(groups, adamw_mode=True, **options)
    return made


def settings_here(
    planned: Mapping[str, Any], *, world_size: int, device: torch.device, nvme_path: str | None
) -> dict[str, Any]:
    """The plan's settings as they are on this machine: only what it alone knows is put in."""
    found = dict(planned)
    zero = dict(found["zero_optimization"])
    micro, passes = found["train_micro_batch_size_per_gpu"], found["gradient_accumulation_steps"]
    found["train_batch_size"] = micro * passes * world_size
    if device.type == "cpu":  # a rehearsal: states are on the host anyway, torch's AdamW moves them
        found["zero_force_ds_cpu_optimizer"] = False
    for name in ("offload_optimizer", "offload_param"):
        if nvme_path is not None and zero.get(name, {}).get("device") == "nvme":
            zero[name] = {**zero[name], "nvme_path": nvme_path}
    return found | {"zero_optimization": zero}


if __name__ == "__main__":
    load_deepspeed(torch.device("cuda"))
    try:
        build_cpu_adam()
    except NotReadyError as error:
        sys.exit(f"error: {error.message}")

"""The folder that states are offloaded to: there, writable, with room, before anything is started."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from sftplan.errors import UsageError
from sftplan.facts.params import num_parameters
from sftplan.facts.strategy import Offload
from sftplan.plan.launch import NVME_PATH
from sftplan.units import format_gib

if TYPE_CHECKING:
    from sftplan.facts.model import ModelShape
    from sftplan.plan.record import Plan

FP32_STATES_BYTES = 12  # per parameter: weight and two moments, as DeepSpeed's swapper writes them
HINT = "--nvme-path DIR names a folder on a local drive"


def check_nvme(plan: Plan, model: ModelShape, path: str | None) -> None:
    """Refuse a plan that offloads to NVMe where its states have no place.

    Raises:
        UsageError: The folder is missing, cannot be written to, or has too little room.
    """
    if plan.strategy.offload is not Offload.NVME:
        return
    folder = Path(path or NVME_PATH)
    if not folder.is_dir():
        message = f"--offload nvme: {folder} is not a folder"
        raise UsageError(message, HINT)
    if not os.access(folder, os.W_OK):
        message = f"--offload nvme: {folder} cannot be written to"
        raise UsageError(message, HINT)
    needed = FP32_STATES_BYTES * num_parameters(model) // plan.inputs.hardware.num_nodes
    free = shutil.disk_usage(folder).free
    if free < needed:
        message = (
            f"--offload nvme: {folder} has {format_gib(free)} GiB free, "
            f"the optimizer's states need {format_gib(needed)} GiB"
        )
        raise UsageError(message, HINT)

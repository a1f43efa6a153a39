"""`python -m sftplan.verify.calibrate_child DIR`: measures rates in a process that has done nothing else."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sftplan.errors import ExitCode, NotReadyError, SftplanError
from sftplan.plan.file import write_text
from sftplan.verify.child import end_with_parent
from sftplan.verify.request import result_file

if TYPE_CHECKING:
    import torch

SETTINGS = "calibrate.json"
HOST_S = 3.0  # its pace changes within seconds


def measure(*, cpu: bool) -> dict[str, Any]:
    """Rates in base units; shares of a datasheet are for the caller to take."""
    from sftplan.verify.occupancy import taken_bytes

    before = None if cpu else taken_bytes(0)
    import torch

    from sftplan.verify import rates
    from sftplan.verify.host_rate import HostProbe

    if not cpu and not torch.cuda.is_available():
        message = "PyTorch sees no GPU"
        raise NotReadyError(message, "`sftplan env` shows why")
    device = torch.device("cpu") if cpu else torch.device("cuda", 0)
    context = None if before is None else _context_bytes(device, before)
    types: tuple[torch.dtype, ...] = (torch.bfloat16, torch.float16, torch.float32)
    found = rates.products(device, types[-1:] if cpu else types)
    return {
        "context_bytes": context,
        "products": [asdict(product) for product in found],
        "large": {t: rates.large_rate(found, t) for t in {p.dtype for p in found}},
        "hbm_bytes_per_s": rates.streaming_bytes_per_s(device),
        "link_bytes_per_s": rates.link_bytes_per_s(device),
        "dispatch_scale": HostProbe(device).mean_scale(0.0 if cpu else HOST_S),
        "host_bytes_per_s": rates.host_bytes_per_s(small=cpu),
        "cpu_adam_bytes_per_s": rates.cpu_adam_bytes_per_s(small=cpu),
        "gpu": None if cpu else torch.cuda.get_device_name(device),
    }


def _context_bytes(device: torch.device, before: int) -> int | None:
    """What the driver shows beyond PyTorch's reserve, with kernels loaded."""
    import torch

    from sftplan.verify.occupancy import taken_bytes
    from sftplan.verify.rates import load_kernels

    load_kernels(device)
    torch.cuda.synchronize(device)
    now = taken_bytes(0)
    return None if now is None else now - before - torch.cuda.memory_reserved(device)


def main(folder: Path) -> int:
    """Leave the result, or the error, in the folder."""
    end_with_parent()
    settings = json.loads((folder / SETTINGS).read_text(encoding="utf-8"))
    try:
        found = measure(cpu=settings["cpu"])
        code = ExitCode.OK
    except SftplanError as error:
        code = error.exit_code
        found = {"error": error.message, "hint": error.hint, "exit_code": int(code)}
    write_text(json.dumps(found, allow_nan=False) + "\n", result_file(folder, 0))
    return code


if __name__ == "__main__":
    code = main(Path(sys.argv[-1]))
    sys.stderr.flush()
    os._exit(code)

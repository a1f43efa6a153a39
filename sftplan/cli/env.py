"""`sftplan env`: what a bug report needs to know of this machine."""

from __future__ import annotations

import os
import platform
from importlib import metadata
from typing import Any

from sftplan import __version__
from sftplan.cli.help import command
from sftplan.cli.options import common_options
from sftplan.cli.output import print_json, print_text, talk

_PACKAGES = (
    "torch", "transformers", "accelerate", "deepspeed", "datasets", "safetensors", "tokenizers",
    "huggingface-hub", "bitsandbytes", "triton", "click", "rich", "pydantic", "psutil",
    "nvidia-ml-py",
)  # fmt: skip
# Those that change what is planned or measured; never the whole environment, which holds secrets.
_VARIABLES = (
    "CUDA_VISIBLE_DEVICES", "CUDA_DEVICE_ORDER", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF",
    "NCCL_P2P_DISABLE", "HF_HUB_OFFLINE",
)  # fmt: skip


@command("env", examples=["sftplan env", "sftplan env --json"])
@common_options
def env(*, as_json: bool, quiet: bool, verbose: int) -> None:
    """Print versions and drivers for a bug report."""
    document = describe_environment()
    if as_json:
        print_json(document)
        return
    print_text(_render(document))
    talk("\nhint: attach this to a bug report", quiet=quiet)


def describe_environment() -> dict[str, Any]:
    """Versions, driver and GPUs; a package that is not installed is None. Imports no package."""
    return {
        "format": "sftplan.env",
        "format_version": 1,
        "sftplan": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        **_describe_gpus(),
        "packages": {name: _version(name) for name in _PACKAGES},
        "environment": {name: os.environ[name] for name in _VARIABLES if name in os.environ},
    }


def _describe_gpus() -> dict[str, Any]:
    from sftplan.detect.nvml import read_inventory
    from sftplan.errors import NotReadyError

    try:
        inventory = read_inventory()
    except NotReadyError as error:
        return {"driver": None, "gpus": [], "gpu_problem": error.message}
    gpus = [gpu.name for gpu in inventory.gpus]
    return {"driver": inventory.driver_version, "gpus": gpus, "gpu_problem": None}


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _render(document: dict[str, Any]) -> str:
    gpus = ", ".join(document["gpus"]) or document["gpu_problem"] or "none"
    rows = [
        ("sftplan", document["sftplan"]),
        ("python", document["python"]),
        ("platform", document["platform"]),
        ("driver", document["driver"] or "-"),
        ("gpus", gpus),
        *((name, version or "-") for name, version in document["packages"].items()),
        *document["environment"].items(),
    ]
    width = max(len(name) for name, _ in rows) + 2
    return "\n".join(f"{name:<{width}}{value}" for name, value in rows)

"""From a plan to a trained model: `sftplan launch`."""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sftplan import __version__
from sftplan.detect.gpus import detect
from sftplan.errors import NotReadyError, SftplanError, UsageError
from sftplan.facts.strategy import Allocator
from sftplan.plan.drift import check_drift
from sftplan.plan.file import plan_sha256, read_json
from sftplan.train.job import FINAL, RUN, Job, refuse_used_folder, trains_on_prompt, write_job
from sftplan.train.settings import settings_of

if TYPE_CHECKING:
    from collections.abc import Mapping

    from sftplan.plan.record import Plan
    from sftplan.train.material import Material

LIBRARIES = ("torch", "transformers", "accelerate", "safetensors", "tokenizers")
DEEPSPEED_VARIABLE = "DS_ACCELERATOR"
ALLOCATOR_VARIABLE = "PYTORCH_ALLOC_CONF"


def launch(
    plan: Plan,
    *,
    data: str | Path,
    out: str | Path,
    resume: bool = False,
    quiet: bool = False,
    **options: Any,
) -> dict[str, Any]:
    """Run the training of `plan` on `data` in the folder `out`; what run.json then holds.

    Args:
        plan: What `sftplan.plan` returned, or `read_plan` of its file.
        data: Instruction data.
        out: Folder of the run.
        resume: Go on from the newest complete checkpoint.
        quiet: Say nothing.
        options: The fields of `Settings`.

    Raises:
        SftplanError: Something cannot be used, or the training failed; run.json says why.
    """
    options.pop("no_verify", None)
    options.pop("verbose", None)
    options["train_on_prompt"] = trains_on_prompt(plan, options.get("train_on_prompt"))
    job = Job(
        plan=plan,
        data=str(data),
        out=Path(out),
        settings=settings_of(options),
        resume=resume,
        quiet=quiet,
    )
    check_here(plan, cpu=job.settings.cpu)
    ranks = 1 if job.settings.cpu else plan.inputs.hardware.num_gpus
    if plan.inputs.hardware.num_nodes > 1:
        message = f"{plan.inputs.hardware.num_nodes} nodes: start each one with torchrun"
        raise UsageError(message, "`sftplan export --to slurm` writes the script")
    return start(job, ranks=ranks)


def check_here(plan: Plan, *, cpu: bool) -> None:
    """Refuse a plan for another model, version or machine; on the processor the machine does not count.

    Raises:
        DriftError: With every field that differs.
    """
    machine = None
    if not cpu:
        with contextlib.suppress(NotReadyError):  # PyTorch may see what NVML does not, or will say
            machine = detect()
    check_drift(plan, machine)


def start(job: Job, *, ranks: int) -> dict[str, Any]:
    """Run a job in this process, or in one process per GPU."""
    set_allocator(job.plan)
    if job.settings.cpu:  # transformers imports DeepSpeed on saving, which else warns of no GPU
        os.environ.setdefault(DEEPSPEED_VARIABLE, "cpu")
    from sftplan.train.material import gather_material
    from sftplan.train.progress import Progress

    refuse_used_folder(job.out, resume=job.resume)
    record: dict[str, Any] = {
        "format": "sftplan.run",
        "created_by": f"sftplan {__version__}",
        "status": "running",
        "plan_sha256": plan_sha256(job.plan),
        "data": job.data,
        "started_at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "versions": versions(),
    }
    material = gather_material(job, world_size=ranks)  # all that can be wrong, before a GPU is used
    finished = _finished(job, material) if job.resume else None
    if finished is not None:
        Progress(quiet=job.quiet).say(f"{job.out} is finished: nothing is left to do")
        return finished
    write_job(job)
    return _recorded(job, record, material if ranks == 1 else None, ranks)


def _finished(job: Job, material: Material) -> dict[str, Any] | None:
    """What run.json of this run holds if it has reached its last step, else None.

    Raises:
        UsageError: It is another run that has; names what differs.
    """
    from sftplan.train.checkpoint import check_same
    from sftplan.train.material import identity_of

    file = job.out / RUN
    if not file.exists() or not (job.out / FINAL).is_dir():
        return None
    record = read_json(file)[1]
    total = material.training.num_steps
    steps, was = record.get("steps"), record.get("identity")
    if record.get("status") != "done" or not isinstance(steps, int) or not isinstance(was, dict):
        return None
    if steps < min(total, job.settings.max_steps or total):
        return None
    # Which kernel there is shows on the device alone; a finished run needs none.
    check_same(was, identity_of(job, material, kernel=was["attention"]))
    return record


def _recorded(
    job: Job, record: dict[str, Any], material: Material | None, ranks: int
) -> dict[str, Any]:
    """Run, with how it went in run.json whatever happens."""
    from sftplan.train.metrics import write_run
    from sftplan.train.ranks import run_ranks
    from sftplan.train.session import run_job

    write_run(job.out, record)
    try:
        summary = run_job(job, material) if ranks == 1 else run_ranks(job.out, ranks)
    except KeyboardInterrupt:
        write_run(job.out, record | {"status": "interrupted"})
        raise
    except SftplanError as error:
        with contextlib.suppress(UsageError):  # on a full disk the error itself counts
            write_run(job.out, record | {"status": "failed", "reason": error.message})
        raise
    except Exception as error:
        write_run(job.out, record | {"status": "failed", "reason": repr(error)})
        raise
    record |= {"status": "done", **summary}
    write_run(job.out, record)
    return record


def set_allocator(plan: Plan) -> None:
    """PyTorch reads how it takes memory from the environment, once, before the first allocation."""
    if plan.strategy.allocator is Allocator.EXPANDABLE and sys.platform == "linux":
        os.environ.setdefault(ALLOCATOR_VARIABLE, "expandable_segments:True")


def versions() -> Mapping[str, str | None]:
    """Versions of what decides on the numbers."""
    found: dict[str, str | None] = {"python": sys.version.split()[0]}
    for library in LIBRARIES:
        try:
            found[library] = importlib.metadata.version(library)
        except importlib.metadata.PackageNotFoundError:
            found[library] = None
    return found

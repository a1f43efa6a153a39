"""From a plan to a trained model: `sftplan launch`."""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sftplan import __version__
from sftplan.detect.gpus import detect
from sftplan.errors import NotReadyError, SftplanError, UsageError
from sftplan.facts.strategy import Allocator, Offload
from sftplan.plan.drift import check_drift
from sftplan.plan.file import plan_sha256, read_json
from sftplan.train.job import FINAL, RUN, Job, refuse_used_folder, trains_on_prompt, write_job
from sftplan.train.nodes import Node, node_of
from sftplan.train.settings import settings_of

if TYPE_CHECKING:
    from collections.abc import Mapping

    from sftplan.plan.record import Plan
    from sftplan.train.material import Material

LIBRARIES = ("torch", "transformers", "accelerate", "safetensors", "tokenizers")
DEEPSPEED_VARIABLE = "DS_ACCELERATOR"
BUILD_HINT = (
    "`apt install g++` and `pip install ninja`; with several CUDA versions, CUDA_HOME names the one"
)
ALLOCATOR_VARIABLE = "PYTORCH_ALLOC_CONF"
OLD_ALLOCATOR_VARIABLE = "PYTORCH_CUDA_ALLOC_CONF"  # read where the other is not set
SEGMENTS = "expandable_segments"


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
        options: The fields of `Settings`; of a plan with several nodes also `hosts`, `node_rank`
            and `port`, on each of them.

    Raises:
        SftplanError: Something cannot be used, or the training failed; run.json says why.
    """
    options.pop("no_verify", None)
    options.pop("verbose", None)
    options["train_on_prompt"] = trains_on_prompt(plan, options.get("train_on_prompt"))
    node = node_of(
        options.pop("hosts", None), number=options.pop("node_rank", None),
        port=options.pop("port", None), num_nodes=plan.inputs.hardware.num_nodes,
    )  # fmt: skip
    job = Job(
        plan=plan,
        data=str(data),
        out=Path(out),
        settings=settings_of(options),
        resume=resume,
        quiet=quiet,
    )
    check_here(plan, cpu=job.settings.cpu)
    ranks = 1 if job.settings.cpu else plan.inputs.hardware.gpus_per_node
    return start(job, ranks=ranks, node=node)


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


def start(job: Job, *, ranks: int, node: Node | None = None) -> dict[str, Any]:
    """Run a job in this process, or in one process per GPU, of which this machine has `ranks`."""
    set_allocator(job.plan)
    if job.settings.cpu:  # transformers imports DeepSpeed on saving, which else warns of no GPU
        os.environ.setdefault(DEEPSPEED_VARIABLE, "cpu")
    from sftplan.train.material import gather_material
    from sftplan.train.progress import Progress

    here = node or Node()
    if here.is_first:  # the folder is one for all machines, and the others may come later
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
    world_size = ranks * len(here.hosts)
    material = gather_material(job, world_size=world_size)  # before a GPU is used
    finished = _finished(job, material) if job.resume else None
    if finished is not None:
        Progress(quiet=job.quiet).say(f"{job.out} is finished: nothing is left to do")
        return finished
    if job.plan.strategy.offload is not Offload.NONE and not job.settings.cpu:
        build_host_optimizer()
    write_job(job)
    return _recorded(job, record, material if world_size == 1 else None, ranks, here)


def build_host_optimizer() -> None:
    """Compile DeepSpeed's AdamW for the host, in a process of its own: this one takes no GPU.

    Raises:
        NotReadyError: It cannot be compiled here.
    """
    command = [sys.executable, "-m", "sftplan.train.engine"]
    done = subprocess.run(command, stderr=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        message = done.stderr.strip().splitlines()[-1] if done.stderr.strip() else "it ended"
        raise NotReadyError(message.removeprefix("error: "), BUILD_HINT)


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
    job: Job, record: dict[str, Any], material: Material | None, ranks: int, node: Node
) -> dict[str, Any]:
    """Run, with how it went in run.json whatever happens; the first machine writes it."""
    from sftplan.train.metrics import write_run
    from sftplan.train.ranks import run_ranks
    from sftplan.train.session import run_job

    def write(changes: dict[str, Any]) -> None:
        if node.is_first:
            write_run(job.out, record | changes)

    write({})
    try:
        alone = ranks * len(node.hosts) == 1
        summary = run_job(job, material) if alone else run_ranks(job.out, ranks, node)
    except KeyboardInterrupt:
        write({"status": "interrupted"})
        raise
    except SftplanError as error:
        with contextlib.suppress(UsageError):  # on a full disk the error itself counts
            write({"status": "failed", "reason": error.message})
        raise
    except Exception as error:
        write({"status": "failed", "reason": repr(error)})
        raise
    record |= {"status": "done", **summary}
    write({})
    return record


def set_allocator(plan: Plan) -> None:
    """Ask PyTorch to take memory as the plan counts on it; it reads this once, before its first allocation.

    What else the environment asks of the allocator stays.
    """
    expandable = plan.strategy.allocator is Allocator.EXPANDABLE and sys.platform == "linux"
    asked = os.environ.get(ALLOCATOR_VARIABLE) or os.environ.get(OLD_ALLOCATOR_VARIABLE) or ""
    others = [each for each in asked.split(",") if each and not each.startswith(SEGMENTS)]
    os.environ[ALLOCATOR_VARIABLE] = ",".join([*others, f"{SEGMENTS}:{expandable}"])


def versions() -> Mapping[str, str | None]:
    """Versions of what decides on the numbers."""
    found: dict[str, str | None] = {"python": sys.version.split()[0]}
    for library in LIBRARIES:
        try:
            found[library] = importlib.metadata.version(library)
        except importlib.metadata.PackageNotFoundError:
            found[library] = None
    return found

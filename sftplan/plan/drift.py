"""Whether a plan describes this machine, model and version: field by field, before a GPU is used."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from sftplan import __version__
from sftplan.errors import DriftError
from sftplan.plan.build import model_facts
from sftplan.plan.timeline import model_of
from sftplan.units import format_gib

if TYPE_CHECKING:
    from sftplan.facts.hardware import Hardware
    from sftplan.plan.record import Plan

MEMORY_TOLERANCE_FRACTION = 0.03  # drivers differ by less than 2 %, variants of a GPU by far more
MODEL_FIELDS = (
    "model_type", "num_parameters", "num_layers", "hidden_size", "intermediate_size", "num_heads",
    "num_kv_heads", "head_dim", "vocab_size", "max_positions", "tied_embeddings",
)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """A field of the plan that is otherwise here."""

    field: str
    planned: str
    here: str

    def __str__(self) -> str:
        return f"{self.field}: planned {self.planned}, here {self.here}"


def check_drift(plan: Plan, machine: Hardware | None) -> None:
    """Refuse a plan for something else. `machine` None: whatever it is, it is not looked at.

    Raises:
        DriftError: With every field that differs.
    """
    found = [*version_differences(plan), *model_differences(plan)]
    if machine is not None:
        found += machine_differences(plan, machine)
    if found:
        lines = "\n".join(f"  {each}" for each in found)
        message = f"the plan is for something else:\n{lines}"
        raise DriftError(message, "plan again, here and now: the file's `command` says how")


def version_differences(plan: Plan) -> list[Difference]:
    """Another minor version may predict, and train, otherwise."""
    made_by = plan.created_by.removeprefix("sftplan ")
    if made_by.split(".")[:2] == __version__.split(".")[:2]:
        return []
    return [Difference(field="created_by", planned=plan.created_by, here=f"sftplan {__version__}")]


def model_differences(plan: Plan) -> list[Difference]:
    """The model that the plan names, looked up again."""
    planned = plan.inputs.model
    here = model_facts(model_of(plan))
    if here.shape_sha256 == planned.shape_sha256:
        return []
    found = [
        Difference(field=f"inputs.model.{name}", planned=_text(old), here=_text(new))
        for name in MODEL_FIELDS
        if (old := getattr(planned, name)) != (new := getattr(here, name))
    ]
    return found or [
        Difference(
            field="inputs.model.shape_sha256",
            planned=planned.shape_sha256[:12],
            here=here.shape_sha256[:12],
        )
    ]


def machine_differences(plan: Plan, machine: Hardware) -> list[Difference]:
    """GPU, how many, their memory, and what other processes hold of it."""
    planned = plan.inputs.hardware
    found = []
    if _bare(machine.gpu.nvml_name) != _bare(planned.gpu.nvml_name):
        found.append(("gpu.name", planned.gpu.name, machine.gpu.name))
    if machine.gpus_per_node < planned.gpus_per_node:
        found.append(("gpus_per_node", str(planned.gpus_per_node), str(machine.gpus_per_node)))
    old, new = planned.gpu.memory_bytes, machine.gpu.memory_bytes
    if abs(new - old) > MEMORY_TOLERANCE_FRACTION * old:
        found.append(("gpu.memory_bytes", f"{format_gib(old)} GiB", f"{format_gib(new)} GiB"))
    elif _free_bytes(machine) < plan.memory.gpu.used_bytes:
        held = f"{format_gib(machine.memory_taken_bytes)} GiB, which leave {format_gib(_free_bytes(machine))}"
        old_held = f"{format_gib(planned.memory_taken_bytes)} GiB, for {format_gib(plan.memory.gpu.used_bytes)}"
        found.append(("memory_taken_bytes", old_held, held))
    return [Difference(field=f"inputs.hardware.{f}", planned=p, here=h) for f, p, h in found]


def _free_bytes(machine: Hardware) -> int:
    gpu = machine.gpu
    idle = max(gpu.unusable_bytes, machine.rates.device_bytes)
    return gpu.memory_bytes - idle - machine.memory_taken_bytes


def _bare(nvml_name: str) -> str:
    """Older drivers leave out the maker's name."""
    return nvml_name.removeprefix("NVIDIA ").strip()


def _text(value: object) -> str:
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)

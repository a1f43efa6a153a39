"""From what the processes of a dry run left to a measurement under the plan's own keys."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sftplan.cost.timeline import Timeline
from sftplan.units import format_gib
from sftplan.verify import measurement as keys
from sftplan.verify.measurement import Measurement, OutOfMemory, Phase
from sftplan.verify.steps import steps_alone

if TYPE_CHECKING:
    from collections.abc import Sequence

    from sftplan.plan.record import Plan

PHASES = ("forward", "backward", "communication", "optimizer", "data")
QUANTITIES = {
    "peak_allocated_bytes": keys.ALLOCATED, "peak_reserved_bytes": keys.RESERVED,
    "used_bytes": keys.USED, "outside_bytes": keys.CONTEXT, "host_peak_bytes": keys.HOST,
}  # fmt: skip
HOST_TOLERANCE = 1.3  # a host that is faster or slower by more is worth a word
TIMES = {"step_s": keys.STEP, "tokens_per_s": keys.TOKENS, "mfu_fraction": keys.MFU}


def measurement_of(
    plan: Plan, found: dict[str, Any], *, rehearse: str | None = None, notes: Sequence[str] = ()
) -> Measurement:
    """The measurement in a merged result."""
    versions, failed = found.get("versions", {}), found.get("out_of_memory")
    said = (*notes, *_notes(found, rehearse), *_host_notes(plan, found))
    if failed is not None:
        return Measurement(
            mode="gpu", quantities={}, out_of_memory=_out_of_memory(failed), versions=versions,
            notes=said, rehearsal=rehearse is not None,
        )  # fmt: skip
    alone = steps_alone(plan)
    return Measurement(
        mode="gpu",
        quantities=_quantities(plan, found, rehearse=rehearse is not None),
        instead=alone,
        phases=_phases(found),
        versions=versions,
        timeline=_timeline(found.get("timeline")),
        notes=(*said, *_building_notes(plan)) if alone else said,
        rehearsal=rehearse is not None,
    )


def _building_notes(plan: Plan) -> list[str]:
    needed = format_gib(plan.memory.gpu.used_bytes)
    return [
        f"the plan's {needed} GiB are needed while the model is built: its steps were measured, beside "
        "what they alone were predicted to need"
    ]


def _quantities(plan: Plan, found: dict[str, Any], *, rehearse: bool) -> dict[str, float]:
    """A rehearsal has the small card's context, which is not here to be measured, and no times."""
    wanted = QUANTITIES if rehearse else QUANTITIES | TIMES
    quantities = {key: found[name] for name, key in wanted.items() if found.get(name) is not None}
    if rehearse:
        gpu = plan.memory.gpu
        quantities.pop(keys.CONTEXT, None)
        if keys.RESERVED in quantities:
            outside = gpu.used_bytes - gpu.peak_reserved_bytes
            quantities[keys.USED] = quantities[keys.RESERVED] + outside
        return quantities
    seconds = found.get("phase_s", {})
    if "optimizer" in seconds:
        quantities[keys.OPTIMIZER] = seconds["optimizer"]
    if found.get("first_step_s") and found.get("step_s"):
        quantities[keys.STARTUP] = max(0.0, found["first_step_s"] - found["step_s"])
    return quantities


def _phases(found: dict[str, Any]) -> tuple[Phase, ...]:
    seconds, peaks = found.get("phase_s", {}), found.get("phase_peak_bytes", {})
    return tuple(
        Phase(name=name, seconds=seconds.get(name), peak_allocated_bytes=peaks.get(name))
        for name in PHASES
        if name in seconds or name in peaks
    )


def _out_of_memory(failed: dict[str, Any]) -> OutOfMemory:
    names = (
        "phase",
        "step",
        "allocated_bytes",
        "reserved_bytes",
        "free_bytes",
        "total_bytes",
        "message",
    )
    return OutOfMemory(
        **{name: failed[name] for name in names}, others_bytes=failed.get("taken_before_bytes")
    )


def _timeline(found: dict[str, Any] | None) -> Timeline | None:
    if found is None:
        return None
    return Timeline(
        categories=tuple(found["categories"]),
        points=tuple(tuple(point) for point in found["points"]),
        phases=tuple((position, phase) for position, phase in found["phases"]),
    )


def _notes(found: dict[str, Any], rehearse: str | None) -> list[str]:
    notes = []
    if rehearse is not None:
        notes.append(f"a rehearsal of {rehearse}: memory is judged, time is this GPU's and is not")
    taken = found.get("taken_meanwhile_bytes")
    if taken:
        notes.append(
            f"another process took {format_gib(taken)} GiB of GPU memory during the dry run: "
            "`nvidia-smi` shows which; verify again without it"
        )
    if found.get("note"):
        notes.append(found["note"])
    return notes


def _host_notes(plan: Plan, found: dict[str, Any]) -> list[str]:
    scale, planned = found.get("host_scale"), plan.inputs.hardware.rates.dispatch_scale
    if not scale or 1 / HOST_TOLERANCE < scale / planned < HOST_TOLERANCE:
        return []
    return [
        f"the host took {scale:.2f} times the reference host's time for an operation, the plan reckons "
        f"with {planned:.2f}: steps that wait for it are not as planned"
    ]

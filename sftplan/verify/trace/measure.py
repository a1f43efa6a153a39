"""`verify --no-gpu`: the traced step as a measurement, beside what the tape says of the same step."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from sftplan.cost.captured import as_captured
from sftplan.cost.evaluate import chip_of
from sftplan.cost.memory import exact_peaks
from sftplan.cost.timeline import last_step, last_step_start
from sftplan.errors import NotReadyError
from sftplan.facts.strategy import Allocator, Offload
from sftplan.plan.timeline import events_of, passes_captured, strategy_of
from sftplan.step.repeat import Events
from sftplan.verify import measurement as keys
from sftplan.verify.measurement import Measurement, Phase, memory_quantities

if TYPE_CHECKING:
    from collections.abc import Sequence

    from sftplan.facts.strategy import Strategy
    from sftplan.plan.record import Plan
    from sftplan.verify.record import Difference

PHASES = ("forward", "backward", "optimizer")
COMPILED = "torch.compile's kernels show only on a GPU: traced and predicted without it"
SHARDED = "ZeRO and offload are the tape's: traced and predicted as one rank with everything"


@dataclass(frozen=True, slots=True, kw_only=True)
class Traced:
    """What a trace found, and where the tape differs from it."""

    measurement: Measurement
    differences: Sequence[Difference]


def measure_traced(plan: Plan, *, diff: bool = False) -> Traced:
    """Trace two steps of the plan's real model on fake tensors; no GPU is needed.

    Raises:
        NotReadyError: PyTorch or transformers is not installed.
        UsageError: The plan's model is not to be found any more.
    """
    for name in ("torch", "transformers"):
        if importlib.util.find_spec(name) is None:
            message = f"a trace runs the real model, and {name} is not installed"
            raise NotReadyError(message, "`pip install 'sftplan[train]'`")
    from sftplan.verify.trace.compare import differences
    from sftplan.verify.trace.run import trace_plan

    chip = chip_of(plan.inputs.hardware.gpu)
    strategy, notes = _traceable(plan)
    trace = trace_plan(plan, chip)
    tape = events_of(plan, strategy, num_gpus=1, gpus_per_node=1)
    captured = passes_captured(plan, strategy)
    events = Events(trace.events, trace.sizes, trace.kinds, trace.marks)
    traced, predicted = (
        exact_peaks(x, expandable=strategy.allocator is Allocator.EXPANDABLE, captured=captured)
        for x in (events, tape)
    )
    shown = as_captured(events).events if captured else events
    found, foreseen = (
        memory_quantities(plan, x.allocated_bytes, x.reserved_bytes) for x in (traced, predicted)
    )
    if plan.inputs.workload.lengths is None:  # else fewer positions reach the head than are planned
        found[keys.FLOPS] = float(trace.step_flops * plan.inputs.hardware.num_gpus)
    measurement = Measurement(
        mode="trace",
        quantities=found,
        instead=foreseen if notes else {},
        phases=tuple(_phases(shown)),
        versions=_versions(),
        timeline=last_step(shown).thinned(),
        notes=tuple(notes),
    )
    return Traced(measurement=measurement, differences=differences(trace, tape) if diff else ())


def _traceable(plan: Plan) -> tuple[Strategy, list[str]]:
    """The step that can be traced, and in what it is not the plan's."""
    strategy, notes = strategy_of(plan.strategy), []
    if strategy.compile:
        notes.append(COMPILED)
    if strategy.zero or strategy.offload is not Offload.NONE:
        notes.append(SHARDED)
    return replace(strategy, zero=0, offload=Offload.NONE, compile=False), notes


def _phases(events: Events) -> list[Phase]:
    """The most that is alive in each phase of the last step, as requested."""
    start = last_step_start(events)
    marks = {position: name for position, name in events.marks if position >= start}
    peaks = dict.fromkeys(PHASES, 0)
    live, phase = 0, ""
    for position, event in enumerate(events.events):
        phase = marks.get(position, phase)
        live += events.sizes[event] if event >= 0 else -events.sizes[~event]
        if phase in peaks:
            peaks[phase] = max(peaks[phase], live)
    return [Phase(name=name, peak_allocated_bytes=peak) for name, peak in peaks.items()]


def _versions() -> dict[str, str | None]:
    from sftplan.train.launch import versions

    return dict(versions())

"""The plan screen: verdict, memory, why not otherwise, time, cost, and what to type next.

80 columns, readable without colour and without block characters. The screen may change between
versions; programs read `--json`.
"""

from __future__ import annotations

import textwrap
from typing import TYPE_CHECKING

from sftplan.report.words import (
    VERDICTS,
    change_words,
    options_of,
    strategy_words,
    verdict_colour,
)
from sftplan.units import format_count, format_duration, format_gib

if TYPE_CHECKING:
    from sftplan.plan.record import Plan
    from sftplan.plan.record_costs import Neighbour
    from sftplan.report.style import Style

WIDTH = 80
INDENT = 12
BAR_WIDTH = 30
LARGEST_WHY_TABLE = 8


def _wrapped(label: str, text: str) -> list[str]:
    """`text` behind its label, wrapped under itself."""
    return textwrap.wrap(
        text,
        WIDTH,
        initial_indent=label.ljust(INDENT),
        subsequent_indent=" " * INDENT,
        break_on_hyphens=False,
        break_long_words=False,
    )


def _counted(number: int, noun: str) -> str:
    return f"{number:,} {noun}" + ("" if number == 1 else "s")


def _title(plan: Plan) -> list[str]:
    model, work, machine = plan.inputs.model, plan.inputs.workload, plan.inputs.hardware
    return [
        f"{model.name}, {format_count(model.num_parameters)} parameters, "
        f"sequence {work.seq_len}, global batch {work.global_batch}",
        f"{machine.num_gpus} x {machine.gpu.name}, "
        f"{format_gib(plan.memory.gpu.capacity_bytes)} GiB usable each (profile: {machine.name})",
    ]


def verdict_line(plan: Plan, style: Style) -> str:
    """The line that answers the question by itself."""
    gpu, host = plan.memory.gpu, plan.memory.host
    head = style.paint(VERDICTS[plan.verdict], "bold", verdict_colour(plan.verdict))
    used, capacity = format_gib(gpu.used_bytes), format_gib(gpu.capacity_bytes)
    text = f"{head}: {used} of {capacity} GiB per GPU, "
    if gpu.headroom_bytes < 0:
        return f"{text}{format_gib(-gpu.headroom_bytes)} GiB over"
    if host.capacity_bytes is not None and host.peak_bytes > host.capacity_bytes:
        used, capacity = format_gib(host.peak_bytes), format_gib(host.capacity_bytes)
        over = format_gib(host.peak_bytes - host.capacity_bytes)
        return f"{head}: {used} of {capacity} GiB of host memory per node, {over} GiB over"
    note = ""
    if plan.verdict == "does_not_fit":
        note = f", less than the margin of {plan.inputs.margin_fraction:.0%}"
    return f"{text}{format_gib(gpu.headroom_bytes)} GiB headroom{note}"


def _strategy(plan: Plan, style: Style) -> list[str]:
    chosen, machine, work = plan.strategy, plan.inputs.hardware, plan.inputs.workload
    label = "Strategy" if plan.fits else "Leanest"
    lines = _wrapped(label, ", ".join(strategy_words(chosen)))
    gpus = _counted(machine.num_gpus, "GPU")
    lines += _wrapped(
        "",
        f"{_counted(chosen.micro_batch, 'row')} {style.times} {gpus} {style.times} "
        f"{chosen.accumulation} accumulation = {_counted(work.global_batch, 'row')} a step, "
        f"{work.tokens_per_step:,.0f} tokens, "
        f"{work.examples_per_step:,.0f} examples",
    )
    if chosen.pinned:
        pinned = ", ".join(knob.replace("_", "-") for knob in chosen.pinned)
        lines += _wrapped("", f"pinned: {pinned}")
    return lines


def _memory(plan: Plan, style: Style) -> list[str]:
    gpu, host = plan.memory.gpu, plan.memory.host
    largest = max(gpu.by_category.values(), default=0)
    rows = [(name, size) for name, size in gpu.by_category.items() if size > 0]
    extra = gpu.peak_reserved_bytes - gpu.peak_allocated_bytes
    outside = gpu.used_bytes - gpu.peak_reserved_bytes
    rows += [("cached, free", extra), ("context", outside), ("used", gpu.used_bytes)]
    lines = [f"Memory per GPU (GiB), at its peak: {gpu.peak_at}"]
    for name, size in rows:
        share = size / gpu.capacity_bytes
        bar = style.bar(share, BAR_WIDTH).ljust(BAR_WIDTH)[:BAR_WIDTH]
        bar = style.paint(bar, "bold") if size == largest else bar
        lines.append(f"    {name:<16}{format_gib(size):>9}  {bar}  {share:>5.0%}")
    if host.peak_bytes:
        capacity = "" if host.capacity_bytes is None else f" of {format_gib(host.capacity_bytes)}"
        lines.append(f"    {'host':<16}{format_gib(host.peak_bytes):>9}{capacity} GiB per node")
    return lines


def _step_words(neighbour: Neighbour, chosen_s: float | None) -> str:
    step_s = neighbour.time.step_s
    if step_s is None:
        return f"{'-':>9}"
    text = f"{format_duration(step_s):>9}"
    return text + (f"  {step_s / chosen_s - 1:+.0%}" if chosen_s else "")


def _neighbour_line(plan: Plan, neighbour: Neighbour, style: Style) -> str:
    used = neighbour.memory.gpu.used_bytes
    line = f"    {change_words(neighbour.change):<25}{format_gib(used):>9} "
    over = used - plan.memory.gpu.capacity_bytes
    if neighbour.verdict == "does_not_fit":
        why = f"{format_gib(over)} GiB over" if over > 0 else "inside the margin"
        return style.paint(f"{line}{'-':>9}  does not fit, {why}", "dim", "red")
    line += _step_words(neighbour, plan.time.step_s)
    if neighbour.verdict == "tight":
        line += "  tight"
    return f"{line}\n{' ' * 8}{neighbour.reason}" if neighbour.reason else line


def _why(plan: Plan, style: Style, *, verbose: bool) -> list[str]:
    if not plan.neighbours:
        return []
    step = "-" if plan.time.step_s is None else format_duration(plan.time.step_s)
    used = format_gib(plan.memory.gpu.used_bytes)
    lines = [
        f"{'Why (one decision changed)':<29}{'GiB':>9} {'step':>9}",
        f"    {'chosen':<25}{used:>9} {step:>9}",
    ]
    shown = plan.neighbours if verbose else plan.neighbours[:LARGEST_WHY_TABLE]
    lines += [_neighbour_line(plan, neighbour, style) for neighbour in shown]
    hidden = len(plan.neighbours) - len(shown)
    return [*lines, f"    ({hidden} more with -v)"] if hidden else lines


def _all_reasons(plan: Plan) -> list[str]:
    return [line for why in plan.why for line in _wrapped("", f"{why.choice}: {why.reason}")]


def _time(plan: Plan) -> list[str]:
    time, work = plan.time, plan.inputs.workload
    if time.step_s is None:
        return _wrapped("Time", "unknown for this GPU")
    named = [
        ("compute", time.compute_s),
        ("memory traffic", time.memory_s),
        ("dispatch", time.dispatch_s),
        ("communication", time.communication_s),
        ("offload", time.offload_s),
        ("optimizer", time.optimizer_s),
    ]
    parts = ", ".join(f"{name} {format_duration(seconds)}" for name, seconds in named if seconds)
    lines = _wrapped("Time", f"{format_duration(time.step_s)} per step: {parts}")
    rate = f"{time.tokens_per_s or 0:,.0f} tokens/s"
    if time.mfu_fraction is not None:
        rate += f", {time.mfu_fraction:.0%} of the dense peak (MFU)"
    lines += _wrapped("", rate)
    if time.total_s is None or time.num_steps is None:
        hint = "--tokens, --examples or --data say how much work there is"
        return lines + _wrapped("", f"run time unknown: {hint}")
    start = f", start-up {format_duration(time.startup_s)}" if time.startup_s else ""
    epochs = f"{work.epochs:g} epoch{'s' if work.epochs != 1 else ''}"
    total = f"{time.num_steps:,} steps, {epochs}: {format_duration(time.total_s)}{start}"
    return lines + _wrapped("", total)


def _compute(plan: Plan) -> list[str]:
    compute = plan.compute
    share = compute.attention_flops_per_token / compute.flops_per_token
    return _wrapped(
        "Compute",
        f"{compute.flops_per_token / 1e9:.2f} GFLOP per token, attention {share:.0%} of it",
    )


def _cost(plan: Plan) -> list[str]:
    cost = plan.cost
    if cost.usd_per_hour is None:
        return []
    when = f", price of {cost.price_as_of}" if cost.price_as_of else ""
    hourly = f"${cost.usd_per_hour:,.2f} per hour{when}"
    return _wrapped("Cost", hourly if cost.usd is None else f"${cost.usd:,.2f} at {hourly}")


def _sources(plan: Plan) -> list[str]:
    figures = {
        "memory": "memory.gpu.peak_reserved_bytes",
        "context": "memory.gpu.context_bytes",
        "step time": "time.step_s",
        "start-up": "time.startup_s",
        "price": "cost.usd_per_hour",
    }
    told = [f"{name} {plan.sources[key]}" for name, key in figures.items() if key in plan.sources]
    if plan.inputs.hardware.calibration is not None:
        told.append(f"calibrated {plan.inputs.hardware.calibration}")
    told = told or [f"{key} {source}" for key, source in plan.sources.items()]
    return _wrapped("How sure", ", ".join(told) + "; not verified on this machine")


def _notes(plan: Plan, style: Style) -> list[str]:
    lines = [line for text in plan.assumptions for line in _wrapped("Assumed", text)]
    for text in plan.warnings:
        first, *rest = _wrapped("Warning", text)
        lines += [style.paint(first[:INDENT], "yellow") + first[INDENT:], *rest]
    return lines


def _remedies(plan: Plan, style: Style) -> list[str]:
    if plan.fits:
        return []
    if not plan.remedies:
        return _wrapped("Remedy", "none found: more or larger GPUs, or a smaller model")
    lines = []
    for index, remedy in enumerate(plan.remedies):
        options = style.paint(options_of(remedy.change), "cyan")
        label = "It fits with" if index == 0 else "or with"
        lines.append(f"{label:<13}{options} ({format_gib(remedy.used_bytes)} GiB per GPU)")
    return lines


def render_plan_screen(
    plan: Plan, style: Style, *, path: str | None = None, verbose: bool = False
) -> str:
    """The whole screen; `path` is where the plan was written."""
    blocks = [
        _title(plan),
        [verdict_line(plan, style), *_remedies(plan, style)],
        _strategy(plan, style) + (_all_reasons(plan) if verbose else []),
        _memory(plan, style),
        _why(plan, style, verbose=verbose),
        (_time(plan) + _cost(plan) if plan.fits else []) + _compute(plan) + _sources(plan),
        _notes(plan, style),
    ]
    if path is not None:
        following = [f"Wrote {style.paint(path, 'cyan')}"]
        if plan.fits:
            command = style.paint(f"sftplan verify {path}", "green")
            following.append(f"Next: {command}")
        blocks.append(following)
    return "\n\n".join("\n".join(block) for block in blocks if block)

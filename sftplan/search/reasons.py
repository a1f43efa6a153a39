"""Why each decision was taken, in one sentence with the figures of the neighbour that lost."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sftplan.facts.strategy import Attention, Offload, Precision
from sftplan.search.rows import examples_per_row
from sftplan.search.settle import num_steps
from sftplan.units import GIB, format_gib

if TYPE_CHECKING:
    from collections.abc import Sequence

    from sftplan.facts.strategy import Strategy
    from sftplan.search.result import KnobValue, Option
    from sftplan.search.settle import Search

DECISIONS = (
    "precision",
    "zero",
    "offload",
    "checkpointing",
    "checkpointed_layers",
    "attention",
    "loss",
    "packing",
    "compile",
    "micro_batch",
    "allocator",
)
_SAME_FRACTION = 0.0005  # prints as 0.0 %
_SAME_BYTES = GIB // 200  # prints as 0.00 GiB


def find_reasons(
    search: Search, chosen: Option, neighbours: Sequence[Option]
) -> tuple[tuple[str, str], ...]:
    """One sentence per decision that was not pinned and of which there is something to say."""
    reasons = []
    for knob in DECISIONS:
        if knob in search.space.pins:
            continue
        found = [_rule(search, chosen, knob)]
        found += [
            _against(chosen, other) for other in neighbours if _decision(other.change) == knob
        ]
        sentence = "; ".join(words for words in found if words)
        if sentence:
            reasons.append((_name(chosen.strategy, knob), sentence))
    return tuple(reasons)


def _decision(change: object) -> str:
    """The knob that a change is about; the others in it follow."""
    assert isinstance(change, dict)
    if "packing" in change or "offload" in change:
        return "packing" if "packing" in change else "offload"
    return next((knob for knob in DECISIONS if knob in change), "")


def _name(strategy: Strategy, knob: str) -> str:
    return f"{knob.replace('_', '-')} {_value(getattr(strategy, knob))}"


def _value(value: KnobValue) -> str:
    if isinstance(value, bool):
        return "on" if value else "off"
    return "all" if value is None else str(value)


def _against(chosen: Option, other: Option) -> str:
    """What the other decision would save and cost.

    An option that does not fit says by how much.
    """
    knob = _decision(other.change)
    subject = _value(other.change[knob])
    memory = other.estimate.memory
    if other.verdict == "does_not_fit":
        over = memory.used_bytes - memory.capacity_bytes
        why = f", {format_gib(over)} GiB over" if over > 0 else ""
        return f"{subject} does not fit{why}" + (f" ({other.reason})" if other.reason else "")
    less = chosen.estimate.memory.used_bytes - memory.used_bytes
    parts = []
    if abs(less) >= _SAME_BYTES:
        parts.append((less > 0, f"{format_gib(abs(less))} GiB"))
    share = _slower(chosen, other)
    if share is not None and abs(share) >= _SAME_FRACTION:
        parts.append((share < 0, f"{abs(share):.1%} of the time"))
    words = _joined(parts)
    because = f" ({other.reason})" if other.reason else ""
    return f"{subject} {words}{because}"


def _joined(parts: list[tuple[bool, str]]) -> str:
    if not parts:
        return "would make no difference"
    verbs = ["save" if saves else "cost" for saves, _ in parts]
    if len(parts) == 1:
        return f"would {verbs[0]} {parts[0][1]}"
    if verbs[0] == verbs[1]:
        return f"would {verbs[0]} {parts[0][1]} and {parts[1][1]}"
    return f"would {verbs[0]} {parts[0][1]} but {verbs[1]} {parts[1][1]}"


def _slower(chosen: Option, other: Option) -> float | None:
    """By what share an example takes longer."""
    ours, theirs = chosen.estimate, other.estimate
    if not ours.time.step_s or theirs.time.step_s is None:
        return None
    per_example = theirs.time.step_s / theirs.examples_per_step
    return per_example / (ours.time.step_s / ours.examples_per_step) - 1


def _rule(search: Search, chosen: Option, knob: str) -> str | None:
    """What is decided before anything is counted."""
    space, strategy = search.space, chosen.strategy
    match knob:
        case "precision" if strategy.precision is Precision.FP16_MIXED:
            return f"{space.gpu.name} has no native bf16"
        case "zero" if space.num_gpus == 1 and strategy.offload is Offload.NONE:
            return "one GPU has nothing to share with"
        case "offload" if chosen.verdict != "does_not_fit":
            if strategy.offload is Offload.NONE:
                return "fits without"
            return "nothing fits without"
        case "attention" if space.model.attention_softcap is not None:
            return "the model caps its scores, which only eager attention can"
        case "attention" if strategy.attention is Attention.VARLEN:
            return "keeps packed examples apart without a mask"
        case "packing":
            return _packing_rule(search, strategy)
        case "compile" if num_steps(search, chosen) is None:
            return "judged by step time alone: how long the run is was not said"
        case _:
            return None


def _packing_rule(search: Search, strategy: Strategy) -> str | None:
    workload = search.space.workload
    if workload.lengths is None:
        return "without --data each row counts as one full example"
    if not strategy.packing:
        return None
    per_row = examples_per_row(workload, packing=True)
    rows = strategy.micro_batch * strategy.accumulation * search.space.num_gpus
    return f"{rows} rows hold {rows * per_row:,.0f} examples, {per_row:.1f} each"

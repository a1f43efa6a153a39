"""The chosen strategy with exactly one decision changed: why it was not decided otherwise.

What merely follows from a decision changes with it: the accumulation with the micro-batch, the
ZeRO stage that offload needs, the attention that packing needs.
"""

from __future__ import annotations

from dataclasses import replace
from enum import StrEnum
from itertools import zip_longest
from typing import TYPE_CHECKING, Any

from sftplan.facts.strategy import (
    Allocator,
    Attention,
    Checkpointing,
    Loss,
    Offload,
    Optimizer,
)
from sftplan.search.coster import missing_host_bytes
from sftplan.search.explore import TIE_FRACTION
from sftplan.search.rows import divisors, examples_per_row
from sftplan.search.settle import num_steps
from sftplan.units import format_duration, format_gib

if TYPE_CHECKING:
    from sftplan.facts.strategy import Strategy
    from sftplan.search.result import KnobValue, Option
    from sftplan.search.settle import Search
    from sftplan.search.space import Space

MAX_SHOWN = 8
MAX_EXACT = 12  # estimates for a plan, those for its choice among them

Change = dict[str, "KnobValue"]


def find_neighbours(search: Search, chosen: Option) -> tuple[Option, ...]:
    """At most eight neighbours, fastest first, those that do not fit last."""
    if chosen.verdict == "does_not_fit":
        return ()
    budget = min(MAX_SHOWN, max(0, MAX_EXACT - search.ledger.num_exact))
    found = [
        _neighbour(search, chosen, change)
        for change in changes(search.space, chosen.strategy)[:budget]
    ]
    return tuple(sorted(found, key=_order))


def _order(option: Option) -> tuple[bool, float]:
    step_s, used = option.estimate.time.step_s, option.estimate.memory.used_bytes
    if option.verdict == "does_not_fit":
        return True, used
    return False, float("inf") if step_s is None else step_s


def _neighbour(search: Search, chosen: Option, change: Change) -> Option:
    knobs: dict[str, Any] = change
    written = {k: v.value if isinstance(v, StrEnum) else v for k, v in change.items()}
    strategy = replace(chosen.strategy, **knobs)
    option = replace(search.beside(chosen, strategy), change=written)
    return replace(option, reason=_reason(search, chosen, option))


def _seconds_per_example(option: Option) -> float | None:
    step_s = option.estimate.time.step_s
    return None if step_s is None else step_s / option.estimate.examples_per_step


def _reason(search: Search, chosen: Option, other: Option) -> str | None:
    """Why it was not chosen, where memory and step time do not say so."""
    missing = missing_host_bytes(other.estimate, search.hardware)
    if missing:
        return f"the host lacks {format_gib(missing)} GiB"
    ours, theirs = _seconds_per_example(chosen), _seconds_per_example(other)
    if other.verdict == "does_not_fit" or ours is None or theirs is None or theirs >= ours:
        return None
    if other.strategy.compile and not chosen.strategy.compile:
        return _start_up_words(search, chosen, other)
    if other.verdict == "tight" and chosen.verdict == "fits":
        return f"leaves less than the margin of {search.margin:.0%}"
    if search.minimize == "memory":
        return "memory is what is minimized"
    more = other.estimate.memory.used_bytes - chosen.estimate.memory.used_bytes
    tie = f"within {TIE_FRACTION:.0%} of the step time the choice goes by headroom"
    return tie if theirs >= ours / (1 + TIE_FRACTION) and more > 0 else None


def _start_up_words(search: Search, chosen: Option, compiled: Option) -> str | None:
    steps = num_steps(search, chosen)
    ours, theirs = chosen.estimate.time, compiled.estimate.time
    if steps is None or ours.step_s is None or theirs.step_s is None:
        return None
    saved = steps * (ours.step_s - theirs.step_s)
    spent = (theirs.startup_s or 0.0) - (ours.startup_s or 0.0)
    return (
        f"starting takes {format_duration(spent)} longer, "
        f"{steps:,} steps save {format_duration(saved)}"
    )


def changes(space: Space, strategy: Strategy) -> list[Change]:
    """All changes of one decision that is not pinned, the most telling of each first."""
    by_decision: list[list[Change]] = [
        _larger(space, strategy),
        _smaller(space, strategy),
        _checkpointings(strategy),
        _zeros(space, strategy),
        [{"compile": not strategy.compile}] if _may_flip_compile(space, strategy) else [],
        [{"precision": each} for each in space.precisions if each is not strategy.precision],
        _losses(space, strategy),
        _attentions(space, strategy),
        _offloads(space, strategy),
        _packings(space, strategy),
        [{"allocator": each} for each in Allocator if each is not strategy.allocator],
    ]
    free: list[list[Change]] = [
        [change for change in decision if not change.keys() & space.pins.keys()]
        for decision in by_decision
    ]
    return [change for turn in zip_longest(*free) for change in turn if change is not None]


def _split(space: Space, strategy: Strategy, micro: int | None) -> list[Change]:
    rows = strategy.micro_batch * strategy.accumulation
    return [] if micro is None else [{"micro_batch": micro, "accumulation": rows // micro}]


def _larger(space: Space, strategy: Strategy) -> list[Change]:
    """Twice the micro-batch, or the next that splits the rows."""
    rows = strategy.micro_batch * strategy.accumulation
    above = [size for size in divisors(rows) if size > strategy.micro_batch]
    doubled = 2 * strategy.micro_batch
    return _split(space, strategy, doubled if doubled in above else next(iter(above), None))


def _smaller(space: Space, strategy: Strategy) -> list[Change]:
    """Half the micro-batch, or the next that splits the rows."""
    rows = strategy.micro_batch * strategy.accumulation
    below = [size for size in divisors(rows) if size < strategy.micro_batch]
    halved = strategy.micro_batch // 2
    exact = halved in below and halved * 2 == strategy.micro_batch
    return _split(space, strategy, halved if exact else next(reversed(below), None))


def _checkpointings(strategy: Strategy) -> list[Change]:
    """Of all layers, as they are now first where only some are."""
    order = list(Checkpointing)
    place = order.index(strategy.checkpointing)
    others = sorted((each for each in order if each is not strategy.checkpointing), key=order.index)
    others.sort(key=lambda each: abs(order.index(each) - place))
    if strategy.checkpointed_layers is None:
        return [{"checkpointing": each} for each in others]
    every: Change = {"checkpointed_layers": None}
    return [every, *({"checkpointing": each, **every} for each in others)]


def _zeros(space: Space, strategy: Strategy) -> list[Change]:
    stages = [stage for stage in space.zeros(strategy.offload) if stage != strategy.zero]
    stages.sort(key=lambda stage: (abs(stage - strategy.zero), -stage))
    found: list[Change] = []
    for stage in stages:
        change: Change = {"zero": stage}
        if strategy.compile not in space.compiles(stage, strategy.offload):
            change["compile"] = False
        found.append(change)
    return found


def _may_flip_compile(space: Space, strategy: Strategy) -> bool:
    return (not strategy.compile) in space.compiles(strategy.zero, strategy.offload)


def _losses(space: Space, strategy: Strategy) -> list[Change]:
    order: tuple[Loss, ...] = (Loss.RESPONSE, Loss.CHUNKED, Loss.FULL)
    if Loss.RESPONSE not in space.losses:
        order = space.losses
    return [{"loss": each} for each in order if each is not strategy.loss]


def _attentions(space: Space, strategy: Strategy) -> list[Change]:
    if space.model.attention_softcap is not None:
        return []  # only the scores themselves can be capped
    possible = [Attention.SDPA, Attention.EAGER]
    if space.model.anatomy is not None:
        possible = [each for each in possible if each in space.model.anatomy.attentions]
    if strategy.packing and space.packs_without_mask(strategy.precision):
        possible.insert(0, Attention.VARLEN)
    return [{"attention": each} for each in possible if each is not strategy.attention]


def _packings(space: Space, strategy: Strategy) -> list[Change]:
    """The other packing with its attention and, as rows hold more then, its own split."""
    if space.workload.lengths is None:
        return []
    found: list[Change] = []
    for packing, attention in space.layouts(strategy.precision):
        if packing is strategy.packing:
            continue
        branch = space.branch(replace(strategy, packing=packing))
        micro = min(branch.micros, key=lambda size: abs(size - strategy.micro_batch))
        change: Change = {"packing": packing}
        split = {"micro_batch": micro, "accumulation": branch.rows // micro}
        rest: Change = {"attention": attention, **split}
        change |= {k: v for k, v in rest.items() if getattr(strategy, k) != v}
        if examples_per_row(space.workload, packing=True) > 1:
            found.append(change)
    return found


def _offloads(space: Space, strategy: Strategy) -> list[Change]:
    """One step more or less off the GPU."""
    order = [Offload.NONE, Offload.OPTIMIZER, Offload.ALL]
    fixed = strategy.optimizer is Optimizer.ADAMW_8BIT or space.model.anatomy is not None
    if fixed or strategy.offload not in order:
        return []
    place = order.index(strategy.offload)
    found: list[Change] = []
    for offload in (*order[place + 1 : place + 2], *order[max(place - 1, 0) : place]):
        stages = space.zeros(offload)
        if not stages:
            continue
        change: Change = {"offload": offload}
        if strategy.zero not in stages:
            change["zero"] = stages[0]
        stage = strategy.zero if strategy.zero in stages else stages[0]
        if strategy.compile not in space.compiles(stage, offload):
            change["compile"] = False
        found.append(change)
    return found

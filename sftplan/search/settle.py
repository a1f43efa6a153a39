"""From candidates to one option that was estimated exactly."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from sftplan.search.coster import capacity_bytes, judge, missing_host_bytes
from sftplan.search.explore import (
    TIE_FRACTION,
    Explorer,
    best_first,
    explore_lean,
    find_leanest,
    leanest_first,
)
from sftplan.search.result import Option

if TYPE_CHECKING:
    from collections.abc import Sequence

    from sftplan.facts.hardware import Hardware
    from sftplan.facts.strategy import Offload, Strategy
    from sftplan.search.coster import Ledger
    from sftplan.search.explore import Candidate
    from sftplan.search.space import Family, Space

Minimize = Literal["time", "cost", "memory"]

# Exact estimates after the first one until a family of strategies is taken not to fit but for its leanest.
MAX_TRIES = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Search:
    """One job on one machine: what may be chosen, what it costs, and what is wanted."""

    space: Space
    ledger: Ledger
    margin: float
    minimize: Minimize

    @property
    def hardware(self) -> Hardware:
        """The machine."""
        return self.ledger.hardware

    def option(self, strategy: Strategy) -> Option:
        """The exact estimate of a strategy with its verdict."""
        estimate = self.ledger.exact(strategy)
        verdict = judge(estimate, self.hardware, self.margin)
        return Option(strategy=strategy, estimate=estimate, verdict=verdict)

    def beside(self, chosen: Option, strategy: Strategy) -> Option:
        """A strategy as it compares with the chosen one: the allocator is replayed only where it changes."""
        if strategy.allocator is not chosen.strategy.allocator:
            return self.option(strategy)
        estimate = self.ledger.coster.beside(chosen.estimate, strategy, self.hardware)
        verdict = judge(estimate, self.hardware, self.margin)
        return Option(strategy=strategy, estimate=estimate, verdict=verdict)


def best_option(search: Search) -> Option:
    """The best that fits within the margin, else the best that fits, else the leanest.

    What stays on the GPU goes before what is offloaded.
    """
    capacity = capacity_bytes(search.hardware)
    families: dict[Offload, list[Family]] = {}
    for limit in (capacity * (1 - search.margin), capacity):
        for offload in search.space.offloads:
            if offload not in families:
                families[offload] = list(search.space.families(offload))
            option = settle(search, families[offload], limit)
            if option is not None:
                return option
    return _leanest(search, families)


def settle(search: Search, families: Sequence[Family], limit: float) -> Option | None:
    """The best of these families that needs at most `limit` bytes, verified; None if none does."""
    ranked = _ranked(search, families, limit)
    if not ranked:
        return _last_resort(search, families, limit)
    option = search.option(ranked[0].strategy)
    if _holds(option, limit):
        return option
    if missing_host_bytes(option.estimate, search.hardware):
        return None  # a smaller batch does not ease the host, which holds states
    more_layers = _with_more_layers(search, option, ranked, limit)
    if more_layers is not None:
        return more_layers
    leaner = _allowing_for(search, families, limit, _inflation(option, ranked[0]))
    if leaner is None or search.minimize == "memory":
        return leaner
    return _faster(search, families, limit, leaner)


def _with_more_layers(
    search: Search, option: Option, ranked: Sequence[Candidate], limit: float
) -> Option | None:
    """The best with as many more layers checkpointed as it exceeds the limit by, if it is as fast then.

    None if it is not, if that is not enough, or if their number is pinned.
    """
    strategy, ledger = option.strategy, search.ledger
    layers, every = strategy.checkpointed_layers, search.space.model.num_layers
    if layers is None or search.space.checkpointed_layers is not None:
        return None
    leanest = ledger.used_bytes(replace(strategy, checkpointed_layers=None))
    of_a_layer = (ledger.used_bytes(strategy) - leanest) / (every - layers)
    over = option.estimate.memory.used_bytes - limit
    if of_a_layer <= 0 or layers + over / of_a_layer >= every - 1:
        return None
    more = replace(strategy, checkpointed_layers=layers + math.ceil(over / of_a_layer))
    seconds = ranked[0].seconds * ledger.step_s(more) / ledger.step_s(strategy)
    if seconds > min(each.seconds for each in ranked) * (1 + TIE_FRACTION):
        return None
    found = search.option(more)
    return found if _holds(found, limit) else None


def _allowing_for(
    search: Search, families: Sequence[Family], limit: float, inflation: float
) -> Option | None:
    """The best if reserved memory exceeds the cheap estimate by a share that is alike everywhere.

    What an exact estimate shows of it, the next try allows for.
    """
    for _ in range(MAX_TRIES):
        ranked = _ranked(search, families, limit, inflation)
        if not ranked:
            break
        option = search.option(ranked[0].strategy)
        if _holds(option, limit):
            return option
        if missing_host_bytes(option.estimate, search.hardware):
            return None
        inflation = max(_inflation(option, ranked[0]), inflation * 1.001)
    return _last_resort(search, families, limit)


def _inflation(option: Option, candidate: Candidate) -> float:
    return option.estimate.memory.used_bytes / max(candidate.used_bytes, 1)


def _faster(search: Search, families: Sequence[Family], limit: float, best: Option) -> Option:
    """What another branch's share alone had ruled out, should it be faster and fit after all."""
    ranked = _ranked(search, families, limit)
    slower = (best.estimate.time.step_s or 0.0) / best.estimate.examples_per_step
    if not ranked or ranked[0].seconds * (1 + TIE_FRACTION) >= slower:
        return best
    option = search.option(ranked[0].strategy)
    return option if _holds(option, limit) else best


def _last_resort(search: Search, families: Sequence[Family], limit: float) -> Option | None:
    """The leanest, should it fit after all."""
    least = find_leanest(search.ledger, families)
    if least is None or least.used_bytes > limit:
        return None
    option = search.option(least.strategy)
    return option if _holds(option, limit) else None


def _holds(option: Option, limit: float) -> bool:
    if option.verdict == "does_not_fit":
        return False
    memory = option.estimate.memory
    return memory.used_bytes <= limit


def _ranked(
    search: Search, families: Sequence[Family], limit: float, inflation: float = 1.0
) -> list[Candidate]:
    if search.minimize == "memory":
        lean = leanest_first(explore_lean(search.ledger, families))
        return [each for each in lean if each.used_bytes * inflation <= limit]
    found = Explorer(search.ledger, limit, inflation).run(families)
    return best_first(found, capacity_bytes(search.hardware))


def _leanest(search: Search, families: dict[Offload, list[Family]]) -> Option:
    """What needs least of the GPU, of what the host can hold; all the same it does not fit."""
    found = (find_leanest(search.ledger, offered) for offered in families.values())
    leanest = [each for each in found if each is not None]
    needed = []
    for each in sorted(leanest, key=lambda each: each.used_bytes):
        option = search.option(each.strategy)
        if not missing_host_bytes(option.estimate, search.hardware):
            break
        if option.estimate.memory.used_bytes <= capacity_bytes(search.hardware):
            needed.append(option.estimate.host.peak_bytes)
    return replace(option, host_needed_bytes=min(needed, default=None))


def num_steps(search: Search, option: Option) -> int | None:
    """Optimizer steps of the run; None when nobody said how much work there is."""
    workload, estimate = search.space.workload, option.estimate
    if workload.num_examples is not None:
        return math.ceil(workload.epochs * workload.num_examples / estimate.examples_per_step)
    if workload.num_tokens is not None:
        return math.ceil(workload.epochs * workload.num_tokens / estimate.tokens_per_step)
    return None


def run_seconds(search: Search, option: Option) -> float | None:
    """Start-up and all steps; None where the work or the step time is unknown."""
    steps, time = num_steps(search, option), option.estimate.time
    if steps is None or time.step_s is None:
        return None
    return (time.startup_s or 0.0) + steps * time.step_s


def without_compiling(search: Search, compiled: Option) -> Option:
    """The best uncompiled option if its whole run ends earlier, else the compiled one."""
    total = run_seconds(search, compiled)
    free = "compile" not in search.space.pins and search.minimize != "memory"
    if not (free and total is not None and compiled.strategy.compile):
        return compiled
    capacity = capacity_bytes(search.hardware)
    limit = capacity * (1 - search.margin) if compiled.verdict == "fits" else capacity
    plain = [
        family
        for family in search.space.families(compiled.strategy.offload)
        if not family.plain.template.compile
    ]
    other = settle(search, plain, limit)
    other_total = None if other is None else run_seconds(search, other)
    if other is None or other_total is None or other_total >= total:
        return compiled
    return other

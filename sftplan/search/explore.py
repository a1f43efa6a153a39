"""The strategies worth an exact look, found with few cheap ones.

Families are taken in the order of what they could reach at best: their plain branch at the largest
micro-batch, whether that fits or not (laws 2 to 4 of `coster`). A family, or a branch of it, that
could not come within the tie tolerance of the fastest found so far is never looked into. Where all layers
checkpointed fit and none do not, as few are as it takes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from sftplan.facts.strategy import Attention, Checkpointing, Loss, Offload, Strategy

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence, Set

    from sftplan.search.coster import Ledger
    from sftplan.search.space import Branch, Family

TIE_FRACTION = 0.01  # what is within it of the fastest is as fast: estimates are no better
_PADDED: dict[str, Any] = {"packing": False, "attention": Attention.SDPA}


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """A strategy with its cheap figures; `seconds` per example, as packed steps hold others."""

    strategy: Strategy
    used_bytes: int
    seconds: float


def num_mechanisms(strategy: Strategy) -> int:
    """How much machinery a strategy brings along; of equals the simpler one is better."""
    return (
        strategy.zero
        + (strategy.accumulation > 1)
        + list(Offload).index(strategy.offload)
        + list(Checkpointing).index(strategy.checkpointing)
        + (strategy.checkpointed_layers is not None)
        + (strategy.loss is Loss.CHUNKED)
        + strategy.packing
        + strategy.compile
    )


def best_first(candidates: Iterable[Candidate], capacity: int) -> list[Candidate]:
    """The tie rule: fastest within 1 %, then most headroom, then fewest mechanisms.

    Headroom is compared in percent of the capacity. What is slower than the tie is left out.
    """
    found = list(candidates)
    fastest = min((each.seconds for each in found), default=0.0)
    tied = [each for each in found if each.seconds <= fastest * (1 + TIE_FRACTION)]

    def key(each: Candidate) -> tuple[int, int, float]:
        percent = each.used_bytes * 100 // max(capacity, 1)
        return percent, num_mechanisms(each.strategy), each.seconds

    return sorted(tied, key=key)


def leanest_first(candidates: Iterable[Candidate]) -> list[Candidate]:
    """Least memory within 1 %, then fastest, then fewest mechanisms."""
    found = list(candidates)
    least = min((each.used_bytes for each in found), default=0)
    tied = [each for each in found if each.used_bytes <= least * (1 + TIE_FRACTION)]
    return sorted(tied, key=lambda each: (each.seconds, num_mechanisms(each.strategy)))


class Explorer:
    """The fastest strategies of some families that need at most `limit_bytes`.

    They need `inflation` times the cheap estimate, or what exact estimates of their branch have shown.
    """

    def __init__(self, ledger: Ledger, limit_bytes: float, inflation: float = 1.0) -> None:
        self._ledger = ledger
        self._limit = limit_bytes
        self._inflation = inflation
        self._fastest = float("inf")
        self._found: list[Candidate] = []

    def run(self, families: Iterable[Family]) -> list[Candidate]:
        """Everything within the tie of the fastest, and what was looked at on the way."""
        offered = list(families)
        if not any(self._can_fit(family.leanest) for family in offered):
            return []
        explored: dict[tuple[int, bool], tuple[Family, set[tuple[int, int]]]] = {}
        for seconds, family in self._by_promise(offered):
            if not self._may_win(seconds):
                break
            if self._can_fit(family.leanest):
                walked = self._explore(family)
                template = family.plain.template
                explored.setdefault((template.zero, template.packing), (family, walked))
        for family, walked in explored.values():  # of each stage and layout the most promising one
            self._mix(family, walked)
        return self._found

    def _may_win(self, seconds: float) -> bool:
        return seconds <= self._fastest * (1 + TIE_FRACTION)

    def _seconds(self, branch: Branch, index: int) -> float:
        return self._ledger.step_s(branch.at(index)) / branch.examples

    def _fits(self, branch: Branch, index: int) -> bool:
        strategy = branch.at(index)
        inflation = max(self._inflation, self._ledger.inflation(strategy))
        return self._ledger.used_bytes(strategy) * inflation <= self._limit

    def _by_promise(self, families: Sequence[Family]) -> list[tuple[float, Family]]:
        """With what each family could reach; padded rows reach no more than the same packed."""
        packed = {
            replace(family.plain.template, **_PADDED): family.plain
            for family in families
            if family.plain.template.attention is Attention.VARLEN
        }
        promises = []
        for family in families:
            twin = packed.get(replace(family.plain.template, **_PADDED), family.plain)
            promises.append((self._branch_at_best(twin), family))
        return sorted(promises, key=lambda promise: promise[0])

    def _branch_at_best(self, branch: Branch) -> float:
        last = len(branch.micros) - 1
        if branch.steady:
            return self._seconds(branch, last)
        return min(self._seconds(branch, index) for index in range(last + 1))

    def _can_fit(self, leanest: Branch) -> bool:
        return _least_bytes(self._ledger, leanest) * self._inflation <= self._limit

    def _explore(self, family: Family) -> set[tuple[int, int]]:
        """All branches, savers last; one too slow at its best rules out those that save more.

        The places of those that were walked.
        """
        walked: set[tuple[int, int]] = set()
        too_slow: list[tuple[int, int]] = []
        for place, branch in sorted(family.branches.items(), key=lambda it: (sum(it[0]), it[0])):
            if any(place[0] >= slow[0] and place[1] >= slow[1] for slow in too_slow):
                continue
            if self._may_win(self._branch_at_best(branch)):
                self._walk(branch)
                walked.add(place)
            else:
                too_slow.append(place)
        return walked

    def _walk(self, branch: Branch) -> None:
        """From the largest micro-batch that fits downwards, while that is not too slow."""
        top = self._largest(branch)
        for index in range(top, -1, -1):
            if not self._fits(branch, index):
                continue
            seconds = self._seconds(branch, index)
            self._find(branch.at(index), seconds)
            if branch.steady and index < top and not self._may_win(seconds):
                break

    def _mix(self, family: Family, walked: Set[tuple[int, int]]) -> None:
        """Between its branches: some layers checkpointed as in the one, the others as in the other."""
        for saving, loss in sorted(walked):
            lighter, branch = (family.branches.get((saving + more, loss)) for more in (0, 1))
            if lighter and branch and self._may_win(self._branch_at_best(lighter)):
                self._mix_branches(lighter, branch)

    def _mix_branches(self, lighter: Branch, branch: Branch) -> None:
        """Micro-batches that fit with every layer checkpointed as the branch is, but not with none."""
        fits_light = self._largest(lighter)
        if fits_light == len(branch.micros) - 1:
            return
        for index in range(self._largest(branch), fits_light, -1):
            if not self._may_win(self._seconds(lighter, index)):
                if branch.steady:
                    break
                continue
            strategy = self._fewest_layers(lighter.at(index), branch.at(index), branch.layers)
            if strategy.checkpointed_layers is not None:
                self._find(strategy, self._ledger.step_s(strategy) / branch.examples)

    def _find(self, strategy: Strategy, seconds: float) -> None:
        used = self._ledger.used_bytes(strategy)
        self._found.append(Candidate(strategy=strategy, used_bytes=used, seconds=seconds))
        self._fastest = min(self._fastest, seconds)

    def _fewest_layers(self, light: Strategy, heavy: Strategy, layers: int) -> Strategy:
        """As few layers checkpointed as fit, all of them if it takes all.

        By bisection that begins at the chord: memory is convex in their number, mostly two straight lines.
        """
        inflation = max(self._inflation, *map(self._ledger.inflation, (light, heavy)))
        limit, best = self._limit / inflation, heavy
        most, least = map(self._ledger.used_bytes, (light, heavy))
        if not least <= limit < most:
            return heavy
        low, high = 0, layers
        chord = math.ceil(layers * (most - limit) / (most - least))
        guesses = iter((chord, chord - 1))
        while high - low > 1:
            middle = min(max(next(guesses, (low + high) // 2), low + 1), high - 1)
            strategy = replace(heavy, checkpointed_layers=middle)
            if self._ledger.used_bytes(strategy) <= limit:
                high, best = middle, strategy
            else:
                low = middle
        return best

    def _largest(self, branch: Branch) -> int:
        """Index of the largest micro-batch that fits, by bisection; -1 if none does (law 1)."""
        last = len(branch.micros) - 1
        if self._fits(branch, last):
            return last
        low, high = -1, last
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self._fits(branch, middle) else (low, middle)
        return low


def explore_lean(ledger: Ledger, families: Sequence[Family]) -> list[Candidate]:
    """What needs least memory, and all that comes within the tie of it."""
    at_least = [(_least_bytes(ledger, family.leanest), family) for family in families]
    limit = min((used for used, _ in at_least), default=0) * (1 + TIE_FRACTION)
    found: list[Candidate] = []
    for used, family in at_least:
        if used > limit:
            continue
        for branch in family.branches.values():
            found += _up_to(ledger, branch, limit)
    return found


def _up_to(ledger: Ledger, branch: Branch, limit: float) -> Iterator[Candidate]:
    """The micro-batches from the smallest up within the limit, and perhaps the largest."""
    last = len(branch.micros) - 1
    inside = True
    for index in range(last + 1):
        if not inside and index < last:
            continue
        strategy = branch.at(index)
        used = ledger.used_bytes(strategy)
        inside = used <= limit
        if inside:
            seconds = ledger.step_s(strategy) / branch.examples
            yield Candidate(strategy=strategy, used_bytes=used, seconds=seconds)


def find_leanest(ledger: Ledger, families: Sequence[Family]) -> Candidate | None:
    """What needs least memory of all."""
    least: Candidate | None = None
    for branch in (family.leanest for family in families):
        for index in _ends(branch):
            strategy = branch.at(index)
            used = ledger.used_bytes(strategy)
            if least is None or used < least.used_bytes:
                seconds = ledger.step_s(strategy) / branch.examples
                least = Candidate(strategy=strategy, used_bytes=used, seconds=seconds)
    return least


def _ends(branch: Branch) -> Sequence[int]:
    """Smallest and largest micro-batch: the latter alone keeps no gradients while it runs."""
    return sorted({0, len(branch.micros) - 1})


def _least_bytes(ledger: Ledger, branch: Branch) -> int:
    return min(ledger.used_bytes(branch.at(index)) for index in _ends(branch))

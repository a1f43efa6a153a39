"""What to change so that it fits: each remedy is proven by a search of its own."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from sftplan.errors import UsageError
from sftplan.facts.strategy import Offload, Optimizer, Precision
from sftplan.search.coster import Ledger, capacity_bytes
from sftplan.search.explore import find_leanest
from sftplan.search.rows import rows_per_gpu
from sftplan.search.settle import Search, best_option
from sftplan.search.space import check_pins

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from sftplan.facts.hardware import Hardware
    from sftplan.facts.workload import Workload
    from sftplan.search.coster import Coster, CosterFactory
    from sftplan.search.result import KnobValue, Option

MAX_SHOWN = 3
MAX_TRIED_LENGTHS = 4
SHORTEST_SEQUENCE = 128
GPU_FACTORS = (2, 4, 8)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Attempt:
    """Another job: what changes, and what of the result belongs to the change.

    `group` says of which kind it is; only the smallest change of a kind is shown.
    """

    group: str
    change: Mapping[str, KnobValue]
    told: tuple[str, ...]  # knobs of the strategy found that have to be given as well
    search: Search
    reason: str | None = None


def find_remedies(search: Search, chosen: Option, make: CosterFactory) -> tuple[Option, ...]:
    """At most three changes after which it fits with the margin, mildest first."""
    if chosen.verdict != "does_not_fit":
        return ()
    found: dict[str, Option] = {}
    for attempt in _attempts(search, make):
        if attempt.group in found:
            continue
        option = _prove(attempt)
        if option is not None:
            found[attempt.group] = option
        if len(found) == MAX_SHOWN:
            break
    return tuple(found.values())


def _prove(attempt: _Attempt) -> Option | None:
    """The best strategy of that job, None unless it fits."""
    search = attempt.search
    try:
        check_pins(search.space.pins, search.space.model)
        if not _may_fit(search):
            return None
        option = best_option(search)
    except UsageError:  # rows that so many GPUs cannot split, pins that exclude each other
        return None
    if option.verdict != "fits":
        return None
    values = {knob: getattr(option.strategy, knob) for knob in attempt.told}
    told = {knob: value for knob, value in values.items() if value is not None}
    return replace(option, change=_written({**attempt.change, **told}), reason=attempt.reason)


def _written(change: Mapping[str, Any]) -> dict[str, KnobValue]:
    return {knob: getattr(value, "value", value) for knob, value in change.items()}


def _may_fit(search: Search) -> bool:
    """Whether the leanest comes near: most jobs that do not fit do not by far."""
    limit = capacity_bytes(search.hardware) * (1 - search.margin)
    for offload in search.space.offloads:
        least = find_leanest(search.ledger, list(search.space.families(offload)))
        if least is not None and least.used_bytes <= limit:
            return True
    return False


def _attempts(search: Search, make: CosterFactory) -> Iterator[_Attempt]:
    yield from _unpinned(search)
    yield from _shorter(search, make)
    yield from _more_gpus(search, make)
    yield from _lossy(search)


def _repinned(search: Search, pins: Mapping[str, Any]) -> Search:
    return replace(search, space=replace(search.space, pins=dict(pins)))


def _unpinned(search: Search) -> Iterator[_Attempt]:
    """Another value where a pinned one is in the way."""
    pins = search.space.pins
    for group, knobs in (
        ("offload", ("offload",)),
        ("checkpointing", ("checkpointing", "checkpointed_layers")),
        ("micro_batch", ("micro_batch", "accumulation")),
    ):
        if not any(knob in pins for knob in knobs):
            continue
        rest = {knob: value for knob, value in pins.items() if knob not in knobs}
        yield _Attempt(group=group, change={}, told=knobs, search=_repinned(search, rest))


def _moved(search: Search, make: CosterFactory, hardware: Hardware, workload: Workload) -> Search:
    """The same wish on other hardware or with other work."""
    space = search.space
    coster: Coster = make(
        space.model,
        workload,
        num_gpus=hardware.num_gpus,
        gpus_per_node=hardware.gpus_per_node,
    )
    return replace(
        search,
        space=replace(space, workload=workload, num_gpus=hardware.num_gpus),
        ledger=Ledger(coster, hardware),
    )


def _shorter(search: Search, make: CosterFactory) -> Iterator[_Attempt]:
    """Half the sequence length, and half of that; data would have to be counted again."""
    workload = search.space.workload
    if workload.lengths is not None:
        return
    for halvings in range(1, MAX_TRIED_LENGTHS + 1):
        seq_len = workload.seq_len >> halvings
        if seq_len < SHORTEST_SEQUENCE:
            return
        shorter = replace(workload, seq_len=seq_len)
        yield _Attempt(
            group="seq_len",
            change={"seq_len": seq_len},
            told=(),
            search=_moved(search, make, search.hardware, shorter),
        )


def _more_gpus(search: Search, make: CosterFactory) -> Iterator[_Attempt]:
    """More GPUs in the node, or more nodes where the machine comes as it is."""
    hardware, workload = search.hardware, search.space.workload
    whole = hardware.offer is not None or hardware.host.memory_bytes is not None
    for factor in GPU_FACTORS:
        if whole or hardware.num_nodes > 1:
            nodes = hardware.num_nodes * factor
            larger, change = replace(hardware, num_nodes=nodes), {"nodes": nodes}
        else:
            gpus = hardware.gpus_per_node * factor
            larger, change = replace(hardware, gpus_per_node=gpus), {"gpus": gpus}
        if _splits(search, larger.num_gpus):
            yield _Attempt(
                group="gpus",
                change=dict(change),
                told=(),
                search=_moved(search, make, larger, workload),
            )


def _splits(search: Search, num_gpus: int) -> bool:
    """Whether the very same global batch can be spread over that many GPUs."""
    try:
        rows_per_gpu(search.space.workload, search.space.pins, num_gpus=num_gpus, packing=False)
    except UsageError:
        return False
    return True


def _lossy(search: Search) -> Iterator[_Attempt]:
    """What trains differently, said so."""
    pins = search.space.pins
    if "optimizer" not in pins and pins.get("offload", Offload.NONE) is Offload.NONE:
        changed = {**pins, "optimizer": Optimizer.ADAMW_8BIT}
        yield _Attempt(
            group="optimizer",
            change={"optimizer": Optimizer.ADAMW_8BIT.value},
            told=(),
            search=_repinned(search, changed),
            reason="lossy: moments in 8 bits",
        )
    if "precision" not in pins and search.space.gpu.bf16_native:
        changed = {**pins, "precision": Precision.BF16_TRUE}
        yield _Attempt(
            group="precision",
            change={"precision": Precision.BF16_TRUE.value},
            told=(),
            search=_repinned(search, changed),
            reason="lossy: small updates are rounded away",
        )

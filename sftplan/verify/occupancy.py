"""How much of each visible GPU is taken, as the driver tells it: by whom NVML says it is."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sftplan.detect.gpus import find_machine
from sftplan.errors import NotReadyError
from sftplan.units import MIB

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

# Contexts grow by kernels that are loaded late, readings of a driver lag: less is no other process.
NOTICEABLE_BYTES = 128 * MIB


def all_taken_bytes() -> tuple[int, ...] | None:
    """Bytes taken on each visible GPU, by CUDA's order; None where NVML does not tell."""
    try:
        return tuple(device.taken_bytes for device in find_machine().devices)
    except NotReadyError:
        return None


def taken_bytes(local_rank: int) -> int | None:
    """Bytes taken on one of them."""
    found = all_taken_bytes()
    return None if found is None or local_rank >= len(found) else found[local_rank]


def taken_meanwhile(
    before: tuple[int, ...] | None,
    after: tuple[int, ...] | None,
    results: Sequence[Mapping[str, object]],
) -> int | None:
    """The most that another process took on one GPU while the dry run was there; None if nothing.

    Two signs: more is taken after the run than before it, or what lies outside our own reserve grew
    between the worst batch and the end.
    """
    grown = [b - a for a, b in zip(before or (), after or (), strict=False)]
    for found in results:
        early, late = found.get("outside_bytes"), found.get("outside_later_bytes")
        if isinstance(early, int) and isinstance(late, int):
            grown.append(late - early)
    most = max(grown, default=0)
    return most if most > NOTICEABLE_BYTES else None

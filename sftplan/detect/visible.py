"""Which GPUs CUDA shows to a process: CUDA_VISIBLE_DEVICES, read as CUDA and PyTorch read it."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

_INDEX = re.compile(r"[+-]?[0-9]+", re.ASCII)
_UUID_PREFIXES = ("GPU-", "MIG-")
_MAX_DIGITS = 9  # of an index; more is no device's, and Python refuses to convert thousands

Id = TypeVar("Id", int, str)


@dataclass(frozen=True, slots=True, kw_only=True)
class Selection:
    """Entries of CUDA_VISIBLE_DEVICES that count, as positions in a list of UUIDs.

    `stopped_at` is the first entry that is not a device: CUDA ignores it and all that follow.
    """

    positions: tuple[int, ...]
    stopped_at: str | None = None
    repeated: bool = False  # an entry twice hides all devices
    by_index: bool = False


def select(text: str, gpus: Sequence[str], slices: Sequence[str] = ()) -> Selection:
    """The devices that `text`, the value of CUDA_VISIBLE_DEVICES, leaves visible.

    `gpus` are the UUIDs of the GPUs by CUDA's index, `slices` those of their MIG slices; positions
    count through both lists, GPUs first.

    >>> select("1,0", ["GPU-a", "GPU-b"]).positions
    (1, 0)
    >>> select("0,-1,1", ["GPU-a", "GPU-b"])
    Selection(positions=(0,), stopped_at='-1', repeated=False, by_index=True)
    """
    entries = [entry.strip() for entry in text.split(",")]
    by_uuid = entries[0].startswith(_UUID_PREFIXES)
    uuids = [*gpus, *slices]
    positions: list[int] = []
    stopped_at = None
    for entry in entries:
        position = _by_uuid(entry, uuids) if by_uuid else _by_index(entry, len(gpus))
        if position is None:
            stopped_at = entry
            break
        if position in positions:
            return Selection(positions=(), stopped_at=entry, repeated=True, by_index=not by_uuid)
        positions.append(position)
    return Selection(positions=tuple(positions), stopped_at=stopped_at, by_index=not by_uuid)


def _by_index(entry: str, num_gpus: int) -> int | None:
    # CUDA reads digits up to the first other character: "1gpu" is 1.
    match = _INDEX.match(entry)
    if match is None or len(match[0]) > _MAX_DIGITS:
        return None
    index = int(match[0])
    return index if 0 <= index < num_gpus else None


def _by_uuid(entry: str, uuids: Sequence[str]) -> int | None:
    if not entry.startswith(_UUID_PREFIXES) or entry in _UUID_PREFIXES:
        return None
    matching = [place for place, uuid in enumerate(uuids) if uuid.startswith(entry)]
    return matching[0] if len(matching) == 1 else None


def hint_of(text: str, selection: Selection) -> str:
    """What to do where CUDA_VISIBLE_DEVICES hides every GPU."""
    if not text.strip():
        return "CUDA_VISIBLE_DEVICES is empty, which hides all GPUs: unset it"
    if selection.repeated:
        return f"CUDA_VISIBLE_DEVICES={text} names a GPU twice, which hides all: name it once"
    return (
        f"CUDA_VISIBLE_DEVICES={text}: {selection.stopped_at!r} is no GPU here, "
        "and CUDA ignores what follows it"
    )


def order_matters(environ: Mapping[str, str], selection: Selection, *, mixed: bool) -> bool:
    """Whether an index may mean another GPU to CUDA than to NVML, which counts by PCI bus."""
    by_bus = environ.get("CUDA_DEVICE_ORDER", "") == "PCI_BUS_ID"
    return mixed and selection.by_index and not by_bus

"""A micro-batch as tensors on the device, and the next step's made ready while this one runs."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from array import array
    from collections.abc import Callable, Iterator

    from sftplan.data.batches import Batches, Step
    from sftplan.data.collate import MicroBatch


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """How rows lie in memory: `flat` is one row of documents, `packed` rows hold several."""

    flat: bool
    packed: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Inputs:
    """One forward pass. `position_ids` is None where rows simply count; `cu_seqlens` where not flat."""

    input_ids: torch.Tensor  # (rows, row_len), or flat (1, rows · row_len)
    position_ids: torch.Tensor | None
    cu_seqlens: torch.Tensor | None
    longest: int  # no document is longer
    keep: torch.Tensor  # (capacity,) flat positions; unused ones point one past the end
    targets: torch.Tensor  # (capacity,), then -100


@dataclass(frozen=True, slots=True, kw_only=True)
class Ready:
    """A step with its micro-batches on the device."""

    step: Step
    inputs: tuple[Inputs, ...]


def _tensor(
    values: array[int],
    dtype: torch.dtype,
    device: torch.device,
    *,
    beyond: tuple[int, int] = (-1, 0),
) -> torch.Tensor:
    """The values on the device; from place `beyond[0]` on, if that is not -1, all `beyond[1]`."""
    tensor = torch.frombuffer(values, dtype=dtype)
    tensor = tensor.pin_memory() if device.type == "cuda" else tensor.clone()
    start, value = beyond
    if start >= 0:
        tensor[start:] = value
    return tensor.to(device, non_blocking=True)


def to_device(batch: MicroBatch, layout: Layout, device: torch.device) -> Inputs:
    """The arrays of a micro-batch as tensors on `device`."""
    shape = (1, -1) if layout.flat else (batch.shape.rows, batch.shape.row_len)
    counted = layout.packed or layout.flat
    unused = (batch.num_targets, len(batch.input_ids))
    return Inputs(
        input_ids=_tensor(batch.input_ids, torch.int64, device).view(shape),
        position_ids=(
            _tensor(batch.positions, torch.int64, device).view(shape) if counted else None
        ),
        cu_seqlens=_tensor(batch.cu_seqlens, torch.int32, device) if layout.flat else None,
        longest=batch.shape.row_len,
        keep=_tensor(batch.keep, torch.int64, device, beyond=unused),
        targets=_tensor(batch.targets, torch.int64, device),
    )


def prefetched(
    batches: Batches,
    layout: Layout,
    device: torch.device,
    *,
    start: tuple[int, int],
    rank: int = 0,
) -> Iterator[Ready]:
    """The steps from `start` on, each made while the one before it runs."""

    def make(step: Step) -> Ready:
        inputs = tuple(to_device(batch, layout, device) for batch in step.micro_batches)
        return Ready(step=step, inputs=inputs)

    steps = batches.steps(start=start, rank=rank)
    with ThreadPoolExecutor(1, thread_name_prefix="sftplan-data") as worker:
        coming = worker.submit(lambda: _next(steps, make))
        while (ready := coming.result()) is not None:
            coming = worker.submit(lambda: _next(steps, make))
            yield ready


def _next(steps: Iterator[Step], make: Callable[[Step], Ready]) -> Ready | None:
    step = next(steps, None)
    return None if step is None else make(step)

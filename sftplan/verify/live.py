"""Memory over one step as the allocator recorded it: live bytes by what they are for.

Weights and optimizer states are there before; a block that ends up as a parameter's gradient is one;
others count as activations if the forward pass took them, else as temporary.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Callable

    from sftplan.train.step import Stepper

MAX_POINTS = 600  # of a curve: more than a picture has columns
CATEGORIES = ("weights", "optimizer", "gradients", "activations", "temporary", "other")


class Recorder:
    """Records one step. Off, or without a GPU, the step just runs."""

    def __init__(self, stepper: Stepper, *, on: bool, snapshot: str | None = None) -> None:
        self.stepper = stepper
        self.on = on
        self.snapshot = snapshot
        self.timeline: dict[str, Any] | None = None
        self._marks: list[tuple[int, str]] = []
        self._gradients: frozenset[int] = frozenset()

    def record(self, step: Callable[[Stepper], Any]) -> None:
        """Run one step, its allocations written down."""
        marked = replace(self.stepper, mark=self._mark)
        if not self.on:
            step(marked)
            return
        device = self.stepper.device
        # Lines of what is taken, not of what is freed: reading those loses the exception by which a
        # checkpoint ends its recomputation ("returned NULL without setting an exception", torch 2.11).
        context = None if self.snapshot is None else "alloc"
        self.stepper.release()  # a replay allocates nothing: record how its pool is filled
        base = self._base(device)
        first = _num_allocations(device)
        torch.cuda.memory._record_memory_history(
            "all", context=context, stacks="python", clear_history=True
        )
        try:
            step(marked)
            torch.cuda.synchronize(device)
            found = torch.cuda.memory._snapshot(device)
            if self.snapshot is not None:
                torch.cuda.memory._dump_snapshot(self.snapshot)  # type: ignore[no-untyped-call]
        finally:
            torch.cuda.memory._record_memory_history(None)
        trace = found["device_traces"][device.index or 0]
        marks = [(count - first, phase) for count, phase in self._marks]
        self.timeline = timeline_of(trace, base, marks, self._gradients)

    def _mark(self, phase: str) -> None:
        if self.on:
            self._marks.append((_num_allocations(self.stepper.device), phase))
            if phase == "optimizer":
                grads = (p.grad for p in self.stepper.update.parameters)
                self._gradients = frozenset(g.data_ptr() for g in grads if g is not None)

    def _base(self, device: torch.device) -> dict[str, int]:
        """What is live before the step."""
        weights = _storage_bytes(self.stepper.model.parameters())
        optimizer = _storage_bytes(self.stepper.update.state().values(), device=device)
        rest = torch.cuda.memory_allocated(device) - weights - optimizer
        return {"weights": weights, "optimizer": optimizer, "other": rest}


def _num_allocations(device: torch.device) -> int:
    """How many blocks the allocator has handed out so far."""
    return int(torch.cuda.memory_stats(device)["allocation.all.allocated"])


def _storage_bytes(tensors: Any, *, device: torch.device | None = None) -> int:
    sizes = {
        tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
        for tensor in tensors
        if device is None or tensor.device == device
    }
    return sum(sizes.values())


def timeline_of(
    trace: list[dict[str, Any]],
    base: dict[str, int],
    marks: list[tuple[int, str]],
    gradients: frozenset[int],
) -> dict[str, Any]:
    """Live bytes by category over a trace of PyTorch's allocator.

    Args:
        trace: Entries with `action`, `addr` and `size`, in order.
        base: Bytes that are live before it.
        marks: After how many allocations of the trace each phase begins, and its name.
        gradients: Addresses of the gradients when the optimizer's phase begins.
    """
    kinds = _kinds(trace, marks, gradients)
    live = dict.fromkeys(CATEGORIES, 0) | base
    known: dict[int, tuple[str, int]] = {}
    points, phases = [list(live.values())], []
    waiting = list(marks)
    count = 0
    for entry in trace:
        while waiting and count >= waiting[0][0]:
            phases.append([len(points) - 1, waiting.pop(0)[1]])
        address, size = entry["addr"], entry["size"]
        if entry["action"] == "alloc":
            known[address] = (kinds[count], size)
            live[kinds[count]] += size
            count += 1
        elif entry["action"] == "free_completed":
            kind, size = known.pop(address, ("other", size))
            live[kind] -= size
        else:
            continue
        points.append(list(live.values()))
    phases += [[len(points) - 1, phase] for _, phase in waiting]
    return thinned({"categories": list(live), "points": points, "phases": phases})


def _kinds(
    trace: list[dict[str, Any]], marks: list[tuple[int, str]], gradients: frozenset[int]
) -> list[str]:
    """What each allocation of the trace is for."""
    allocations = [entry["addr"] for entry in trace if entry["action"] == "alloc"]
    kinds, phase, waiting = [], "", list(marks)
    update = next((count for count, name in marks if name == "optimizer"), len(allocations))
    for number in range(len(allocations)):
        while waiting and number >= waiting[0][0]:
            phase = waiting.pop(0)[1]
        kinds.append("activations" if phase == "forward" else "temporary")
    last = {address: number for number, address in enumerate(allocations[:update])}
    for address in gradients & last.keys():
        kinds[last[address]] = "gradients"
    return kinds


def thinned(timeline: dict[str, Any], most: int = MAX_POINTS) -> dict[str, Any]:
    """At most about `most` points: of each stretch the highest one.

    >>> long = {"categories": ["x"], "points": [[n % 3] for n in range(9)], "phases": [[0, "forward"]]}
    >>> thinned(long, most=3)["points"]
    [[2], [2], [2]]
    """
    points = timeline["points"]
    width = max(1, -(-len(points) // most))
    kept = [max(points[i : i + width], key=sum) for i in range(0, len(points), width)]
    phases = [[position // width, phase] for position, phase in timeline["phases"]]
    return {**timeline, "points": kept, "phases": phases}

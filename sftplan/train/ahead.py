"""How far the host is ahead of the GPU under ZeRO-3.

DeepSpeed lets a gathered weight go to whoever asks once the GPU has used it (record_stream;
partition_parameters.py, free_param). A host that runs far ahead finds none of them and gathers into new
memory, as much as a pass has weights. (Read off its code: llama-2-7b with 24 rows took 7.6 GB more than planned
on each of two H100, 2026-11-27; how much of it was this has not been measured.)
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, Any

from sftplan.facts.buckets import AHEAD_BLOCKS

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    import torch


class RunAhead:
    """Lets the host begin a block when the GPU has begun the one AHEAD_BLOCKS before it.

    Args:
        blocks: The model's layers, which run in turn; checkpointed ones run again.
        new_event: Makes a mark in the GPU's work: `record` sets it, `synchronize` waits until it is reached.
    """

    def __init__(self, blocks: Iterable[torch.nn.Module], new_event: Callable[[], Any]) -> None:
        self._new_event = new_event
        self._begun: deque[Any] = deque()
        for block in blocks:
            block.register_forward_pre_hook(self._begin)

    def _begin(self, block: torch.nn.Module, inputs: Any) -> None:
        event = self._new_event()
        event.record()
        self._begun.append(event)
        if len(self._begun) > AHEAD_BLOCKS:
            self._begun.popleft().synchronize()

"""What was asked for, checked, before the hardware is known."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from sftplan.plan.request import resolve_batch

if TYPE_CHECKING:
    from collections.abc import Mapping

    from sftplan.facts.model import ModelShape
    from sftplan.facts.workload import LengthStatistics, Workload


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """A checked request, before the hardware is known."""

    model: ModelShape
    seq_len: int
    pins: Mapping[str, Any]
    global_batch: object
    epochs: float
    num_examples: int | None
    num_tokens: int | None
    lengths: LengthStatistics | None
    train_on_prompt: bool
    margin: float
    minimize: Any

    def workload(self, num_gpus: int) -> tuple[Workload, list[str]]:
        """The workload on so many GPUs, and what had to be assumed for it."""
        from sftplan.facts.workload import Workload

        batch = resolve_batch(self.global_batch, self.pins, num_gpus)
        workload = Workload(
            seq_len=self.seq_len,
            global_batch=batch.rows,
            global_batch_pinned=batch.pinned,
            epochs=self.epochs,
            num_examples=self.num_examples,
            num_tokens=self.num_tokens,
            lengths=self.lengths,
            train_on_prompt=self.train_on_prompt,
        )
        return workload, [batch.assumption] if batch.assumption else []

    @property
    def pinned(self) -> list[str]:
        """Names of what was given."""
        return [*self.pins, *(["global_batch"] if self.global_batch is not None else [])]

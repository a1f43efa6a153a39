"""The steady steps of one job, shared by all whose costs are read off them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from sftplan.cost.memory import allocated_bound_bytes
from sftplan.cost.passes import Passes
from sftplan.facts.strategy import Allocator, Offload
from sftplan.step.batch import full_batch
from sftplan.step.few import few_layers
from sftplan.step.simulate import STEADY_PASSES, steady

if TYPE_CHECKING:
    from collections.abc import Mapping

    from sftplan.cost.memory import Peaks
    from sftplan.facts.model import ModelShape
    from sftplan.facts.strategy import Strategy
    from sftplan.facts.workload import Workload
    from sftplan.step.chip import Chip
    from sftplan.step.tape import Tape
    from sftplan.step.traced import Tracer


def ranks(strategy: Strategy, num_gpus: int) -> int:
    """How many ranks a rank's tape depends on: without sharding it is the same beside any number.

    >>> from sftplan.facts.strategy import Strategy
    >>> ranks(Strategy(), 8), ranks(Strategy(zero=1), 8)
    (1, 8)
    """
    return num_gpus if strategy.zero or strategy.offload is not Offload.NONE else 1


@dataclass(frozen=True, slots=True, eq=False)
class Steady:
    """A steady step; `times`: for how many layers one on its tape stands, where for several."""

    tape: Tape
    times: Mapping[int, int]


class Tapes:
    """The steady steps of one model and workload, each simulated once however it is asked for."""

    def __init__(
        self, model: ModelShape, workload: Workload, *, tracer: Tracer | None = None
    ) -> None:
        self.workload = workload
        self.tracer = tracer
        self.model = model
        self._tapes: dict[tuple[Strategy, Chip, int, ModelShape], Steady] = {}
        self._passes: dict[Steady, Passes] = {}
        self._allocated: dict[Steady, int] = {}
        self.peaks: dict[
            tuple[object, ...], Peaks
        ] = {}  # found by evaluators, of any number of GPUs

    def steady(
        self, strategy: Strategy, chip: Chip, num_gpus: int, *, like: ModelShape | None = None
    ) -> Steady:
        """The tape of a strategy; what does not change it is not told apart. `like`: of this shape instead."""
        model = like or self.model
        alike = replace(
            strategy,
            accumulation=min(strategy.accumulation, STEADY_PASSES),
            allocator=Allocator.EXPANDABLE,
        )
        key = (alike, chip, ranks(strategy, num_gpus), model)
        if key not in self._tapes:
            few = few_layers(model, alike, self.workload.seq_len)
            batch = full_batch(strategy, self.workload)
            tape = steady(
                few.model, few.strategy, batch, num_gpus=key[2], chip=chip, times=few.times,
                tracer=self.tracer,
            )  # fmt: skip
            self._tapes[key] = Steady(tape, few.times)
        return self._tapes[key]

    def passes(self, strategy: Strategy, chip: Chip, num_gpus: int) -> Passes:
        """The passes of a strategy's tape.

        Norms behind the additions are compiled to as many kernels as norms before the blocks, whose compiled
        blocks the tape knows.
        """
        like = None
        if strategy.compile and self.model.post_norm:
            like = replace(self.model, post_norm=False)
        step = self.steady(strategy, chip, num_gpus, like=like)
        if step not in self._passes:
            self._passes[step] = Passes(step.tape, step.times)
        return self._passes[step]

    def allocated_bytes(self, strategy: Strategy, chip: Chip, num_gpus: int) -> int:
        """Peak allocated by a strategy's tape."""
        step = self.steady(strategy, chip, num_gpus)
        if step not in self._allocated:
            self._allocated[step] = allocated_bound_bytes(step.tape, step.times)
        return self._allocated[step]

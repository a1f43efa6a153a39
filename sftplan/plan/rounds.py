"""One request on many machines."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from sftplan.errors import SftplanError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from sftplan.facts.hardware import Hardware
    from sftplan.facts.workload import Workload
    from sftplan.plan.asked import Request
    from sftplan.plan.comparison import Row


class Rounds:
    """One request on many machines: memory is computed once, equal machines share a choice."""

    def __init__(self, request: Request) -> None:
        self.request = request
        self._evaluators: dict[tuple[int, int], Any] = {}
        self._choices: dict[tuple[object, ...], Any] = {}
        self._tapes: Any = None

    def choice(self, machine: Hardware, workload: Workload) -> Any:
        """What to train with on a machine."""
        from sftplan.cost.evaluate import Evaluator
        from sftplan.facts.hardware import Host
        from sftplan.plan.evaluator import make_evaluator, make_tapes
        from sftplan.search.choose import choose
        from sftplan.search.coster import machine_key, missing_host_bytes

        alike = machine_key(dataclasses.replace(machine, host=Host()))
        known = self._choices.get(alike)
        if known is not None and not missing_host_bytes(known.estimate, machine):
            return known  # leaves the host alone, so any that is large enough will do
        key = machine_key(machine)
        if key not in self._choices:
            size = (machine.num_gpus, machine.gpus_per_node)
            self._tapes = self._tapes or make_tapes(self.request.model, workload)
            if size not in self._evaluators:
                self._evaluators[size] = Evaluator(
                    self.request.model,
                    workload,
                    num_gpus=machine.num_gpus,
                    gpus_per_node=machine.gpus_per_node,
                    quick=True,
                    tapes=self._tapes,
                )
            self._choices[key] = choose(
                self.request.model,
                machine,
                workload,
                dict(self.request.pins),
                margin=self.request.margin,
                minimize=self.request.minimize,
                evaluator=self._evaluators[size],
                make_evaluator=make_evaluator,
            )
        choice = self._choices[key]
        if choice.verdict != "does_not_fit" and choice.strategy.offload == "none":
            self._choices[alike] = choice
        return choice

    def row(self, machine: Hardware) -> Row:
        """The row of one machine; what it alone cannot do is the row's reason."""
        from sftplan.plan.comparison import Row, comparison_row

        try:
            workload, _ = self.request.workload(machine.num_gpus)
            choice = self.choice(machine, workload)
        except SftplanError as error:  # such as a batch that it cannot split
            return Row(hardware=machine.name, num_gpus=machine.num_gpus, reason=error.message)
        return comparison_row(choice, machine, workload, self.request.pinned)

    def offer_row(self, name: str, sizes: Mapping[str, int | None]) -> Row:
        """The row of one of many offers: what it cannot be resized to is its own reason."""
        from sftplan.facts.profiles import load_hardware
        from sftplan.plan.comparison import Row

        try:
            machine = load_hardware(name, **sizes)
        except SftplanError as error:
            return Row(hardware=name, reason=error.message)
        return self.row(machine)

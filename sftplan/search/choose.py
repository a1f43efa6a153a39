"""The best strategy for a job on a machine: the entry of the search."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any

from sftplan.search.coster import Ledger
from sftplan.search.neighbours import find_neighbours
from sftplan.search.reasons import find_reasons
from sftplan.search.remedies import find_remedies
from sftplan.search.result import Choice
from sftplan.search.settle import Search, best_option, without_compiling
from sftplan.search.space import Space, check_pins

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from sftplan.facts.hardware import Hardware
    from sftplan.facts.model import ModelShape
    from sftplan.facts.workload import Workload
    from sftplan.search.coster import Coster, CosterFactory
    from sftplan.search.result import Option
    from sftplan.search.settle import Minimize


def choose(
    model: ModelShape,
    hardware: Hardware,
    workload: Workload,
    pins: Mapping[str, Any],
    *,
    margin: float,
    minimize: Minimize,
    evaluator: Coster | None = None,
    make_evaluator: CosterFactory | None = None,
) -> Choice:
    """The fastest strategy that fits, with the pinned knobs held.

    The rule for ties is `explore.best_first`'s. `evaluator` may be shared by all machines with as
    many GPUs; `make_evaluator` makes those that a remedy needs.
    """
    check_pins(pins, model)
    make = make_evaluator or _evaluator_factory()
    coster = evaluator or make(
        model, workload, num_gpus=hardware.num_gpus, gpus_per_node=hardware.gpus_per_node
    )
    search = Search(
        space=Space(
            model=model,
            workload=workload,
            num_gpus=hardware.num_gpus,
            gpu=hardware.gpu,
            pins=dict(pins),
        ),
        ledger=Ledger(coster, hardware),
        margin=margin,
        minimize=minimize,
    )
    option = without_compiling(search, best_option(search))
    return _choice(search, option, make)


def _choice(search: Search, option: Option, make: CosterFactory) -> Choice:
    """The choice, its company left for when it is asked for: comparing machines needs none."""

    @cache
    def neighbours() -> Sequence[Option]:
        return find_neighbours(search, option)

    @cache
    def remedies() -> Sequence[Option]:
        return find_remedies(search, option, make)

    @cache
    def reasons() -> Sequence[tuple[str, str]]:
        return find_reasons(search, option, neighbours())

    return Choice(
        option=option,
        find_neighbours=neighbours,
        find_remedies=remedies,
        find_reasons=reasons,
    )


def _evaluator_factory() -> CosterFactory:
    from sftplan.cost.evaluate import Evaluator

    return Evaluator

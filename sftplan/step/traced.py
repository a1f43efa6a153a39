"""Passes that were traced from the real model, played onto a tape: for models whose blocks are not written here.

Weights, clipping, optimizer and the repetition of layers are the tape's own, as for every other model.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from sftplan.step.chip import LT_WORKSPACE_BYTES
from sftplan.step.repeat import MIDDLE
from sftplan.step.tensor import DType, Tensor
from sftplan.step.work import Work

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from sftplan.facts.model import ModelShape
    from sftplan.facts.strategy import Strategy
    from sftplan.step.batch import Batch
    from sftplan.step.chip import Chip
    from sftplan.step.tape import Tape
    from sftplan.step.tensor import Storage

TYPES = {
    kind.label: kind
    for kind in (DType.FP32, DType.BF16, DType.FP16, DType.INT64, DType.INT32, DType.BYTE)
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Pass:
    """One forward and backward pass: storages by number as they are born, complements as they die.

    `gradients` name the parameter that keeps a storage as its gradient; an accumulated pass has none.
    `works` and `hosts` belong to the stretches that `marks` begin.
    """

    events: Sequence[int]
    sizes: Sequence[int]
    kinds: Sequence[str]
    gradients: Mapping[str, int]
    marks: Sequence[tuple[int, str]]
    works: Sequence[Counter[Work]]
    hosts: Sequence[Counter[str]]


class Tracer(Protocol):
    """Has the real model's passes."""

    def __call__(
        self, model: ModelShape, strategy: Strategy, batch: Batch, chip: Chip
    ) -> Sequence[Pass]:
        """The first pass of a step and, where passes are accumulated, one that follows."""


def read_pass(document: Mapping[str, Any]) -> Pass:
    """A pass as a trace wrote it down, from JSON's types."""
    return Pass(
        events=document["events"],
        sizes=document["sizes"],
        kinds=document["kinds"],
        gradients=document["gradients"],
        marks=[(position, label) for position, label in document["marks"]],
        works=[
            Counter({_work(work): count for work, count in stretch})
            for stretch in document["works"]
        ],
        hosts=[Counter(stretch) for stretch in document["hosts"]],
    )


def _work(fields: Sequence[Any]) -> Work:
    kind, label, flops, num_bytes, shape = fields
    return Work(kind, TYPES[label], flops, num_bytes, tuple(shape))


def repeats(one: Pass) -> bool:
    """Whether the inner layers of few are born alike, so that one of them may stand for many."""
    stops = [position for position, _ in one.marks[1:]] + [len(one.events)]
    births: dict[str, list[list[int]]] = {"forward": [], "backward": []}
    for (start, label), stop in zip(one.marks, stops, strict=True):
        phase, _, number = label.partition(" ")
        if number.isdigit() and MIDDLE - 1 <= int(number) <= MIDDLE + 1:
            births[phase].append([one.sizes[e] for e in one.events[start:stop] if e >= 0])
    return all(each == layers[0] for layers in births.values() for each in layers)


def play(tape: Tape, one: Pass, weights: Mapping[str, Tensor]) -> None:
    """Write a pass on a tape; its gradients go to the weights, by name."""
    held: dict[int, Storage] = {}
    stops = [position for position, _ in one.marks[1:]] + [len(one.events)]
    for number, ((start, label), stop) in enumerate(zip(one.marks, stops, strict=True)):
        _mark(tape, label)
        tape.works[-1][1].update(one.works[number])
        tape.hosts[-1].update(one.hosts[number])
        for event in one.events[start:stop]:
            if event < 0:
                held.pop(~event, None)
            elif one.kinds[event] == "workspace":
                _touch(tape, one.sizes[event], backward=label.startswith("backward"))
            else:
                held[event] = tape.storage(one.sizes[event], one.kinds[event])
    for name, place in one.gradients.items():
        weight = weights[name]
        assert weight.node is not None
        weight.node.extra = Tensor(weight.shape, weight.dtype, held.pop(place))


def _mark(tape: Tape, label: str) -> None:
    phase, _, number = label.partition(" ")
    if number.isdigit():
        tape.mark(phase, int(number))
    else:
        tape.mark(label)


def _touch(tape: Tape, num_bytes: int, *, backward: bool) -> None:
    """The libraries' workspaces stay from the first step on, and belong to no layer."""
    if num_bytes == LT_WORKSPACE_BYTES:
        tape.touch_lt_workspace()
    else:
        tape.touch_workspace(backward=backward)

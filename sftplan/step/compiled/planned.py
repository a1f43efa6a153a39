"""Buffers as inductor plans them: what is born may take the place of what died before."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import accumulate
from typing import TYPE_CHECKING

from sftplan.step.compiled.graph import Buffer, Graph

if TYPE_CHECKING:
    from sftplan.step.tensor import DType


@dataclass(slots=True)
class PlannedGraph(Graph):
    """A graph written without a thought of reuse; `planned` tells what its wrapper code allocates.

    `returned` are the buffers that a custom operator allocates itself, `written` those over an operand.
    """

    returned: set[Buffer] = field(default_factory=set)
    written: set[Buffer] = field(default_factory=set)

    def give(self, name: str, *shape: int, dtype: DType) -> None:
        """A buffer that a custom operator returns."""
        self.new(name, *shape, dtype=dtype)
        self.returned.add(self.held[name])

    def over(self, old: str, name: str, *shape: int, dtype: DType) -> None:
        """A result written over what is read for the last time, if both are alike."""
        self.free(old)
        self.new(name, *shape, dtype=dtype)
        self.written.add(self.held[name])

    def planned(self) -> Graph:
        """The same graph with reuse.

        A birth takes the buffer of its type and size that died last, if keeping that one until then does
        not raise the graph's peak (torch/_inductor/codegen/wrapper.py, AllocateLine.plan and
        should_reuse_buffer). What the graph did not allocate itself only serves results that are
        written over it (codegen_free lets an InputBuffer go).

        >>> from sftplan.step.tensor import DType
        >>> graph = PlannedGraph()
        >>> graph.new("a", 8, dtype=DType.BF16)
        >>> graph.over("a", "b", 2, 4, dtype=DType.BF16)
        >>> graph.free("b")
        >>> [(born, buffer.name) for born, buffer in graph.planned().events]
        [(True, 'a'), (False, 'a')]
        """
        signed = (x.nbytes if born else -x.nbytes for born, x in self.events)
        live = list(accumulate(signed))
        highest = max(live, default=0)
        own = {buffer for born, buffer in self.events if born}
        dead: dict[tuple[DType, int], list[int]] = {}
        taken: set[int] = set()
        place: dict[Buffer, Buffer] = {}
        for at, (born, buffer) in enumerate(self.events):
            waiting = dead.setdefault((buffer.dtype, buffer.nbytes), [])
            if not born:
                follows, after = (*self.events, (False, buffer))[at + 1]
                if buffer in own or (follows and after in self.written):
                    waiting.append(at)
            elif waiting and buffer not in self.returned:
                since = waiting[-1]
                between = max(live[since:at])
                if since == at - 1 or between + buffer.nbytes <= highest:
                    old = self.events[waiting.pop()][1]
                    taken |= {since, at}
                    for kept in range(since, at):  # EstimatePeakMemory.update_peak_between
                        live[kept] += buffer.nbytes
                    place[buffer] = place.get(old, old)
        events = [
            (born, place.get(x, x)) for at, (born, x) in enumerate(self.events) if at not in taken
        ]
        held = {name: place.get(x, x) for name, x in self.held.items()}
        return Graph(events, held)

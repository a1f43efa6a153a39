"""Random numbers that checkpointed blocks draw a second time, where graphs replay their passes.

torch.utils.checkpoint reads the generator's state on the host, which no CUDA graph can. Here each block has
a state of its own for going forward again. It is set to where the block's draws began: by the block itself
where it is issued, from the outside before a graph is replayed.
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence


class Redraw:
    """One block's draws: how far after the pass's first they begin, and the state to draw them again."""

    def __init__(self, device: torch.device) -> None:
        self.state = torch.Generator(device)
        self.begins, self.ends = 0, 0
        self.pass_begins = 0

    @contextmanager
    def going_forward(self) -> Iterator[None]:
        """Around the block: notes where its draws are; a graph's are where they were before."""
        generator = default_generator()
        if torch.cuda.is_current_stream_capturing():
            yield
            return
        begins = generator.get_offset()
        self.begins = begins - self.pass_begins
        self.stand(generator.initial_seed(), begins)
        yield
        self.ends = generator.get_offset() - self.pass_begins

    @contextmanager
    def going_again(self) -> Iterator[None]:
        """Around the block when it is computed again: the generator is at this block's draws."""
        generator = default_generator()
        own = generator.graphsafe_get_state()
        generator.graphsafe_set_state(self.state)
        try:
            yield
        finally:
            generator.graphsafe_set_state(own)

    @property
    def draws(self) -> bool:
        """Whether the block draws at all."""
        return self.ends > self.begins

    def stand(self, seed: int, offset: int) -> None:
        """Let what comes next be drawn from here."""
        self.state.manual_seed(seed)
        self.state.set_offset(offset)


class Redraws:
    """Those of all blocks; a hook before `runner` runs them notes where a pass begins."""

    def __init__(self, runner: torch.nn.Module, blocks: Sequence[torch.nn.Module]) -> None:
        device = next(runner.parameters()).device
        self.of_blocks = [Redraw(device) for _ in blocks]
        runner.register_forward_pre_hook(self._begin)

    def _begin(self, *_: Any) -> None:
        if not torch.cuda.is_current_stream_capturing():
            begins = default_generator().get_offset()
            for redraw in self.of_blocks:
                redraw.pass_begins = begins

    def rewind(self) -> None:
        """Before a graph's forward pass: its backward pass will draw as it does."""
        generator = default_generator()
        seed, offset = generator.initial_seed(), generator.get_offset()
        for redraw in self._drawing():
            redraw.stand(seed, offset + redraw.begins)

    def register(self, graph: torch.cuda.CUDAGraph) -> None:
        """Before a backward pass is captured: the graph will draw from these states."""
        for redraw in self._drawing():
            graph.register_generator_state(redraw.state)

    def restart(self) -> None:
        """States that are left in a capture that failed begin anew."""
        for redraw in self.of_blocks:
            redraw.state.graphsafe_set_state(redraw.state.clone_state())

    def _drawing(self) -> list[Redraw]:
        return [redraw for redraw in self.of_blocks if redraw.draws]


def default_generator() -> torch.Generator:
    """This device's, which PyTorch's own kernels draw from."""
    return torch.cuda.default_generators[torch.cuda.current_device()]

"""Dropout whose mask is a hash of a seed and the element's number: cheap to draw, and to draw again.

inductor's own takes ten rounds of Philox an element and keeps a byte of mask for each. A hash of a few
integer operations hides behind the memory traffic of the kernel that it is fused into, and the backward
pass may compute it again from the seed (of OPT AOTAutograd does so for both dropouts, of GPT-2 for the
attention's; the MLP's mask it keeps).
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Sequence

Tensor = torch.Tensor
# fmix32 of MurmurHash3 (Austin Appleby, public domain): every input bit changes each output bit with
# probability near one half. Multipliers as signed 32-bit numbers.
FIRST, SECOND = 0x85EBCA6B - 2**32, 0xC2B2AE35 - 2**32
SPREAD = 0x9E3779B1 - 2**32  # 2³² over the golden ratio: neighbouring elements far apart
RANGE = 2**31
SEED_BYTES_APART = 16  # compiled kernels want their inputs so aligned
# Blocks that drop by a function, with a probability of their own, what these modules give.
FUNCTIONAL = {"OPTDecoderLayer": ("self_attn", "fc2")}


def hashed(number: Tensor, seed: Tensor) -> Tensor:
    """31 bits from the number of an element and a seed, int32 both: non-negative int32.

    >>> one = hashed(torch.arange(4, dtype=torch.int32), torch.tensor(7, dtype=torch.int32))
    >>> bool((one >= 0).all()), len(set(one.tolist()))
    (True, 4)
    """
    x = (number ^ seed) * SPREAD
    x = (x ^ _shifted(x, 16)) * FIRST ^ seed  # twice, or one seed's masks were another's, shifted
    x = (x ^ _shifted(x, 13)) * SECOND
    return (x ^ _shifted(x, 16)) & (RANGE - 1)


def _shifted(x: Tensor, bits: int) -> Tensor:
    """To the right, zeros coming in."""
    return (x >> bits) & ((1 << (32 - bits)) - 1)


class HashedDropout(torch.nn.Dropout):
    """nn.Dropout with the same probability; `seed` (1,) is a place in what `Seeds` draws for each pass."""

    seed: Tensor

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - nn.Dropout's name
        """x / (1 − p) where the element's hash says so, else 0."""
        if not self.training:
            return input
        number = torch.arange(input.numel(), dtype=torch.int32, device=input.device)
        kept = hashed(number.view(input.shape), self.seed) < int((1 - self.p) * RANGE)
        return torch.where(kept, input * (1 / (1 - self.p)), 0.0)


@cache
def _dropping(kind: type[torch.nn.Module]) -> type[torch.nn.Module]:
    """That kind of module, that drops what it gives, or what it gives first."""

    class Dropping(kind):  # type: ignore[misc, valid-type]
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            out = super().forward(*args, **kwargs)
            return (self.dropped(out[0]), *out[1:]) if isinstance(out, tuple) else self.dropped(out)

    return Dropping


def _as_modules(block: Any) -> None:
    """Let modules of a block drop what its functions would; these drop nothing from here on."""
    names = FUNCTIONAL.get(type(block).__name__, ())
    for name in names:
        module = block.get_submodule(name)
        module.__class__ = _dropping(type(module))  # type: ignore[arg-type]
        module.dropped = torch.nn.Dropout(block.dropout).train(block.training)
    if names:
        block.dropout = 0.0


class Seeds:
    """New seeds for all dropouts of the blocks before each forward pass, in one kernel.

    They come from PyTorch's generator of the device, whose state a checkpoint keeps.
    """

    def __init__(self, dropouts: Sequence[HashedDropout], device: torch.device) -> None:
        self.dropouts = dropouts
        apart = SEED_BYTES_APART // torch.int32.itemsize
        self.drawn = torch.zeros((len(dropouts), apart), dtype=torch.int32)
        for dropout in dropouts:
            dropout.register_buffer("seed", None, persistent=False)
        self._place(device)

    def _place(self, device: torch.device) -> None:
        self.drawn = torch.zeros_like(self.drawn, device=device)
        for place, dropout in zip(self.drawn, self.dropouts, strict=True):
            dropout.seed = place[:1]

    def draw(self, module: torch.nn.Module, _: Any) -> None:
        """A hook before a forward pass."""
        if not module.training:
            return
        if self.dropouts[0].seed.device != self.drawn.device:  # the model has moved
            self._place(self.dropouts[0].seed.device)
        self.drawn.random_(-RANGE, RANGE)


def hash_dropouts(runner: torch.nn.Module, blocks: Sequence[torch.nn.Module]) -> None:
    """Let every dropout that drops, inside of the blocks that `runner` runs, draw by hash."""
    found: list[HashedDropout] = []
    for block in blocks:
        _as_modules(block)
    for module in (m for block in blocks for m in block.modules()):
        if type(module) is torch.nn.Dropout and module.p > 0:
            module.__class__ = HashedDropout
            found.append(module)  # type: ignore[arg-type]
    if found:
        device = next(runner.parameters()).device
        runner.register_forward_pre_hook(Seeds(found, device).draw)

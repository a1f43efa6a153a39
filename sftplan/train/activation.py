"""The tanh approximation of GELU by a sigmoid: the same function, half of its arithmetic.

    ½·x·(1 + tanh u) = x·σ(2u),   u = √(2/π)·(x + 0.044715·x³)

(Hendrycks, Gimpel 2016, arXiv:1606.08415, section 2.) A compiled kernel takes tanh from a library
in some twenty instructions, σ from one exponential of the hardware.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Sequence

CUBIC = 0.044715
SLOPE = 2 * math.sqrt(2 / math.pi)
TANH_GELUS = ("NewGELUActivation", "GELUTanh", "FastGELUActivation")  # of transformers.activations


class SigmoidGELU(torch.nn.Module):
    """x·σ(2u).

    >>> x = torch.tensor([-1.0, 0.0, 2.0], dtype=torch.float64)
    >>> torch.allclose(SigmoidGELU()(x), torch.nn.functional.gelu(x, approximate="tanh"), rtol=1e-12)
    True
    """

    def forward(self, input: torch.Tensor) -> torch.Tensor:  # noqa: A002 - as torch's activations
        """The activation, element by element."""
        return input * torch.sigmoid(SLOPE * (input + CUBIC * input * input * input))


def sigmoid_gelus(blocks: Sequence[torch.nn.Module]) -> None:
    """Let every tanh GELU inside of the blocks be taken so."""
    for block in blocks:
        for parent in block.modules():
            for name, child in parent.named_children():
                if type(child).__name__ in TANH_GELUS:
                    setattr(parent, name, SigmoidGELU())

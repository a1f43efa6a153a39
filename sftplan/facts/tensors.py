"""Single parameter tensors and the projections made of them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable


@dataclass(frozen=True, slots=True)
class Parameter:
    """One tensor of the model."""

    name: str
    shape: tuple[int, ...]

    @property
    def num_elements(self) -> int:
        """Elements of the tensor.

        >>> Parameter("wte.weight", (50257, 768)).num_elements
        38597376
        """
        return math.prod(self.shape)

    @property
    def decayed(self) -> bool:
        """Whether weight decay acts on it: on matrices and stacks of them, not on vectors."""
        return len(self.shape) >= 2


Parameters = tuple[Parameter, ...]


def count(parameters: Iterable[Parameter]) -> int:
    """Elements over all of `parameters`."""
    return sum(parameter.num_elements for parameter in parameters)


def linear(name: str, num_in: int, num_out: int, *, bias: bool) -> Parameters:
    """`torch.nn.Linear`: its weight is [out, in].

    >>> count(linear("q_proj", 2048, 2048, bias=True))
    4196352
    """
    weight = Parameter(f"{name}.weight", (num_out, num_in))
    return (weight, Parameter(f"{name}.bias", (num_out,))) if bias else (weight,)


def conv1d(name: str, num_in: int, num_out: int) -> Parameters:
    """GPT-2's projection: its weight is [in, out], and it always has a bias.

    >>> count(conv1d("c_attn", 768, 2304))
    1771776
    """
    weight = Parameter(f"{name}.weight", (num_in, num_out))
    return (weight, Parameter(f"{name}.bias", (num_out,)))

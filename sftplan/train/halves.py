"""fp32 numbers as bf16 weights and the 16 bits between the two, each number to its last bit.

The bits of a number, taken as an integer, are those of the weight times 2^16 plus `rest`, from -2^15 to 2^15 - 1;
halfway between two weights it is the farther from zero. A NaN's weight is a NaN. Intel's Split SGD parts weights
like that, but cuts the lower half off where here the weight is the nearest
(intel.github.io/intel-extension-for-pytorch, features/split_sgd).
"""

from __future__ import annotations

import torch

Tensor = torch.Tensor
HALF = 1 << 15
QUIET_NAN = 0x7FC0


def split(numbers: Tensor) -> tuple[Tensor, Tensor]:
    """The bf16 weights nearest to fp32 numbers, and the int16 rests; both of the numbers' shape.

    >>> weight, rest = split(torch.tensor([1 + 2**-7 + 2**-20]))
    >>> weight.item() == 1 + 2**-7, rest.item()
    (True, 8)
    """
    bits = numbers.contiguous().view(torch.int32)
    high = (bits + HALF) >> 16
    rest = (bits - (high << 16)).to(torch.int16)
    high = torch.where(numbers.isnan(), QUIET_NAN, high)
    return high.to(torch.int16).view(torch.bfloat16), rest


def joined(weight: Tensor, rest: Tensor) -> Tensor:
    """The fp32 numbers of `split`.

    >>> joined(*split(torch.tensor([0.1]))).item() == torch.tensor([0.1]).item()
    True
    """
    bits = weight.contiguous().view(torch.int16).to(torch.int32) << 16
    return (bits + rest).view(torch.float32)

"""One point of the search space: every decision that a plan takes."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Literal


class Precision(StrEnum):
    """In which types weights, gradients and optimizer live and the products are taken."""

    FP32 = "fp32"
    FP16_MIXED = "fp16-mixed"  # fp32 weights, fp16 autocast, gradient scaler
    BF16_MIXED = "bf16-mixed"  # fp32 weights, bf16 autocast
    BF16_MASTER = "bf16-master"  # bf16 weights and gradients, fp32 master weights in the optimizer
    BF16_TRUE = "bf16-true"  # everything bf16: lossy, never chosen unless pinned


class Offload(StrEnum):
    """What leaves the GPU between its uses."""

    NONE = "none"
    OPTIMIZER = "optimizer"
    ALL = "all"  # optimizer and parameters, to host memory
    NVME = "nvme"  # optimizer and parameters, to NVMe


class Checkpointing(StrEnum):
    """What the forward pass forgets and the backward pass computes again."""

    NONE = "none"
    SELECTIVE = "selective"  # keeps matrix products and attention, recomputes what lies between
    FULL = "full"  # keeps each block's input

    @property
    def lighter(self) -> Checkpointing:
        """What forgets one step less.

        >>> Checkpointing.FULL.lighter, Checkpointing.SELECTIVE.lighter
        (<Checkpointing.SELECTIVE: 'selective'>, <Checkpointing.NONE: 'none'>)
        """
        order = list(Checkpointing)
        return order[max(0, order.index(self) - 1)]


def checkpointing_of(kind: Checkpointing, layers: int | None, layer: int) -> Checkpointing:
    """What a layer forgets where `layers` of them, from the first, are checkpointed as `kind`; None: all.

    The first ones, as the backward pass comes to them last: what the others kept is gone by then.

    >>> [checkpointing_of(Checkpointing.FULL, 2, layer).value for layer in range(4)]
    ['full', 'full', 'selective', 'selective']
    """
    return kind if layers is None or layer < layers else kind.lighter


class Attention(StrEnum):
    """How softmax(QKᵀ)V is computed."""

    EAGER = "eager"
    SDPA = "sdpa"
    VARLEN = "varlen"  # packed documents, no T×T mask


class Loss(StrEnum):
    """Which positions reach the LM head, and how many at once."""

    FULL = "full"
    RESPONSE = "response"
    CHUNKED = "chunked"


class Optimizer(StrEnum):
    """The optimizer and the type of its moments."""

    ADAMW = "adamw"
    ADAMW_8BIT = "adamw-8bit"


class Allocator(StrEnum):
    """How PyTorch's caching allocator takes memory from the driver."""

    EXPANDABLE = "expandable"
    DEFAULT = "default"


@dataclass(frozen=True, slots=True, kw_only=True)
class Strategy:
    """Every knob of the contract with its value."""

    precision: Precision = Precision.BF16_MIXED
    zero: int = 0
    offload: Offload = Offload.NONE
    checkpointing: Checkpointing = Checkpointing.NONE
    checkpointed_layers: int | None = None  # from the first, the others are lighter; None: all
    attention: Attention = Attention.SDPA
    loss: Loss = Loss.FULL
    packing: bool = False
    compile: bool = False
    micro_batch: int = 1
    accumulation: int = 1
    optimizer: Optimizer = Optimizer.ADAMW
    allocator: Allocator = Allocator.EXPANDABLE
    attention_dropout: float | Literal["model"] = 0.0
    max_grad_norm: float = 1.0

    def checkpointing_at(self, layer: int) -> Checkpointing:
        """What that layer forgets."""
        return checkpointing_of(self.checkpointing, self.checkpointed_layers, layer)

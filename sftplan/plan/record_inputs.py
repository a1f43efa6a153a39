"""What a plan was made from, and what it decided: the inputs and the strategy in its record."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from sftplan.facts.hardware import Gpu, Host, Rates  # noqa: TC001 - the file border resolves these
from sftplan.facts.strategy import (  # noqa: TC001
    Allocator,
    Attention,
    Checkpointing,
    Loss,
    Offload,
    Optimizer,
    Precision,
)
from sftplan.facts.workload import LengthStatistics  # noqa: TC001


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelFacts:
    """The model. `shape_sha256` is of its whole shape: another shape is another plan.

    `hub_id` is where weights and tokenizer of a built-in model are.
    """

    name: str
    source: str
    hub_id: str | None = None
    model_type: str
    num_parameters: int
    num_trainable: int
    num_layers: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    max_positions: int
    tied_embeddings: bool
    shape_sha256: str


@dataclass(frozen=True, slots=True, kw_only=True)
class HardwareFacts:
    """The machines. `usd_per_hour` is for all nodes together."""

    name: str
    num_gpus: int
    gpus_per_node: int
    num_nodes: int
    gpu: Gpu
    host: Host
    rates: Rates
    memory_taken_bytes: int = 0
    internode_bytes_per_s: float | None = None
    usd_per_hour: float | None = None
    price_as_of: str | None = None
    calibration: str | None = None
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkloadFacts:
    """The work. `global_batch` is rows per step over all GPUs; per step means over all GPUs.

    `num_tokens` and `num_examples` are one epoch's, as given or counted.
    """

    seq_len: int
    global_batch: int
    tokens_per_step: float
    examples_per_step: float
    epochs: float
    num_examples: int | None = None
    num_tokens: int | None = None
    response_fraction: float | None = None
    lengths: LengthStatistics | None = None
    train_on_prompt: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Inputs:
    """Everything that the plan depends on; `margin_fraction` of the GPU is kept free."""

    model: ModelFacts
    hardware: HardwareFacts
    workload: WorkloadFacts
    margin_fraction: float
    minimize: Literal["time", "cost", "memory"]


@dataclass(frozen=True, slots=True, kw_only=True)
class StrategyRecord:
    """Every knob with its value; `pinned` names those that were given.

    `checkpointed_layers` are those, from the first, that are checkpointed as said, the others one step
    lighter; None: all are.
    """

    precision: Precision
    zero: int
    offload: Offload
    checkpointing: Checkpointing
    attention: Attention
    loss: Loss
    packing: bool
    compile: bool
    micro_batch: int
    accumulation: int
    optimizer: Optimizer
    allocator: Allocator
    attention_dropout: float | Literal["model"]
    max_grad_norm: float
    checkpointed_layers: int | None = None
    pinned: list[str] = field(default_factory=list)

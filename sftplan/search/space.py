"""Which strategies there are: values of each knob, and which of them go together.

A *family* fixes precision, packing, attention, compilation and ZeRO stage. Within it a *branch*
fixes the two memory savers, checkpointing and the loss; in a branch only the micro-batch is open, and
between two branches how many layers are checkpointed as in the one, the others as in the other.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import product
from typing import TYPE_CHECKING, Any

from sftplan.errors import UsageError
from sftplan.facts.strategy import (
    Allocator,
    Attention,
    Checkpointing,
    Loss,
    Offload,
    Optimizer,
    Precision,
    Strategy,
)
from sftplan.search.known import check_traced_pins
from sftplan.search.rows import examples_per_row, micro_batches, rows_per_gpu

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from sftplan.facts.hardware import Gpu
    from sftplan.facts.model import Anatomy, ModelShape
    from sftplan.facts.workload import Workload

ON_HOST = (Offload.ALL, Offload.NVME)
DEFAULT_MAX_GRAD_NORM = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Branch:
    """Strategies that differ in the micro-batch alone, ascending."""

    template: Strategy
    rows: int  # of one GPU per step
    micros: tuple[int, ...]
    examples: float  # of one GPU per step
    steady: bool  # rows are equally long, so a larger micro-batch is no slower
    layers: int  # that may be checkpointed one by one; 1: all or none

    def at(self, index: int) -> Strategy:
        """The strategy with the micro-batch of that index."""
        return _split(self.template, self.rows, self.micros[index])


@lru_cache(maxsize=4096)
def _split(template: Strategy, rows: int, micro: int) -> Strategy:
    return replace(template, micro_batch=micro, accumulation=rows // micro)


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """Branches by how far they save memory: checkpointing, then the loss, from least to most."""

    branches: Mapping[tuple[int, int], Branch]

    @property
    def plain(self) -> Branch:
        """The fastest branch at each micro-batch, and the one that needs most memory."""
        return self.branches[min(self.branches)]

    @property
    def leanest(self) -> Branch:
        """The branch that needs least memory at each micro-batch."""
        return self.branches[max(self.branches)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Space:
    """Every strategy for a job, with the pinned knobs held."""

    model: ModelShape
    workload: Workload
    num_gpus: int
    gpu: Gpu
    pins: Mapping[str, Any]

    def _pinned(self, knob: str, *otherwise: Any) -> tuple[Any, ...]:
        return (self.pins[knob],) if knob in self.pins else otherwise

    @property
    def precisions(self) -> tuple[Precision, ...]:
        """fp16 only where bf16 is not native; nothing lossy unless pinned."""
        if not self.gpu.bf16_native:
            return self._pinned("precision", Precision.FP16_MIXED)
        anatomy = self.model.anatomy
        if anatomy is not None and (anatomy.idle_parameters or not anatomy.alike):
            # Fake grouped products of experts are bf16; where layers differ each point takes seconds.
            return self._pinned("precision", Precision.BF16_MASTER)
        return self._pinned("precision", Precision.BF16_MASTER, Precision.BF16_MIXED)

    @property
    def attention_dropout(self) -> float:
        """The probability that the attention drops."""
        dropout = self.pins.get("attention_dropout", 0.0)
        return self.model.attention_dropout if dropout == "model" else float(dropout)

    def packs_without_mask(self, precision: Precision) -> bool:
        """Whether varlen attention can do this model: 16 bits, no dropout, no cap on the scores."""
        return (
            precision is not Precision.FP32
            and self.gpu.bf16_native
            and not self.attention_dropout
            and self.model.attention_softcap is None
        )

    def layouts(self, precision: Precision) -> list[tuple[bool, Attention]]:
        """Packing with its attention. Without data rows are full, and packing brings nothing."""
        if self.model.anatomy is not None:
            return self._traced_layouts(self.model.anatomy)
        pinned = self.pins.get("attention")
        capped = self.model.attention_softcap is not None
        rowwise = Attention.EAGER if capped else Attention.SDPA
        varlen = self.packs_without_mask(precision)
        if pinned is Attention.VARLEN:
            packings: tuple[bool, ...] = (True,)
        elif pinned is None and varlen and self.workload.lengths is not None:
            packings = (True, False)
        else:
            packings = (False,)
        packed = Attention.VARLEN if varlen else rowwise
        return [
            (packing, pinned or (packed if packing else rowwise))
            for packing in self._pinned("packing", *packings)
        ]

    def _traced_layouts(self, anatomy: Anatomy) -> list[tuple[bool, Attention]]:
        """Whole rows, as nobody has looked at how the architecture packs, and the kernel that it has."""
        pinned = self.pins.get("attention")
        own = Attention.SDPA if Attention.SDPA in anatomy.attentions else Attention.EAGER
        packings = self._pinned("packing", pinned is Attention.VARLEN)
        return [(packing, pinned or own) for packing in packings]

    @property
    def checkpointings(self) -> tuple[Checkpointing, ...]:
        """From fast to lean."""
        return self._pinned("checkpointing", *Checkpointing)

    @property
    def checkpointed_layers(self) -> int | None:
        """Layers that are pinned to be checkpointed; None: all."""
        pinned = self.pins.get("checkpointed_layers", self.model.num_layers)
        return None if pinned == self.model.num_layers else int(pinned)

    @property
    def losses(self) -> tuple[Loss, ...]:
        """From fast to lean. Without data each position may be trained on: nothing is lost."""
        if self.model.anatomy is not None and not self.model.anatomy.plain_head:
            return self._pinned("loss", Loss.FULL)
        return self._pinned("loss", Loss.RESPONSE, Loss.CHUNKED)

    @property
    def offloads(self) -> tuple[Offload, ...]:
        """In the order in which they are tried, each only if nothing fits with those before it."""
        traced = self.model.anatomy is not None
        if traced or self.pins.get("optimizer") is Optimizer.ADAMW_8BIT:
            return self._pinned("offload", Offload.NONE)
        return self._pinned("offload", Offload.NONE, Offload.OPTIMIZER, Offload.ALL)

    def zeros(self, offload: Offload) -> tuple[int, ...]:
        """ZeRO stages: offload is DeepSpeed's and needs one, parameters leave only in stage 3."""
        if offload in ON_HOST:
            allowed: tuple[int, ...] = (3,)
        elif offload is Offload.OPTIMIZER:
            allowed = (1, 2, 3)
        else:
            allowed = (0, 1, 2, 3)
        if "zero" in self.pins:
            return tuple(stage for stage in allowed if stage == self.pins["zero"])
        if self.model.anatomy is not None:
            return (0,)
        if self.num_gpus > 1:
            return allowed
        return {Offload.NONE: (0,), Offload.OPTIMIZER: (2,)}.get(offload, (3,))

    def compiles(self, zero: int, offload: Offload) -> tuple[bool, ...]:
        """The compiler cannot see through the hooks that gather parameters: not there by choice."""
        if self.model.anatomy is not None:
            return (False,)
        hooked = zero == 3 or offload in ON_HOST
        return self._pinned("compile", *((False,) if hooked else (True, False)))

    def branch(self, template: Strategy) -> Branch:
        """The micro-batches of a template."""
        packing = template.packing
        rows = rows_per_gpu(self.workload, self.pins, num_gpus=self.num_gpus, packing=packing)
        return Branch(
            template=template,
            rows=rows,
            micros=micro_batches(rows, self.pins),
            examples=rows * examples_per_row(self.workload, packing=packing),
            steady=packing or self.workload.lengths is None,
            layers=1 if self.model.anatomy is not None else self.model.num_layers,
        )

    def family(self, template: Strategy) -> Family:
        """The branches of a template."""
        branch = self.branch(template)
        return Family(
            branches={
                (i, j): replace(
                    branch, template=replace(template, checkpointing=checkpointing, loss=loss)
                )
                for i, checkpointing in enumerate(self.checkpointings)
                for j, loss in enumerate(self.losses)
            }
        )

    def families(self, offload: Offload) -> Iterator[Family]:
        """All families with that offload."""
        base = Strategy(
            offload=offload,
            checkpointed_layers=self.checkpointed_layers,
            optimizer=self.pins.get("optimizer", Optimizer.ADAMW),
            allocator=self.pins.get("allocator", Allocator.EXPANDABLE),
            attention_dropout=self.pins.get("attention_dropout", 0.0),
            max_grad_norm=self.pins.get("max_grad_norm", DEFAULT_MAX_GRAD_NORM),
        )
        for precision, zero in product(self.precisions, self.zeros(offload)):
            for (packing, attention), compiled in product(
                self.layouts(precision), self.compiles(zero, offload)
            ):
                yield self.family(
                    replace(
                        base,
                        precision=precision,
                        zero=zero,
                        packing=packing,
                        attention=attention,
                        compile=compiled,
                    )
                )

    def strategies(self, offload: Offload) -> Iterator[Strategy]:
        """Every single one, for whom pruning is no matter."""
        for family in self.families(offload):
            for (saving, _), branch in family.branches.items():
                for index in range(len(branch.micros)):
                    yield branch.at(index)
                    for layers in range(1, branch.layers if saving else 1):
                        yield replace(branch.at(index), checkpointed_layers=layers)


def check_pins(pins: Mapping[str, Any], model: ModelShape) -> None:
    """Refuse pins that exclude each other, or that this model cannot be planned with."""
    if model.anatomy is not None:
        check_traced_pins(pins, model.anatomy, model.model_type)
    _check_checkpointed(pins, model)
    offload, zero = pins.get("offload", Offload.NONE), pins.get("zero")
    if offload is Offload.NONE:
        return
    if zero == 0:
        message = f"--offload {offload} is ZeRO's, --zero 0 is without it"
        raise UsageError(message, "`--zero 2`" if offload is Offload.OPTIMIZER else "`--zero 3`")
    if offload in ON_HOST and zero not in (None, 3):
        message = f"--offload {offload} moves parameters, which --zero {zero} keeps whole"
        raise UsageError(message, "`--zero 3`, or `--offload optimizer`")
    if pins.get("optimizer") is Optimizer.ADAMW_8BIT:
        message = f"--optimizer adamw-8bit steps on the GPU, --offload {offload} on the host"
        raise UsageError(message, "leave one of them out")


def _check_checkpointed(pins: Mapping[str, Any], model: ModelShape) -> None:
    layers = pins.get("checkpointed_layers")
    if layers is None:
        return
    kind, option = pins.get("checkpointing"), f"--checkpointed-layers {layers}"
    if kind is None or kind is Checkpointing.NONE:
        said = (
            "does not say how" if kind is None else f"and --checkpointing {kind} exclude each other"
        )
        message = f"{option} {said}"
        raise UsageError(message, "`--checkpointing full`, or `--checkpointing selective`")
    if layers > model.num_layers:
        message = f"{option}: {model.name} has {model.num_layers} layers"
        raise UsageError(message, "leave it out for all of them")

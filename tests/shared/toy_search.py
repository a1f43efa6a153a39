"""An analytic coster that obeys the laws of the real one, and jobs for it."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from statistics import fmean
from typing import TYPE_CHECKING, Any, Literal

from sftplan.cost.estimate import Compute, Estimate, GpuMemory, HostMemory, StepTime
from sftplan.facts.catalogue import builtin
from sftplan.facts.hardware import Gpu, Hardware, Host, Rates
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
from sftplan.facts.workload import LengthStatistics, Workload
from sftplan.search.choose import choose
from sftplan.search.coster import capacity_bytes, judge
from sftplan.search.rows import examples_per_row
from sftplan.search.space import Space
from sftplan.units import GIB

if TYPE_CHECKING:
    from collections.abc import Sequence

    from sftplan.facts.model import ModelShape
    from sftplan.search.result import Choice

MODEL = replace(builtin("gpt2-large"), num_layers=6)
KEPT = (
    1.0,
    0.5,
    0.1,
)  # of activations: nothing forgotten, what lies between products, all but the input
RATES = Rates(
    matmul_fraction=0.75,
    hbm_fraction=0.9,
    context_bytes=GIB // 2,
    device_bytes=0,
    dispatch_scale=1.0,
    allreduce_fraction=0.8,
    pcie_fraction=0.8,
    host_bytes_per_s=200e9,
)
LENGTHS = LengthStatistics(
    source="data.jsonl",
    num_examples=1000,
    num_dropped=0,
    prompt_mean_tokens=107.0,
    response_mean_tokens=258.0,
    total_mean_tokens=365.0,
    total_max_tokens=1024,
    total_p50_tokens=350,
    total_p95_tokens=900,
    packed_fill_fraction=0.98,
    estimated=False,
    tokenizer="gpt2",
    num_packed_rows=373,
)


def hardware(
    gib: float = 24.0, *, gpus: int = 1, bf16: bool = True, host_gib: float | None = None
) -> Hardware:
    """A machine with so much memory per GPU."""
    gpu = Gpu(
        name="Toy",
        nvml_name="Toy",
        vendor="nvidia",
        architecture="Toy",
        compute_capability=9.0,
        memory_bytes=round(gib * GIB),
        hbm_bytes_per_s=1e12,
        bf16_flops_per_s=1e14,
        fp16_flops_per_s=1e14,
        tf32_flops_per_s=5e13,
        fp32_flops_per_s=2e13,
        nvlink_bytes_per_s=1e11,
        pcie_bytes_per_s=3e10,
        bf16_native=bf16,
    )
    host = Host(memory_bytes=None if host_gib is None else round(host_gib * GIB))
    return Hardware(name="toy", gpu=gpu, rates=RATES, gpus_per_node=gpus, host=host)


def workload(batch: int = 64, *, data: bool = False, tokens: int | None = None) -> Workload:
    """Rows of 1024 tokens."""
    return Workload(
        seq_len=1024,
        global_batch=batch,
        num_tokens=tokens,
        num_examples=1000 if data else None,
        lengths=LENGTHS if data else None,
    )


def mean_of_layers(strategy: Strategy, figures: Sequence[float]) -> float:
    """One figure for each kind of checkpointing, of all layers on average."""
    kinds = map(strategy.checkpointing_at, range(MODEL.num_layers))
    return fmean(figures[list(Checkpointing).index(kind)] for kind in kinds)


@dataclass(kw_only=True)
class ToyCoster:
    """Bytes and seconds of a step as sums of terms; `excess` is what the allocator adds."""

    workload: Workload
    num_gpus: int = 1
    weights_gib: float = 1.0
    row_gib: float = 2.0
    logits_gib: float = 0.5
    recompute: tuple[float, float, float] = (0.0, 0.05, 0.3)
    compiled: float = 0.7
    mixed: float = 1.05
    dispatch_s: float = 0.02
    chunk: float = 0.01
    stage_s: tuple[float, float, float, float] = (0.05, 0.03, 0.04, 0.2)
    excess: tuple[float, ...] = (1.05,)
    startup_s: float = 60.0
    exact: list[Strategy] = field(default_factory=list)
    cheap: set[Strategy] = field(default_factory=set)

    def bound_bytes(self, strategy: Strategy, hardware: Hardware) -> int:
        self.cheap.add(strategy)
        sharded = self.num_gpus if strategy.zero else 1
        per_weight = {Optimizer.ADAMW: 8.0, Optimizer.ADAMW_8BIT: 2.0}[strategy.optimizer]
        lossy = strategy.precision is Precision.BF16_TRUE
        optimizer = self.weights_gib * per_weight / (2 if lossy else 1) / sharded
        weights = self.weights_gib * (2 if lossy else 4)
        gradients = weights / (self.num_gpus if strategy.zero >= 2 else 1)
        if strategy.offload is not Offload.NONE:
            optimizer = 0.0
        if strategy.zero == 3:
            weights /= self.num_gpus
        if strategy.offload in (Offload.ALL, Offload.NVME):
            weights = 0.1
        kept = mean_of_layers(strategy, KEPT)
        rows = strategy.micro_batch * self.workload.seq_len / 1024
        eager = 2.0 if strategy.attention is Attention.EAGER else 1.0
        activations = rows * self.row_gib * kept * eager * (0.8 if strategy.compile else 1.0)
        head = {Loss.FULL: 2.0, Loss.RESPONSE: 1.0, Loss.CHUNKED: 0.1}[strategy.loss]
        logits = rows * self.logits_gib * head
        during = activations + logits + (gradients if strategy.accumulation > 1 else 0.0)
        peak = weights + optimizer + max(during, gradients)
        return round((peak + 0.5) * GIB)

    def step_seconds(self, strategy: Strategy, hardware: Hardware) -> float:
        self.cheap.add(strategy)
        rows = strategy.micro_batch * strategy.accumulation
        row_s = 0.1 * (1 + mean_of_layers(strategy, self.recompute))
        row_s *= self.compiled if strategy.compile else 1.0
        row_s *= {
            Precision.BF16_MASTER: 1.0,
            Precision.BF16_TRUE: 0.99,
            Precision.FP32: 8.0,
        }.get(strategy.precision, self.mixed)
        row_s *= 1 + (self.chunk if strategy.loss is Loss.CHUNKED else 0.0)
        row_s *= 1.5 if strategy.attention is Attention.EAGER else 1.0
        if self.workload.lengths is not None and not strategy.packing:
            row_s *= 0.4 + 0.5 * strategy.micro_batch / (strategy.micro_batch + 8)
        shared = self.stage_s[strategy.zero] if self.num_gpus > 1 else 0.01
        moved = {Offload.NONE: 0.0, Offload.OPTIMIZER: 1.0}.get(strategy.offload, 2.0)
        return rows * row_s + strategy.accumulation * self.dispatch_s + shared + moved

    def beside(self, known: Estimate, strategy: Strategy, hardware: Hardware) -> Estimate:
        estimate = self.estimate(strategy, hardware)
        self.exact.pop()
        return estimate

    def estimate(self, strategy: Strategy, hardware: Hardware) -> Estimate:
        self.exact.append(strategy)
        allocated = self.bound_bytes(strategy, hardware)
        odd = strategy.micro_batch + list(Checkpointing).index(strategy.checkpointing)
        used = round(allocated * self.excess[odd % len(self.excess)])
        if strategy.allocator is Allocator.DEFAULT:
            used = round(used * 1.1)
        rows = strategy.micro_batch * strategy.accumulation * self.num_gpus
        step_s = self.step_seconds(strategy, hardware)
        return Estimate(
            memory=GpuMemory(
                peak_allocated_bytes=allocated,
                peak_reserved_bytes=used,
                context_bytes=0,
                used_bytes=used,
                capacity_bytes=capacity_bytes(hardware),
                peak_at="loss",
                by_category={"weights": allocated},
            ),
            host=HostMemory(
                peak_bytes=0 if strategy.offload is Offload.NONE else round(50 * GIB),
            ),
            compute=Compute(
                flops_per_token=1,
                linear_flops_per_token=1,
                attention_flops_per_token=0,
                step_flops=rows,
            ),
            time=StepTime(
                step_s=step_s,
                compute_s=step_s,
                memory_s=0.0,
                dispatch_s=0.0,
                communication_s=0.0,
                offload_s=0.0,
                optimizer_s=0.0,
                startup_s=10.0 + (self.startup_s if strategy.compile else 0.0),
            ),
            tokens_per_step=rows * 1024.0,
            examples_per_step=rows * examples_per_row(self.workload, packing=strategy.packing),
            rows_per_step=rows,
        )


@dataclass(kw_only=True)
class Factory:
    """Gives the toy's figures to other jobs."""

    toy: ToyCoster

    def __call__(
        self, model: ModelShape, workload: Workload, *, num_gpus: int, gpus_per_node: int
    ) -> ToyCoster:
        return replace(self.toy, workload=workload, num_gpus=num_gpus, exact=[], cheap=set())


@dataclass(frozen=True, kw_only=True)
class Job:
    """One search and the coster that saw it."""

    machine: Hardware
    toy: ToyCoster
    pins: dict[str, Any]
    margin: float = 0.05
    minimize: Literal["time", "cost", "memory"] = "time"

    def choose(self) -> Choice:
        return choose(
            MODEL,
            self.machine,
            self.toy.workload,
            self.pins,
            margin=self.margin,
            minimize=self.minimize,
            evaluator=self.toy,
            make_evaluator=Factory(toy=self.toy),
        )

    def space(self) -> Space:
        return Space(
            model=MODEL,
            workload=self.toy.workload,
            num_gpus=self.toy.num_gpus,
            gpu=self.machine.gpu,
            pins=self.pins,
        )

    def brute_force(self) -> list[tuple[Strategy, Estimate]]:
        """Everything of the space, estimated exactly, in the first offload where something fits."""
        toy = replace(self.toy, exact=[], cheap=set())
        every = {
            offload: [(s, toy.estimate(s, self.machine)) for s in self.space().strategies(offload)]
            for offload in self.space().offloads
        }
        for accepted in (("fits",), ("fits", "tight")):
            for found in every.values():
                good = [it for it in found if judge(it[1], self.machine, self.margin) in accepted]
                if good:
                    return good
        return []


def job(gib: float, pins: dict[str, Any] | None = None, **changes: Any) -> Job:
    """One GPU with so much memory and an ordinary job."""
    work = changes.pop("workload", workload())
    machine = changes.pop("machine", hardware(gib))
    toy = ToyCoster(workload=work, num_gpus=machine.num_gpus, **changes)
    return Job(machine=machine, toy=toy, pins=pins or {})

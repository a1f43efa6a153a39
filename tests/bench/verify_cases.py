"""The configurations that verify_h200.py measures, and a plan for each: all of it without a GPU."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

from sftplan.cost.evaluate import Evaluator
from sftplan.detect.gpus import detect
from sftplan.errors import SftplanError
from sftplan.facts.hardware import Hardware
from sftplan.facts.profiles import load_hardware
from sftplan.facts.resolve import resolve_model
from sftplan.facts.strategy import Strategy
from sftplan.facts.workload import LengthStatistics, Workload
from sftplan.plan.build import plan_from_choice
from sftplan.plan.record import Plan
from sftplan.plan.request import read_pins
from sftplan.units import GIB

COLUMNS = ("name", "half", "model", "seq_len", "micro_batch", "accumulation", "precision", "checkpointing",
           "attention", "loss", "packing", "compile", "allocator")  # fmt: skip
MARGIN = 0.05


@dataclass(frozen=True, kw_only=True)
class Case:
    """One training step."""

    model: str
    seq_len: int
    micro_batch: int
    accumulation: int = 1
    precision: str = "bf16-mixed"
    checkpointing: str = (
        "none"  # or "full/8": of the first eight layers, the others one step lighter
    )
    attention: str = "sdpa"
    loss: str = "full"
    packing: bool = False
    compile: bool = False
    allocator: str = "expandable"
    half: str = "held-out"

    @property
    def name(self) -> str:
        """All that it is."""
        flags = ("pack " if self.packing else "") + ("compile" if self.compile else "eager")
        return (f"{self.model} {self.seq_len}x{self.micro_batch}x{self.accumulation} {self.precision} "
                f"{self.checkpointing} {self.attention} {self.loss} {flags} {self.allocator}")  # fmt: skip

    @property
    def knobs(self) -> dict[str, Any]:
        """As `plan` takes them."""
        names = (
            "precision",
            "attention",
            "loss",
            "packing",
            "compile",
            "micro_batch",
            "accumulation",
            "allocator",
        )
        kind, _, layers = self.checkpointing.partition("/")
        some = {"checkpointed_layers": int(layers)} if layers else {}
        fixed = {"zero": 0, "offload": "none", "checkpointing": kind}
        return {name: getattr(self, name) for name in names} | fixed | some


# What goes together, from plain to what the search chooses: (precision, checkpointing, attention, loss, packing, compile).
STYLES: tuple[tuple[str, str, str, str, bool, bool], ...] = (
    ("bf16-mixed", "none", "sdpa", "full", False, False),
    ("bf16-master", "none", "varlen", "response", True, True),
    ("bf16-mixed", "none", "varlen", "response", True, True),
    ("bf16-master", "selective", "varlen", "chunked", True, True),
    ("bf16-mixed", "full", "sdpa", "full", False, False),
    ("bf16-master", "full", "varlen", "chunked", True, False),
    ("fp32", "none", "sdpa", "response", False, False),
    ("bf16-true", "none", "sdpa", "full", False, False),
    ("bf16-master", "none", "sdpa", "response", False, True),
    ("fp16-mixed", "selective", "sdpa", "response", False, False),
    ("bf16-mixed", "none", "varlen", "chunked", True, False),
    ("bf16-master", "full", "varlen", "response", True, True),
)
MODELS = ("gpt2", "gpt2-large", "gpt2-xl", "opt-1.3b", "pythia-410m", "smollm2-360m", "qwen2.5-0.5b",
          "qwen3-0.6b", "tinyllama-1.1b", "llama-3.2-1b")  # fmt: skip
LENGTHS = (512, 1024, 2048)
ROWS = (2, 4, 8, 16, 32)
MOST_BYTES = 120 * GIB  # predicted; a case is no test of how close to full one may go
MOST_STEP_S = 2.0


@cache
def h200() -> Hardware:
    """The profile, one GPU."""
    return load_hardware("h200-sxm")


@cache
def here() -> Hardware:
    """The profile of the GPU in this machine; without one, of an H200."""
    try:
        return load_hardware(detect().name)
    except SftplanError:
        return h200()


@cache
def lengths_of(seq_len: int) -> LengthStatistics:
    """Statistics of the synthetic instruction set of train_throughput.py."""
    from train_build import synthetic

    from sftplan.data.fit import fitted
    from sftplan.data.statistics import length_statistics

    return length_statistics(
        fitted(synthetic(2000, 1000, seq_len), seq_len),
        source="synthetic",
        tokenizer="none",
        estimated=False,
    )


def cases(count: int) -> list[Case]:
    """`count` cases, always the same; a random half is for calibration."""
    draw = random.Random(20261124)
    found: dict[str, Case] = {}
    number = 0
    while len(found) < count:
        precision, checkpointing, attention, loss, packing, compiled = STYLES[number % len(STYLES)]
        model = MODELS[(number * 7 + number // len(STYLES)) % len(MODELS)]
        longest = min(resolve_model(model).max_positions, LENGTHS[-1])
        seq_len = draw.choice([n for n in LENGTHS if n <= longest])
        case = Case(
            model=model, seq_len=seq_len, micro_batch=draw.choice(ROWS),
            accumulation=draw.choice((1, 1, 1, 2)), precision=precision, checkpointing=checkpointing,
            attention=attention, loss=loss, packing=packing, compile=compiled,
            allocator="default" if number % 5 == 4 else "expandable",
        )  # fmt: skip
        number += 1
        memory, seconds = _quickly(case)
        if memory < MOST_BYTES and seconds < MOST_STEP_S:
            found.setdefault(case.name, case)
    chosen = list(found.values())
    fitted = set(draw.sample(range(count), count // 2))
    return [
        replace(c, half="calibration" if i in fitted else "held-out") for i, c in enumerate(chosen)
    ]


def _quickly(case: Case) -> tuple[int, float]:
    evaluator, strategy, _ = _evaluator(case, quick=True)
    found = evaluator.estimate(strategy, h200())
    return found.memory.used_bytes, found.time.step_s or 0.0


def _evaluator(case: Case, *, quick: bool) -> tuple[Evaluator, Strategy, Workload]:
    workload = Workload(
        seq_len=case.seq_len, global_batch=case.micro_batch * case.accumulation, global_batch_pinned=True,
        lengths=lengths_of(case.seq_len) if case.packing else None,
    )  # fmt: skip
    pins: dict[str, Any] = read_pins(case.knobs)
    model = resolve_model(case.model)
    evaluator = Evaluator(model, workload, num_gpus=1, gpus_per_node=1, quick=quick)
    return evaluator, Strategy(**pins), workload


@dataclass(frozen=True)
class Only:
    """A choice without company."""

    strategy: Strategy
    estimate: Any
    verdict: Any = "fits"
    host_needed_bytes: int | None = None
    neighbours: tuple[Any, ...] = ()
    remedies: tuple[Any, ...] = ()
    reasons: tuple[tuple[str, str], ...] = ()


def plan_of(case: Case, hardware: Hardware | None = None) -> Plan:
    """The plan of a case: an estimate of one point."""
    machine = hardware or here()
    evaluator, strategy, workload = _evaluator(case, quick=False)
    return plan_from_choice(
        Only(strategy, evaluator.estimate(strategy, machine)), model=resolve_model(case.model),
        hardware=machine, workload=workload, pinned=list(case.knobs), margin=MARGIN, minimize="time",
        command=["verify_h200.py", case.name],
    )  # fmt: skip


def machine_of(profile: str | None) -> Hardware:
    """The GPU of a profile, or the one here."""
    return here() if profile is None else load_hardware(profile)


def capped(gib: float, profile: str | None = None) -> Hardware:
    """The GPU here, or of a profile, with so much memory: as a smaller card's driver would show it, all usable."""
    full = machine_of(profile)
    gpu = replace(full.gpu, memory_bytes=int(gib * GIB), unusable_bytes=0)
    return replace(full, gpu=gpu, rates=replace(full.rates, device_bytes=0))

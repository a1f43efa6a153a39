"""The steps on several GPUs that h200_ranks.py measures, and a plan for each: all of it without a GPU."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from verify_cases import Only, lengths_of

from sftplan.cost.evaluate import Evaluator
from sftplan.facts.hardware import Hardware, Host
from sftplan.facts.profiles import load_hardware
from sftplan.facts.resolve import resolve_model
from sftplan.facts.strategy import Strategy
from sftplan.facts.workload import Workload
from sftplan.plan.build import plan_from_choice
from sftplan.plan.record import Plan
from sftplan.plan.request import read_pins
from sftplan.units import GIB

PLAIN = {"attention": "sdpa", "packing": False, "compile": False}
PACKED = {"attention": "varlen", "packing": True, "compile": True}  # what a search chooses
STYLES = {"plain": PLAIN, "packed": PACKED, "uncompiled": PACKED | {"compile": False}}
HOST = Host(memory_bytes=128 * GIB, num_cpus=16)  # for each GPU of the machines that are measured


@dataclass(frozen=True, kw_only=True)
class Case:
    """One step; bf16-master, loss on the response."""

    model: str
    zero: int
    style: str = "plain"
    offload: str = "none"
    checkpointing: str = "none"
    micro_batch: int = 8
    accumulation: int = 1
    seq_len: int = 1024

    @property
    def name(self) -> str:
        """All that it is."""
        rows = f"{self.micro_batch}x{self.accumulation}"
        return f"{Path(self.model).name} zero-{self.zero} {self.offload} {self.checkpointing} {self.style} {rows}"

    @property
    def knobs(self) -> dict[str, Any]:
        """As `plan` takes them."""
        own = {k: v for k, v in asdict(self).items() if k not in ("model", "style", "seq_len")}
        return (
            own
            | STYLES[self.style]
            | {"precision": "bf16-master", "loss": "response", "allocator": "expandable"}
        )


COLUMNS = tuple(Case.__dataclass_fields__)
LARGE, XL, SEVEN, THREE = "gpt2-large", "gpt2-xl", "llama-2-7b", "llama-3.2-3b"
CASES = (
    Case(model=LARGE, zero=0, style="packed"),
    Case(model=LARGE, zero=0),
    Case(model=LARGE, zero=2),
    Case(model=LARGE, zero=3),
    Case(model=LARGE, zero=1),
    Case(model=SEVEN, zero=3, checkpointing="full", micro_batch=2),
    Case(model=XL, zero=2, checkpointing="full"),
    Case(model=LARGE, zero=2, offload="optimizer"),
    Case(model=XL, zero=3, checkpointing="full"),
    Case(model=XL, zero=0, checkpointing="full"),
    Case(model=THREE, zero=2, checkpointing="full", micro_batch=4),
    Case(model=LARGE, zero=2, style="packed"),
    Case(model=LARGE, zero=1, style="packed"),
    Case(model=LARGE, zero=3, style="packed"),
    Case(model=LARGE, zero=0, style="packed", accumulation=2),
    Case(model=LARGE, zero=2, accumulation=2),
    Case(model=THREE, zero=3, offload="all", checkpointing="full", micro_batch=4),
)


def tiny_cases(model: str) -> tuple[Case, ...]:
    """Each kind once, for a rehearsal on processors."""
    shape = {"model": model, "micro_batch": 2, "seq_len": 256}
    kinds = [{"zero": zero} for zero in (0, 2, 3)]
    kinds += [{"zero": 2, "offload": "optimizer", "accumulation": 2}]
    return tuple(Case(**shape, **kind) for kind in kinds)


def machine(profile: str, num_gpus: int, host: Host | None = None) -> Hardware:
    """So many GPUs of one host."""
    found = host or Host(
        memory_bytes=num_gpus * (HOST.memory_bytes or 0), num_cpus=num_gpus * (HOST.num_cpus or 0)
    )
    return replace(load_hardware(profile), gpus_per_node=num_gpus, host=found)


def plan_of(case: Case, hardware: Hardware) -> Plan:
    """The plan of a case: an estimate of one point."""
    num_gpus = hardware.num_gpus
    workload = Workload(
        seq_len=case.seq_len, global_batch=case.micro_batch * case.accumulation * num_gpus, global_batch_pinned=True,
        lengths=lengths_of(case.seq_len) if case.style != "plain" else None,
    )  # fmt: skip
    model = resolve_model(case.model)
    evaluator = Evaluator(model, workload, num_gpus=num_gpus, gpus_per_node=num_gpus)
    pins: dict[str, Any] = read_pins(case.knobs)
    strategy = Strategy(**pins)
    return plan_from_choice(
        Only(strategy, evaluator.estimate(strategy, hardware)), model=model, hardware=hardware, workload=workload,
        pinned=list(case.knobs), margin=0.05, minimize="time", command=["h200_ranks.py", case.name],
    )  # fmt: skip

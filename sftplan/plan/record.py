"""The plan: what was decided, what it will cost, and everything it was decided from.

The fields are the keys of the plan file and of `--json`, in this order. Units are in the names;
None is unknown. The parts are in record_inputs.py (what was given) and record_costs.py (what it
costs).
"""

from __future__ import annotations

from dataclasses import dataclass, field

from sftplan.plan.record_costs import (  # noqa: TC001 - the file border resolves these names
    Compute,
    Cost,
    Memory,
    Neighbour,
    Remedy,
    Time,
    Verdict,
)
from sftplan.plan.record_inputs import Inputs, StrategyRecord  # noqa: TC001

FORMAT = "sftplan.plan"
FORMAT_VERSION = "1.0"


@dataclass(frozen=True, slots=True, kw_only=True)
class Reason:
    """Why one decision was taken."""

    choice: str
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Launch:
    """How the run is started; `deepspeed` and `accelerate` are empty where they are not used."""

    argv: list[str]
    env: dict[str, str]
    deepspeed: dict[str, object] = field(default_factory=dict)
    accelerate: dict[str, object] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """One plan. When nothing fits it holds the strategy that needs least memory, `fits` False."""

    format: str = FORMAT
    format_version: str = FORMAT_VERSION
    created_by: str
    command: list[str]
    inputs: Inputs
    strategy: StrategyRecord
    fits: bool
    verdict: Verdict
    memory: Memory
    compute: Compute
    time: Time
    cost: Cost
    neighbours: list[Neighbour] = field(default_factory=list)
    why: list[Reason] = field(default_factory=list)
    remedies: list[Remedy] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    assumptions: list[str] = field(default_factory=list)
    sources: dict[str, str] = field(default_factory=dict)
    launch: Launch

"""What `verify` says of a plan, in the names of the contract."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from sftplan.cost.timeline import Timeline  # noqa: TC001 - whoever reads the annotations needs it
from sftplan.plan.verified import FORMAT


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One quantity; `error_fraction` is predicted / measured − 1, None where there is nothing to divide."""

    quantity: str
    predicted: float | None
    measured: float | None
    error_fraction: float | None
    within: bool | None  # None: shown, not judged


@dataclass(frozen=True, slots=True, kw_only=True)
class PhaseRow:
    """One phase of the measured step."""

    name: str
    seconds: float | None
    peak_allocated_bytes: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """`count` storages of `each_bytes` in which tape and trace differ, by the operator that made them."""

    what: Literal["only traced", "only modelled", "lives longer traced", "lives longer modelled"]
    phase: str
    maker: str
    each_bytes: int
    count: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Verification:
    """The judgement of a dry run."""

    format: str = FORMAT
    format_version: str = "1.0"
    created_by: str
    plan_sha256: str
    ok: bool
    mode: Literal["gpu", "trace"]
    rows: list[Row]
    judgement: str
    phases: list[PhaseRow] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    next_plan: dict[str, object] | None = None  # knobs of the next safe plan, where this one failed
    versions: dict[str, str | None] = field(default_factory=dict)
    timeline: Timeline | None = None  # measured memory over one step
    differences: list[Difference] = field(
        default_factory=list
    )  # of `--no-gpu --diff`, largest first

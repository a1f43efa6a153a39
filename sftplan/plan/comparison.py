"""Several machines for one job, one row each: the record behind `compare`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from sftplan.plan.build import cost_record as run_cost
from sftplan.plan.build import hardware_facts, strategy_record, time_record
from sftplan.plan.file import document

if TYPE_CHECKING:
    from collections.abc import Sequence

    from sftplan.facts.hardware import Hardware
    from sftplan.facts.workload import Workload
    from sftplan.plan.choice import Choice
    from sftplan.plan.record_costs import Verdict
    from sftplan.plan.record_inputs import StrategyRecord

FORMAT = "sftplan.comparison"
FORMAT_VERSION = "1.0"
SORTS = ("cost", "time", "memory", "name")
Sort = Literal["cost", "time", "memory", "name"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One machine. Without a strategy it could not be planned for, and `reason` says why."""

    hardware: str
    num_gpus: int | None = None
    gpu: str | None = None
    fits: bool = False
    verdict: Verdict = "does_not_fit"
    strategy: StrategyRecord | None = None
    used_bytes: int | None = None
    capacity_bytes: int | None = None
    step_s: float | None = None
    tokens_per_s: float | None = None
    mfu_fraction: float | None = None
    total_s: float | None = None
    usd: float | None = None
    usd_per_hour: float | None = None
    usd_per_million_tokens: float | None = None
    price_as_of: str | None = None
    reason: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """All rows, sorted, those that do not fit last."""

    format: str = FORMAT
    format_version: str = FORMAT_VERSION
    created_by: str
    command: list[str]
    model: str
    seq_len: int
    global_batch: int
    sort: Sort
    rows: list[Row]


def comparison_row(
    choice: Choice, hardware: Hardware, workload: Workload, pinned: Sequence[str]
) -> Row:
    """The row of one machine; reads no neighbours, so a search may leave them for later."""
    estimate, machine = choice.estimate, hardware_facts(hardware)
    time = time_record(estimate, hardware, workload, choice.strategy.precision)
    cost = run_cost(machine, time.total_s)
    missing = estimate.memory.used_bytes - estimate.memory.capacity_bytes
    fits = choice.verdict != "does_not_fit"
    per_token = None
    if cost.usd_per_hour is not None and time.tokens_per_s:
        per_token = cost.usd_per_hour / 3600 / time.tokens_per_s * 1e6
    reason = None
    if not fits:
        over = f"{missing / 2**30:,.2f} GiB over" if missing > 0 else "inside the margin"
        reason = f"{over}, with the leanest strategy"
    return Row(
        hardware=hardware.name,
        num_gpus=hardware.num_gpus,
        gpu=hardware.gpu.name,
        fits=fits,
        verdict=choice.verdict,
        strategy=strategy_record(choice.strategy, pinned),
        used_bytes=estimate.memory.used_bytes,
        capacity_bytes=estimate.memory.capacity_bytes,
        step_s=time.step_s if fits else None,
        tokens_per_s=time.tokens_per_s if fits else None,
        mfu_fraction=time.mfu_fraction if fits else None,
        total_s=time.total_s if fits else None,
        usd=cost.usd if fits else None,
        usd_per_hour=cost.usd_per_hour,
        usd_per_million_tokens=per_token if fits else None,
        price_as_of=cost.price_as_of,
        reason=reason,
    )


def _figure(row: Row, sort: Sort) -> float | None:
    match sort:
        case "cost":
            return row.usd if row.usd is not None else row.usd_per_million_tokens
        case "time":
            return None if not row.tokens_per_s else 1 / row.tokens_per_s
        case "memory":
            return row.used_bytes
        case "name":
            return 0.0


def sorted_rows(rows: Sequence[Row], sort: Sort) -> list[Row]:
    """What fits first, by the figure that is asked for, unknown figures last."""

    def key(row: Row) -> tuple[bool, bool, float, str]:
        figure = _figure(row, sort)
        return not row.fits, figure is None, figure or 0.0, row.hardware

    return sorted(rows, key=key)


def comparison_document(comparison: Comparison) -> dict[str, object]:
    """The JSON object of a comparison."""
    result = document(comparison)
    assert isinstance(result, dict)
    return result

"""The comparison of machines as a table: one row each, what fits first."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sftplan.units import format_duration, format_gib

if TYPE_CHECKING:
    from sftplan.plan.comparison import Comparison, Row
    from sftplan.report.style import Style

_HEADINGS_OF_A_RUN = ("Machine", "GPUs", "Strategy", "GiB", "run time", "cost")
_HEADINGS_OF_A_STEP = ("Machine", "GPUs", "Strategy", "GiB", "step", "$/M tokens")
_ALIGNED_RIGHT = (False, True, False, True, True, True)
NO_FIGURE = "-"


def short_strategy(row: Row) -> str:
    """The decisions that differ between machines, in a few characters.

    Micro-batch, ZeRO stage, checkpointing and offload.
    """
    chosen = row.strategy
    if chosen is None or not row.fits:
        return NO_FIGURE
    words = [f"mb {chosen.micro_batch}"]
    if chosen.zero:
        words.append(f"Z{chosen.zero}")
    if chosen.checkpointing != "none":
        layers = chosen.checkpointed_layers
        part = "" if layers is None else f" {layers} layers"
        words.append(f"{chosen.checkpointing} ckpt{part}")
    if chosen.offload != "none":
        words.append("offload" if chosen.offload == "all" else f"{chosen.offload} offl.")
    return ", ".join(words)


def _money(row: Row, *, whole_run: bool) -> str:
    value = row.usd if whole_run else row.usd_per_million_tokens
    if value is None:
        return NO_FIGURE
    return f"${value:,.2f}" if value >= 0.095 else f"${value:.2g}"


def _cells(row: Row, *, whole_run: bool) -> tuple[str, ...]:
    gib = NO_FIGURE if row.used_bytes is None else format_gib(row.used_bytes)
    seconds = row.total_s if whole_run else row.step_s
    duration = NO_FIGURE if seconds is None else format_duration(seconds)
    name = row.hardware + (" (tight)" if row.verdict == "tight" else "")
    gpus = NO_FIGURE if row.num_gpus is None else str(row.num_gpus)
    return name, gpus, short_strategy(row), gib, duration, _money(row, whole_run=whole_run)


def _table(lines: list[tuple[str, ...]]) -> list[str]:
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    rendered = []
    for line in lines:
        cells = zip(line, widths, _ALIGNED_RIGHT, strict=True)
        text = "  ".join(c.rjust(width) if right else c.ljust(width) for c, width, right in cells)
        rendered.append(text.rstrip())
    return rendered


def render_comparison(
    comparison: Comparison, style: Style, *, limit: int | None = None, verbose: bool = False
) -> str:
    """The table, then why the others do not fit: counted, or with `verbose` each by name."""
    fitting = [row for row in comparison.rows if row.fits]
    others = [row for row in comparison.rows if not row.fits]
    whole_run = any(row.total_s is not None for row in fitting)
    shown = fitting[:limit]
    headings = _HEADINGS_OF_A_RUN if whole_run else _HEADINGS_OF_A_STEP
    lines = [
        f"{comparison.model}, sequence {comparison.seq_len}, global batch "
        f"{comparison.global_batch}: fits {len(fitting)} of {len(comparison.rows)} machines"
    ]
    if shown:
        table = _table([headings, *(_cells(row, whole_run=whole_run) for row in shown)])
        lines += ["", style.paint(table[0], "bold"), *table[1:]]
    if len(fitting) > len(shown):
        lines.append(f"({len(fitting) - len(shown)} more fit: --limit 0 shows all)")
    if others and verbose:
        width = max(len(row.hardware) for row in others)
        lines += ["", "Does not fit:"]
        lines += [f"  {row.hardware:<{width}}  {row.reason or ''}".rstrip() for row in others]
    elif others:
        count = "1 machine does" if len(others) == 1 else f"{len(others)} machines do"
        lines += ["", f"{count} not fit; -v shows why"]
    if not whole_run and fitting:
        lines += ["", "For run time and cost say how much: --tokens, --examples or --data"]
    return "\n".join(lines)

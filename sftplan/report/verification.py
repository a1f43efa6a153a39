"""The screen of `verify`: predicted beside measured."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sftplan.units import format_gib

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

MAX_DIFFERENCES = 20  # on the screen
MARKS = {True: "ok", False: "off", None: ""}


def verification_text(found: Mapping[str, Any]) -> str:
    """The judgement, a row per quantity, and what was noticed; `found` is the verification's document."""
    lines = [f"{'':30}{'predicted':>12}{'measured':>12}{'error':>9}"]
    for row in found["rows"]:
        name = row["quantity"]
        error = "" if row["error_fraction"] is None else f"{row['error_fraction']:+.1%}"
        lines.append(
            f"{name:32}{_number(name, row['predicted']):>12}{_number(name, row['measured']):>12}"
            f"{error:>9}  {MARKS[row['within']]}".rstrip()
        )
    for phase in found["phases"]:
        peak, seconds = phase["peak_allocated_bytes"], phase["seconds"]
        peaks = "" if peak is None else f"{format_gib(peak)} GiB at most"
        times = "" if seconds is None else f"{seconds:.4f} s"
        lines.append(f"  {phase['name']:30}{times:>12}  {peaks}".rstrip())
    lines += [f"Note: {note}" for note in found["notes"]]
    lines += _differences(found["differences"])
    verdict = "Verified" if found["ok"] else "Not as predicted"
    return "\n".join([f"{verdict}: {found['judgement']}", "", *lines])


def _differences(differences: Sequence[Mapping[str, Any]]) -> list[str]:
    """The largest ones, a line each."""
    if not differences:
        return []
    lines = ["", "Model and trace differ in:"]
    lines += [
        f"  {each['what']:22}{each['count']:>4} x {format_gib(each['each_bytes'])} GiB  "
        f"{each['phase']}: {each['maker']}"
        for each in differences[:MAX_DIFFERENCES]
    ]
    left = len(differences) - MAX_DIFFERENCES
    return [*lines, f"  and {left} more: --json has all"] if left > 0 else lines


def _number(name: str, value: float | None) -> str:
    if value is None:
        return "-"
    if name.endswith("_bytes"):
        return f"{format_gib(value)} GiB"
    if name.endswith("_flops"):
        return f"{value / 1e12:,.1f} TFLOP"
    if name.endswith("_fraction"):
        return f"{value:.1%}"
    if name.endswith("_per_s"):
        return f"{value:,.0f} /s"
    return f"{value:.4f} s"

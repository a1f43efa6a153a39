"""Memory over one step as pictures: a chart for the terminal, and SVG inside one HTML file.

Both draw stacked categories of plain data; where they are from, predicted or measured, is for the
caller to say. The HTML file needs nothing from anywhere: no script, no font, no network.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from html import escape
from itertools import accumulate
from typing import TYPE_CHECKING

from sftplan.units import GIB, format_gib

if TYPE_CHECKING:
    from collections.abc import Sequence

    from sftplan.cost.timeline import Timeline
    from sftplan.report.style import Style

# From the bottom up: what lives longest first. Unknown categories come on top, in grey.
ORDER = ("weights", "optimizer", "gradients", "activations", "logits", "temporary", "workspace")
COLOURS = {
    "weights": ("blue", "#4269d0"), "optimizer": ("cyan", "#3ca7a0"), "gradients": ("magenta", "#a463f2"),
    "activations": ("green", "#6cae3e"), "logits": ("yellow", "#efb118"), "temporary": ("red", "#e5604d"),
    "workspace": ("dim", "#97a0af"),
}  # fmt: skip
OTHER = ("dim", "#c3c9d4")
EIGHTHS = " ▁▂▃▄▅▆▇█"
ROWS = 12  # of the terminal's chart
MARGIN = 9  # columns of the axis
MIN_WIDTH = 40
SVG_WIDTH, SVG_HEIGHT = 900, 320
SVG_LEFT, SVG_TOP, SVG_BOTTOM = 70, 12, 28
TICKS = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Panel:
    """One picture: its title, what it shows, and a line to draw across, such as the capacity."""

    title: str
    timeline: Timeline
    limit_bytes: int | None = None


def render_chart(timeline: Timeline, style: Style, *, width: int = 80) -> str:
    """The chart for a terminal of `width` columns; letters stand for categories without colour."""
    columns = max(MIN_WIDTH, width) - MARGIN
    names, stacks = _stacks(timeline, columns)
    top = max(sum(stack) for stack in stacks) or 1
    lines = []
    for row in range(ROWS, 0, -1):
        cells = "".join(_cell(stack, names, row, top, style) for stack in stacks)
        label = format_gib(top * row / ROWS) if row in (ROWS, ROWS // 2) else ""
        lines.append(f"{label:>{MARGIN - 2}} {style_bar(style)}{cells}")
    lines.append(" " * (MARGIN - 1) + _phase_line(timeline, columns))
    return "\n".join([*lines, *_legend(timeline, names, style, width)])


def style_bar(style: Style) -> str:
    """The axis."""
    return "│" if style.unicode else "|"


def _stacks(timeline: Timeline, columns: int) -> tuple[list[str], list[list[int]]]:
    """Categories from the bottom up, and the highest point of each column's stretch."""
    names = sorted(timeline.categories, key=lambda n: ORDER.index(n) if n in ORDER else len(ORDER))
    places = [timeline.categories.index(name) for name in names]
    points, count = timeline.points, len(timeline.points)
    stacks = []
    for column in range(columns):
        start = column * count // columns
        stretch = points[start : max(start + 1, (column + 1) * count // columns)]
        highest = max(stretch, key=sum)
        stacks.append([highest[place] for place in places])
    return names, stacks


def _cell(stack: Sequence[int], names: Sequence[str], row: int, top: int, style: Style) -> str:
    """One character: the category at the middle of what of the cell is filled."""
    low, high = top * (row - 1) / ROWS, top * row / ROWS
    total = sum(stack)
    filled = min(1.0, max(0.0, (total - low) / (high - low)))
    if filled < 1 / 16:
        return " "
    name = _category_at(low + (min(total, high) - low) / 2, names, stack)
    if not style.colour:
        return letter(name, names) if filled >= 0.5 or row == 1 else "."
    glyph = EIGHTHS[max(1, round(filled * 8))] if style.unicode else "#"
    return style.paint(glyph, COLOURS.get(name, OTHER)[0])


def _category_at(level: float, names: Sequence[str], stack: Sequence[int]) -> str:
    """The category that a level of the stack is in."""
    return next(
        (name for name, top in zip(names, accumulate(stack), strict=True) if top >= level),
        names[-1],
    )


def letter(name: str, names: Sequence[str]) -> str:
    """What stands for a category without colour: its first letter that none before it has.

    >>> letter("workspace", ["weights", "optimizer", "workspace"])
    'r'
    """
    initials = {each[0] for each in names if each != name}
    taken: dict[str, str] = {}
    for each in names:
        free = (c for c in each if c not in taken.values() and (c == each[0] or c not in initials))
        taken[each] = next(free, "?")
    return taken[name]


def _phase_line(timeline: Timeline, columns: int) -> str:
    """Names of the phases where they begin, as far as there is room."""
    line = [" "] * columns
    free = 0
    for position, phase in timeline.phases:
        column = position * columns // max(1, len(timeline.points))
        word = phase if column + len(phase) <= columns else phase[: columns - column]
        if column >= free and word:
            line[column : column + len(word)] = word
            free = column + len(word) + 1
    return "".join(line).rstrip()


def _legend(timeline: Timeline, names: Sequence[str], style: Style, width: int) -> list[str]:
    peak = dict(zip(timeline.categories, timeline.points[timeline.peak], strict=True))
    lines = [f"{'GiB, peak':>{MARGIN}} {format_gib(sum(peak.values()))}:"]
    for name in names:
        mark = style.paint("█" if style.unicode else "#", COLOURS.get(name, OTHER)[0])
        if not style.colour:
            mark = letter(name, names)
        words = f" {mark} {name} {format_gib(peak[name])}"
        plain = f" x {name} {format_gib(peak[name])}"
        if len(_plain(lines[-1])) + len(plain) > width:
            lines.append(" " * MARGIN)
        lines[-1] += words
    return lines


def _plain(text: str) -> str:
    """Without colours, which take no columns."""
    return re.sub(r"\x1b\[[0-9;]*m", "", text)


def render_page(title: str, panels: Sequence[Panel], *, screen: str = "") -> str:
    """One HTML file with a picture per panel, all to the same scale; `screen` is text with columns."""
    tops = [max(sum(p) for p in panel.timeline.points) for panel in panels]
    tops += [panel.limit_bytes for panel in panels if panel.limit_bytes]
    top = max(tops) * 1.03 if tops else 1.0
    pictures = "\n".join(
        f"<h2>{escape(panel.title)}</h2>\n{render_svg(panel, top)}" for panel in panels
    )
    shown = {name for panel in panels for name in panel.timeline.categories}
    keys = "".join(
        f'<span><i style="background:{_colour(name)}"></i>{escape(name)}</span>'
        for name in [*(n for n in ORDER if n in shown), *sorted(shown - set(ORDER))]
    )
    said = f"<pre>{escape(screen)}</pre>\n" if screen else ""
    return _PAGE.format(title=escape(title), keys=keys, pictures=pictures, screen=said)


_PAGE = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<style>
body {{ font: 15px/1.5 system-ui, sans-serif; max-width: 920px; margin: 2em auto; padding: 0 1em;
  color: #1f2430; background: #fff }}
h1 {{ font-size: 1.4em }} h2 {{ font-size: 1.05em; margin: 1.6em 0 .3em }}
pre {{ overflow-x: auto; font-size: 13px }}
svg {{ width: 100%; height: auto }} svg text {{ font: 12px system-ui, sans-serif; fill: currentColor }}
.keys span {{ margin-right: 1.2em; white-space: nowrap }}
.keys i {{ display: inline-block; width: .8em; height: .8em; margin-right: .35em; border-radius: 2px }}
@media (prefers-color-scheme: dark) {{ body {{ color: #dfe3ea; background: #171a21 }} }}
</style></head><body>
<h1>{title}</h1>
<p class="keys">{keys}</p>
{pictures}
{screen}</body></html>
"""


def _colour(name: str) -> str:
    return COLOURS.get(name, OTHER)[1]


def render_svg(panel: Panel, top: float) -> str:
    """The stacked areas of one timeline; `top` is the axis's end in bytes."""
    timeline = panel.timeline
    columns = min(len(timeline.points), SVG_WIDTH - SVG_LEFT)
    names, stacks = _stacks(timeline, columns)
    levels = [[0.0] * columns]
    parts = []
    for place, name in enumerate(names):
        levels.append(
            [level + stack[place] for level, stack in zip(levels[-1], stacks, strict=True)]
        )
        upper = [_point(x, level, columns, top) for x, level in enumerate(levels[-1])]
        lower = [_point(x, level, columns, top) for x, level in enumerate(levels[-2])]
        peak = timeline.points[timeline.peak][timeline.categories.index(name)]
        parts.append(
            f'<polygon fill="{_colour(name)}" points="{" ".join([*upper, *reversed(lower)])}">'
            f"<title>{escape(name)}: {format_gib(peak)} GiB at the peak</title></polygon>"
        )
    parts += _axis(top) + _phases(timeline)
    if panel.limit_bytes:
        y = _y(panel.limit_bytes, top)
        parts.append(
            f'<line x1="{SVG_LEFT}" x2="{SVG_WIDTH}" y1="{y:.1f}" y2="{y:.1f}" stroke="#d0342c" '
            f'stroke-dasharray="6 4"/><text x="{SVG_LEFT + 6}" y="{y + 15:.1f}">capacity '
            f"{format_gib(panel.limit_bytes)} GiB</text>"
        )
    label = escape(f"{panel.title}: memory over one step by category")
    body = "\n".join(parts)
    return f'<svg viewBox="0 0 {SVG_WIDTH} {SVG_HEIGHT}" role="img" aria-label="{label}">\n{body}\n</svg>'


def _y(size: float, top: float) -> float:
    return SVG_HEIGHT - SVG_BOTTOM - size / top * (SVG_HEIGHT - SVG_TOP - SVG_BOTTOM)


def _x(share: float) -> float:
    return SVG_LEFT + share * (SVG_WIDTH - SVG_LEFT)


def _point(column: int, level: float, columns: int, top: float) -> str:
    return f"{_x(column / max(1, columns - 1)):.1f},{_y(level, top):.1f}"


def _axis(top: float) -> list[str]:
    """Horizontal lines at round numbers of GiB."""
    step = _round_step(top / GIB / TICKS)
    parts = []
    value = 0.0
    while value * GIB <= top:
        y = _y(value * GIB, top)
        parts.append(
            f'<line x1="{SVG_LEFT}" x2="{SVG_WIDTH}" y1="{y:.1f}" y2="{y:.1f}" stroke="currentColor" '
            f'stroke-opacity=".18"/><text x="{SVG_LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">'
            f"{value:g} GiB</text>"
        )
        value = round(value + step, 6)
    return parts


def _round_step(raw: float) -> float:
    """1, 2 or 5 times a power of ten.

    >>> _round_step(7.3), _round_step(0.13)
    (10.0, 0.2)
    """
    power = 10.0 ** len(str(int(raw))) / 10 if raw >= 1 else 0.01
    while power * 10 <= raw:
        power *= 10
    return round(next((power * f for f in (1, 2, 5) if power * f >= raw), power * 10), 6)


def _phases(timeline: Timeline) -> list[str]:
    """Where each phase begins; names that would run into one another are left out."""
    parts, free = [], 0.0
    for position, phase in timeline.phases:
        x = _x(position / max(1, len(timeline.points)))
        parts.append(
            f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{SVG_TOP}" y2="{SVG_HEIGHT - SVG_BOTTOM}" '
            'stroke="currentColor" stroke-opacity=".35" stroke-dasharray="2 3"/>'
        )
        if x >= free and x < SVG_WIDTH - 7 * len(phase):
            parts.append(f'<text x="{x + 3:.1f}" y="{SVG_HEIGHT - 10}">{escape(phase)}</text>')
            free = x + 8.0 * len(phase) + 6
    return parts

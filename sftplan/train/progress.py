"""The bar on a terminal's standard error; elsewhere only sentences, and with -q not even those."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

from sftplan.units import format_count, format_gib

if TYPE_CHECKING:
    from collections.abc import Mapping

FIGURES = "loss {task.fields[loss]} · {task.fields[speed]} · {task.fields[memory]}"


class Progress:
    """What a person sees of a run."""

    def __init__(self, *, quiet: bool) -> None:
        self.quiet = quiet
        self.console = Console(stderr=True, highlight=False)
        self.bar: Bar | None = None

    def say(self, text: str) -> None:
        """One sentence, whether there is a bar or not."""
        if not self.quiet:
            self.console.print(escape(text), soft_wrap=True)

    def start(self, *, total: int, done: int) -> None:
        """Show the bar on a terminal."""
        if self.quiet or not sys.stderr.isatty():
            return
        self.bar = Bar(
            TextColumn("training"), BarColumn(), MofNCompleteColumn(), TextColumn(FIGURES),
            TimeRemainingColumn(), console=self.console,
        )  # fmt: skip
        self.task = self.bar.add_task("", total=total, completed=done, loss="", speed="", memory="")
        self.bar.start()

    def update(self, record: Mapping[str, Any]) -> None:
        """Show the figures of a step."""
        if self.bar is not None:
            self.bar.update(
                self.task,
                completed=record["step"],
                loss=f"{record['loss']:.4f} · |g| {record['grad_norm']:.2f}",
                speed=speed_text(record["tokens_per_s"], record["mfu_fraction"]),
                memory=memory_text(record["memory"]),
            )

    def close(self) -> None:
        """Take the bar away."""
        if self.bar is not None:
            self.bar.stop()
            self.bar = None


def speed_text(tokens_per_s: float | None, mfu_fraction: float | None) -> str:
    """Tokens per second and the share of the peak.

    >>> speed_text(95123.4, 0.501), speed_text(812.0, None)
    ('95.1 K tokens/s · MFU 50.1 %', '812 tokens/s')
    """
    if tokens_per_s is None:
        return ""
    text = f"{format_count(round(tokens_per_s))} tokens/s"
    return text if mfu_fraction is None else f"{text} · MFU {mfu_fraction:.1%}".replace("%", " %")


def memory_text(memory: Mapping[str, int | None]) -> str:
    """Measured against predicted; nothing without a GPU."""
    reserved, predicted = memory["peak_reserved_bytes"], memory["predicted_reserved_bytes"]
    if reserved is None:
        return ""
    text = f"{format_gib(reserved)} GiB"
    return text if predicted is None else f"{text} of {format_gib(predicted)} predicted"

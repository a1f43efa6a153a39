"""What a person sees of a run: a bar on a terminal's standard error, plain lines elsewhere.

With -q there is neither, and no sentence.
"""

from __future__ import annotations

import math
import sys
import time
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar
from rich.text import Text

from sftplan.units import format_count, format_gib

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from rich.console import RenderableType

LINE_EVERY_S = 30.0  # at most, where there is no terminal: a log that is watched, not filled


class _Figured(Bar):
    """The bar, and the figures of the last step below it."""

    figures = ""

    def get_renderables(self) -> Iterable[RenderableType]:
        """The bar's row, then the figures."""
        yield self.make_tasks_table(self.tasks)
        yield Text(self.figures)


class Progress:
    """What a person sees of a run."""

    def __init__(self, *, quiet: bool, clock: Callable[[], float] = time.monotonic) -> None:
        self.quiet = quiet
        self.console = Console(stderr=True, highlight=False)
        self.clock = clock
        self.bar: _Figured | None = None
        self.total = self.first = 0
        self.begun = self.told = clock()

    def say(self, text: str) -> None:
        """One sentence, whether there is a bar or not."""
        if not self.quiet:
            self.console.print(escape(text), soft_wrap=True)

    def start(self, *, total: int, done: int) -> None:
        """Steps begin: show the bar on a terminal."""
        self.total, self.first = total, done
        self.begun = self.told = self.clock()
        if self.quiet or not sys.stderr.isatty():
            return
        self.bar = _Figured(
            TextColumn("training"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(),
            TextColumn("left"), console=self.console,
        )  # fmt: skip
        self.task = self.bar.add_task("", total=total, completed=done)
        self.bar.start()

    def update(self, record: Mapping[str, Any]) -> None:
        """Show the figures of a step."""
        if self.bar is not None:
            self.bar.figures = figures_text(record)
            self.bar.update(self.task, completed=record["step"])
        elif self._is_time(record["step"]):
            self.told = self.clock()
            left = duration_text(self._left_s(record["step"]))
            self.say(
                f"step {record['step']:,}/{self.total:,} · {figures_text(record)} · {left} left"
            )

    def _is_time(self, step: int) -> bool:
        return step >= self.total or self.clock() - self.told >= LINE_EVERY_S

    def _left_s(self, step: int) -> float:
        """As long as the steps of this run took in the mean."""
        return (self.clock() - self.begun) / max(step - self.first, 1) * (self.total - step)

    def close(self) -> None:
        """Leave the bar as it is."""
        if self.bar is not None:
            self.bar.stop()
            self.bar = None


def figures_text(record: Mapping[str, Any]) -> str:
    """Loss, gradient norm with its running standard deviation, clipping, speed, memory.

    >>> record = {"loss": 1.5, "grad_norm": 0.7, "grad_norm_variance": 0.01, "clip_fraction": 0.25,
    ...           "skipped_steps": 0, "tokens_per_s": 812.0, "mfu_fraction": None,
    ...           "memory": {"peak_reserved_bytes": None, "predicted_reserved_bytes": None}}
    >>> figures_text(record)
    'loss 1.5000 · |g| 0.70 ± 0.10 · clipped 25 % · 812 tokens/s'
    """
    skipped = record["skipped_steps"]
    parts = (
        f"loss {record['loss']:.4f}",
        f"|g| {record['grad_norm']:.2f} ± {math.sqrt(record['grad_norm_variance']):.2f}",
        f"clipped {100 * record['clip_fraction']:.0f} %",
        f"{skipped:,} skipped" if skipped else "",
        speed_text(record["tokens_per_s"], record["mfu_fraction"]),
        memory_text(record["memory"]),
    )
    return " · ".join(part for part in parts if part)


def duration_text(seconds: float) -> str:
    """Hours, minutes and seconds, as a clock shows them.

    >>> duration_text(59.6), duration_text(3725), duration_text(90_000)
    ('0:01:00', '1:02:05', '25:00:00')
    """
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}"


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
    """Measured against predicted; nothing without a GPU.

    >>> memory_text({"peak_reserved_bytes": 27 * 2**30, "predicted_reserved_bytes": 26 * 2**30})
    '27.00 GiB of 26.00 predicted'
    """
    reserved, predicted = memory["peak_reserved_bytes"], memory["predicted_reserved_bytes"]
    if reserved is None:
        return ""
    text = f"{format_gib(reserved)} GiB"
    return text if predicted is None else f"{text} of {format_gib(predicted)} predicted"

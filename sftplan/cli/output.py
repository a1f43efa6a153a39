"""What reaches the terminal: the answer on standard output, all talk on standard error."""

from __future__ import annotations

import json
import os
import sys
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from sftplan.report.style import Style


_ANSWERED = "sftplan.answered"  # in what click's contexts share


def has_answered(context: click.Context) -> bool:
    """Whether the one JSON document is printed already."""
    return _ANSWERED in context.meta


def print_json(document: Mapping[str, object] | Sequence[object]) -> None:
    """The one JSON document of `--json`; NaN and infinities are a bug of ours, not output."""
    context = click.get_current_context(silent=True)
    if context is not None:
        context.meta[_ANSWERED] = True
    click.echo(json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False))


def print_text(text: str) -> None:
    """The answer for people, on standard output."""
    click.echo(text, color=use_colour())


def talk(message: str, *, quiet: bool = False) -> None:
    """Anything that is not the answer, on standard error."""
    if not quiet:
        click.echo(message, err=True)


def use_colour() -> bool:
    """Whether standard output is a terminal that wants colour."""
    if os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb":
        return False
    return sys.stdout.isatty()


def use_unicode() -> bool:
    """Whether standard output can show block characters."""
    return (sys.stdout.encoding or "").lower().replace("-", "") in ("utf8", "utf16", "utf32")


def terminal_style() -> Style:
    """What standard output can show."""
    from sftplan.report.style import Style

    return Style(colour=use_colour(), unicode=use_unicode())

"""`sftplan show`: print a file that sftplan wrote."""

from __future__ import annotations

import json

import click

from sftplan.cli.help import command
from sftplan.cli.options import common_options
from sftplan.cli.output import print_json, print_text, terminal_style
from sftplan.errors import UsageError


@command(
    "show",
    examples=["sftplan show plan.json", "sftplan show plan.json -q", "sftplan show run/run.json"],
)
@click.argument("file")
@common_options
def show(file: str, *, as_json: bool, quiet: bool, verbose: int) -> None:
    """Print a file that sftplan wrote."""
    from sftplan.plan.file import plan_document, read_json, read_plan
    from sftplan.report.text import render_plan_screen, verdict_line

    _, parsed = read_json(file)
    kind = parsed.get("format")
    if not isinstance(kind, str) or not kind.startswith("sftplan."):
        message = f"{file}: not a file of sftplan: format is {kind!r}"
        raise UsageError(message)
    if kind != "sftplan.plan":
        if as_json:
            print_json(parsed)
        else:
            print_text(json.dumps(parsed, indent=2, ensure_ascii=False))
        return
    plan = read_plan(file)
    style = terminal_style()
    if as_json:
        print_json(plan_document(plan))
    elif quiet:
        print_text(verdict_line(plan, style))
    else:
        print_text(render_plan_screen(plan, style, path=None, verbose=verbose > 0))

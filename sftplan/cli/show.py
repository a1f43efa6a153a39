"""`sftplan show`: print a file that sftplan wrote."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import click

from sftplan.cli.help import command
from sftplan.cli.options import common_options, option
from sftplan.cli.output import print_json, print_text, talk, terminal_style
from sftplan.errors import UsageError

if TYPE_CHECKING:
    from sftplan.plan.record import Plan
    from sftplan.report.style import Style


@command(
    "show",
    examples=[
        "sftplan show plan.json",
        "sftplan show plan.json --memory",
        "sftplan show plan.json --html memory.html",
        "sftplan show runs/first",
    ],
)
@click.argument("file")
@option("--memory", is_flag=True, group="Pictures",
        help="Draw a plan's memory over one step in the terminal.")  # fmt: skip
@option("--html", metavar="FILE", group="Pictures",
        help="Write a plan's memory over one step as a page with a picture.")  # fmt: skip
@common_options
def show(
    file: str, *, memory: bool, html: str | None, as_json: bool, quiet: bool, verbose: int
) -> None:
    """Print a file that sftplan wrote."""
    from sftplan.plan.file import plan_document, read_json, read_plan
    from sftplan.report.text import render_plan_screen, verdict_line

    if Path(file).is_dir():  # of a run
        file = str(Path(file, "run.json"))
    _, parsed = read_json(file)
    kind = parsed.get("format")
    if not isinstance(kind, str) or not kind.startswith("sftplan."):
        message = f"{file}: not a file of sftplan: format is {kind!r}"
        raise UsageError(message)
    if kind != "sftplan.plan":
        if memory or html is not None:
            message = f"{file}: --memory and --html draw plans, this is {kind}"
            raise UsageError(message)
        if as_json:
            print_json(parsed)
        else:
            print_text(_text(kind, parsed, file))
        return
    plan = read_plan(file)
    style = terminal_style()
    if html is not None:
        _write_page(plan, file, html)
        talk(f"wrote {click.format_filename(html)}", quiet=quiet)
    if memory and not as_json:
        print_text(_chart(plan, style))
        return
    if as_json:
        print_json(plan_document(plan))
    elif quiet:
        print_text(verdict_line(plan, style))
    else:
        print_text(render_plan_screen(plan, style, path=None, verbose=verbose > 0))


def _text(kind: str, parsed: dict[str, object], file: str) -> str:
    """As the command that wrote it showed it, where that is more than its JSON."""
    from sftplan.report.launch import run_text
    from sftplan.report.verification import verification_text

    if kind == "sftplan.verification":
        return verification_text(parsed)
    if kind == "sftplan.run" and {"steps", "tokens"} <= parsed.keys():  # it has reached its end
        return run_text(parsed, str(Path(file).parent))
    return json.dumps(parsed, indent=2, ensure_ascii=False)


def _chart(plan: Plan, style: Style) -> str:
    from sftplan.plan.timeline import plan_timeline
    from sftplan.report.timeline import render_chart

    return render_chart(plan_timeline(plan), style, width=shutil.get_terminal_size().columns)


def _write_page(plan: Plan, file: str, html: str) -> None:
    from sftplan.plan.file import write_text
    from sftplan.plan.timeline import plan_timeline
    from sftplan.report.timeline import Panel, render_page

    panel = Panel(
        title="Predicted", timeline=plan_timeline(plan), limit_bytes=plan.memory.gpu.capacity_bytes
    )
    write_text(render_page(f"Memory over one step: {file}", [panel]), html)

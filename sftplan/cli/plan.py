"""`sftplan plan`: choose a strategy, show why, write it down."""

from __future__ import annotations

import sys
from typing import Any

import click

import sftplan.api
from sftplan.cli.help import command
from sftplan.cli.options import (
    common_options,
    data_options,
    knob_options,
    model_options,
    option,
    targets_option,
)
from sftplan.cli.output import print_json, print_text, talk, terminal_style
from sftplan.errors import ExitCode


def invocation() -> list[str]:
    """The command line as one would type it again."""
    return ["sftplan", *sys.argv[1:]]


@command(
    "plan",
    examples=[
        "sftplan plan --model gpt2-large --seq 1024 --hardware h200-sxm",
        "sftplan plan --model llama-3-8b --seq 4096 --hardware a100-80gb-sxm --gpus 8",
        "sftplan plan --model qwen2.5-0.5b --seq 2048 --data train.jsonl --epochs 3 --json",
    ],
)
@model_options(required=True)
@knob_options
@data_options
@targets_option
@option("--out", metavar="FILE", default="plan.json", group="Output",
        help="Where the plan is written; plan.json.")  # fmt: skip
@option("--no-out", is_flag=True, group="Output", help="Write no file.")
@common_options
def plan(
    *, out: str, no_out: bool, as_json: bool, quiet: bool, verbose: int, **request: Any
) -> ExitCode:
    """Choose a strategy, show why, and write it as a plan."""
    from sftplan.plan.file import plan_document, write_plan
    from sftplan.report.text import render_plan_screen, verdict_line

    made = sftplan.api.plan(command=invocation(), **request)
    if not no_out:
        write_plan(made, out)
    style = terminal_style()
    if as_json:
        print_json(plan_document(made))
    elif quiet:
        print_text(verdict_line(made, style))
    else:
        path = None if no_out else click.format_filename(out)
        print_text(render_plan_screen(made, style, path=path, verbose=verbose > 0))
    if as_json and not no_out:
        talk(f"wrote {click.format_filename(out)}", quiet=quiet)
    return ExitCode.OK if made.fits else ExitCode.INFEASIBLE

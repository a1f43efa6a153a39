"""`sftplan verify`: measure a plan in a dry run and judge its prediction."""

from __future__ import annotations

import json

import click

import sftplan.api
from sftplan.cli.help import command
from sftplan.cli.options import common_options, option
from sftplan.cli.output import print_json, print_text
from sftplan.errors import ExitCode


@command(
    "verify",
    examples=[
        "sftplan verify plan.json",
        "sftplan verify plan.json --no-gpu",
        "sftplan verify plan.json --as rtx-4090 --steps 10",
    ],
)
@click.argument("plan")
@option("--steps", type=click.IntRange(min=1), group="Run", help="Steps that are measured.")
@option("--no-gpu", is_flag=True, group="Run", help="Trace the real model without a GPU.")
@option("--as", "rehearse", metavar="PROFILE", group="Run",
        help="Rehearse a smaller card on this bigger one.")  # fmt: skip
@common_options
def verify(
    plan: str,
    *,
    steps: int | None,
    no_gpu: bool,
    rehearse: str | None,
    as_json: bool,
    quiet: bool,
    verbose: int,
) -> ExitCode:
    """Measure a plan in a dry run and judge its prediction."""
    from sftplan.plan.file import document, read_plan

    judged = sftplan.api.verify(read_plan(plan), steps=steps, no_gpu=no_gpu, rehearse=rehearse)
    found = document(judged)
    assert isinstance(found, dict)
    if as_json:
        print_json(found)
    else:
        print_text(str(found["judgement"]) if quiet else json.dumps(found, indent=2))
    return ExitCode.OK if found["ok"] else ExitCode.MISPREDICTED

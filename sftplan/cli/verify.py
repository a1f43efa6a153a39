"""`sftplan verify`: measure a plan in a dry run and judge its prediction."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import click

import sftplan.api
from sftplan.cli.help import command
from sftplan.cli.options import common_options, option
from sftplan.cli.output import print_json, print_text
from sftplan.errors import ExitCode

if TYPE_CHECKING:
    from sftplan.plan.record import Plan


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
@option("--data", metavar="FILE", group="Run", help="The longest rows of this data first.")
@option("--snapshot", metavar="FILE", group="Run", help="Keep PyTorch's memory snapshot.")
@common_options
def verify(
    plan: str,
    *,
    steps: int | None,
    no_gpu: bool,
    rehearse: str | None,
    data: str | None,
    snapshot: str | None,
    as_json: bool,
    quiet: bool,
    verbose: int,
) -> ExitCode:
    """Measure a plan in a dry run and judge its prediction; the verdict stays beside the plan's file."""
    from sftplan.plan.file import document, read_plan
    from sftplan.report.verification import verification_text

    read = read_plan(plan)
    judged = sftplan.api.verify(
        read, steps=steps, no_gpu=no_gpu, rehearse=rehearse, data=data, snapshot=snapshot
    )
    found = document(judged)
    assert isinstance(found, dict)
    if rehearse is None:
        _keep(read, plan, found)
    if as_json:
        print_json(found)
    else:
        print_text(str(found["judgement"]) if quiet else verification_text(found))
    return ExitCode.OK if found["ok"] else ExitCode.MISPREDICTED


def _keep(plan: Plan, path: str, found: dict[str, object]) -> None:
    """Beside the plan's file, for `launch`; a trace takes no measured verdict's place."""
    from sftplan.plan.file import write_text
    from sftplan.plan.verified import verification_beside, verification_file

    if path == "-" or (found["mode"] == "trace" and verification_beside(plan, path)):
        return
    write_text(json.dumps(found, indent=2, ensure_ascii=False) + "\n", verification_file(path))

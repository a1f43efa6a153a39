"""`sftplan verify`: measure a plan in a dry run and judge its prediction."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import click

import sftplan.api
from sftplan.cli.help import command
from sftplan.cli.options import common_options, data_options, option, share_option
from sftplan.cli.output import print_json, print_text, talk
from sftplan.errors import ExitCode

if TYPE_CHECKING:
    from sftplan.cost.timeline import Timeline
    from sftplan.plan.record import Plan


@command(
    "verify",
    examples=[
        "sftplan verify plan.json",
        "sftplan verify plan.json --no-gpu --diff",
        "sftplan verify plan.json --as rtx-4090 --steps 10",
    ],
)
@click.argument("plan")
@option("--steps", type=click.IntRange(min=1), group="Run",
        help="Steps that are timed; else 4 to 12, and rounds more where they are uneven.")  # fmt: skip
@option("--no-gpu", is_flag=True, group="Run", help="Trace the real model without a GPU.")
@option("--diff", is_flag=True, group="Run",
        help="With --no-gpu: name the operators where model and trace differ.")  # fmt: skip
@option("--as", "rehearse", metavar="PROFILE", group="Run",
        help="Rehearse a smaller card on this bigger one.")  # fmt: skip
@option("--data", metavar="FILE", group="Run", help="The longest rows of this data first.")
@data_options
@share_option(
    "--memory-tolerance", group="Judgement", help="Error that a prediction of memory may have; 2%."
)
@share_option("--time-tolerance", group="Judgement",
              help="Error that the prediction of the step time may have; 10%.")  # fmt: skip
@option("--snapshot", metavar="FILE", group="Run", help="Keep PyTorch's memory snapshot.")
@option("--html", metavar="FILE", group="Run",
        help="Write predicted and measured memory over one step as a page with pictures.")  # fmt: skip
@common_options
def verify(
    plan: str,
    *,
    steps: int | None,
    no_gpu: bool,
    diff: bool,
    rehearse: str | None,
    data: str | None,
    tokenizer: str | None,
    skip_bad: int | None,
    memory_tolerance: float | None,
    time_tolerance: float | None,
    snapshot: str | None,
    html: str | None,
    as_json: bool,
    quiet: bool,
    verbose: int,
) -> ExitCode:
    """Measure a plan in a dry run and judge its prediction.

    The verdict stays beside the plan's file, for launch.
    """
    from sftplan.plan.file import document, read_plan
    from sftplan.report.verification import verification_text

    read = read_plan(plan)
    judged = sftplan.api.verify(
        read, steps=steps, no_gpu=no_gpu, diff=diff, rehearse=rehearse, data=data, tokenizer=tokenizer,
        skip_bad=skip_bad or 0, snapshot=snapshot, memory_tolerance=memory_tolerance,
        time_tolerance=time_tolerance,
    )  # fmt: skip
    found = document(judged)
    assert isinstance(found, dict)
    if rehearse is None:
        _keep(read, plan, found)
    if html is not None:
        _write_page(read, judged.timeline, verification_text(found), html)
        talk(f"wrote {click.format_filename(html)}", quiet=quiet)
    if as_json:
        print_json(found)
    else:
        print_text(str(found["judgement"]) if quiet else verification_text(found))
    return ExitCode.OK if found["ok"] else ExitCode.MISPREDICTED


def _write_page(plan: Plan, measured: Timeline | None, text: str, html: str) -> None:
    """Both pictures to one scale, and what the terminal says."""
    from sftplan.plan.file import write_text
    from sftplan.plan.timeline import plan_timeline
    from sftplan.report.timeline import Panel, render_page

    capacity = plan.memory.gpu.capacity_bytes
    panels = [Panel(title="Predicted", timeline=plan_timeline(plan), limit_bytes=capacity)]
    if measured is not None:
        panels.append(Panel(title="Measured", timeline=measured, limit_bytes=capacity))
    write_text(
        render_page(f"Memory over one step of {plan.inputs.model.name}", panels, screen=text), html
    )


def _keep(plan: Plan, path: str, found: dict[str, object]) -> None:
    """Beside the plan's file, for `launch`; a trace takes no measured verdict's place."""
    from sftplan.plan.file import write_text
    from sftplan.plan.verified import verification_beside, verification_file

    if path == "-" or (found["mode"] == "trace" and verification_beside(plan, path)):
        return
    write_text(json.dumps(found, indent=2, ensure_ascii=False) + "\n", verification_file(path))

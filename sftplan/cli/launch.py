"""`sftplan launch`: the real masked fine-tuning run of a plan."""

from __future__ import annotations

from typing import Any

import click

import sftplan.api
from sftplan.cli.help import command
from sftplan.cli.options import common_options, knob_options, model_options, option
from sftplan.cli.output import print_json
from sftplan.cli.plan import invocation
from sftplan.errors import InfeasibleError, UsageError


@command(
    "launch",
    examples=[
        "sftplan launch plan.json --data train.jsonl --out runs/first",
        "sftplan launch --model gpt2-large --seq 1024 --data train.jsonl --out runs/first",
        "sftplan launch plan.json --data train.jsonl --out runs/first --resume",
    ],
)
@click.argument("plan", required=False)
@model_options(required=False)
@knob_options
@option("--out", metavar="DIR", required=True, group="Run", help="Where everything is written.")
@option("--resume", is_flag=True, group="Run", help="Go on from the last complete checkpoint.")
@option("--no-verify", is_flag=True, group="Run", help="Train without a dry run before.")
@common_options
def launch(
    plan: str | None,
    *,
    out: str,
    resume: bool,
    no_verify: bool,
    as_json: bool,
    quiet: bool,
    verbose: int,
    **request: Any,
) -> None:
    """Train: the real masked fine-tuning run of a plan."""
    from sftplan.plan.file import document, read_plan

    data = request["data"]
    if data is None:
        message = "no --data: there is nothing to train on"
        raise UsageError(message)
    if plan is not None:
        made = read_plan(plan)
        knobs = [name for name, value in request.items() if value is not None and name != "data"]
        if knobs:
            message = f"{plan} has decided --{knobs[0].replace('_', '-')} already"
            raise UsageError(message, "leave PLAN out to plan again")
    elif request["model"] is None or request["seq_len"] is None:
        message = "neither a PLAN nor --model and --seq"
        raise UsageError(message, "`sftplan plan` writes a plan")
    else:
        made = sftplan.api.plan(command=invocation(), **request)
    if not made.fits:
        message = "the plan does not fit"
        raise InfeasibleError(message, "`sftplan plan` shows what would")
    options = {"resume": resume, "no_verify": no_verify, "quiet": quiet, "verbose": verbose}
    result = sftplan.api.launch(made, data=data, out=out, **options)
    if as_json:
        found = document(result)
        assert isinstance(found, dict)
        print_json(found)

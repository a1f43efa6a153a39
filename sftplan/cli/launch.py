"""`sftplan launch`: the real masked fine-tuning run of a plan."""

from __future__ import annotations

import os
import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

import sftplan.api
from sftplan.cli.help import command
from sftplan.cli.options import common_options, knob_options, model_options, option
from sftplan.cli.output import print_json, print_text, talk
from sftplan.cli.plan import invocation
from sftplan.errors import InfeasibleError, MispredictedError, UsageError
from sftplan.units import format_gib

if TYPE_CHECKING:
    from collections.abc import Callable

    from sftplan.plan.record import Plan

RUN_OPTIONS = [
    option("--learning-rate", type=float, group="Training", help="Highest learning rate; 2e-5."),
    option("--min-learning-rate", type=float, group="Training",
           help="Where the cosine decay ends; 0."),
    option("--warmup", type=float, group="Training",
           help="Share of the steps with a rising rate, or from 1 on their number; 0.03."),
    option("--weight-decay", type=float, group="Training",
           help="Decoupled, not on norms and biases; 0.01."),
    option("--seed", type=int, group="Training", help="Of the order and of dropout; 0."),
    option("--train-on-prompt", is_flag=True, default=None, group="Training",
           help="Every token counts, not only the responses'."),
    option("--random-weights", is_flag=True, default=None, group="Training",
           help="Start from scratch instead of the model's weights."),
    option("--tokenizer", metavar="DIR", group="Training",
           help="A folder with a tokenizer, instead of the model's."),
    option("--skip-bad", type=click.IntRange(min=0), group="Training",
           help="How many bad examples may be left out; 0."),
    option("--spike", type=float, group="Training",
           help="Stop at a loss of so many standard deviations above its mean; off."),
    option("--eval-split", type=float, group="Run",
           help="Share of the examples that is held out and evaluated; 0."),
    option("--eval-every", type=click.IntRange(min=0), group="Run",
           help="Steps between evaluations; with each checkpoint."),
    option("--save-every", type=click.IntRange(min=0), group="Run",
           help="Steps between checkpoints, 0 for none; 500."),
    option("--keep", type=click.IntRange(min=1), group="Run",
           help="Checkpoints that are kept beside the best one; 2."),
    option("--max-steps", type=click.IntRange(min=0), group="Run",
           help="Stop after so many steps; --resume goes on."),
    option("--tracker", metavar="NAME", group="Run",
           help="Also log to tensorboard, wandb, trackio ... through accelerate."),
    option("--nvme-path", metavar="DIR", group="Run",
           help="Where --offload nvme keeps its states; /local_nvme."),
    option("--hosts", metavar="A,B,...", group="Run",
           help="The plan's nodes; the same command on each, the first one leads."),
    option("--node-rank", type=click.IntRange(min=0), group="Run",
           help="Which of --hosts this machine is, from 0; found by its name or address."),
    option("--port", type=click.IntRange(1, 65534), group="Run",
           help="Where the processes meet, on the first host; 29500, on one machine any."),
    option("--cpu", is_flag=True, default=None, group="Run",
           help="Train on the processor, whatever the plan is for."),
]  # fmt: skip
RUN_NAMES = (
    "learning_rate", "min_learning_rate", "warmup", "weight_decay", "seed", "train_on_prompt",
    "random_weights", "tokenizer", "skip_bad", "spike", "eval_split", "eval_every", "save_every",
    "keep", "max_steps", "tracker", "nvme_path", "cpu",
    "hosts", "node_rank", "port",
)  # fmt: skip


def run_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """What a run decides beside its plan."""
    for decorate in reversed(RUN_OPTIONS):
        function = decorate(function)
    return function


@command(
    "launch",
    examples=[
        "sftplan launch --demo --out runs/demo",
        "sftplan launch plan.json --data train.jsonl --out runs/first",
        "sftplan launch --model gpt2-large --data train.jsonl --out runs/first",
        "sftplan launch plan.json --data train.jsonl --out runs/first --resume",
    ],
)
@click.argument("plan", required=False)
@model_options(required=False)
@knob_options
@option("--out", metavar="DIR", required=True, group="Run", help="Where everything is written.")
@option("--resume", is_flag=True, group="Run", help="Go on from the last complete checkpoint.")
@option("--no-verify", is_flag=True, group="Run", help="Train without a dry run before.")
@option(
    "--demo",
    is_flag=True,
    group="Run",
    help="Train a tiny model on our own examples, offline, on the processor.",
)
@run_options
@common_options
def launch(
    plan: str | None,
    *,
    out: str,
    resume: bool,
    no_verify: bool,
    demo: bool,
    as_json: bool,
    quiet: bool,
    verbose: int,
    **request: Any,
) -> None:
    """Train: the real masked fine-tuning run of a plan."""
    from sftplan.plan.file import document
    from sftplan.train.job import trains_on_prompt

    options = {name: request.pop(name) for name in RUN_NAMES}
    _check(out, options, resume=resume)
    if demo:
        made, data, options = _demo(plan, Path(out), request, options)
    else:
        made, data = _plan_of(plan, request, options, quiet=quiet), request["data"]
    options["train_on_prompt"] = trains_on_prompt(made, options.get("train_on_prompt"))
    if not made.fits:
        raise InfeasibleError(_misfit(made), "`sftplan plan` shows what would")
    _introduce(made, quiet=quiet)
    if options["cpu"]:
        talk("on the processor: no dry run, which measures a GPU", quiet=quiet or no_verify)
    elif made.inputs.hardware.num_nodes > 1:
        talk("several machines: no dry run, which measures one", quiet=quiet or no_verify)
    elif not (no_verify or resume):
        _verify_once(made, plan, data, options, quiet=quiet)
    options |= {"resume": resume, "no_verify": no_verify, "quiet": quiet, "verbose": verbose}
    with redirect_stdout(sys.stderr):  # libraries talk, too: DeepSpeed's logger does, when imported
        result = sftplan.api.launch(made, data=data, out=out, **options)
    found = document(result)
    assert isinstance(found, dict)
    if as_json:
        print_json(found)
    else:
        print_text(str(Path(out, "final")) if quiet else _summary(found, out))


def _check(out: str, options: dict[str, Any], *, resume: bool) -> None:
    """What can be wrong without a look at the data, before a dry run takes its time."""
    from sftplan.train.job import refuse_used_folder
    from sftplan.train.nodes import NODE_OPTIONS
    from sftplan.train.settings import settings_of

    settings_of({name: value for name, value in options.items() if name not in NODE_OPTIONS})
    if options["hosts"] is None:  # else the first machine makes the folder, whichever that is
        refuse_used_folder(Path(out), resume=resume)


def _introduce(plan: Plan, *, quiet: bool) -> None:
    """What is going to be trained, and what the plan warns of."""
    from sftplan.report.words import strategy_words

    talk(f"{plan.inputs.model.name}: {', '.join(strategy_words(plan.strategy))}", quiet=quiet)
    for warning in plan.warnings:
        talk(f"warning: {warning}", quiet=quiet)


def _plan_of(
    plan: str | None, request: dict[str, Any], options: dict[str, Any], *, quiet: bool
) -> Plan:
    """The plan in the file, or a new one."""
    from sftplan.plan.file import read_plan
    from sftplan.plan.request import option_name

    if request["data"] is None:
        message = "no --data: there is nothing to train on"
        raise UsageError(message, "--demo trains on examples of our own")
    if plan is not None:
        knobs = [name for name, value in request.items() if value is not None and name != "data"]
        if knobs:
            message = f"{plan} has decided {option_name(knobs[0])} already"
            raise UsageError(message, "leave PLAN out to plan again")
        return read_plan(plan)
    if request["model"] is None:
        message = "neither a PLAN nor --model"
        raise UsageError(message, "`sftplan plan` writes a plan")
    counting = _counting(options)
    if request["seq_len"] is None:
        request |= {"seq_len": _fitting_seq_len(request, counting, quiet=quiet)}
    return sftplan.api.plan(
        command=invocation(), train_on_prompt=options["train_on_prompt"], **request, **counting
    )


def _counting(options: dict[str, Any]) -> dict[str, Any]:
    """What of the run's options decides on how the data is read, in the plan and in the dry run."""
    return {"tokenizer": options["tokenizer"], "skip_bad": options["skip_bad"] or 0}


def _fitting_seq_len(request: dict[str, Any], counting: dict[str, Any], *, quiet: bool) -> int:
    """Without --seq: what holds the longest example."""
    from sftplan.data.lengths import fitting_seq_len
    from sftplan.facts.resolve import resolve_model

    found, longest = fitting_seq_len(
        request["data"], model=resolve_model(request["model"]), **counting
    )
    talk(f"--seq {found}: the longest example has {longest:,} tokens", quiet=quiet)
    return found


def _demo(
    plan: str | None, out: Path, request: dict[str, Any], options: dict[str, Any]
) -> tuple[Plan, str, dict[str, Any]]:
    """A plan for the demo's model; run options that are given hold, everything else is the demo's."""
    from sftplan.plan.request import option_name
    from sftplan.train.demo import DEMO_KNOBS, DEMO_SEQ_LEN, DEMO_SETTINGS, write_demo_model

    given = [
        name for name, value in request.items() if value is not None and name not in DEMO_KNOBS
    ]
    if plan is not None or given:
        what = "a PLAN" if plan is not None else option_name(given[0])
        message = f"--demo and {what} exclude each other"
        raise UsageError(message, "--demo has a model and a machine of its own")
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # on a busy machine, threads of tiny sums wait
    folder = out / "model"
    write_demo_model(folder)
    knobs = DEMO_KNOBS | {k: v for k, v in request.items() if v is not None}
    made = sftplan.api.plan(
        model=str(folder), seq_len=DEMO_SEQ_LEN, hardware=sftplan.api.REFERENCE_HARDWARE,
        gpus=1, command=invocation(), train_on_prompt=options["train_on_prompt"], **knobs,
    )  # fmt: skip
    chosen = DEMO_SETTINGS | {name: value for name, value in options.items() if value is not None}
    return made, str(knobs["data"]), chosen


def _verify_once(
    plan: Plan, path: str | None, data: str, options: dict[str, Any], *, quiet: bool
) -> None:
    """The dry run before, unless the verification beside the plan's file says that there was one."""
    from sftplan.plan.verified import verification_beside

    if path is not None and verification_beside(plan, path) is not None:
        talk("verified already", quiet=quiet)
        return
    talk("dry run first; --no-verify goes without", quiet=quiet)
    judged = sftplan.api.verify(plan, data=data, **_counting(options))
    if not judged.ok:
        message = f"the dry run: {judged.judgement}"
        raise MispredictedError(message, "--no-verify trains all the same")


def _summary(found: dict[str, Any], out: str) -> str:
    """What a person wants to know at the end."""
    from sftplan.report.launch import run_text

    return run_text(found, out)


def _misfit(plan: Plan) -> str:
    """What a plan that does not fit lacks: the host's memory, or the GPU's."""
    gpu, host = plan.memory.gpu, plan.memory.host
    there, needed, where = gpu.capacity_bytes, gpu.used_bytes, "GPU"
    if host.capacity_bytes is not None and host.peak_bytes > host.capacity_bytes:
        there, needed, where = host.capacity_bytes, host.peak_bytes, "host"
    return (
        f"the plan does not fit: it needs {format_gib(needed)} GiB of {where} memory, "
        f"{format_gib(there)} are there"
    )

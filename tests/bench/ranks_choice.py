"""Is the plan's choice the fastest on several GPUs? `python ranks_choice.py OUT.csv --gpus 2 [--models gpt2-large:4]`.

For each model the plan for packed instruction data on this machine, and beside it the next best by
prediction (`:N` of them, one decision changed or the micro-batch as well), each measured by a dry run of
its own. All have as many rows in a step: the share is the seconds of the fastest's over those of the choice's.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from ranks_apart import Deadline, append, rows_of, table
from ranks_cases import machine
from verify_cases import Only, lengths_of

from sftplan.cost.evaluate import Evaluator
from sftplan.detect.gpus import detect
from sftplan.facts.hardware import Hardware
from sftplan.facts.resolve import resolve_model
from sftplan.facts.strategy import Attention, Checkpointing, Loss, Precision, Strategy
from sftplan.facts.workload import Workload
from sftplan.plan.build import plan_from_choice
from sftplan.plan.record import Plan
from sftplan.search.choose import choose
from sftplan.search.coster import judge
from sftplan.verify.profile import measure_here

SEQ_LEN, GLOBAL_BATCH = 1024, 128  # examples: about 50 packed rows
STEPS = 6  # that are timed
LONGEST_S = 60.0
LIMIT_S = 200.0
MODELS = "gpt2-large:5,llama-2-7b:2,gpt2-xl:2"
KNOBS = ("zero", "offload", "precision", "checkpointing", "attention", "loss", "compile", "micro_batch", "accumulation")  # fmt: skip
COLUMNS = ("name", "status", "model", "chosen", "gpus", "hardware", *KNOBS,
           "step_s", "step_s_predicted", "used", "used_predicted", "share", "took_s")  # fmt: skip


def changes(chosen: Strategy, rows: int) -> Iterator[Strategy]:
    """The choice with one decision changed, each with every micro-batch; `rows` of one GPU in a step."""
    others: list[dict[str, Any]] = [{}]
    others += [{"zero": zero} for zero in range(4)]
    others += [{"checkpointing": each} for each in Checkpointing]
    others += [{"loss": each} for each in (Loss.RESPONSE, Loss.CHUNKED)]
    others += [{"precision": each} for each in (Precision.BF16_MASTER, Precision.BF16_MIXED)]
    others += [{"compile": each} for each in (True, False)]
    others += [{"attention": each} for each in (Attention.VARLEN, Attention.SDPA)]
    for micro_batch in (n for n in range(1, rows + 1) if rows % n == 0):
        for other in others:
            beside = replace(
                chosen, **other, micro_batch=micro_batch, accumulation=rows // micro_batch
            )
            if not (beside.zero == 3 and beside.compile):  # hooks gather: no such step exists
                yield beside


def plans(name: str, hardware: Hardware, beside: int) -> list[Plan]:
    """The choice, then what comes next by prediction."""
    model = resolve_model(name)
    workload = Workload(
        seq_len=SEQ_LEN, global_batch=GLOBAL_BATCH, lengths=lengths_of(SEQ_LEN), num_examples=2_000_000
    )  # fmt: skip
    choice = choose(model, hardware, workload, {}, margin=0.05, minimize="time")
    gpus = hardware.num_gpus
    evaluator = Evaluator(model, workload, num_gpus=gpus, gpus_per_node=gpus)
    rows = choice.strategy.micro_batch * choice.strategy.accumulation
    others = {knobs_of(other): other for other in changes(choice.strategy, rows)}
    others.pop(knobs_of(choice.strategy), None)
    found = {other: evaluator.estimate(other, hardware) for other in others.values()}
    fitting = [other for other in found if judge(found[other], hardware, 0.0) == "fits"]
    nearest = sorted(fitting, key=lambda other: found[other].time.step_s or 0.0)[:beside]
    both = [(choice.strategy, choice.estimate), *((other, found[other]) for other in nearest)]
    return [
        plan_from_choice(
            Only(strategy, estimate), model=model, hardware=hardware, workload=workload, pinned=list(KNOBS),
            margin=0.05, minimize="time", command=["ranks_choice.py", name],
        )
        for strategy, estimate in both
    ]  # fmt: skip


def knobs_of(strategy: Any) -> tuple[str, ...]:
    """What tells two of them apart."""
    return tuple(str(getattr(strategy, knob)) for knob in KNOBS)


def measured(plan: Plan, *, chosen: bool) -> dict[str, Any]:
    """One row."""
    found = measure_here(plan, steps=STEPS, timeout_s=LIMIT_S)
    row = {
        "model": plan.inputs.model.name, "chosen": chosen, "gpus": plan.inputs.hardware.num_gpus,
        "hardware": plan.inputs.hardware.name, **{knob: getattr(plan.strategy, knob) for knob in KNOBS},
        "step_s_predicted": plan.time.step_s,
        "used_predicted": plan.memory.gpu.used_bytes,
    }  # fmt: skip
    if "out_of_memory" in found:
        return row | {"status": "out of memory"}
    return row | {"step_s": found["step_s"], "used": found["used_bytes"]}


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--gpus", type=int, default=2)
    parser.add_argument("--models", default=MODELS, help="name:how many beside, with commas")
    parser.add_argument("--seconds", type=float, default=560.0)
    parser.add_argument("--dry", metavar="PROFILE", help="only say what would be measured there")
    args = parser.parse_args()
    deadline = Deadline(args.seconds)
    found = None if args.dry else detect()
    hardware = machine(args.dry or found.name, args.gpus, None if found is None else found.host)
    rows: list[dict[str, Any]] = []
    for asked in args.models.split(","):
        name, _, beside = asked.partition(":")
        made = plans(name, hardware, int(beside or 3))
        named = {f"{name} {' '.join(knobs_of(plan.strategy))}": plan for plan in made}
        if args.dry:
            for words, plan in named.items():
                print(
                    f"{words}: {plan.time.tokens_per_s:,.0f} tokens/s, {plan.memory.gpu.used_bytes:,} bytes"
                )
            continue
        runs = {
            words: lambda plan=plan, first=made[0]: measured(plan, chosen=plan is first)
            for words, plan in named.items()
        }
        ours = list(rows_of(runs, deadline, longest_s=LONGEST_S))
        best = min((row["step_s"] for row in ours if "step_s" in row), default=None)
        for row in ours:
            row["share"] = best / row["step_s"] if "step_s" in row else None
            append(args.out, COLUMNS, row)
        rows += ours
    if rows:
        table(("name", "status", "chosen", "step_s", "step_s_predicted", "share"), rows)


if __name__ == "__main__":
    main()

"""Under memory caps: does the plan chosen run, and is anything beside it faster?

For each cap and model the plan is made for the H200 with that much memory; PyTorch may then reserve the cap
less the context, and the plan runs 20 steps. Beside it are tried, in the order of their predicted step time
per token: the next best of every branch of the search's grid (precision, checkpointing, loss, attention,
compilation, micro-batch) that is not predicted to need more than the cap by a tenth. `--gib 80,32` takes some of
the caps: whether plans run does not change where several caps are tried at once on one GPU, their speed does.
"""

from __future__ import annotations

import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from typing import Any

from verify_cases import Case, capped, lengths_of, plan_of
from verify_h200 import MEASURED, PLANNERS, Table, row_of, run_jobs

from sftplan.facts.resolve import resolve_model
from sftplan.facts.workload import Workload
from sftplan.plan.build import plan_from_choice
from sftplan.plan.record import Plan
from sftplan.plan.request import read_pins
from sftplan.search.choose import choose
from sftplan.units import GIB

CAPS_GIB = (8, 10, 12, 16, 24, 32, 40, 48, 80)
MODELS = (
    ("gpt2", 1024),
    ("gpt2-medium", 1024),
    ("smollm2-360m", 2048),
    ("pythia-410m", 2048),
    ("opt-350m", 1024),
)
STEPS = 20
TOKENS_PER_STEP = 65_536
COLUMNS = ("name", "cap_gib", "model", "seq_len", "chosen", "micro_batch", "accumulation", "precision", "checkpointing",
           "attention", "loss", "packing", "compile", "verdict", "tokens_per_s_predicted")  # fmt: skip
PINS = read_pins({"zero": 0, "offload": "none", "optimizer": "adamw"})
SLACK = 1.1  # of the cap, by prediction: what needs more is not tried
KNOBS = (
    "precision",
    "checkpointing",
    "attention",
    "loss",
    "packing",
    "compile",
    "micro_batch",
    "accumulation",
)


def chosen_plan(job: tuple[float, str, int]) -> Plan:
    """What `plan` chooses under a cap, on packed instruction data, without what one GPU cannot launch."""
    gib, name, seq_len = job
    model, machine = resolve_model(name), capped(gib)
    workload = Workload(
        seq_len=seq_len,
        global_batch=TOKENS_PER_STEP // seq_len,
        lengths=lengths_of(seq_len),
        num_examples=100_000,
    )
    choice = choose(model, machine, workload, dict(PINS), margin=0.05, minimize="time")
    lean = replace_company(choice)
    return plan_from_choice(
        lean, model=model, hardware=machine, workload=workload, pinned=["zero", "offload"], margin=0.05,
        minimize="time", command=["verify_h200.py", "--caps"],
    )  # fmt: skip


def replace_company(choice: Any) -> Any:
    """The choice with its neighbours, without remedies and reasons, which take longest to find."""
    from verify_cases import Only

    return Only(choice.strategy, choice.estimate, choice.verdict)


def beside(job: tuple[Plan, float, str, int, int]) -> list[Plan]:
    """Plans of other points of the grid, fastest by prediction first, one per branch."""
    plan, gib, name, seq_len, most = job
    chosen = {knob: getattr(plan.strategy, knob) for knob in KNOBS}
    rows = chosen["micro_batch"] * chosen["accumulation"]
    base = Case(model=name, seq_len=seq_len, allocator=plan.strategy.allocator, **{k: str(v) if isinstance(v, str) else v for k, v in chosen.items()})  # fmt: skip
    changes: list[dict[str, Any]] = [{"precision": p} for p in ("bf16-master", "bf16-mixed")]
    changes += [{"checkpointing": c} for c in ("none", "selective", "full")]
    changes += [{"loss": loss} for loss in ("response", "chunked")]
    changes += [{"compile": compiled} for compiled in (True, False)]
    micros = [m for m in range(1, rows + 1) if rows % m == 0]
    changes += [{"micro_batch": m, "accumulation": rows // m} for m in micros]
    changes += [
        {"checkpointing": c, "micro_batch": m, "accumulation": rows // m}
        for c in ("none", "selective", "full")
        for m in micros
    ]
    found: dict[str, Plan] = {}
    for change in changes:
        case = replace(base, **change)
        if case.name == base.name or case.name in found:
            continue
        made = plan_of(case, capped(gib))
        if made.memory.gpu.used_bytes <= gib * GIB * SLACK:
            found[case.name] = made
    ordered = sorted(found.values(), key=lambda p: -(p.time.tokens_per_s or 0.0))
    return ordered[:most]


def measure_caps(args: Any) -> None:
    """All caps and models: first what was chosen, then what lies beside it."""
    deadline = time.monotonic() + args.seconds
    table = Table(args.out, (*COLUMNS, *MEASURED), args.done)
    caps = [int(gib) for gib in args.gib.split(",")] if args.gib else CAPS_GIB
    points = [(gib, model, seq) for gib in caps for model, seq in MODELS]
    with ProcessPoolExecutor(PLANNERS) as pool:
        plans = list(pool.map(chosen_plan, points))
        fitting = [(plan, *point) for plan, point in zip(plans, points, strict=True) if plan.fits]
        _run(table, [(point[0], point[1:], True) for point in fitting], deadline)
        for plan, point in zip(plans, points, strict=True):
            if not plan.fits:
                print(f"{point}: nothing fits, {plan.memory.gpu.used_bytes / GIB:.2f} GiB at least")
        if not args.beside:
            report(table)
            return
        others = pool.map(beside, [(*point, args.beside) for point in fitting])
        groups = [
            (plan, point[1:], False)
            for point, found in zip(fitting, others, strict=True)
            for plan in found
        ]
        _run(table, groups, deadline)
    report(table)


def _run(table: Table, groups: list[tuple[Plan, tuple[Any, ...], bool]], deadline: float) -> None:
    jobs, known = [], {}
    for number, (plan, point, is_chosen) in enumerate(groups):
        gib, model, seq = point
        strategy = plan.strategy
        words = " ".join(str(getattr(strategy, knob)) for knob in KNOBS)
        name = f"{gib} GiB {model} {seq} {words}"
        if name in table.rows:
            continue
        gpu = plan.memory.gpu
        cap = gpu.capacity_bytes - (gpu.used_bytes - gpu.peak_reserved_bytes)
        jobs.append(
            {
                "id": f"cap-{number}",
                "plan": plan,
                "steps": STEPS if is_chosen else 6,
                "cap_bytes": cap,
            }
        )
        known[f"cap-{number}"] = {
            "name": name, "cap_gib": gib, "model": model, "seq_len": seq, "chosen": is_chosen, "verdict": plan.verdict,
            "tokens_per_s_predicted": plan.time.tokens_per_s, **{knob: getattr(strategy, knob) for knob in KNOBS},
        }  # fmt: skip

    def done(job: dict[str, Any], found: dict[str, Any]) -> None:
        table.add(known[job["id"]] | row_of(job["plan"], found))

    run_jobs(jobs, deadline, done)


def report(table: Table) -> None:
    """How many ran, and how near the best each chosen one is."""
    rows = list(table.rows.values())
    chosen = [row for row in rows if row["chosen"] == "True"]
    ran = [row for row in chosen if row["status"] == "ok"]
    print(f"{len(ran)} of {len(chosen)} chosen plans ran; {len(CAPS_GIB) * len(MODELS)} points")
    shares = []
    for row in ran:
        alike = [
            r
            for r in rows
            if (r["cap_gib"], r["model"]) == (row["cap_gib"], row["model"]) and r["status"] == "ok"
        ]
        best = max(alike, key=lambda r: float(r["tokens_per_s"]))
        shares.append(float(row["tokens_per_s"]) / float(best["tokens_per_s"]))
        if shares[-1] < 0.97:
            print(f"{shares[-1]:.3f} of the best: {row['name']}; best {best['name']}")
    if shares:
        print(f"of the best tried: mean {sum(shares) / len(shares):.3f}, worst {min(shares):.3f}")

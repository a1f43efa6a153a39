"""Under memory caps: does the plan chosen run, and is anything beside it faster?

For each cap and model the plan is made for the GPU here with that much memory. `--kept`: PyTorch may then
reserve the cap less the context, and the plan runs 20 steps. Else everything chosen and all points of the grid
(verify_grid.py) that are predicted to come within `--near 0.03` of the fastest under some cap are run once
without one; best under a cap is the fastest of a model that ran under it or was measured to need no more.
`--gib 80,32` and `--models gpt2` take some: whether plans run does not change where several are tried at once on
one GPU, their speed does.
With `--judge` nothing runs: the choices of this version for the GPU of `--profile` among the rows of OUT.csv,
which may be a published file of those that were kept to their caps. `--margin 0.01` plans with another share
kept free.
"""

from __future__ import annotations

import csv
import math
import time
from concurrent.futures import Executor, ProcessPoolExecutor
from functools import partial
from itertools import zip_longest
from statistics import fmean
from typing import Any

from verify_cases import MARGIN, Case, capped, lengths_of, machine_of, plan_of
from verify_grid import near_the_fastest
from verify_h200 import MEASURED, PLANNERS, Table, row_of, run_jobs
from verify_judge import QUANTITIES, again, print_errors

from sftplan.facts.hardware import Hardware
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
GRID_STEPS = 8  # that are timed
TOKENS_PER_STEP = 65_536
COLUMNS = ("name", "cap_gib", "model", "seq_len", "chosen", "micro_batch", "accumulation", "precision", "checkpointing",
           "attention", "loss", "packing", "compile", "verdict", "tokens_per_s_predicted")  # fmt: skip
PINS = read_pins({"zero": 0, "offload": "none", "optimizer": "adamw"})
ENOUGH = 0.97
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


def chosen_plan(
    job: tuple[float, str, int], profile: str | None = None, margin: float = MARGIN
) -> Plan:
    """What `plan` chooses under a cap, on packed instruction data, without what one GPU cannot launch."""
    gib, name, seq_len = job
    model, machine = resolve_model(name), capped(gib, profile)
    workload = Workload(
        seq_len=seq_len,
        global_batch=TOKENS_PER_STEP // seq_len,
        lengths=lengths_of(seq_len),
        num_examples=2_000_000,  # so many that starting does not count
    )
    choice = choose(model, machine, workload, dict(PINS), margin=margin, minimize="time")
    lean = replace_company(choice)
    return plan_from_choice(
        lean, model=model, hardware=machine, workload=workload, pinned=["zero", "offload"], margin=margin,
        minimize="time", command=["verify_h200.py", "--caps"],
    )  # fmt: skip


def replace_company(choice: Any) -> Any:
    """The choice with its neighbours, without remedies and reasons, which take longest to find."""
    from verify_cases import Only

    return Only(choice.strategy, choice.estimate, choice.verdict)


def measure_caps(args: Any) -> None:
    """All caps and models."""
    deadline = time.monotonic() + args.seconds
    table = Table(args.out, (*COLUMNS, *MEASURED), args.done)
    points = points_of(args)
    with ProcessPoolExecutor(PLANNERS) as pool:
        plans = list(pool.map(partial(chosen_plan, margin=args.margin), points))
        fitting = [(plan, *point) for plan, point in zip(plans, points, strict=True) if plan.fits]
        for plan, point in zip(plans, points, strict=True):
            if not plan.fits:
                print(f"{point}: nothing fits, {plan.memory.gpu.used_bytes / GIB:.2f} GiB at least")
        if args.kept:
            jobs = [(plan, str(point[0]), point[1:]) for plan, *point in fitting]
            _run(table, jobs, deadline, capped_to=True)
            ran = [row for row in table.rows.values() if row["status"] == "ok"]
            print(f"{len(ran)} of {len(fitting)} chosen plans ran")
            return
        plans_by_words = {words_of(plan, point[1:]): (plan, point[1:]) for plan, *point in fitting}
        found = near_cases(fitting, args.near, pool)
        for case, plan in zip(found, pool.map(plan_of, found), strict=True):
            model = (case.model, case.seq_len)
            plans_by_words.setdefault(words_of(plan, model), (plan, model))
        grid = [(plan, "any", model) for plan, model in plans_by_words.values()]
        _run(table, grid, deadline, capped_to=False)
    report(table, fitting, args.margin)


def near_cases(
    fitting: list[Any], share: float, pool: Executor, machine: Hardware | None = None
) -> list[Case]:
    """The cases predicted within that share of the fastest under some cap, of each model the nearest first."""
    caps = sorted({point[0] for _, *point in fitting})
    bases = {tuple(point[1:]): case_from(plan, point[1:]) for plan, *point in fitting}
    near = partial(near_the_fastest, caps_gib=caps, share=share, hardware=machine)
    by_model = zip_longest(*pool.map(near, bases.values()))
    return [case for each in by_model for case in each if case is not None]


def points_of(args: Any) -> list[tuple[int, str, int]]:
    """Caps and models that were asked for."""
    caps = [int(gib) for gib in args.gib.split(",")] if args.gib else CAPS_GIB
    wanted = args.models.split(",") if args.models else [model for model, _ in MODELS]
    return [(gib, *model) for gib in caps for model in MODELS if model[0] in wanted]


def judge_caps(args: Any) -> None:
    """This version's choices among rows that were measured."""
    points = points_of(args)
    plans = [(chosen_plan(point, args.profile, args.margin), *point) for point in points]
    with args.out.open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    if "name" not in rows[0]:  # a published file of plans that were kept to their caps
        report_ran(rows, plans)
        return
    table = Table(args.out, (), [])
    report(table, plans, args.margin)
    from verify_near import judge_near

    judge_near(table, plans, judge_errors(table, args.profile), args)


def report_ran(rows: list[dict[str, str]], plans: list[Any]) -> None:
    """Which choices ran under their cap or a smaller one."""
    smallest: dict[str, float] = {}
    for row in rows:
        if row["status"] == "ok":
            words = " ".join(row[name] for name in ("model", "seq_len", *KNOBS))
            smallest[words] = min(float(row["cap_gib"]), smallest.get(words, math.inf))
    missing = [
        f"{gib:>3} GiB not among them: {words}"
        for plan, gib, *model in plans
        if smallest.get(words := words_of(plan, model), math.inf) > gib
    ]
    print(*missing, f"{len(plans) - len(missing)} of {len(plans)} choices ran", sep="\n")


def judge_errors(table: Table, profile: str | None) -> list[dict[str, Any]]:
    """The rows that were measured, as this version predicts them by the profile alone; prints its errors."""
    machine = machine_of(profile)
    rows = [
        again(row | {"allocator": "expandable", "half": "held-out"}, machine)
        for row in table.rows.values()
        if row["status"] == "ok" and row["step_s"]
    ]
    partly = [row for row in rows if "/" in row["checkpointing"]]
    for words, chosen in (("some layers checkpointed", partly), ("all", rows)):
        print(f"{words}: {len(chosen)} rows")
        for quantity in QUANTITIES:
            print_errors(quantity, chosen)
    return rows


def words_of(plan: Plan, model: Any) -> str:
    """Model, length and knobs: a row's name without its cap."""
    return " ".join(str(each) for each in (*model, *knobs_of(plan).values()))


def case_from(plan: Plan, model: Any) -> Case:
    """The case of a plan."""
    name, seq_len = model
    return Case(
        model=name, seq_len=seq_len, allocator=plan.strategy.allocator.value, **knobs_of(plan)
    )


def knobs_of(plan: Plan) -> dict[str, Any]:
    """The knobs of a row as `Case` has them."""
    found = {name: getattr(plan.strategy, name) for name in KNOBS}
    layers = plan.strategy.checkpointed_layers
    if layers is not None:
        found["checkpointing"] = f"{found['checkpointing']}/{layers}"
    return {name: str(value) if isinstance(value, str) else value for name, value in found.items()}


def _run(
    table: Table, asked: list[tuple[Plan, str, Any]], deadline: float, *, capped_to: bool
) -> None:
    jobs, known = [], {}
    for number, (plan, gib, model) in enumerate(asked):
        gpu = plan.memory.gpu
        name = f"{gib} GiB {words_of(plan, model)}"
        if name in table.rows:
            continue
        cap = gpu.capacity_bytes - (gpu.used_bytes - gpu.peak_reserved_bytes)
        jobs.append({"id": f"cap-{number}", "plan": plan, "steps": STEPS if capped_to else GRID_STEPS,
                     "cap_bytes": cap if capped_to else None})  # fmt: skip
        known[f"cap-{number}"] = {
            "name": name, "cap_gib": gib, "model": model[0], "seq_len": model[1], "chosen": capped_to,
            "verdict": plan.verdict, "tokens_per_s_predicted": plan.time.tokens_per_s,
            **knobs_of(plan),
        }  # fmt: skip

    def done(job: dict[str, Any], found: dict[str, Any]) -> None:
        table.add(known[job["id"]] | row_of(job["plan"], found))

    run_jobs(jobs, deadline, done)


def _fits(row: dict[str, str], gib: float) -> bool:
    """Whether a row was kept to that much or less, or took no more by itself."""
    kept = row["name"].partition(" ")[0]
    return (kept != "any" and float(kept) <= gib) or int(row["used"]) <= gib * GIB


def report(table: Table, fitting: list[Any], margin: float) -> None:
    """How near each chosen one is to the best that fits, and to the best that leaves the margin free."""
    rows = {name: row for name, row in table.rows.items() if row["status"] == "ok"}
    shares, within = [], []
    for plan, gib, *model in fitting:
        words = words_of(plan, model)
        mine = next((row for name, row in rows.items() if name.endswith(f" GiB {words}")), None)
        if mine is None:
            print(f"{gib:>3} GiB not measured: {words}")
            continue
        alike = [row for row in rows.values() if row["model"] == model[0]]
        best = max([*(r for r in alike if _fits(r, gib)), mine], key=_rate)
        free = [r for r in alike if int(r["used"]) <= gib * GIB * (1 - margin)]
        shares.append(_rate(mine) / _rate(best))
        within.append(_rate(mine) / max(map(_rate, [*free, mine])))
        held = "" if _fits(mine, gib) else f" DOES NOT FIT: {mine['used']}"
        print(
            f"{gib:>3} GiB {shares[-1]:.3f} of the best{held}: {mine['name']}; best {best['name']}"
        )
    for found, what in ((shares, "tried"), (within, f"that leaves {margin:.0%} free")):
        if found:
            enough = sum(share >= ENOUGH for share in found)
            print(
                f"{len(found)} points: mean {fmean(found):.3f}, worst {min(found):.3f} of the best {what}, "
                f"{enough} at {ENOUGH} or more"
            )


def _rate(row: dict[str, str]) -> float:
    return float(row["tokens_per_s"])

"""The points that come near the fastest under some cap: how many were measured, and what of the others.

What was not measured is expected to take what it is predicted to, times what measured points of its kind took
over their predictions: of its model, loss and micro-batch, or else of its model.
"""

from __future__ import annotations

from collections import defaultdict
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from statistics import fmean
from typing import TYPE_CHECKING, Any

from verify_caps import near_cases, words_of
from verify_cases import Case, machine_of, plan_of
from verify_h200 import PLANNERS, Table

from sftplan.units import GIB

if TYPE_CHECKING:
    from collections.abc import Sequence

    from sftplan.plan.record import Plan


def judge_near(table: Table, plans: list[Any], rows: Sequence[dict[str, Any]], args: Any) -> None:
    """Of the points within `--near` of the fastest, those measured, and how fast the others may be at most."""
    machine = machine_of(args.profile)
    fitting = [(plan, *point) for plan, *point in plans if plan.fits]
    with ProcessPoolExecutor(PLANNERS) as pool:
        cases = near_cases(fitting, args.near, pool, machine)
        near = list(zip(cases, pool.map(partial(plan_of, hardware=machine), cases), strict=True))
    seconds: dict[str, list[float]] = defaultdict(list)
    for name, row in table.rows.items():
        if row["status"] == "ok":
            seconds[name.partition(" GiB ")[2]].append(float(row["step_s"]))
    others = [
        (words, case, plan)
        for case, plan in near
        if (words := words_of(plan, (case.model, case.seq_len))) not in seconds
    ]
    print(
        f"{sum(map(len, seconds.values()))} runs of {len(seconds)} points; of the {len(near)} points"
    )
    print(f"within {args.near:.0%} of the fastest {len(near) - len(others)} were measured")
    shares = [
        (_expected_s(case, plan, rows) / fmean(seconds[mine]), gib, words)
        for chosen, gib, *model in fitting
        if (mine := words_of(chosen, model)) in seconds
        for words, case, plan in others
        if case.model == model[0] and plan.memory.gpu.used_bytes <= gib * GIB
    ]
    if shares:
        share, gib, words = min(shares)
        print(f"beside what others may be expected to do choices are at {share:.3f} or more")
        print(f"  ({gib} GiB: {words})")


def _expected_s(case: Case, plan: Plan, rows: Sequence[dict[str, Any]]) -> float:
    alike = [row for row in rows if row["model"] == case.model]
    kin = [
        row
        for row in alike
        if row["loss"] == case.loss and int(row["micro_batch"]) == case.micro_batch
    ]
    took = fmean(float(row["step_s"]) / row["step_s_predicted"] for row in kin or alike)
    return took * (plan.time.step_s or 0.0)

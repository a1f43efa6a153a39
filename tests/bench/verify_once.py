"""The dry run of one plan, raw: `python tests/bench/verify_once.py PLAN [--as PROFILE] [--snapshot FILE] [--learn]`."""

from __future__ import annotations

import argparse
import json
import time

from sftplan.plan.file import read_plan
from sftplan.verify.calibrate import learn
from sftplan.verify.profile import measure_here

parser = argparse.ArgumentParser()
parser.add_argument("plan")
parser.add_argument("--as", dest="rehearse")
parser.add_argument("--snapshot")
parser.add_argument("--steps", type=int)
parser.add_argument("--learn", action="store_true", help="keep it as a calibration")
args = parser.parse_args()
plan = read_plan(args.plan)
start = time.perf_counter()
found = measure_here(plan, steps=args.steps, rehearse=args.rehearse, snapshot=args.snapshot)
seconds = time.perf_counter() - start
timeline = found.pop("timeline", None)
print(json.dumps(found, indent=1))
gpu = plan.memory.gpu
pairs = {
    "peak_allocated_bytes": gpu.peak_allocated_bytes,
    "peak_reserved_bytes": gpu.peak_reserved_bytes,
    "used_bytes": gpu.used_bytes,
    "step_s": plan.time.step_s,
}
for name, predicted in pairs.items():
    if found.get(name) and predicted:
        print(
            f"{name}: predicted {predicted:,} measured {found[name]:,} {predicted / found[name] - 1:+.2%}"
        )
if timeline:
    last, most = timeline["points"][-1], max(timeline["points"], key=sum)
    print(len(timeline["points"]), timeline["phases"], timeline["categories"], most, last)
print(f"{seconds:.1f} s in all")
if args.learn:
    print(learn(plan, found))

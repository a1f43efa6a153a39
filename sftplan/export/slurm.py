"""A batch script for `sbatch`. Options: https://slurm.schedmd.com/sbatch.html."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from sftplan.export.arguments import header

if TYPE_CHECKING:
    from sftplan.plan.record import Plan

_SPARE_TIME = 1.5  # a job that is killed at 99 % has cost everything: half as much again
_DEFAULT_HOURS = 24


def _time_limit(plan: Plan) -> str:
    total_s = plan.time.total_s
    minutes = _DEFAULT_HOURS * 60 if total_s is None else math.ceil(total_s * _SPARE_TIME / 60)
    return f"{minutes // 60:02}:{minutes % 60:02}:00"


def render(plan: Plan) -> str:
    """One task per node, which starts a process per GPU; OUT has to be a folder that all of them share."""
    machine = plan.inputs.hardware
    exports = [f"export {name}={value}" for name, value in plan.launch.env.items()]
    run = "srun sftplan launch plan.json --data DATA --out OUT"
    if machine.num_nodes > 1:
        exports.append('HOSTS=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | paste -sd,)')
        run += ' --hosts "$HOSTS"'
    return "\n".join(
        [
            "#!/bin/bash",
            f"# {header(plan)}",
            f"#SBATCH --job-name=sft-{plan.inputs.model.name.replace('/', '-')}",
            f"#SBATCH --nodes={machine.num_nodes}",
            "#SBATCH --ntasks-per-node=1",
            f"#SBATCH --gpus-per-node={machine.gpus_per_node}",
            f"#SBATCH --time={_time_limit(plan)}",
            "",
            "set -euo pipefail",
            *exports,
            run,
            "",
        ]
    )

"""A SkyPilot task. Keys: https://docs.skypilot.co/en/latest/reference/yaml-spec.html."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from sftplan.export.arguments import environment, header
from sftplan.export.yaml import render_yaml

if TYPE_CHECKING:
    from sftplan.plan.record import Plan


def accelerator_name(gpu_name: str) -> str:
    """SkyPilot's name of a GPU: no form factor, and a memory size only beside a smaller sibling.

    >>> accelerator_name("A100 80GB SXM"), accelerator_name("RTX 4090")
    ('A100-80GB', 'RTX4090')
    """
    words = [w for w in re.split(r"[ -]", gpu_name) if w.upper() not in {"SXM", "PCIE", "NVL"}]
    words = [w for w in words if w.upper() not in {"16GB", "40GB"}]
    return "-".join(words).replace("RTX-", "RTX")


def _resources(plan: Plan) -> dict[str, object]:
    """The offer's own instance if the plan was made for one, else so many GPUs of the kind."""
    machine = plan.inputs.hardware
    cloud, _, instance = machine.name.partition("/")
    if instance:
        return {"infra": cloud, "instance_type": instance}
    return {"accelerators": f"{accelerator_name(machine.gpu.name)}:{machine.gpus_per_node}"}


def render(plan: Plan) -> str:
    """The YAML of `sky launch`; with several nodes OUT has to be in storage that all of them mount."""
    hosts = ""
    if plan.inputs.hardware.num_nodes > 1:
        hosts = (
            ' --hosts "$(echo "$SKYPILOT_NODE_IPS" | paste -sd,)" --node-rank "$SKYPILOT_NODE_RANK"'
        )
    task: dict[str, object] = {
        "name": f"sft-{plan.inputs.model.name.replace('/', '-')}",
        "resources": _resources(plan),
        "num_nodes": plan.inputs.hardware.num_nodes,
        "workdir": ".",
        "envs": environment(plan),
        "setup": "pip install 'sftplan[train]'\n",
        "run": f"sftplan launch plan.json --data DATA --out OUT{hosts}\n",
    }
    return render_yaml(task, header(plan), "sky launch skypilot.yaml")

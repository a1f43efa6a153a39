"""A SkyPilot task. Keys: https://docs.skypilot.co/en/latest/reference/yaml-spec.html."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sftplan.export.arguments import environment, header
from sftplan.export.yaml import render_yaml

if TYPE_CHECKING:
    from sftplan.plan.record import Plan


def _resources(plan: Plan) -> dict[str, object]:
    """The offer's own instance if the plan was made for one, else so many GPUs of the kind."""
    machine = plan.inputs.hardware
    cloud, _, instance = machine.name.partition("/")
    if instance:
        return {"infra": cloud, "instance_type": instance}
    kind = machine.gpu.name.upper().removesuffix("-SXM").removesuffix("-PCIE")
    return {"accelerators": f"{kind}:{machine.gpus_per_node}"}


def render(plan: Plan) -> str:
    """The YAML of `sky launch`."""
    task: dict[str, object] = {
        "name": f"sft-{plan.inputs.model.name.replace('/', '-')}",
        "resources": _resources(plan),
        "num_nodes": plan.inputs.hardware.num_nodes,
        "workdir": ".",
        "envs": environment(plan),
        "setup": "pip install 'sftplan[train]'\n",
        "run": 'export MASTER_ADDR=$(echo "$SKYPILOT_NODE_IPS" | head -n 1)\n'
        "sftplan launch plan.json --data DATA --out OUT\n",
    }
    return render_yaml(task, header(plan), "sky launch skypilot.yaml")

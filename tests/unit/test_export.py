"""Exported configurations parse and carry the plan's figures."""

from __future__ import annotations

import json
import shutil
import subprocess
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from sftplan.errors import UsageError
from sftplan.export import FORMATS, render_export
from sftplan.export.yaml import render_yaml
from sftplan.facts.strategy import Offload, Strategy
from sftplan.plan.launch import build_launch

if TYPE_CHECKING:
    from pathlib import Path

    from sftplan.plan.record import Plan

EXPECTED = {
    "accelerate": ["distributed_type: DEEPSPEED", "num_processes: 4"],
    "trl": ["per_device_train_batch_size: 16", "max_length: 1024", "completion_only_loss: true"],
    "axolotl": ["micro_batch_size: 16", "sequence_len: 1024", "deepspeed: deepspeed.json"],
    "llamafactory": ["cutoff_len: 1024", "finetuning_type: full", "gradient_accumulation_steps: 4"],
    "slurm": ["#SBATCH --gpus-per-node=4", "export PYTORCH_ALLOC_CONF=expandable_segments:True"],
    "skypilot": ['accelerators: "H200:4"', "num_nodes: 1"],
}


@pytest.fixture
def sharded(fitting: Plan) -> Plan:
    """The plan on four GPUs with ZeRO-3 and everything offloaded."""
    strategy = Strategy(micro_batch=16, accumulation=4, zero=3, offload=Offload.ALL)
    machine = replace(fitting.inputs.hardware, num_gpus=4, gpus_per_node=4)
    return replace(
        fitting,
        inputs=replace(fitting.inputs, hardware=machine),
        strategy=replace(fitting.strategy, zero=3, offload=Offload.ALL),
        launch=build_launch(strategy, gpus_per_node=4, num_nodes=1),
    )


@pytest.mark.parametrize("target", EXPECTED)
def test_the_plan_is_in_the_configuration(sharded: Plan, target: str) -> None:
    text = render_export(sharded, target)

    for line in EXPECTED[target]:
        assert line in text
    assert text.endswith("\n")
    assert "\t" not in text


def test_deepspeed_is_json_with_a_consistent_batch(sharded: Plan) -> None:
    settings = json.loads(render_export(sharded, "deepspeed"))

    assert settings["train_batch_size"] == 16 * 4 * 4
    assert settings["zero_optimization"]["stage"] == 3
    assert settings["zero_optimization"]["offload_param"]["device"] == "cpu"
    assert settings["torch_autocast"] == {"enabled": True, "dtype": "bfloat16"}


def test_a_plan_without_deepspeed_has_no_configuration_for_it(fitting: Plan) -> None:
    with pytest.raises(UsageError, match="does without DeepSpeed"):
        render_export(fitting, "deepspeed")
    assert "deepspeed" not in render_export(fitting, "trl")


def test_an_unknown_format_names_the_closest(fitting: Plan) -> None:
    with pytest.raises(UsageError) as caught:
        render_export(fitting, "axolot")

    assert caught.value.hint == "did you mean axolotl?"


def test_several_nodes_run_launch_with_the_hosts_that_they_are(sharded: Plan) -> None:
    hardware = replace(sharded.inputs.hardware, num_nodes=2, num_gpus=8)
    nodes = replace(sharded, inputs=replace(sharded.inputs, hardware=hardware))

    slurm, sky = render_export(nodes, "slurm"), render_export(nodes, "skypilot")
    assert 'srun sftplan launch plan.json --data DATA --out OUT --hosts "$HOSTS"' in slurm
    assert "#SBATCH --nodes=2" in slurm
    assert "SKYPILOT_NODE_IPS" in sky
    assert "--hosts" not in render_export(sharded, "slurm") + render_export(sharded, "skypilot")


@pytest.mark.skipif(shutil.which("bash") is None, reason="no bash to check the script with")
def test_the_batch_script_is_valid_shell(sharded: Plan, tmp_path: Path) -> None:
    script = tmp_path / "job.sh"
    script.write_text(render_export(sharded, "slurm"))

    subprocess.run(["bash", "-n", str(script)], check=True)


@pytest.mark.parametrize("target", [name for name in FORMATS if name not in {"slurm", "deepspeed"}])
def test_yaml_parses(sharded: Plan, target: str) -> None:
    yaml = pytest.importorskip("yaml")

    assert yaml.safe_load(render_export(sharded, target))


def test_yaml_quotes_what_it_would_read_as_something_else() -> None:
    yaml = pytest.importorskip("yaml")
    value = {"a": "yes", "b": "1e5", "c": "x: y", "d": [{"e": None, "f": []}], "g": "l1\nl2\n"}

    assert yaml.safe_load(render_yaml(value, "comment")) == value

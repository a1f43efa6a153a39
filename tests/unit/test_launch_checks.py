"""What launch refuses before it uses a GPU, and when it measures first."""

from __future__ import annotations

import json
import os
import re
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest

import sftplan.api
from sftplan.cli import launch as command
from sftplan.cli.main import run
from sftplan.data.demo import DEMO_FILE
from sftplan.errors import DriftError, ExitCode, NotReadyError, UsageError
from sftplan.facts.catalogue import builtin
from sftplan.facts.profiles import load_hardware
from sftplan.facts.strategy import Allocator, Offload
from sftplan.plan.drift import check_drift, machine_differences
from sftplan.plan.file import plan_sha256, write_plan
from sftplan.plan.verified import verification_beside, verification_file
from sftplan.train import launch as training
from sftplan.train.job import make_folder, trains_on_prompt
from sftplan.train.nvme import check_nvme

if TYPE_CHECKING:
    from sftplan.facts.hardware import Hardware
    from sftplan.plan.record import Plan

GIB = 2**30


@pytest.fixture(scope="module")
def plan() -> Plan:
    """gpt2 on one H200."""
    return sftplan.api.plan(model="gpt2", seq_len=512, hardware="h200-sxm", command=["x"])


@pytest.fixture(scope="module")
def h200() -> Hardware:
    return load_hardware("h200-sxm")


def fields(plan: Plan, machine: Hardware) -> list[str]:
    return [
        each.field.removeprefix("inputs.hardware.") for each in machine_differences(plan, machine)
    ]


def test_the_machine_that_was_planned_for_is_right(plan: Plan, h200: Hardware) -> None:
    check_drift(plan, h200)
    check_drift(plan, None)
    check_drift(plan, replace(h200, gpus_per_node=8))  # more than the plan uses
    older = replace(
        h200, gpu=replace(h200.gpu, nvml_name="H200", memory_bytes=h200.gpu.memory_bytes - GIB)
    )
    check_drift(plan, older)


def test_every_field_that_differs_is_named(plan: Plan, h200: Hardware) -> None:
    smaller = replace(h200.gpu, memory_bytes=h200.gpu.memory_bytes // 2)

    assert fields(plan, load_hardware("rtx-4090")) == ["gpu.name", "gpu.memory_bytes"]
    assert fields(plan, replace(h200, gpus_per_node=0)) == ["gpus_per_node"]
    assert fields(plan, replace(h200, gpu=smaller)) == ["gpu.memory_bytes"]
    busy = replace(h200, memory_taken_bytes=h200.gpu.memory_bytes - 2 * GIB)
    assert fields(plan, busy) == ["memory_taken_bytes"]
    with pytest.raises(DriftError) as caught:
        check_drift(replace(plan, created_by="sftplan 7.3.0"), load_hardware("rtx-4090"))
    lines = caught.value.message.splitlines()
    assert [line.split(":")[0].strip() for line in lines[1:]] == [
        "created_by", "inputs.hardware.gpu.name", "inputs.hardware.gpu.memory_bytes",
    ]  # fmt: skip
    assert "planned H200 SXM, here RTX 4090" in lines[2]


def test_another_model_of_that_name_is_told_field_by_field(plan: Plan) -> None:
    wider = replace(plan.inputs.model, hidden_size=1024, num_parameters=1, shape_sha256="1" * 64)
    changed = replace(plan, inputs=replace(plan.inputs, model=wider))

    with pytest.raises(DriftError, match="num_parameters: planned 1, here 124,439,808") as caught:
        check_drift(changed, None)
    assert "hidden_size: planned 1,024, here 768" in caught.value.message


def test_launch_refuses_with_exit_4(
    plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(training, "detect", lambda: load_hardware("rtx-4090"))
    write_plan(plan, tmp_path / "plan.json")
    arguments = ["launch", str(tmp_path / "plan.json"), "--data", str(DEMO_FILE)]
    code = run([*arguments, "--out", str(tmp_path / "run"), "--no-verify"])

    assert code == ExitCode.DRIFT
    assert "inputs.hardware.gpu.name: planned H200 SXM, here RTX 4090" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_without_nvml_the_rest_is_checked_all_the_same(
    plan: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    def nothing() -> None:
        message = "no driver"
        raise NotReadyError(message)

    monkeypatch.setattr(training, "detect", nothing)
    training.check_here(plan, cpu=False)
    with pytest.raises(DriftError, match="created_by"):
        training.check_here(replace(plan, created_by="sftplan 9.9.9"), cpu=False)


def verification(plan: Plan, **changes: Any) -> str:
    """A good one, or one that is not."""
    found = {
        "format": "sftplan.verification",
        "plan_sha256": plan_sha256(plan),
        "ok": True,
        "mode": "gpu",
    }
    return json.dumps(found | changes)


@pytest.mark.parametrize(
    ("changes", "good"),
    [
        ({}, True),
        ({"ok": False}, False),
        ({"mode": "trace"}, False),
        ({"plan_sha256": "0"}, False),
        ({"format": "sftplan.plan"}, False),
        (None, False),
    ],
)
def test_only_a_good_measurement_of_this_very_plan_counts(
    plan: Plan, tmp_path: Path, changes: dict[str, Any] | None, good: bool
) -> None:
    path = tmp_path / "plan.json"
    assert verification_beside(plan, path) is None
    text = '{"half' if changes is None else verification(plan, **changes)
    verification_file(path).write_text(text)

    assert (verification_beside(plan, path) is not None) is good


@pytest.mark.parametrize(
    ("verified", "options", "asked"),
    [
        (False, [], True),
        (True, [], False),
        (False, ["--no-verify"], False),
        (False, ["--resume"], False),
    ],
)
def test_an_unverified_plan_is_verified_first(
    plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *,
    verified: bool, options: list[str], asked: bool,
) -> None:  # fmt: skip
    path = tmp_path / "plan.json"
    calls: list[tuple[Any, ...]] = []
    write_plan(plan, path)
    if verified:
        verification_file(path).write_text(verification(plan))

    def verify(made: Plan, **given: Any) -> Any:
        calls.append(("verify", made == plan, given["data"]))
        return SimpleNamespace(ok=True, judgement="")

    monkeypatch.setattr(sftplan.api, "verify", verify)

    def train(*_: Any, **__: Any) -> dict[str, Any]:
        calls.append(("launch",))
        return {}

    monkeypatch.setattr(sftplan.api, "launch", train)
    monkeypatch.setattr(command, "_summary", lambda *_: "")
    run(["launch", str(path), "--data", "d.jsonl", "--out", str(tmp_path / "run"), *options])

    assert calls == [*([("verify", True, "d.jsonl")] if asked else []), ("launch",)]


def test_a_plan_that_fails_its_dry_run_is_not_trained(
    plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_plan(plan, tmp_path / "plan.json")
    judged = SimpleNamespace(ok=False, judgement="reserved is off by 7 %")
    monkeypatch.setattr(sftplan.api, "verify", lambda *_, **__: judged)
    monkeypatch.setattr(sftplan.api, "launch", lambda *_, **__: pytest.fail("trained"))
    code = run(
        ["launch", str(tmp_path / "plan.json"), "--data", "d", "--out", str(tmp_path / "run")]
    )

    assert code == ExitCode.MISPREDICTED
    assert "reserved is off by 7 %" in capsys.readouterr().err


def test_states_need_a_folder_with_room(
    plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = builtin("gpt2")
    offloaded = replace(plan, strategy=replace(plan.strategy, zero=3, offload=Offload.NVME))
    check_nvme(plan, model, str(tmp_path / "no"))  # nothing goes there
    check_nvme(offloaded, model, str(tmp_path))
    with pytest.raises(UsageError, match="no is not a folder"):
        check_nvme(offloaded, model, str(tmp_path / "no"))
    free = 1_493_277_695  # one byte less than 12 for each of 124,439,808 parameters
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=free))
    with pytest.raises(UsageError, match=r"1\.39 GiB free, the optimizer's states need 1\.39 GiB"):
        check_nvme(offloaded, model, str(tmp_path))


def test_a_folder_that_cannot_be_written_is_refused_before_anything_else(
    plan: Plan, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "plan.json"
    write_plan(plan, file)
    used = tmp_path / "used"
    (used / "final").mkdir(parents=True)
    arguments = ["launch", str(file), "--data", str(DEMO_FILE)]

    assert run([*arguments, "--out", str(used)]) == ExitCode.USAGE  # before the dry run
    assert "holds a run already" in capsys.readouterr().err
    assert run([*arguments, "--out", str(used), "--learning-rate", "-1"]) == ExitCode.USAGE
    assert "--learning-rate -1 has to be above 0" in capsys.readouterr().err
    with pytest.raises(UsageError, match="--out /proc/run cannot be made"):
        make_folder(Path("/proc/run"))


def test_launch_says_what_it_trains_and_what_the_plan_warns_of(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--max-steps", "1", "--save-every", "0", "--eval-split", "0"]
    assert run(["launch", "--demo", "--out", str(tmp_path / "run"), *options]) == ExitCode.OK
    told = capsys.readouterr().err

    assert "model: fp32, micro-batch 2, sdpa attention, response loss" in told
    assert re.search(r"warning: 195 examples are few for [\d.]+ K parameters: n·ε/d = ", told)


def test_a_finished_run_is_not_trained_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    demo = ["launch", "--demo", "--out", str(out), "--eval-split", "0", "--save-every", "0"]
    assert run([*demo, "--epochs", "0.2"]) == ExitCode.OK  # no checkpoint: the model is all
    written = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    capsys.readouterr()

    assert run([*demo, "--epochs", "0.2", "--resume", "--json"]) == ExitCode.OK
    told = capsys.readouterr()
    assert "is finished: nothing is left to do" in told.err
    assert run(["show", str(out)]) == ExitCode.OK
    assert "steps " in (shown := capsys.readouterr().out)
    assert f"model      {out}/final" in shown
    assert json.loads(told.out) == json.loads(written[out / "run.json"])
    assert run([*demo, "--epochs", "0.2", "--resume", "--seed", "1"]) == ExitCode.USAGE
    assert "--resume: seed was 0, now it is 1" in capsys.readouterr().err
    assert written == {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}


def test_no_unknown_package_is_named_for_installing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    demo = ["launch", "--demo", "--out", str(tmp_path / "run")]
    assert run([*demo, "--tracker", "tensorbord"]) == ExitCode.USAGE
    told = capsys.readouterr().err
    assert "did you mean tensorboard?" in told
    assert "pip install" not in told


def test_the_plan_decides_on_what_is_trained(tmp_path: Path) -> None:
    request: dict[str, Any] = {"model": "gpt2", "seq_len": 512, "hardware": "h200-sxm",
                               "command": ["x"], "loss": "response", "micro_batch": 8}  # fmt: skip
    responses = sftplan.api.plan(**request, data=str(DEMO_FILE))
    everything = sftplan.api.plan(**request, data=str(DEMO_FILE), train_on_prompt=True)
    without_data = sftplan.api.plan(**request)

    assert everything.memory.gpu.by_category["logits"] > responses.memory.gpu.by_category["logits"]
    assert trains_on_prompt(everything, None)
    assert not trains_on_prompt(responses, None)
    assert trains_on_prompt(without_data, True)  # all positions are counted
    with pytest.raises(UsageError, match="the plan counts the responses alone"):
        trains_on_prompt(responses, True)
    with pytest.raises(UsageError, match="the plan counts the responses alone"):
        training.launch(responses, data=str(DEMO_FILE), out=tmp_path / "x", train_on_prompt=True)


@pytest.mark.parametrize(
    ("allocator", "before", "after"),
    [
        ("expandable", {}, "expandable_segments:True"),
        ("default", {"PYTORCH_ALLOC_CONF": "expandable_segments:True"}, "expandable_segments:False"),
        (
            "expandable",
            {"PYTORCH_CUDA_ALLOC_CONF": "roundup_power2_divisions:[256:1,512:2],expandable_segments:False"},
            "roundup_power2_divisions:[256:1,512:2],expandable_segments:True",
        ),
    ],
)  # fmt: skip
def test_the_allocator_is_the_planned_one_whatever_the_environment_asks(
    plan: Plan, monkeypatch: pytest.MonkeyPatch, allocator: str, before: dict[str, str], after: str
) -> None:
    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(sys, "platform", "linux")
    for name, value in before.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("PYTORCH_ALLOC_CONF", before.get("PYTORCH_ALLOC_CONF", ""))  # undone after
    strategy = replace(plan.strategy, allocator=Allocator(allocator))
    training.set_allocator(replace(plan, strategy=strategy))
    assert os.environ["PYTORCH_ALLOC_CONF"] == after

"""Calibration: rates are recovered from steps, kept in the user's folder, and planned with."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest

import sftplan.api
from sftplan.cli.main import run
from sftplan.cost.outside import GRAPHS_BYTES
from sftplan.detect.gpus import Machine
from sftplan.detect.nvml import Device
from sftplan.errors import ExitCode, UsageError
from sftplan.facts.calibration import (
    CALIBRATED,
    FITTED,
    Calibration,
    Observation,
    calibration_file,
    read_calibration,
    with_rates,
)
from sftplan.facts.hardware import Host
from sftplan.facts.profiles import load_hardware, user_folder
from sftplan.plan.file import read_plan, write_plan
from sftplan.verify import calibrate
from sftplan.verify.fit import fitted_rates, minimised, predictor, scaled, solved

if TYPE_CHECKING:
    from pathlib import Path

    from sftplan.facts.hardware import Hardware

CASES: tuple[dict[str, Any], ...] = (  # uncompiled, the loss of responses alone would be captured
    {"model": "gpt2", "micro_batch": 1, "compile": False, "precision": "bf16-mixed", "loss": "full"},
    {"model": "gpt2", "micro_batch": 16, "compile": True, "precision": "bf16-master", "packing": True},
    {"model": "gpt2", "micro_batch": 32, "compile": False, "precision": "bf16-true", "loss": "full"},
    {"model": "tinyllama-1.1b", "micro_batch": 8, "compile": False, "precision": "bf16-mixed", "loss": "full"},
    # without masks it would be captured and show nothing of the host
    {"model": "gpt2", "micro_batch": 8, "compile": True, "attention": "sdpa", "packing": True},
)  # fmt: skip


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The user's configuration, empty."""
    monkeypatch.setenv("SFTPLAN_CONFIG_DIR", str(tmp_path / "config"))
    return tmp_path / "config"


@pytest.fixture(scope="module")
def h200() -> Hardware:
    return load_hardware("h200-sxm")


@pytest.fixture(scope="module")
def steps() -> list[Observation]:
    """Observed steps, still without the time that they took."""
    found = []
    for case in CASES:
        plan = sftplan.api.plan(
            seq_len=512, hardware="h200-sxm", accumulation=1, zero=0, offload="none",
            command=["x"], **case,
        )  # fmt: skip
        seen = {"step_s": plan.time.step_s, "outside_bytes": 700 * 2**20}
        found.append(calibrate.observation_of(plan, seen))
    return found


def calibration(h200: Hardware, **changes: Any) -> Calibration:
    fields: dict[str, Any] = {
        "gpu": h200.gpu.nvml_name, "memory_bytes": h200.gpu.memory_bytes, "driver": "580.1",
        "measured_at": "2026-11-24", "versions": {"torch": "2.11.0"}, "measured": {},
    }  # fmt: skip
    return Calibration(**(fields | changes))


def seconds_on(steps: list[Observation], machine: Hardware) -> list[float]:
    predictors = [predictor(step) for step in steps]
    return [predict(machine) for predict in predictors if predict is not None]


def test_an_observation_predicts_what_the_plan_predicted(
    h200: Hardware, steps: list[Observation]
) -> None:
    assert seconds_on(steps, h200) == pytest.approx([step.predicted_s for step in steps], rel=1e-9)


def test_rates_are_recovered_from_the_steps_that_they_make(
    h200: Hardware, steps: list[Observation]
) -> None:
    truth = scaled(h200, [0.05, -0.06, 0.20, -0.15])
    observed = [
        replace(step, step_s=seconds)
        for step, seconds in zip(steps, seconds_on(steps, truth), strict=True)
    ]
    observed *= 20  # as many as outweigh where the fit begins
    found = fitted_rates(calibration(h200, observations=observed), h200)

    for name in FITTED:
        assert found[name] == pytest.approx(getattr(truth.rates, name), rel=0.05), name
    again = calibrate.with_observations(calibration(h200), observed, h200)
    assert again.fitted == found
    assert again.rates["context_bytes"] == 700 * 2**20


def test_each_step_is_explained_with_its_host_as_it_was(
    h200: Hardware, steps: list[Observation]
) -> None:
    """Hosts between half and twice as fast, all operations of a step 1.2 times what small ones tell."""
    observed = []
    for step, host in zip(steps * 10, [0.5, 0.8, 1.0, 1.5, 2.0] * (2 * len(steps)), strict=True):
        rates = replace(h200.rates, dispatch_scale=1.2 * host)
        seconds = seconds_on([step], replace(h200, rates=rates))[0]
        observed.append(replace(step, step_s=seconds, host_scale=host))
    made = calibrate.with_observations(calibration(h200), observed, h200)

    assert made.measured["dispatch_scale"] == 1.0  # the host in the middle
    assert made.fitted["dispatch_scale"] == pytest.approx(1.2, rel=0.03)
    assert made.fitted["hbm_fraction"] == pytest.approx(h200.rates.hbm_fraction, rel=0.01)


def test_one_dry_run_does_not_overrule_what_kernels_measured(
    h200: Hardware, steps: list[Observation]
) -> None:
    """Many like it do: the step is met a little, then most of the way."""
    slow = replace(steps[2], step_s=1.1 * steps[2].step_s)
    measured = {name: getattr(h200.rates, name) for name in FITTED}
    shares = []
    for count in (1, 30):
        made = calibrate.with_observations(
            calibration(h200, measured=measured), [slow] * count, h200
        )
        machine = with_rates(h200, made, where="")
        shares.append((seconds_on([slow], machine)[0] - steps[2].step_s) / (0.1 * steps[2].step_s))

    assert 0.05 < shares[0] < 0.5
    assert 0.6 < shares[1] < 1.05
    assert fitted_rates(calibration(h200), h200) == {}


def test_a_model_that_is_gone_teaches_nothing(h200: Hardware, steps: list[Observation]) -> None:
    gone = replace(steps[0], model="/no/such/folder", step_s=9.0)

    assert fitted_rates(calibration(h200, observations=[gone]), h200) == {}


def test_least_squares_holds_its_bounds() -> None:
    assert minimised(lambda t: [t[0] - 99.0], [10.0], sigma=0.01) == [
        pytest.approx(0.6931, abs=1e-4)
    ]
    assert solved([[0.0, 2.0], [3.0, 1.0]], [4.0, 5.0]) == pytest.approx(
        [1.0, 2.0]
    )  # needs a pivot


def test_the_next_plan_uses_and_names_it(h200: Hardware, folder: Path, tmp_path: Path) -> None:
    job: dict[str, Any] = {
        "model": "gpt2", "seq_len": 512, "micro_batch": 8, "accumulation": 1, "command": ["x"]
    }  # fmt: skip
    before = sftplan.api.plan(hardware="h200-sxm", **job)
    rates = {"matmul_fraction": 0.4, "context_bytes": 123_456_789.0}
    path = calibrate.write_calibration(calibration(h200, measured=rates))
    after = sftplan.api.plan(hardware="h200-sxm", **job)

    assert path == folder / "calibrations" / "h200.json"
    assert before.inputs.hardware.calibration is None
    assert "calibration" not in before.sources
    context = 123_456_789 + GRAPHS_BYTES
    assert after.memory.gpu.context_bytes == context
    assert after.memory.gpu.used_bytes == after.memory.gpu.peak_reserved_bytes + context
    assert (after.time.step_s or 0.0) > 1.1 * (before.time.step_s or 0.0)
    assert after.sources["calibration"] == f"2026-11-24, driver 580.1, torch 2.11.0: {path}"
    assert after.sources["inputs.hardware.rates.matmul_fraction"] == "measured"
    write_plan(after, tmp_path / "plan.json")
    assert read_plan(tmp_path / "plan.json") == after


def test_it_is_of_this_machine_and_of_no_other(h200: Hardware, folder: Path) -> None:
    calibrate.write_calibration(calibration(h200, measured={"matmul_fraction": 0.4}))

    assert load_hardware("h200-sxm").rates.matmul_fraction == 0.4
    assert load_hardware("h100-sxm").calibration is None
    assert load_hardware("nebius/gpu-h200-sxm_1gpu-16vcpu-200gb").calibration is None
    half = calibration(h200, measured={"matmul_fraction": 0.4}, memory_bytes=71 * 2**30)
    calibrate.write_calibration(half)  # a slice of one
    assert load_hardware("h200-sxm").calibration is None
    assert user_folder() == folder / "profiles"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "invalid JSON"),
        ('{"gpu": 3}', "h200.json: gpu: "),
        ("NEWER", "this sftplan reads"),
        ("ZERO", "is no rate"),
    ],
)
def test_a_broken_calibration_names_its_file(h200: Hardware, text: str, words: str) -> None:
    path = calibrate.write_calibration(calibration(h200, measured={"hbm_fraction": 0.9}))
    whole = path.read_text()
    texts = {
        "NEWER": whole.replace('"1.0"', '"2.0"'),
        "ZERO": whole.replace("0.9", "0"),
    }
    path.write_text(texts.get(text, text))

    with pytest.raises(UsageError) as caught:
        load_hardware("h200-sxm")
    assert str(path) in caught.value.message
    assert words in caught.value.message
    assert "--calibrate" in str(caught.value.hint)


def test_what_is_written_reads_back(h200: Hardware, steps: list[Observation]) -> None:
    made = calibration(h200, observations=steps, measured={"hbm_fraction": 0.9})
    path = calibrate.write_calibration(made)

    assert read_calibration(path) == made
    assert path == calibration_file(h200.gpu.nvml_name)
    assert json.loads(path.read_text())["format"] == "sftplan.calibration"


def machine(h200: Hardware) -> Machine:
    """This machine, with an H200 in it."""
    gpu = h200.gpu
    device = Device(
        uuid="GPU-0", name=gpu.nvml_name, memory_bytes=gpu.memory_bytes, taken_bytes=0,
        reserved_bytes=gpu.unusable_bytes, compute_capability=9.0,
    )  # fmt: skip
    return Machine(
        driver_version="580.1", devices=(device,), host=Host(memory_bytes=2**37, num_cpus=16)
    )


RATES: dict[str, Any] = {
    "context_bytes": 6 * 10**8, "products": [], "large": {"bfloat16": 7.9e14, "float32": 5e13},
    "hbm_bytes_per_s": 4.4e12, "link_bytes_per_s": 5.5e10, "dispatch_scale": 1.2,
    "host_bytes_per_s": 1.5e11, "cpu_adam_bytes_per_s": 7e10, "gpu": "NVIDIA H200",
}  # fmt: skip


def test_detect_calibrate_measures_keeps_and_shows(
    h200: Hardware, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sftplan.detect.gpus.find_machine", lambda: machine(h200))
    monkeypatch.setattr(calibrate, "find_machine", lambda: machine(h200))
    monkeypatch.setattr(calibrate, "measured_rates", lambda *, cpu: RATES)
    code = run(["detect", "--calibrate", "--json"])
    shown = json.loads(capsys.readouterr().out)

    assert code == ExitCode.OK
    assert shown["rates"]["matmul_fraction"] == pytest.approx(7.9e14 / 9.894e14)
    assert shown["rates"]["hbm_fraction"] == pytest.approx(4.4 / 4.8)
    assert shown["rates"]["pcie_fraction"] == pytest.approx(5.5e10 / h200.gpu.pcie_bytes_per_s)
    assert shown["rates"]["context_bytes"] == 6 * 10**8
    assert shown["rates"]["cpu_adam_bytes_per_s"] == 7e10
    not_measured = {n for n in CALIBRATED if shown["rates"]["sources"][n] != "measured"}
    assert not_measured == {"compiled_dispatch_scale"}  # only dry runs tell
    assert "driver 580.1" in shown["calibration"]


def test_every_dry_run_is_learned_from_once(
    h200: Hardware, monkeypatch: pytest.MonkeyPatch, folder: Path
) -> None:
    monkeypatch.setattr(calibrate, "find_machine", lambda: machine(h200))
    plan = sftplan.api.plan(model="gpt2", seq_len=512, hardware="h200-sxm", command=["x"])
    outside = 5 * 10**8 + GRAPHS_BYTES  # this plan's passes are captured
    seen = {"step_s": 1.2 * (plan.time.step_s or 0.0), "outside_bytes": outside}
    for _ in range(2):
        path = calibrate.learn(plan, seen)
    assert path is not None
    found = read_calibration(path)

    assert [each.step_s for each in found.observations] == [seen["step_s"]]
    assert set(found.fitted) == set(FITTED)
    assert found.rates["context_bytes"] == 5 * 10**8
    assert calibrate.learn(plan, {"out_of_memory": {"phase": "forward"}}) is None
    assert calibrate.learn(plan, seen | {"taken_meanwhile_bytes": 2**30}) is None


def test_a_folder_that_cannot_be_made_is_an_error_with_a_way_out(
    h200: Hardware, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("SFTPLAN_CONFIG_DIR", str(tmp_path / "file"))

    with pytest.raises(UsageError) as caught:
        calibrate.write_calibration(calibration(h200))
    assert "SFTPLAN_CONFIG_DIR" in str(caught.value.hint)


def test_the_measuring_process_measures_what_it_names(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    found = calibrate.measured_rates(cpu=True)

    assert set(found) == set(RATES)
    assert found["context_bytes"] is None
    assert found["link_bytes_per_s"] is None
    rates = [found["hbm_bytes_per_s"], found["host_bytes_per_s"], found["cpu_adam_bytes_per_s"]]
    assert all(1e8 < rate < 1e13 for rate in rates)
    assert 0.01 < found["dispatch_scale"] < 10
    assert {product["dtype"] for product in found["products"]} == {"float32"}

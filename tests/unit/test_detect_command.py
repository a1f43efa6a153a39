"""The commands `detect`, `profiles` and `env`, with NVML's answers put in their way."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import sftplan.detect.gpus
from sftplan.cli.main import run
from sftplan.detect.nvml import Device, Inventory
from sftplan.errors import NotReadyError
from sftplan.facts.profiles import load_hardware

if TYPE_CHECKING:
    from pathlib import Path

    import pytest

H200 = Device(
    uuid="GPU-0",
    name="NVIDIA H200",
    memory_bytes=150_754_820_096,
    taken_bytes=0,
    reserved_bytes=644_939_776,
)
UNKNOWN = Device(uuid="GPU-0", name="NVIDIA X900", memory_bytes=2**35, taken_bytes=0)


def put(monkeypatch: pytest.MonkeyPatch, device: Device | None) -> None:
    def read(_nvml: object) -> Inventory:
        if device is None:
            message = "no NVIDIA driver is installed"
            raise NotReadyError(message, "install it")
        return Inventory(driver_version="580.1", gpus=(device,))

    monkeypatch.setattr(sftplan.detect.gpus, "read_inventory", read)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


def test_detect_and_save(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    put(monkeypatch, H200)
    file = tmp_path / "My Machine.toml"
    assert run(["detect", "--save", str(file), "--json"]) == 0
    printed = capsys.readouterr()
    document = json.loads(printed.out)
    assert document["name"] == "h200-sxm"
    assert document["gpu"]["memory_bytes"] == 150_754_820_096
    assert document["rates"]["sources"]["device_bytes"] == "measured"
    assert document["driver_version"] == "580.1"
    assert "wrote" in printed.err
    assert load_hardware(str(file)).name == "my-machine"
    assert run(["detect"]) == 0
    assert "h200-sxm: 1 x H200 SXM" in capsys.readouterr().out


def test_detect_without_a_gpu_prints_the_host(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    put(monkeypatch, None)
    assert run(["detect", "--json"]) == 6
    printed = capsys.readouterr()
    document = json.loads(printed.out)
    assert document["gpu"] is None
    assert document["host"]["memory_bytes"] > 0
    assert "no NVIDIA driver" in printed.err
    assert run(["detect"]) == 6
    assert "host memory" in capsys.readouterr().out


def test_detect_an_unknown_gpu(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    put(monkeypatch, UNKNOWN)
    assert run(["detect", "--json"]) == 2
    printed = capsys.readouterr()
    assert "NVIDIA X900" in json.loads(printed.out)["problem"]
    file = tmp_path / "x900.toml"
    assert run(["detect", "--save", str(file)]) == 0
    assert "nvml_name" in file.read_text()
    assert run(["detect", "--save", str(tmp_path / "absent" / "x.toml")]) == 2
    assert "cannot be written" in capsys.readouterr().err


def test_profiles(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["profiles"]) == 0
    listed = capsys.readouterr().out
    assert "h200-sxm" in listed
    assert "aws/p5.4xlarge" in listed
    assert run(["profiles", "l40"]) == 0
    assert "unverified" in capsys.readouterr().out
    assert run(["profiles", "aws/p5.48xlarge", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["usd_per_hour"] == 55.04
    assert document["offer"]["spot_usd_per_hour"] == 9.3722
    assert run(["profiles", "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["offers"]) == 150
    assert run(["profiles", "-q"]) == 0
    assert capsys.readouterr().out.splitlines()[0] == "a10"
    assert run(["profiles", "h20o"]) == 2
    assert "did you mean" in capsys.readouterr().err


def test_env_names_versions_and_no_secrets(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SOME_TOKEN", "abc-secret")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1,0")
    assert run(["env", "--json"]) == 0
    text = capsys.readouterr().out
    document = json.loads(text)
    assert document["sftplan"]
    assert document["packages"]["click"]
    assert document["environment"]["CUDA_VISIBLE_DEVICES"] == "1,0"
    assert "abc-secret" not in text
    assert run(["env"]) == 0
    printed = capsys.readouterr()
    assert "python" in printed.out
    assert "bug report" in printed.err

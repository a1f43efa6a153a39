"""Offload where DeepSpeed's optimizer cannot be compiled, and dry runs of what one machine is not."""

# ruff: noqa: TID253
from __future__ import annotations

import subprocess
from typing import TYPE_CHECKING, Any

import pytest
from deepspeed.ops.op_builder import CPUAdamBuilder

import sftplan.api
from sftplan.cli.main import run
from sftplan.errors import ExitCode, NotReadyError
from sftplan.plan.file import write_plan
from sftplan.train.engine import build_cpu_adam
from sftplan.train.launch import build_host_optimizer

if TYPE_CHECKING:
    from pathlib import Path


def test_without_compilers_the_processes_before_the_run_say_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing on PATH and nothing built before: neither ninja nor a compiler."""
    (tmp_path / "nothing").mkdir()
    monkeypatch.setenv("PATH", str(tmp_path / "nothing"))
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "built"))
    with pytest.raises(NotReadyError, match="for the host cannot be compiled: ") as caught:
        build_host_optimizer()

    assert caught.value.exit_code == ExitCode.NOT_READY
    assert "apt install g++" in str(caught.value.hint)


def test_what_the_compiler_said_is_the_cause(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(self: Any, **_: Any) -> None:
        message = "Error building extension 'cpu_adam'"
        raise RuntimeError(message) from subprocess.SubprocessError("c++: command not found\n")

    monkeypatch.setattr(CPUAdamBuilder, "load", load)
    with pytest.raises(NotReadyError, match=r"compiled: c\+\+: command not found") as caught:
        build_cpu_adam()

    assert caught.value.exit_code == ExitCode.NOT_READY
    assert "apt install g++" in str(caught.value.hint)


def test_a_dry_run_of_several_machines_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = sftplan.api.plan(
        model="gpt2", seq_len=128, hardware="h200-sxm", gpus=2, nodes=2, command=[]
    )
    write_plan(plan, tmp_path / "plan.json")

    assert run(["verify", str(tmp_path / "plan.json")]) == ExitCode.USAGE
    said = capsys.readouterr().err
    assert "a dry run is of one machine, the plan has 2" in said
    assert "`--nodes 1` plans for it" in said

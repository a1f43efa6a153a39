"""The entry point: errors become messages and exit codes, answers go to standard output."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest

import sftplan.api
from sftplan.cli.main import run
from sftplan.errors import DriftError, MispredictedError, NotReadyError, TrainingFailedError
from sftplan.plan.file import plan_document, write_plan

if TYPE_CHECKING:
    from pathlib import Path

    from sftplan.plan.record import Plan

PLAN = ["plan", "--model", "gpt2-large", "--seq", "1024"]


@pytest.fixture
def planned(monkeypatch: pytest.MonkeyPatch, fitting: Plan) -> dict[str, Any]:
    """What `plan` was asked; it always answers with the same plan."""
    seen: dict[str, Any] = {}

    def plan(**request: Any) -> Plan:
        seen.update(request)
        return fitting

    monkeypatch.setattr(sftplan.api, "plan", plan)
    return seen


def failing(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    """Let `plan` end in an error."""

    def plan(**_: Any) -> Plan:
        raise error

    monkeypatch.setattr(sftplan.api, "plan", plan)


def test_options_reach_the_api_by_name(planned: dict[str, Any], tmp_path: Path) -> None:
    options = ["--zero", "2", "--margin", "5%", "--tokens", "20M", "--no-compile", "--packing"]
    more = ["--attention-dropout", "model", "--max-grad-norm", "0", "--out", str(tmp_path / "p")]

    assert run([*PLAN, *options, *more]) == 0
    given = {name: value for name, value in planned.items() if value is not None}
    assert given.pop("command")[0] == "sftplan"
    assert given == {
        "model": "gpt2-large",
        "seq_len": 1024,
        "zero": 2,
        "margin": 0.05,
        "tokens": 20_000_000,
        "compile": False,
        "packing": True,
        "attention_dropout": "model",
        "max_grad_norm": 0.0,
    }


def test_json_is_one_document_and_the_file_is_the_same(
    planned: dict[str, Any],
    fitting: Plan,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = tmp_path / "plan.json"

    assert run([*PLAN, "--json", "--out", str(path)]) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out) == json.loads(path.read_text()) == plan_document(fitting)
    assert "wrote" in captured.err


def test_quiet_prints_the_verdict_alone(
    planned: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run([*PLAN, "-q", "--no-out"]) == 0
    assert capsys.readouterr().out.startswith("Fits: 62.50")


def test_nothing_fits_is_exit_3_with_the_json(
    monkeypatch: pytest.MonkeyPatch, not_fitting: Plan, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sftplan.api, "plan", lambda **_: not_fitting)

    assert run([*PLAN, "--no-out", "--json"]) == 3
    assert json.loads(capsys.readouterr().out)["fits"] is False


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (DriftError("other GPU"), 4),
        (MispredictedError("12% off"), 5),
        (NotReadyError("no driver", "install one"), 6),
        (TrainingFailedError("rank 3"), 7),
    ],
)
def test_expected_failures_have_a_message_and_no_traceback(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    error: Exception,
    code: int,
) -> None:
    failing(monkeypatch, error)

    assert run([*PLAN, "--no-out"]) == code
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith(f"error: {error}")
    assert "Traceback" not in captured.err


def test_a_hint_follows_after_a_blank_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    failing(monkeypatch, NotReadyError("no driver", "install one"))
    run(PLAN)

    assert capsys.readouterr().err == "error: no driver\n\nhint: install one\n"


def test_a_bug_keeps_its_traceback(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    failing(monkeypatch, ZeroDivisionError("oops"))

    assert run(PLAN) == 1
    error = capsys.readouterr().err
    assert "Traceback" in error
    assert "please report it with the output of `sftplan env`" in error


def test_an_interrupt_is_130(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    failing(monkeypatch, KeyboardInterrupt())

    assert run(PLAN) == 130
    assert "Traceback" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["frobnicate"], "no command 'frobnicate'"),
        (["comapre"], "did you mean compare?"),
        ([*PLAN, "--modle", "x"], "did you mean --model"),
        ([*PLAN, "--zero", "7"], "'7' is not one of"),
        ([*PLAN, "--margin", "x"], "'x' is not a share such as 0.05 or 5%"),
        ([*PLAN, "--tokens", "many"], "'many' is not a count such as 20M"),
        (["plan", "--seq", "8"], "missing option '--model'"),
        (["show", "missing.json"], "cannot read missing.json"),
        (["explain", "atention"], "did you mean attention or"),
        (["compare", *PLAN[1:], "--all", "--on", "a"], "--on and --all exclude each other"),
        (["launch", "--out", "x"], "no --data"),
    ],
)
def test_usage_errors_are_exit_2_with_what_to_do(
    capsys: pytest.CaptureFixture[str], args: list[str], message: str
) -> None:
    assert run(args) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert message in captured.err
    assert "Traceback" not in captured.err


def test_show_prints_the_plan_again(
    fitting: Plan, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "plan.json"
    write_plan(fitting, path)

    assert run(["show", str(path)]) == 0
    assert "Fits: 62.50 of 140.00 GiB" in capsys.readouterr().out
    assert run(["show", str(path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == plan_document(fitting)


def test_show_prints_other_files_of_ours_and_refuses_the_rest(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "file.json"
    path.write_text('{"format": "sftplan.run", "status": "done"}')

    assert run(["show", str(path)]) == 0
    assert "done" in capsys.readouterr().out
    path.write_text('{"format": "other"}')
    assert run(["show", str(path)]) == 2


def test_explain_takes_numbers_from_a_plan(
    fitting: Plan, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "plan.json"
    write_plan(fitting, path)

    assert run(["explain", "activations", "--plan", str(path)]) == 0
    assert "41.00 GiB" in capsys.readouterr().out
    assert run(["explain", "--json"]) == 0
    assert "mfu" in json.loads(capsys.readouterr().out)["terms"]


def test_export_prints_or_writes(
    fitting: Plan, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, out = tmp_path / "plan.json", tmp_path / "job.sh"
    write_plan(fitting, path)

    assert run(["export", str(path), "--to", "slurm"]) == 0
    printed = capsys.readouterr().out
    assert run(["export", str(path), "--to", "slurm", "--out", str(out)]) == 0
    assert out.read_text() == printed
    assert capsys.readouterr().out == ""


def sftplan_process(*args: str, **environment: str) -> subprocess.Popen[str]:
    """The program as a shell starts it."""
    return subprocess.Popen(
        [sys.executable, "-m", "sftplan", *args],
        env=os.environ | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        encoding="utf-8",
    )


def test_a_reader_that_has_seen_enough_is_no_error() -> None:
    process = sftplan_process("explain")
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    errors = process.stderr.read()
    process.stderr.close()

    assert process.wait() == 0
    assert errors == ""


def test_a_terminal_without_unicode_gets_text(fitting: Plan, tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    write_plan(fitting, path)
    process = sftplan_process("show", str(path), PYTHONIOENCODING="ascii")
    out, errors = process.communicate()

    assert (process.returncode, errors) == (0, "")
    assert out.isascii()
    assert "####" in out

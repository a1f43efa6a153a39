"""What a first-time user types: one document whatever happens, bounds, and no traceback."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from sftplan.cli.main import run
from sftplan.errors import ExitCode

if TYPE_CHECKING:
    from pathlib import Path

PLAN = ["plan", "--model", "gpt2", "--seq", "128", "--no-out"]


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["plan", "--model", "gpt2-larg", "--seq", "1024"], 2, "gpt2-larg"),
        (["plan", "--model", "gpt2"], 2, "missing option '--seq'"),
        (["plan", "--model", "gpt2", "--seq", "128", "--zero", "9"], 2, "--zero"),
        (["plann"], 2, "no command"),
        (["show", "no-such-file.json"], 2, "no-such-file.json"),
        (["explain", "attn"], 2, "attn"),
        (["launch", "--out", "x"], 2, "no --data"),
        (["compare", "--model", "gpt2", "--seq", "128", "--on", ","], 2, "--on names no machine"),
    ],
)
def test_with_json_an_error_is_the_one_document(
    arguments: list[str], code: int, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run([*arguments, "--json"]) == code
    told = capsys.readouterr()
    found = json.loads(told.out)

    assert found["format"] == "sftplan.error"
    assert found["exit_code"] == code
    assert words in found["error"]
    assert found["error"].splitlines()[0] in told.err  # said on the terminal, too
    assert run(arguments) == code
    assert capsys.readouterr().out == ""


def test_an_answer_before_an_error_stays_the_one_document(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """`detect` without a GPU says what there is, and that it is not enough."""
    if run(["detect", "--json"]) == ExitCode.NOT_READY:
        assert json.loads(capsys.readouterr().out)["format"] == "sftplan.hardware"
    else:
        assert json.loads(capsys.readouterr().out)["num_gpus"] > 0


def test_a_bug_is_a_document_and_a_traceback(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(**_: object) -> None:
        raise RuntimeError("a wheel came off")

    monkeypatch.setattr("sftplan.api.plan", broken)
    assert run([*PLAN, "--json"]) == ExitCode.BUG
    told = capsys.readouterr()
    assert json.loads(told.out)["error"] == "RuntimeError: a wheel came off"
    assert "Traceback" in told.err


SIGTERM = """
import os, signal, sys, time
from sftplan.cli import main as module
def slow(args):
    try:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(30)
    finally:
        print("put away")
module._invoke = slow
sys.argv = ["sftplan", "env"]
module.main()
"""


def test_sigterm_is_an_interruption_that_puts_away_what_was_begun() -> None:
    done = subprocess.run(
        [sys.executable, "-c", SIGTERM], check=False, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == ExitCode.INTERRUPTED
    assert (done.stdout.strip(), done.stderr.strip()) == ("put away", "interrupted")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--micro-batch", "100000000"], "--micro-batch 100000000 has to be at most 4,096"),
        (
            ["--epochs", "1e300", "--tokens", "20M"],
            "--epochs 1e+300 has to be at least 0 and below",
        ),
        (["--epochs", "inf"], "--epochs inf has to be"),
        (["--max-grad-norm", "inf"], "--max-grad-norm inf has to be at least 0 and finite"),
        (["--seq", "1"], "--seq 1 has to be at least 2"),
    ],
)
def test_what_is_out_of_bounds_is_refused_at_once(
    options: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run([*PLAN, *options]) == ExitCode.USAGE
    assert words in capsys.readouterr().err


def test_hardware_beside_on_is_not_passed_over(capsys: pytest.CaptureFixture[str]) -> None:
    compare = ["compare", "--model", "gpt2", "--seq", "128", "--hardware", "h100-sxm"]
    assert run([*compare, "--on", "t4"]) == ExitCode.USAGE
    assert "--hardware and --on exclude each other" in capsys.readouterr().err
    assert run([*compare, "--all"]) == ExitCode.USAGE
    assert run([*compare, "--json"]) == ExitCode.OK


def test_the_file_of_a_command_stands_under_arguments(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["verify", "--help"]) == ExitCode.OK
    assert "Arguments:\n  PLAN" in capsys.readouterr().out


def test_a_plan_counts_its_data_with_the_tokenizer_that_is_given(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from sftplan.data.demo import demo_tokenizer

    demo_tokenizer().save(tmp_path / "tokenizer")
    data = tmp_path / "data.jsonl"
    data.write_text('{"instruction": "Say it", "output": "It is said."}\n{}\n', encoding="utf-8")
    options = [*PLAN, "--data", str(data), "--json", "--tokenizer", str(tmp_path / "tokenizer")]
    assert run(options) == ExitCode.USAGE
    capsys.readouterr()
    assert run([*options, "--skip-bad", "1"]) == ExitCode.OK
    lengths = json.loads(capsys.readouterr().out)["inputs"]["workload"]["lengths"]
    assert (lengths["estimated"], lengths["num_dropped"]) == (False, 1)

"""What people script against: commands, options, exit codes. What is added is added here."""

from __future__ import annotations

import importlib.util

import click
import pytest

from sftplan.cli.main import COMMANDS, cli, run
from sftplan.errors import ExitCode

COMMON = {"--json", "-q", "--quiet", "-v", "--verbose", "-h", "--help"}
MODEL = {"-m", "--model", "--seq"}
KNOBS = {
    "--hardware", "--gpus", "--nodes",
    "--data", "--epochs", "--tokens", "--examples", "--global-batch",
    "--precision", "--zero", "--offload", "--checkpointing", "--checkpointed-layers", "--attention", "--loss",
    "--packing", "--no-packing", "--compile", "--no-compile",
    "--micro-batch", "--accumulation", "--optimizer", "--allocator",
    "--attention-dropout", "--max-grad-norm",
    "--margin", "--minimize",
}  # fmt: skip
RUN = {
    "--out", "--resume", "--no-verify", "--demo", "--cpu", "--max-steps",
    "--learning-rate", "--min-learning-rate", "--warmup", "--weight-decay", "--seed",
    "--train-on-prompt", "--random-weights", "--tokenizer", "--skip-bad", "--spike",
    "--eval-split", "--eval-every", "--save-every", "--keep", "--tracker", "--nvme-path",
    "--hosts", "--node-rank", "--port",
}  # fmt: skip
DATA = {"--tokenizer", "--skip-bad"}
SURFACE = {
    "plan": MODEL | KNOBS | DATA | {"--train-on-prompt", "--out", "--no-out"},
    "compare": MODEL
    | KNOBS
    | DATA
    | {"--train-on-prompt", "--on", "--all", "--sort", "--limit", "--out"},
    "launch": MODEL | KNOBS | RUN,
    "verify": DATA
    | {
        "--steps",
        "--no-gpu",
        "--diff",
        "--as",
        "--data",
        "--snapshot",
        "--html",
        "--memory-tolerance",
        "--time-tolerance",
    },
    "explain": {"--plan"},
    "export": {"--to", "--out"},
    "show": {"--memory", "--html"},
}
# Commands of the contract whose modules are written; all, in the end.
WRITTEN = [name for name in COMMANDS if importlib.util.find_spec(f"sftplan.cli.{name}")]


def loaded(name: str) -> click.Command:
    """The command, imported."""
    command = cli.get_command(click.Context(cli), name)
    assert command is not None
    return command


def test_the_commands() -> None:
    expected = "detect plan compare verify launch data models profiles explain export show env"

    assert list(COMMANDS) == expected.split()


@pytest.mark.parametrize("name", SURFACE)
def test_the_options_of_a_command(name: str) -> None:
    command = loaded(name)
    context = click.Context(command, **command.context_settings)
    options = {
        opt
        for parameter in command.get_params(context)
        if isinstance(parameter, click.Option)
        for opt in (*parameter.opts, *parameter.secondary_opts)
    }

    assert options == SURFACE[name] | COMMON


@pytest.mark.parametrize("name", WRITTEN)
def test_the_group_repeats_the_first_line_of_each_help(name: str) -> None:
    first_line = (loaded(name).help or "").strip().splitlines()[0]

    assert first_line == COMMANDS[name]


@pytest.mark.parametrize("name", WRITTEN)
@pytest.mark.parametrize("flag", ["-h", "--help"])
def test_help_shows_examples(name: str, flag: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run([name, flag]) == 0
    out = capsys.readouterr().out
    assert out.count(f"sftplan {name}") >= 3 or isinstance(loaded(name), click.Group)
    assert max(len(line) for line in out.splitlines()) <= 90


def test_the_exit_codes() -> None:
    assert {code.name: code.value for code in ExitCode} == {
        "OK": 0,
        "BUG": 1,
        "USAGE": 2,
        "INFEASIBLE": 3,
        "DRIFT": 4,
        "MISPREDICTED": 5,
        "NOT_READY": 6,
        "TRAINING_FAILED": 7,
        "INTERRUPTED": 130,
    }


def test_version_and_no_arguments(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["--version"]) == 0
    assert capsys.readouterr().out.startswith("sftplan 0.")
    assert run([]) == 2
    assert "Usage" in capsys.readouterr().err

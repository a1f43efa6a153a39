"""Runs that go wrong, or are watched: overflow under fp16, spikes, trackers, both kinds of loss."""

# ruff: noqa: TID253
from __future__ import annotations

import functools
import json
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

from sftplan.cli.main import run as command
from sftplan.data.demo import DEMO_FILE
from sftplan.errors import ExitCode, NotReadyError, TrainingFailedError
from sftplan.train import loop, metrics, session, stability
from sftplan.train.job import read_job
from sftplan.train.schedule import Schedule
from sftplan.train.step import LossScale, train_step

if TYPE_CHECKING:
    from collections.abc import Iterator

QUICK = ("--epochs", "1", "--save-every", "0")  # 10 steps


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Sums depend on how many threads share them."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def demo(out: Path, *options: str) -> int:
    return command(["launch", "--demo", "--out", str(out), "-q", *options])


def lines(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def status(out: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((out / "run.json").read_text())
    return found


def schedule_of(out: Path, num_steps: int) -> Schedule:
    settings = read_job(out).settings
    return Schedule(
        peak=settings.learning_rate,
        floor=settings.min_learning_rate,
        warmup_steps=settings.warmup_steps(num_steps),
        num_steps=num_steps,
    )


def test_steps_that_overflow_neither_train_nor_advance_the_schedule(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A scale that is far too high: skipped until it fits, and again after resuming in between."""
    monkeypatch.setattr(session, "LossScale", functools.partial(LossScale, value=2.0**22))
    options = ["--precision", "fp16-mixed", "--epochs", "1", "--save-every", "3"]
    options += ["--micro-batch", "1", "--accumulation", "1"]  # half precision is slow here
    assert demo(tmp_path / "whole", *options, "--max-steps", "12") == ExitCode.OK
    whole = lines(tmp_path / "whole")
    schedule = schedule_of(tmp_path / "whole", round(1 / whole[0]["epoch"]))
    before = [0, *(line["skipped_steps"] for line in whole[:-1])]

    assert 2 < whole[-1]["skipped_steps"] < 10
    for line, skipped in zip(whole, before, strict=True):
        assert line["learning_rate"] == schedule(line["step"] - 1 - skipped)
        is_skipped = line["skipped_steps"] > skipped
        assert (line["grad_norm"] is None) == is_skipped
        assert line["loss_scale"] == 2.0 ** (22 - line["skipped_steps"])
    assert status(tmp_path / "whole")["skipped_steps"] == whole[-1]["skipped_steps"]

    out = tmp_path / "run"
    assert demo(out, *options, "--max-steps", "4") == ExitCode.OK
    assert lines(out)[-1]["skipped_steps"] > 0
    assert demo(out, *options, "--max-steps", "12", "--resume") == ExitCode.OK
    names = ("loss", "grad_norm", "learning_rate", "loss_scale", "skipped_steps")
    assert [[line[n] for n in names] for line in lines(out)] == [
        [line[n] for n in names] for line in whole
    ]


def test_a_gradient_that_is_not_finite_stops_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The loss is a number, its gradient is none: the model on disk stays the one before."""
    calls = []

    def broken(stepper: Any, passes: Any, **options: Any) -> Any:
        calls.append(1)
        if len(calls) == 4:
            weight = next(iter(stepper.model.parameters()))
            weight.register_hook(lambda gradient: gradient * float("inf"))
        return train_step(stepper, passes, **options)

    monkeypatch.setattr(loop, "train_step", broken)
    assert demo(tmp_path, "--epochs", "1", "--save-every", "2") == ExitCode.TRAINING_FAILED
    told = capsys.readouterr().err

    assert "step 4: the loss is " in told
    assert "the gradient's norm nan" in told or "the gradient's norm inf" in told
    assert "demo.jsonl:" in told
    assert [line["step"] for line in lines(tmp_path)] == [1, 2, 3]
    assert (tmp_path / "checkpoints" / "last").resolve().name == "step-2"


def test_a_spike_stops_the_run_and_names_the_lines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(stability, "SPIKE_AFTER", 5)
    calls = []

    def spiked(*arguments: Any, **options: Any) -> Any:
        calls.append(1)
        outcome = train_step(*arguments, **options)
        if len(calls) == 8:
            object.__setattr__(outcome, "loss", outcome.loss * 10)
        return outcome

    monkeypatch.setattr(loop, "train_step", spiked)
    assert demo(tmp_path / "on", *QUICK, "--spike", "6") == ExitCode.TRAINING_FAILED
    told = capsys.readouterr().err
    assert "step 8: the loss of " in told
    assert "is a spike: the recent mean is" in told
    assert "demo.jsonl:" in told
    calls.clear()
    assert demo(tmp_path / "off", *QUICK) == ExitCode.OK


def test_masked_and_unmasked_training_can_be_compared(tmp_path: Path) -> None:
    """Each is better at what it trains on: both losses are of the same held-out examples."""
    found = {}
    for name, more in (("masked", ()), ("all", ("--train-on-prompt",))):
        assert demo(tmp_path / name, "--epochs", "4", "--save-every", "0", *more) == ExitCode.OK
        found[name] = status(tmp_path / name)
        steps = lines(tmp_path / name)
        share = sum(s["response_tokens"] for s in steps) / sum(s["tokens"] for s in steps)
        assert (share > 0.95) == (name == "all")
    masked, everything = found["masked"], found["all"]

    assert masked["settings"]["train_on_prompt"] is False
    assert everything["settings"]["train_on_prompt"] is True
    assert everything["eval_loss_all_tokens"] < masked["eval_loss_all_tokens"] - 0.5
    assert masked["eval_loss"] < masked["eval_loss_all_tokens"]


class Tracker:
    """As accelerate's trackers are called."""

    name = "tensorboard"
    requires_logging_directory = True
    made: list[Tracker] = []  # noqa: RUF012 - emptied by each test

    def __init__(self, run_name: str, logging_dir: str) -> None:
        self.run_name, self.folder = run_name, logging_dir
        self.config: dict[str, Any] = {}
        self.logged: list[tuple[int, dict[str, float]]] = []
        self.state = "new"
        Tracker.made.append(self)

    def start(self) -> None:
        self.state = "started"

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        self.config = values

    def log(self, values: dict[str, float], step: int) -> None:
        self.logged.append((step, values))

    def finish(self) -> None:
        self.state = "finished"


def test_a_tracker_of_accelerate_gets_every_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from accelerate import tracking
    from accelerate.utils import LoggerType

    Tracker.made.clear()
    monkeypatch.setattr(tracking, "get_available_trackers", lambda: [LoggerType.TENSORBOARD])
    monkeypatch.setitem(tracking.LOGGER_TYPE_TO_CLASS, "tensorboard", Tracker)
    assert demo(tmp_path, *QUICK, "--tracker", "tensorboard") == ExitCode.OK
    (tracker,) = Tracker.made

    assert (tracker.folder, tracker.state) == (str(tmp_path), "finished")
    assert tracker.config["precision"] == "fp32"
    assert [step for step, _ in tracker.logged] == list(range(1, 11))
    for (_, values), line in zip(tracker.logged, lines(tmp_path), strict=True):
        assert {k: line[k] for k in ("loss", "grad_norm", "tokens_per_s", "clip_fraction")} == {
            k: values[k] for k in ("loss", "grad_norm", "tokens_per_s", "clip_fraction")
        }


def test_the_trackers_of_accelerate_are_called_as_that_stand_in() -> None:
    """The stand-in above is only worth something if the real ones look like it."""
    import inspect

    from accelerate import tracking

    for name in ("tensorboard", "wandb", "trackio"):
        kind = tracking.LOGGER_TYPE_TO_CLASS[name]
        has_folder = "logging_dir" in inspect.signature(kind.__init__).parameters
        assert has_folder == kind.requires_logging_directory
        for method in ("start", "store_init_configuration", "log", "finish"):
            assert callable(getattr(kind, method))


def test_a_tracker_that_is_not_installed_is_named_before_training(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert demo(tmp_path / "run", *QUICK, "--tracker", "comet_ml") == ExitCode.NOT_READY
    assert "--tracker comet_ml is not installed" in capsys.readouterr().err
    assert not (tmp_path / "run" / "run.json").exists()
    monkeypatch.setitem(sys.modules, "accelerate", None)
    with pytest.raises(NotReadyError, match="needs accelerate"):
        metrics.start_tracker("wandb", tmp_path, {})


def test_a_run_whose_data_or_plan_has_changed_is_not_gone_on_with(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "data.jsonl"
    shutil.copy(DEMO_FILE, data)
    out = tmp_path / "run"
    same = ("--save-every", "2", "--epochs", "1", "--data", str(data))
    assert demo(out, *same, "--max-steps", "4") == ExitCode.OK

    for change, reason in (
        (("--accumulation", "1"), "--resume: "),
        (("--precision", "bf16-mixed"), "--resume: precision was fp32, now it is bf16-mixed"),
        (("--train-on-prompt",), "--resume: train_on_prompt was False, now it is True"),
    ):
        assert demo(out, *same, "--resume", *change) == ExitCode.USAGE
        assert reason in capsys.readouterr().err
    text = data.read_text(encoding="utf-8")
    data.write_text(text.replace("even or odd", "odd or even"), encoding="utf-8")
    assert demo(out, *same, "--resume") == ExitCode.USAGE
    assert "--resume: data was" in capsys.readouterr().err
    data.write_text(text, encoding="utf-8")
    assert demo(out, *same, "--resume") == ExitCode.OK
    assert [line["step"] for line in lines(out)] == list(range(1, 11))


def test_a_line_that_cannot_be_written_ends_the_run(tmp_path: Path) -> None:
    written = metrics.MetricsFile(tmp_path, done=0)
    written.path = Path("/dev/full")
    with pytest.raises(TrainingFailedError, match="/dev/full cannot be written: No space left"):
        written.write({"step": 1})
    written.close()

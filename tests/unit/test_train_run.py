"""Whole runs of the demo's model: from the command line to the model's folder, and back from a kill."""

# ruff: noqa: TID253
from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from typing import TYPE_CHECKING, Any

import pytest
import torch
import transformers
from safetensors.torch import load_file

from sftplan.cli.main import run as command
from sftplan.data.demo import DEMO_FILE, demo_tokenizer
from sftplan.errors import ExitCode, UsageError
from sftplan.facts.strategy import Optimizer, Precision
from sftplan.train import checkpoint, interrupt, loop
from sftplan.train.job import read_job
from sftplan.train.metrics import MetricsFile
from sftplan.train.settings import Settings, settings_of
from sftplan.train.stability import Decaying, Stability
from sftplan.train.step import train_step

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


from demo_run import EPOCHS, ONE_THREAD, demo, lines, numbers, status


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Here as in the processes that are started: sums depend on how many threads share them."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing interrupts, with a checkpoint every five steps."""
    out = tmp_path_factory.mktemp("whole") / "run"
    assert demo(out, "--save-every", "5", "--eval-every", "5") == ExitCode.OK
    return out


def test_the_demo_learns_and_writes_what_it_promises(whole: Path) -> None:
    steps, found = lines(whole), status(whole)
    keys = {
        "step", "loss", "learning_rate", "grad_norm", "tokens", "response_tokens", "tokens_per_s",
        "mfu_fraction", "memory", "grad_norm_variance", "response_mean_tokens", "clip_fraction",
    }  # fmt: skip

    assert [line["step"] for line in steps] == list(range(1, 21))
    assert keys <= set(steps[0])
    assert steps[-1]["loss"] < steps[0]["loss"] - 1
    assert steps[-1]["learning_rate"] == 4e-4  # the floor, exactly
    assert all(0 < line["response_tokens"] < line["tokens"] for line in steps)
    assert (found["format"], found["status"], found["steps"]) == ("sftplan.run", "done", 20)
    assert found["eval_loss"] == steps[-1]["eval_loss"]
    assert {"torch", "transformers"} <= set(found["versions"])
    assert sum(row["steps"] for row in found["grad_norm_by_response_length"]) == 20
    links = {name: (whole / "checkpoints" / name).resolve().name for name in ("last", "best")}
    best = min((line["eval_loss"], line["step"]) for line in steps if "eval_loss" in line)
    assert links == {"last": "step-20", "best": f"step-{best[1]}"}
    assert found["best"]["step"] == best[1]


def test_the_final_model_loads_with_its_tokenizer_and_its_weights(whole: Path) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(whole / "final")
    tokenizer = transformers.AutoTokenizer.from_pretrained(whole / "final")
    trained = load_file(whole / "checkpoints" / "step-20" / "model.safetensors")
    ids = torch.tensor([tokenizer("Is the number even or odd?")["input_ids"]])
    config = transformers.AutoConfig.from_pretrained(whole / "model")
    again = transformers.AutoModelForCausalLM.from_config(config).eval()
    missing = again.load_state_dict(trained, strict=False).missing_keys

    assert missing == ["lm_head.weight"]  # tied to the embedding
    assert torch.equal(model(ids).logits, again(ids).logits)
    assert (
        ids[0].tolist()
        == demo_tokenizer()
        .encode(["Is the number even or odd?"], special=False, first=True)[0]
        .tolist()
    )
    assert tokenizer.eos_token_id == model.config.eos_token_id == demo_tokenizer().eos_id
    assert model.config.use_cache
    assert model.lm_head.weight is model.transformer.wte.weight


def test_a_resumed_run_repeats_the_whole_one_bit_for_bit(whole: Path, tmp_path: Path) -> None:
    """Twice interrupted in the middle of an epoch, with dropout, packing and accumulation."""
    out = tmp_path / "run"
    same = ("--save-every", "5", "--eval-every", "5")
    assert demo(out, *same, "--max-steps", "7") == ExitCode.OK
    assert demo(out, *same, "--max-steps", "13", "--resume") == ExitCode.OK
    assert demo(out, *same, "--resume") == ExitCode.OK

    assert numbers(out) == numbers(whole)
    for file in ("final/model.safetensors", "checkpoints/step-20/optimizer.safetensors",
                 "checkpoints/step-20/random.safetensors"):  # fmt: skip
        assert (out / file).read_bytes() == (whole / file).read_bytes()


@pytest.mark.slow
def test_a_killed_run_goes_on_bit_for_bit(whole: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    arguments = ["launch", "--demo", "--out", str(out), "-q", *EPOCHS]
    arguments += ["--save-every", "1", "--eval-every", "5"]
    process = subprocess.Popen([sys.executable, "-m", "sftplan", *arguments], env=ONE_THREAD)
    deadline = time.monotonic() + 60
    while not (out / "checkpoints" / "step-8").exists():
        assert process.poll() is None, "it ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    killed_at = len(lines(out)) if (out / "metrics.jsonl").exists() else 0

    assert process.returncode == -signal.SIGKILL
    assert killed_at < 20
    assert status(out)["status"] == "running"
    assert command([*arguments, "--resume"]) == ExitCode.OK
    assert numbers(out) == numbers(whole)
    assert (out / "final/model.safetensors").read_bytes() == (
        whole / "final/model.safetensors"
    ).read_bytes()


@pytest.mark.parametrize("number", interrupt.SIGNALS)
def test_a_signal_saves_and_ends_with_130(
    number: signal.Signals, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "run"
    calls = []

    def signalled(*arguments: Any, **options: Any) -> Any:
        calls.append(1)
        if len(calls) == 6:
            signal.raise_signal(number)
        return train_step(*arguments, **options)

    monkeypatch.setattr(loop, "train_step", signalled)
    assert demo(out, "--save-every", "0") == ExitCode.INTERRUPTED
    monkeypatch.undo()

    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert status(out)["status"] == "interrupted"
    assert checkpoint.steps_in(out / "checkpoints") == [6]
    assert demo(out, "--save-every", "0", "--resume") == ExitCode.OK
    assert numbers(out) == numbers(whole)


def test_a_run_that_is_not_finite_stops_and_names_the_lines(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A learning rate beyond all measure: the second step's loss is no number."""
    out = tmp_path / "run"
    assert demo(out, "--learning-rate", "1e30", "--warmup", "0") == ExitCode.TRAINING_FAILED
    told = capsys.readouterr().err
    job = read_job(out)
    from sftplan.train.material import gather_material

    source = gather_material(job, world_size=1).training
    batches = source.step(0, 1).micro_batches
    expected = [source.examples[i].place.line for batch in batches for i in batch.examples]
    shown = told.split("demo.jsonl:")[1].split()[0].split(",")

    assert "step 2: the loss is nan" in told
    assert len(expected) > 10
    assert [int(line) for line in shown] == sorted(line or 0 for line in expected)[:20]
    assert status(out)["status"] == "failed"
    assert not (out / "final").exists()
    assert [line["step"] for line in lines(out)] == [1]


def test_a_spike_stops_where_that_was_asked_for() -> None:
    steady = Stability()
    for value in [2.0, 2.1] * 15:
        steady.seen(loss=value, grad_norm=1.0, response_mean=9.0, clip_at=0.5, skipped=False)

    assert steady.is_spike(3.0, 6.0)
    assert not steady.is_spike(2.2, 6.0)
    assert not steady.is_spike(3.0, 0.0)
    assert Stability.of(json.loads(json.dumps(steady.state()))) == steady
    assert (steady.clipped, steady.skipped) == (30, 0)


def test_recent_values_weigh_more() -> None:
    running = Decaying()
    for value in [0.0] * 500 + [1.0] * 500:
        running.add(value)

    assert running.mean == pytest.approx(1.0, abs=1e-3)
    assert running.variance == pytest.approx(0.0, abs=1e-3)


def test_another_run_is_not_gone_on_with(
    whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    shutil.copytree(whole, out, symlinks=True)

    assert demo(out) == ExitCode.USAGE
    assert "holds a run already" in capsys.readouterr().err
    assert demo(out, "--resume", "--seed", "1") == ExitCode.USAGE
    assert "--resume: data was" in capsys.readouterr().err  # another split of the examples
    assert demo(out, "--resume", "--learning-rate", "0.001") == ExitCode.USAGE
    assert "--resume: learning_rate was 0.004, now it is 0.001" in capsys.readouterr().err


def test_a_model_without_weights_or_tokenizer_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    base = ["launch", "--model", "gpt2", "--seq", "64", "--hardware", "h200-sxm", "--gpus", "1",
            "--data", str(DEMO_FILE), "--cpu", "-q", "--out", str(tmp_path / "run")]  # fmt: skip

    assert command(base) == ExitCode.USAGE
    assert "no weights of gpt2 on this machine" in capsys.readouterr().err
    assert command([*base, "--random-weights"]) == ExitCode.USAGE
    assert "no tokenizer of gpt2" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_tokenizer_beyond_the_vocabulary_is_refused(
    whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    demo_tokenizer(600).save(tmp_path / "tokenizer")
    out = tmp_path / "run"

    assert demo(out, "--tokenizer", str(tmp_path / "tokenizer")) == ExitCode.USAGE
    assert "makes ids up to 599" in capsys.readouterr().err
    assert not (out / "run.json").exists()


def test_what_cannot_be_launched_yet_is_said(whole: Path) -> None:
    from dataclasses import replace

    from sftplan.train.material import check_supported

    plan = read_job(whole).plan
    for change, said in (
        ({"optimizer": Optimizer.ADAMW_8BIT}, "adamw-8bit cannot be sharded by --zero 2"),
        ({"precision": Precision.BF16_TRUE}, "bf16-true has no ZeRO"),
    ):
        strategy = replace(plan.strategy, zero=2, **change)
        with pytest.raises(UsageError, match=said):
            check_supported(replace(plan, strategy=strategy))


def test_metrics_lose_what_comes_again(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2}\n{"step": 3, "lo')
    file = MetricsFile(tmp_path, done=1)
    file.write({"step": 2, "loss": float("nan")})
    file.close()

    assert lines(tmp_path) == [{"step": 1}, {"step": 2, "loss": None}]


def test_settings_are_checked() -> None:
    assert settings_of({"learning_rate": None, "seed": 3}) == Settings(seed=3)
    for options in ({"learning_rate": 0.0}, {"min_learning_rate": 1.0}, {"beta1": 1.0},
                    {"learning_rate": float("nan")}, {"warmup": float("inf")}, {"keep": 0}):  # fmt: skip
        with pytest.raises(UsageError, match=r"has to be|is above"):
            settings_of(options)
    with pytest.raises(UsageError) as unknown:
        settings_of({"learning_rat": 1.0})
    assert unknown.value.hint == "did you mean learning_rate?"

"""SIGKILL anywhere: at every file operation of a save, and at random moments of a run.

One process imports PyTorch, then forks a child for each kill: many kills in a few seconds.
"""

# ruff: noqa: TID253
from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest
import torch

from sftplan.train import checkpoint, interrupt

if TYPE_CHECKING:
    from pathlib import Path

forks = pytest.mark.skipif(sys.platform != "linux", reason="forks, as Linux does")

SAVE_TWICE = """
import os, signal, sys
from pathlib import Path
import torch
from sftplan.train import checkpoint

def content(value):
    tensors = {"model.safetensors": {"w": torch.full((64,), value)},
               "optimizer.safetensors": {"m": torch.arange(32.0)}}
    return checkpoint.Content(tensors=tensors, state={"identity": {}, "value": value})

def killed_at(last, root):
    seen = 0
    def hook(event, arguments):
        nonlocal seen
        files = event == "open" or event.split(".")[0] in ("os", "shutil")
        if files and any(str(root) in str(each) for each in arguments):
            seen += 1
            if seen == last:
                os.kill(os.getpid(), signal.SIGKILL)
    sys.addaudithook(hook)
    checkpoint.save(root, 1, content(1.0))
    checkpoint.save(root, 2, content(2.0))
    checkpoint.rotate(root, keep=1, best=None)
    os._exit(0)

for last in range(1, 500):
    root = Path(sys.argv[1]) / str(last)
    if (child := os.fork()) == 0:
        killed_at(last, root)
    status = os.waitpid(child, 0)[1]
    if status == 0:
        break
    assert os.WIFSIGNALED(status), status
print(last)
"""


@forks
def test_a_save_that_is_killed_anywhere_leaves_whole_checkpoints(tmp_path: Path) -> None:
    """What is found then is the newest whole one, never half of one; and saving works again."""
    command = [sys.executable, "-W", "ignore", "-c", SAVE_TWICE, str(tmp_path)]
    told = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    operations = int(told)
    found: list[int] = []
    for number in range(1, operations + 1):
        root = tmp_path / str(number)
        checkpoint.clear_leftovers(root)
        newest = checkpoint.newest(root)
        assert not list(root.glob(".bad-*"))
        step = 0
        if newest is not None:
            loaded = checkpoint.load(newest)
            step = loaded.state["step"]
            expected = torch.full((64,), float(step))
            assert torch.equal(loaded.tensors["model.safetensors"]["w"], expected)
        found.append(step)
        content = checkpoint.Content(tensors={}, state={"identity": {}})
        assert checkpoint.newest(checkpoint.save(root, 3, content).parent) == root / "step-3"
        checkpoint.rotate(root, keep=1, best=None)
        assert {path.name for path in root.iterdir()} == {"last", "step-3"}

    assert operations > 30
    assert found == sorted(found)  # the later the kill, the newer the checkpoint
    assert set(found) == {0, 1, 2}


RUN = """
import json, os, random, signal, sys, time
from sftplan.cli.main import run
from sftplan.train.session import run_job  # imported once, before there are children
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2LMHeadModel

arguments, out, seed, kills = sys.argv[4:], sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
draw, done = random.Random(seed), 0
moments = []
while True:
    more = ["--resume"] if moments else []
    begun = time.monotonic()
    if (child := os.fork()) == 0:
        os._exit(run([*arguments, "--out", out, *more]))
    wait = draw.uniform(0.3, 1.2) if len(moments) < kills else 600.0
    while time.monotonic() - begun < wait and os.waitpid(child, os.WNOHANG) == (0, 0):
        time.sleep(0.005)
    try:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    except (ProcessLookupError, ChildProcessError):
        break
    try:
        lines = open(os.path.join(out, "metrics.jsonl")).read().count("\\n")
    except OSError:
        lines = 0
    moments.append(lines)
print(json.dumps(moments))
"""


def numbers(out: Path) -> list[tuple[object, ...]]:
    names = ("step", "loss", "grad_norm", "learning_rate", "tokens_total", "grad_norm_variance")
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [tuple(line[name] for name in names) for line in lines]


@forks
@pytest.mark.slow
def test_a_run_that_is_killed_again_and_again_ends_as_the_one_that_was_not(tmp_path: Path) -> None:
    """With packing, accumulation and dropout; a checkpoint after every step, evaluations between."""
    seed = random.SystemRandom().randrange(2**32)
    demo = ["launch", "--demo", "-q", "--epochs", "2", "--save-every", "1", "--eval-every", "7"]
    results = {}
    for name, kills in (("whole", 0), ("killed", 3)):
        out = tmp_path / name
        command = [
            sys.executable,
            "-W",
            "ignore",
            "-c",
            RUN,
            str(out),
            str(seed),
            str(kills),
            *demo,
        ]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=200)
        assert done.returncode == 0, done.stderr
        results[name] = json.loads(done.stdout.splitlines()[-1])
        assert json.loads((out / "run.json").read_text())["status"] == "done"
    whole, killed = tmp_path / "whole", tmp_path / "killed"

    assert results["whole"] == []
    assert results["killed"], f"seed {seed}: it was over before the first kill"
    assert numbers(killed) == numbers(whole), f"seed {seed}: killed at {results['killed']}"
    for file in ("final/model.safetensors", "checkpoints/last/optimizer.safetensors"):
        assert (killed / file).read_bytes() == (whole / file).read_bytes(), f"seed {seed}"


def test_the_first_signal_is_noted_and_the_second_acts() -> None:
    before = signal.getsignal(signal.SIGINT)
    with interrupt.deferred() as asked:
        signal.raise_signal(signal.SIGINT)
        assert asked.by == "SIGINT"
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before

"""What a person sees: a bar on a real terminal, plain lines elsewhere, nothing with -q."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest

from sftplan.train.progress import LINE_EVERY_S, Progress

if TYPE_CHECKING:
    from pathlib import Path

RUN = ["-m", "sftplan", "launch", "--demo", "--epochs", "1", "--save-every", "0"]
ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


def record(step: int) -> dict[str, Any]:
    memory = {"peak_reserved_bytes": 2**34, "predicted_reserved_bytes": 2**34}
    return {
        "step": step, "loss": 2.0 / step, "grad_norm": 0.5, "grad_norm_variance": 0.04,
        "clip_fraction": 0.5, "skipped_steps": 1, "tokens_per_s": 95_000.0, "mfu_fraction": 0.5,
        "memory": memory,
    }  # fmt: skip


def on_terminal(command: list[str], columns: int) -> str:
    """What a command writes to a terminal of its own."""
    pty = pytest.importorskip("pty")
    fcntl, termios = pytest.importorskip("fcntl"), pytest.importorskip("termios")
    import struct

    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))
    env = {k: v for k, v in os.environ.items() if k not in ("NO_COLOR", "COLUMNS", "LINES")}
    process = subprocess.Popen(
        [sys.executable, *command], stdin=theirs, stdout=theirs, stderr=theirs,
        env=env | {"TERM": "xterm-256color", "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    os.close(theirs)
    parts = []
    while True:
        try:
            part = os.read(ours, 65536)
        except OSError:  # Linux says so once the other end is closed
            break
        if not part:
            break
        parts.append(part)
    os.close(ours)
    assert process.wait(60) == 0, b"".join(parts).decode()
    return b"".join(parts).decode()


@pytest.mark.slow
def test_a_terminal_shows_a_bar_and_the_figures_below_it(tmp_path: Path) -> None:
    shown = on_terminal([*RUN, "--out", str(tmp_path / "run")], columns=120)
    plain = ESCAPES.sub("", shown)

    assert "\x1b[" in shown
    assert re.search(r"training .*\b10/10\b.* left", plain)
    assert re.search(
        r"loss \d\.\d{4} · \|g\| \d+\.\d\d ± \d+\.\d\d · clipped \d+ % · [\d.K ]+tokens/s", plain
    )
    assert not re.search(r"^step \d", plain, re.MULTILINE)  # those are for logs
    assert "held out" in plain
    assert "|gradient|" in plain


NARROW = """
import sys, time
from sftplan.train.progress import Progress
sys.path.insert(0, sys.argv[1])
from test_train_progress import record
progress = Progress(quiet=False)
progress.start(total=3, done=0)
for step in (1, 2, 3):
    progress.update(record(step))
progress.close()
"""


def test_a_narrow_terminal_loses_no_figure() -> None:
    here = os.path.dirname(__file__)  # noqa: PTH120 - for another process
    shown = ESCAPES.sub("", on_terminal(["-c", NARROW, here], columns=60))
    last = " ".join(shown.replace("\r", "\n").split())
    for figure in ("3/3", "loss 0.6667", "± 0.20", "clipped 50 %", "1 skipped", "95.0 K tokens/s",
                   "MFU 50.0 %", "16.00 GiB of 16.00 predicted"):  # fmt: skip
        assert figure in last


@pytest.mark.slow
def test_a_log_gets_plain_lines(tmp_path: Path) -> None:
    command = [sys.executable, *RUN, "--out", str(tmp_path / "run")]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=env)

    assert "\x1b" not in done.stdout + done.stderr
    assert "\r" not in done.stdout + done.stderr
    assert re.search(r"^step 10/10 · loss \d.* tokens/s · 0:00:00 left$", done.stderr, re.MULTILINE)
    assert "training" not in done.stderr


def test_lines_come_when_it_is_time(capsys: pytest.CaptureFixture[str]) -> None:
    now = 0.0
    progress = Progress(quiet=False, clock=lambda: now)
    progress.start(total=100, done=10)
    for step in range(11, 101):
        now += LINE_EVERY_S / 6
        progress.update(record(step))
    told = [line.split(" · ") for line in capsys.readouterr().err.splitlines()]

    assert [line[0] for line in told] == [f"step {step}/100" for step in range(16, 101, 6)]
    assert told[0][-1] == "0:07:00 left"  # 84 steps of 5 s


def test_nothing_is_said_when_quiet(capsys: pytest.CaptureFixture[str]) -> None:
    progress = Progress(quiet=True)
    progress.start(total=1, done=0)
    progress.say("a sentence")
    progress.update(record(1))
    progress.close()
    assert capsys.readouterr() == ("", "")


@pytest.mark.slow
def test_standard_output_holds_the_result_alone(tmp_path: Path) -> None:
    """Whatever libraries say while they are imported."""
    command = [sys.executable, *RUN, "--json", "--max-steps", "2", "--out", str(tmp_path / "run")]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=env)
    assert json.loads(done.stdout)["format"] == "sftplan.run"

"""The processes of a dry run: results in order, and nothing left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from typing import TYPE_CHECKING

import pytest

from sftplan.errors import TrainingFailedError
from sftplan.verify import processes, profile
from sftplan.verify.processes import run_processes

if TYPE_CHECKING:
    from pathlib import Path


FAKE = """
import json, os, subprocess, sys, time
from pathlib import Path
from sftplan.verify.child import end_with_parent
from sftplan.verify.request import result_file

folder, rank = Path(sys.argv[-1]), int(os.environ.get("RANK", "0"))
end_with_parent()
grandchild = subprocess.Popen(["sleep", "600"])
(folder / f"pids-{rank}").write_text(f"{os.getpid()} {grandchild.pid}")
what = (folder / f"what-{rank}").read_text()
if what == "oom":
    result_file(folder, rank).write_text(json.dumps({"out_of_memory": {"phase": "backward"}}))
    os._exit(5)
if what == "die":
    print("cause of death", flush=True)
    os._exit(3)
if what == "ok":
    result_file(folder, rank).write_text(json.dumps({"rank": rank}))
    os._exit(0)
time.sleep(600)
"""


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder whose ranks do what its files say; the module that they run is called `fake_child`."""
    (tmp_path / "fake_child.py").write_text(FAKE)
    before = os.environ.get("PYTHONPATH", "")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, (str(tmp_path), before))))
    monkeypatch.setattr(processes, "GRACE_S", 0.5)
    return tmp_path


def tell(folder: Path, *what: str) -> None:
    for rank, word in enumerate(what):
        (folder / f"what-{rank}").write_text(word)


def pids(folder: Path) -> list[int]:
    return [int(p) for file in folder.glob("pids-*") for p in file.read_text().split()]


def alive(pid: int) -> bool:
    """Whether a process still runs; one that waits to be reaped does not."""
    try:
        with open(f"/proc/{pid}/stat") as stat:  # noqa: PTH123
            return stat.read().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def wait_until_gone(found: list[int]) -> None:
    """Signals take a moment."""
    deadline = time.monotonic() + 10
    while any(alive(pid) for pid in found):
        assert time.monotonic() < deadline, "left running"
        time.sleep(0.05)


def test_all_ranks_end_when_one_runs_out_of_memory(fake: Path) -> None:
    tell(fake, "sleep", "oom")
    results = run_processes(fake, 2, module="fake_child", timeout_s=60)

    assert profile.merged(results) == {"out_of_memory": {"phase": "backward"}}
    assert len(pids(fake)) == 4
    wait_until_gone(pids(fake))


def test_results_come_in_the_order_of_ranks(fake: Path) -> None:
    tell(fake, "ok", "ok")
    assert run_processes(fake, 2, module="fake_child", timeout_s=60) == [{"rank": 0}, {"rank": 1}]
    wait_until_gone(pids(fake))


def test_a_rank_that_dies_is_named_with_its_last_words(fake: Path) -> None:
    tell(fake, "sleep", "die")
    with pytest.raises(TrainingFailedError, match=r"rank 1 .*code 3.*\n.*cause of death"):
        run_processes(fake, 2, module="fake_child", timeout_s=60)
    wait_until_gone(pids(fake))


def test_a_dry_run_that_hangs_is_ended(fake: Path) -> None:
    tell(fake, "sleep")
    said = r'not ended in 4 s; it stood at\nrank 0:\n  File ".*fake_child.py", line \d+ in <module>'
    with pytest.raises(TrainingFailedError, match=said):
        run_processes(fake, 1, module="fake_child", timeout_s=4)
    wait_until_gone(pids(fake))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_nothing_outlives_the_process_that_asked(fake: Path, number: int) -> None:
    tell(fake, "sleep")
    code = (
        "import sys; from pathlib import Path; from sftplan.verify.processes import run_processes; "
        "run_processes(Path(sys.argv[1]), 1, module='fake_child', timeout_s=60)"
    )
    parent = subprocess.Popen([sys.executable, "-c", code, str(fake)], stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 20
    while not (fake / "pids-0").exists() or len(pids(fake)) < 2:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    parent.send_signal(number)
    parent.wait(10)

    wait_until_gone(pids(fake))

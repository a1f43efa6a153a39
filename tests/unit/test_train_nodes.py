"""Several machines: their places, the port they meet at, and all of them gone when one is."""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import psutil  # type: ignore[import-untyped]
import pytest

import sftplan.api
from sftplan.data.demo import DEMO_FILE
from sftplan.errors import ExitCode, TrainingFailedError, UsageError
from sftplan.plan.file import write_plan
from sftplan.train import nodes
from sftplan.train.demo import DEMO_KNOBS, DEMO_SEQ_LEN, write_demo_model
from sftplan.train.job import Job
from sftplan.train.launch import start
from sftplan.train.nodes import Node, Others, meeting_port, node_of
from sftplan.train.ranks import place_of_rank
from sftplan.train.settings import Settings

if TYPE_CHECKING:
    from pathlib import Path

    from sftplan.plan.record import Plan

pytestmark = pytest.mark.xdist_group("nodes")  # what both machines left is made once, in one worker
SAME = ("step", "loss", "grad_norm", "learning_rate", "tokens_total")
ALL_GONE_S = 60.0


def free_port() -> int:
    """One that is free, as is the next; below those that the system gives to connections."""
    for port in random.SystemRandom().sample(range(20_000, 30_000, 2), 100):
        with contextlib.suppress(OSError), socket.create_server(("", port)):
            socket.create_server(("", port + 1)).close()
            return port
    pytest.fail("no two free ports")


def plan_for(folder: Path, *, gpus: int, num_nodes: int) -> Plan:
    """The demo's model; a step has the same rows however many ranks there are."""
    write_demo_model(folder)
    config = json.loads((folder / "config.json").read_text()) | {"resid_pdrop": 0.0}
    (folder / "config.json").write_text(json.dumps(config))
    knobs = DEMO_KNOBS | {"accumulation": 2 // (gpus * num_nodes), "epochs": 2.0}
    return sftplan.api.plan(
        model=str(folder), seq_len=DEMO_SEQ_LEN, hardware="h200-sxm", gpus=gpus, nodes=num_nodes,
        command=[], **knobs,
    )  # fmt: skip


def numbers(out: Path) -> list[list[Any]]:
    """What of the metrics is the same in every run; none of a line that is being written."""
    if not (out / "metrics.jsonl").exists():
        return []
    lines = (out / "metrics.jsonl").read_text().split("\n")[:-1]
    return [[record[key] for key in SAME] for record in map(json.loads, lines)]


def wait_for_steps(out: Path, count: int) -> None:
    """Until a run has come so far."""
    deadline = time.monotonic() + 120
    while len(numbers(out)) < count:
        assert time.monotonic() < deadline
        time.sleep(0.05)


def ranks_of(parent: int) -> list[psutil.Process]:
    """The ranks that a process has started."""
    children = psutil.Process(parent).children(recursive=True)
    return [each for each in children if "sftplan.train" in each.cmdline()]


def test_a_machine_finds_its_place_by_name_or_address() -> None:
    name = socket.gethostname()

    assert node_of(f"far, {name}", number=None, port=None, num_nodes=2).number == 1
    assert node_of("127.0.0.1,far", number=None, port=4000, num_nodes=2) == Node(
        hosts=("127.0.0.1", "far"), number=0, port=4000
    )
    assert node_of(None, number=None, port=None, num_nodes=1) == Node()


@pytest.mark.parametrize(
    ("hosts", "number", "said"),
    [
        (None, None, "the plan has 2 nodes, --hosts names 0"),
        ("a,b,c", None, "the plan has 2 nodes, --hosts names 3"),
        ("far,further", None, "none of --hosts far,further is this machine"),
        ("127.0.0.1,127.0.0.1", None, "2 of --hosts"),
        ("a,b", 2, "--node-rank 2: the nodes are 0 to 1"),
    ],
)
def test_hosts_that_do_not_match_are_refused(
    hosts: str | None, number: int | None, said: str
) -> None:
    with pytest.raises(UsageError, match=re.escape(said)):
        node_of(hosts, number=number, port=None, num_nodes=2)


def test_a_port_in_use_is_refused_where_it_has_to_be_free() -> None:
    with socket.create_server(("", 0)) as taken:
        port = int(taken.getsockname()[1])
        first = Node(hosts=("a", "b"), number=0, port=port)

        with pytest.raises(UsageError, match=f"--port: {port} on a is not free") as caught:
            meeting_port(first)
        assert "--port N" in (caught.value.hint or "")
        with pytest.raises(UsageError, match=f"{port} on a is not free"):
            Others(replace(first, port=port - 1))
        assert meeting_port(replace(first, number=1)) == port
    assert meeting_port(Node()) > 0


def test_ranks_are_numbered_over_all_machines_and_share_the_processors(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr("sftplan.train.ranks.num_cpus", lambda: 32)
    place = place_of_rank(3, 8, Node(hosts=("a", "b"), number=1, port=29500), 29500)

    assert (place["RANK"], place["LOCAL_RANK"], place["WORLD_SIZE"]) == ("11", "3", "16")
    assert (place["MASTER_ADDR"], place["MASTER_PORT"]) == ("a", "29500")
    assert place["OMP_NUM_THREADS"] == "4"


@pytest.mark.parametrize("well", [True, False])
def test_an_end_without_farewell_is_a_loss(monkeypatch: pytest.MonkeyPatch, well: bool) -> None:
    monkeypatch.setattr(nodes, "RETRY_S", 0.05)
    both = Node(hosts=("127.0.0.1", "127.0.0.1"), number=0, port=free_port())
    first, second = Others(both), Others(replace(both, number=1))
    deadline = time.monotonic() + 20
    while not (first._sockets and second._sockets) and time.monotonic() < deadline:
        time.sleep(0.01)
    second.end(well=well)
    while first.lost is None and time.monotonic() < deadline and not well:
        time.sleep(0.01)
    time.sleep(0.2 if well else 0.0)
    first.end(well=True)

    assert first.lost == (None if well else "127.0.0.1")
    assert second.lost is None


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> list[list[Any]]:
    """The metrics of one process."""
    folder = tmp_path_factory.mktemp("whole")
    plan = plan_for(folder / "model", gpus=1, num_nodes=1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        start(job(plan, folder / "run"), ranks=1)
    return numbers(folder / "run")


def job(plan: Plan, out: Path, **changes: Any) -> Job:
    """A run on the processor that saves every five steps."""
    settings = Settings(random_weights=True, cpu=True, save_every=5)
    return Job(plan=plan, data=str(DEMO_FILE), out=out, settings=settings, quiet=True, **changes)


def same_curve(found: list[list[Any]], expected: list[list[Any]]) -> None:
    """Equal but for the order in which ranks add up."""
    assert len(found) == len(expected)
    for line, other in zip(found, expected, strict=True):
        assert line == pytest.approx(other, rel=1e-4)


@pytest.mark.slow
def test_a_killed_rank_stops_all_and_the_run_resumes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whole: list[list[Any]]
) -> None:
    """Two ranks on one machine, one ended by SIGKILL; in the end all is as if nothing had been."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    plan = plan_for(tmp_path / "model", gpus=2, num_nodes=1)
    out = tmp_path / "run"
    killed: list[float] = []

    def kill() -> None:
        wait_for_steps(out, 7)
        (second,) = [p for p in ranks_of(os.getpid()) if p.environ().get("RANK") == "1"]
        second.kill()
        killed.append(time.monotonic())

    thread = threading.Thread(target=kill)
    thread.start()
    with pytest.raises(TrainingFailedError, match="rank 1 ended with signal 9") as caught:
        start(job(plan, out), ranks=2)
    thread.join()

    assert time.monotonic() - killed[0] < ALL_GONE_S
    assert caught.value.exit_code == ExitCode.TRAINING_FAILED
    assert "rank-1.log" in caught.value.message
    assert not ranks_of(os.getpid())
    assert json.loads((out / "run.json").read_text())["status"] == "failed"
    start(job(plan, out, resume=True), ranks=2)
    same_curve(numbers(out), whole)


def node_command(plan: Path, out: Path, number: int, port: int, *more: str) -> list[str]:
    """`sftplan launch` on one of two machines, both of which are this one."""
    return [
        sys.executable, "-W", "ignore", "-m", "sftplan", "launch", str(plan), "--data", str(DEMO_FILE),
        "--out", str(out), "--hosts", "127.0.0.1,127.0.0.1", "--node-rank", str(number),
        "--port", str(port), "--cpu", "--random-weights", "-q", "--save-every", "5", *more,
    ]  # fmt: skip


@pytest.mark.slow
def test_two_machines_train_as_one_and_stop_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whole: list[list[Any]]
) -> None:
    """The rank of the second is killed: both launchers end with exit code 7; both resume."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    plan, out = tmp_path / "plan.json", tmp_path / "run"
    write_plan(plan_for(tmp_path / "model", gpus=1, num_nodes=2), plan)

    def launched(*more: str) -> list[subprocess.Popen[str]]:
        port = free_port()
        return [
            subprocess.Popen(
                node_command(plan, out, number, port, *more), stdout=subprocess.PIPE,
                stderr=subprocess.PIPE, text=True,
            )
            for number in (0, 1)
        ]  # fmt: skip

    both = launched()
    wait_for_steps(out, 7)
    (rank,) = ranks_of(both[1].pid)
    rank.send_signal(signal.SIGKILL)
    said = [process.communicate(timeout=ALL_GONE_S)[1] for process in both]

    assert [process.returncode for process in both] == [ExitCode.TRAINING_FAILED] * 2
    assert "the ranks of 127.0.0.1 are gone" in said[0]
    assert "rank 1 ended with signal 9" in said[1]
    both = launched("--resume")
    said = [process.communicate(timeout=120)[1] for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    assert json.loads((out / "run.json").read_text())["status"] == "done"
    same_curve(numbers(out), whole)

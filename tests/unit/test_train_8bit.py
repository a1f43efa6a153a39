"""adamw-8bit: refused without its library, kept in checkpoints, as large as the plan says."""

# ruff: noqa: TID253
from __future__ import annotations

import sys
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import torch

import sftplan.api
from sftplan.cli.main import run as command
from sftplan.data.demo import DEMO_FILE
from sftplan.errors import ExitCode
from sftplan.facts.strategy import Optimizer, Precision
from sftplan.step.tape import Tape
from sftplan.step.tensor import DType
from sftplan.step.update import Update as PlannedUpdate
from sftplan.train import checkpoint
from sftplan.train.demo import DEMO_KNOBS, write_demo_model
from sftplan.train.settings import Settings
from sftplan.train.update import Update

if TYPE_CHECKING:
    from pathlib import Path

    from sftplan.facts.strategy import Strategy

ARGUMENTS = ["--seq=256", "--hardware=h200-sxm", "--gpus=1", "--cpu", "--random-weights", "-q"]


class LikeBitsandbytes(torch.optim.Optimizer):
    """AdamW with the states of bitsandbytes: 8-bit moments of large tensors share their tables."""

    tables = (torch.linspace(-1, 1, 256), torch.linspace(0, 1, 256))

    def __init__(self, params: Any, *, lr: float, betas: Any, eps: float) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": 0.0})

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for weight in group["params"]:
                self._move(weight, group["lr"])

    def _move(self, weight: torch.Tensor, rate: float) -> None:
        state = self.state[weight]
        if not state:
            state["step"] = 0
            for number, table in enumerate(self.tables, start=1):
                large = weight.numel() >= 4096
                kind = torch.uint8 if large else torch.float32
                state[f"state{number}"] = torch.zeros_like(weight, dtype=kind)
                if large:
                    state[f"qmap{number}"] = table
                    state[f"absmax{number}"] = torch.zeros(-(-weight.numel() // 256))
        state["step"] += 1
        assert weight.grad is not None
        weight.data -= rate * weight.grad.sign() * state["step"]
        state["state1"] += 1


@pytest.fixture(params=["stand-in", "bitsandbytes"])
def library(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The library, if it is installed, and what stands in for it."""
    name: str = request.param
    if name == "bitsandbytes":
        pytest.importorskip("bitsandbytes")
        return name
    kinds = type("optim", (), {"AdamW8bit": LikeBitsandbytes})
    monkeypatch.setitem(sys.modules, "bitsandbytes", type("bitsandbytes", (), {"optim": kinds}))
    return name


def made() -> tuple[torch.nn.Module, Update]:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(64, 128), torch.nn.Linear(128, 4))
    settings = Settings(learning_rate=1e-2)
    return model, Update(
        model, precision=Precision.FP32, kind=Optimizer.ADAMW_8BIT, settings=settings
    )


def move(model: torch.nn.Module, update: Update, steps: int, *, skip: float = 0.0) -> None:
    for _ in range(steps):
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        update.step(learning_rate=1e-2, divisor=torch.tensor(2.0), skip=torch.tensor(skip))
        update.clear()


def test_a_checkpoint_goes_on_as_if_nothing_had_been(library: str, tmp_path: Path) -> None:
    model, update = made()
    move(model, update, 3)
    tensors = {"weights": dict(model.state_dict()), "optimizer": update.state()}
    content = checkpoint.Content(
        tensors={f"{name}.safetensors": held for name, held in tensors.items()},
        state={"identity": {}},
    )
    found = checkpoint.load(checkpoint.save(tmp_path, 3, content)).tensors
    again, resumed = made()
    again.load_state_dict(found["weights.safetensors"])
    resumed.load(found["optimizer.safetensors"])
    move(model, update, 2)
    move(again, resumed, 2)

    for mine, theirs in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(mine, theirs)


def test_a_step_that_is_skipped_moves_nothing(library: str) -> None:
    model, update = made()
    before = [parameter.detach().clone() for parameter in model.parameters()]
    move(model, update, 1, skip=1.0)
    for parameter, old in zip(model.parameters(), before, strict=True):
        assert torch.equal(parameter, old)
    assert update.state() == {}


def test_the_plan_knows_the_size_of_its_states(library: str) -> None:
    """Moments and scales; the two tables of 256 values are the library's, not a weight's."""
    model, update = made()
    move(model, update, 1)
    kept = {
        key: value for key, value in update.state().items() if not key.startswith(("qmap", "step"))
    }
    strategy: Strategy = replace(demo_strategy(), optimizer=Optimizer.ADAMW_8BIT)
    planned, tape = PlannedUpdate(strategy, range(len(list(model.parameters())))), Tape()
    weights = [
        (None, tape.empty(tuple(p.shape), DType.FP32, "weights")) for p in model.parameters()
    ]
    planned.create(tape, weights)

    assert sum(state.nbytes for state in kept.values()) == sum(s.nbytes for s in planned.states)


def demo_strategy() -> Strategy:
    return sftplan.api.plan(
        model="gpt2", seq_len=64, hardware="h200-sxm", gpus=1,
        **{k: v for k, v in DEMO_KNOBS.items() if k not in ("data", "epochs")},
    ).strategy  # type: ignore[return-value]  # fmt: skip


def test_without_the_library_it_is_refused_before_anything_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sftplan.train.material.find_spec", lambda _: None)
    write_demo_model(tmp_path / "model")
    source = ["--model", str(tmp_path / "model"), "--data", str(DEMO_FILE)]
    out = tmp_path / "run"
    code = command(["launch", *source, *ARGUMENTS, "--optimizer=adamw-8bit", "--out", str(out)])
    told = capsys.readouterr().err

    assert code == ExitCode.NOT_READY
    assert "--optimizer adamw-8bit needs bitsandbytes, which is not installed" in told
    assert "pip install bitsandbytes" in told
    assert not out.exists()

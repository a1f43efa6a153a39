"""fp32 numbers as bf16 weights and 16 bits more."""

# ruff: noqa: TID253
from __future__ import annotations

import math
import struct
from typing import TYPE_CHECKING, Any

import torch
from hypothesis import given
from hypothesis import strategies as st

from sftplan.facts.strategy import Optimizer, Precision
from sftplan.train import update as updates
from sftplan.train.halves import joined, split
from sftplan.train.settings import Settings
from sftplan.train.update import Update
from sftplan.verify.trace.one_kernel import MasterAdamW

if TYPE_CHECKING:
    import pytest

BITS = st.integers(0, 2**32 - 1)
TIE = 0x8000


def number(bits: int) -> torch.Tensor:
    """The fp32 number of these bits."""
    signed = struct.unpack("<i", struct.pack("<I", bits))[0]
    return torch.tensor([signed], dtype=torch.int32).view(torch.float32)


@given(BITS)
def test_every_number_comes_back_to_the_bit(bits: int) -> None:
    master = number(bits)
    weight, rest = split(master)
    back = joined(weight, rest)

    if math.isnan(master.item()):
        assert math.isnan(weight.item())
        assert math.isnan(back.item())
    else:
        assert torch.equal(back.view(torch.int32), master.view(torch.int32))


@given(BITS)
def test_weights_are_the_nearest_and_halfway_the_farther_from_zero(bits: int) -> None:
    master = number(bits)
    weight, _ = split(master)

    if bits & 0xFFFF != TIE:
        torch.testing.assert_close(weight, master.bfloat16(), rtol=0, atol=0, equal_nan=True)
    elif math.isfinite(master.item()):
        assert abs(weight.item()) > abs(master.item())


class Moving(MasterAdamW):
    """The kernel's states, moved by hand."""

    def restored(self) -> None:
        """Nothing is kept beside `state`."""


def made(monkeypatch: pytest.MonkeyPatch) -> tuple[torch.nn.Module, Update, Any]:
    """A model whose masters are split."""
    monkeypatch.setattr(updates, "_has_triton", lambda _: True)
    monkeypatch.setattr(updates, "_master_adamw", lambda: Moving)
    torch.manual_seed(0)
    model = torch.nn.Linear(5, 3, dtype=torch.bfloat16)
    update = Update(
        model, precision=Precision.BF16_MASTER, kind=Optimizer.ADAMW, settings=Settings()
    )
    (bucket,) = update.buckets
    return model, update, bucket.optimizer


def test_what_is_saved_are_fp32_masters(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where they are copies: a run goes on either way."""
    model, update, kernel = made(monkeypatch)
    masters = {name: torch.randn(p.shape) for name, p in model.named_parameters()}
    for name, parameter in model.named_parameters():
        weight, kernel.state[parameter]["rest"] = split(masters[name])
        parameter.data.copy_(weight)
    saved = {key: value.clone() for key, value in update.saved()}
    size = sum(value.nbytes for _, value in (*update.weights(), *update.saved()))

    other, restored, its = made(monkeypatch)
    restored.restore({name: torch.zeros_like(p) for name, p in model.named_parameters()}, saved)

    assert update.saved_bytes() == size
    assert all(torch.equal(saved[f"master/{name}"], masters[name]) for name in masters)
    for (_, a), (_, b) in zip(model.named_parameters(), other.named_parameters(), strict=True):
        assert torch.equal(a, b)
        assert torch.equal(kernel.state[a]["rest"], its.state[b]["rest"])

"""One kernel over all bf16 weights and their rests against torch's AdamW on fp32 copies; on a GPU."""

# ruff: noqa: TID253
from __future__ import annotations

import pytest
import torch

from sftplan.facts.strategy import Optimizer, Precision
from sftplan.train.halves import split
from sftplan.train.settings import Settings
from sftplan.train.update import Update

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
SHAPES = ((4096, 3), (1280,), (50257, 8), (7,), (64, 4096))


class Weights(torch.nn.Module):
    """Tables and vectors of awkward sizes; the last one never gets a gradient."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.all = torch.nn.ParameterList(
            torch.nn.Parameter(torch.randn(shape, device="cuda", dtype=torch.bfloat16))
            for shape in (*SHAPES, (16,))
        )


def test_follows_torch_on_fp32_masters_and_stays_where_a_step_is_skipped() -> None:
    settings = Settings(learning_rate=1e-3, weight_decay=0.1)
    model = Weights()
    update = Update(model, precision=Precision.BF16_MASTER, kind=Optimizer.ADAMW, settings=settings)
    assert update.one_kernel
    copies = [torch.nn.Parameter(p.detach().float()) for p in model.all[:-1]]
    plain = torch.optim.AdamW(
        [
            {"params": [c for c in copies if c.ndim > 1], "weight_decay": 0.1},
            {"params": [c for c in copies if c.ndim == 1], "weight_decay": 0.0},
        ],
        lr=1e-3, betas=(settings.beta1, settings.beta2), eps=settings.epsilon,
    )  # fmt: skip
    untouched = model.all[-1].detach().clone()
    for number in range(6):
        skipped = number == 3
        for weight, copy in zip(model.all[:-1], copies, strict=True):
            weight.grad = torch.randn_like(weight) * 4.0
            copy.grad = weight.grad.float() / 4.0
        flag = torch.tensor(float(skipped), device="cuda")
        update.step(learning_rate=1e-3, divisor=torch.tensor(4.0, device="cuda"), skip=flag)
        if not skipped:
            plain.step()
    state = {key: value.cpu() for key, value in update.saved()}
    for place, (weight, copy) in enumerate(zip(model.all[:-1], copies, strict=True)):
        master = state[f"master/all.{place}"]
        torch.testing.assert_close(master, copy.detach().cpu(), rtol=2e-6, atol=1e-7)
        assert torch.equal(weight.detach().cpu(), split(master)[0])
        for part in ("exp_avg", "exp_avg_sq"):
            torch.testing.assert_close(
                state[f"{part}/all.{place}"], plain.state[copy][part].cpu(), rtol=1e-5, atol=1e-7
            )
        assert state[f"step/all.{place}"].item() == 5
    torch.testing.assert_close(model.all[-1].detach(), untouched, rtol=0, atol=0)
    assert state[f"step/all.{len(SHAPES)}"].item() == 0


def test_goes_on_to_the_bit_from_what_it_saved() -> None:
    def made() -> tuple[Weights, Update]:
        model = Weights()
        update = Update(
            model, precision=Precision.BF16_MASTER, kind=Optimizer.ADAMW, settings=Settings()
        )
        return model, update

    def move(model: Weights, update: Update, seed: int) -> None:
        torch.manual_seed(seed)
        for weight in model.all[:-1]:
            weight.grad = torch.randn_like(weight)
        update.step(
            learning_rate=1e-3,
            divisor=torch.ones((), device="cuda"),
            skip=torch.zeros((), device="cuda"),
        )

    (model, update), (other, restored) = made(), made()
    restored.restore(dict(model.named_parameters()), dict(update.saved()))  # before any step
    for seed in (1, 2):
        move(model, update, seed)
    move(other, restored, 9)
    restored.restore(
        {k: v.detach().clone() for k, v in model.named_parameters()},
        {k: v.clone() for k, v in update.saved()},
    )
    move(model, update, 3)
    move(other, restored, 3)
    found = dict(restored.saved())
    for name, value in update.saved():
        torch.testing.assert_close(found[name], value, rtol=0, atol=0)
    for a, b in zip(model.all, other.all, strict=True):
        torch.testing.assert_close(a.detach(), b.detach(), rtol=0, atol=0)


def test_a_gradient_that_is_not_a_number_shows_in_the_weight() -> None:
    model = Weights()
    update = Update(
        model, precision=Precision.BF16_MASTER, kind=Optimizer.ADAMW, settings=Settings()
    )
    model.all[0].grad = torch.full_like(model.all[0], torch.nan)
    zero = torch.zeros((), device="cuda")
    update.step(learning_rate=1e-3, divisor=torch.ones((), device="cuda"), skip=zero)

    assert model.all[0].isnan().all()
    assert not model.all[1].isnan().any()

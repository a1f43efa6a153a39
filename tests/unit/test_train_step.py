"""The step against itself in other forms, and against plain PyTorch."""

# ruff: noqa: TID253
from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from tiny_step import (
    CONFIGS,
    PACKED,
    VOCAB,
    by_hand,
    data,
    examples,
    first,
    gradients,
    made,
)
from torch.utils.flop_counter import FlopCounterMode

from sftplan.facts.strategy import Checkpointing, Loss, Precision
from sftplan.step.update import buckets
from sftplan.train.compiled import blocks_of, prepare_blocks
from sftplan.train.evaluate import Evaluation, evaluate
from sftplan.train.schedule import Schedule
from sftplan.train.step import LossScale, Stepper, scaled_loss, train_step
from sftplan.train.update import Update

if TYPE_CHECKING:
    from sftplan.train.inputs import Inputs


@pytest.mark.parametrize("layers", [None, 1])
@pytest.mark.parametrize("kind", Checkpointing)
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_checkpointing_changes_nothing(name: str, kind: Checkpointing, layers: int | None) -> None:
    passes, num_targets = first(data(packing=True), PACKED)
    expected = gradients(made(name), passes, num_targets)
    stepper = made(name)
    prepare_blocks(stepper.model, checkpointing=kind, checkpointed_layers=layers, compiled=False)
    found = gradients(stepper, passes, num_targets)

    assert found[0] == expected[0]
    assert all(torch.equal(a, b) for a, b in zip(found[1], expected[1], strict=True))


def test_selective_checkpointing_keeps_products_and_full_keeps_none() -> None:
    """Counted by the work of the backward pass: modes below the cache see only what is computed."""
    passes, num_targets = first(data(packing=True), PACKED)
    work: dict[tuple[Checkpointing, int | None], int] = {}
    for kind, layers in [*((each, None) for each in Checkpointing), (Checkpointing.FULL, 1)]:
        stepper = made()
        prepare_blocks(
            stepper.model, checkpointing=kind, checkpointed_layers=layers, compiled=False
        )
        loss = scaled_loss(stepper, passes[0], torch.tensor(1 / num_targets))
        with FlopCounterMode(display=False) as counter:
            loss.backward()  # type: ignore[no-untyped-call]
        work[kind, layers] = counter.get_total_flops()
    tokens, size = 4 * 64, 32
    last_product = 2 * tokens * 4 * size * size  # of each block: nothing needs its result again
    again = 2 * tokens * 12 * size * size - last_product
    none, selective, full, full_in_one = work.values()

    assert selective == none
    assert full >= none + 2 * again
    assert full_in_one - none == (full - none) / 2  # of two blocks


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # the compiler itself warns
@pytest.mark.parametrize(
    ("precision", "kind", "layers"),
    [
        (Precision.FP32, Checkpointing.NONE, None),
        (Precision.BF16_MIXED, Checkpointing.NONE, None),
        (Precision.FP32, Checkpointing.SELECTIVE, None),
        (Precision.FP32, Checkpointing.FULL, 1),
    ],
)
def test_a_compiled_model_trains_alike(
    precision: Precision, kind: Checkpointing, layers: int | None
) -> None:
    passes, num_targets = first(data(packing=True), PACKED)
    expected = gradients(made("llama", precision=precision), passes, num_targets)
    stepper = made("llama", precision=precision)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    prepare_blocks(stepper.model, checkpointing=kind, checkpointed_layers=layers, compiled=True)
    found = gradients(stepper, passes, num_targets)
    tolerance = 1e-4 if precision is Precision.FP32 else 3e-2

    graphs = 1 if layers is None else 2  # that all blocks share which forget the same
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs
    assert not torch._dynamo.utils.counters["graph_break"]
    assert found[0] == pytest.approx(expected[0], rel=tolerance)
    for mine, plain in zip(found[1], expected[1], strict=True):
        torch.testing.assert_close(mine, plain, rtol=tolerance, atol=tolerance)


def test_the_update_is_adamw_without_decay_on_norms_and_biases() -> None:
    stepper, plain = made("llama"), made("llama")
    decayed = [p for p in plain.model.parameters() if p.ndim > 1]
    others = [p for p in plain.model.parameters() if p.ndim <= 1]
    reference = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}], lr=1e-2
    )
    source = data(packing=True)
    for index in range(source.steps_per_epoch):
        passes, num_targets = first(source, PACKED, index)
        outcome = train_step(stepper, passes, num_targets=num_targets, learning_rate=1e-2)
        gradient = gradients_kept(plain, passes, num_targets)
        norm = torch.nn.utils.clip_grad_norm_(plain.model.parameters(), 1.0)
        reference.step()

        assert outcome.grad_norm.item() == pytest.approx(norm.item(), rel=1e-5)
        assert outcome.loss.item() == pytest.approx(gradient, rel=1e-5)
    assert others
    for mine, theirs in zip(stepper.model.parameters(), plain.model.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


def gradients_kept(stepper: Stepper, passes: list[Inputs], num_targets: int) -> float:
    """Loss; the gradients stay on the parameters."""
    loss, found = gradients(stepper, passes, num_targets)
    for parameter, gradient in zip(stepper.update.parameters, found, strict=True):
        parameter.grad = gradient
    return loss


def test_master_weights_follow_the_fp32_optimizer(monkeypatch: pytest.MonkeyPatch) -> None:
    """bf16 weights are the rounded fp32 ones, which take every update that bf16 would lose."""
    monkeypatch.setattr("sftplan.train.update.MASTER_BUCKET_ELEMENTS", 2000)  # several buckets
    stepper = made(precision=Precision.BF16_MASTER)
    masters = [p.detach().float().requires_grad_() for p in stepper.model.parameters()]
    groups = [
        {"params": [m for m in masters if m.ndim > 1], "weight_decay": 0.1},
        {"params": [m for m in masters if m.ndim <= 1], "weight_decay": 0.0},
    ]
    reference = torch.optim.AdamW(groups, lr=1e-5)
    before = [p.detach().clone() for p in stepper.model.parameters()]
    passes, num_targets = first(data(packing=True), PACKED)
    for _ in range(5):
        _, found = gradients(stepper, passes, num_targets)
        for master, gradient in zip(masters, found, strict=True):
            master.grad = gradient.float()
        torch.nn.utils.clip_grad_norm_(masters, 1.0)
        reference.step()
        train_step(stepper, passes, num_targets=num_targets, learning_rate=1e-5)
    own = {key: value for key, value in stepper.update.state().items() if "master/" in key}

    assert isinstance(stepper.update, Update)
    assert len(stepper.update.buckets) > 1
    for mine, master in zip(own.values(), masters, strict=True):
        torch.testing.assert_close(mine, master, rtol=1e-6, atol=1e-7)
    for parameter, mine in zip(stepper.model.parameters(), own.values(), strict=True):
        assert parameter.dtype is torch.bfloat16
        assert torch.equal(parameter, mine.bfloat16())
    lost = sum(torch.equal(a, b) for a, b in zip(before, stepper.model.parameters(), strict=True))
    assert lost < len(before)
    assert all(not torch.equal(a.float(), m) for a, m in zip(before, own.values(), strict=True))


def test_buckets_keep_their_order_and_their_size() -> None:
    sizes = [5, 3, 9, 1, 1, 2]
    found = [[sizes[number] for number in group] for group in buckets(sizes, 8)]

    assert found == [[5, 3], [9], [1, 1, 2]]


@pytest.mark.parametrize("precision", [p for p in Precision if p is not Precision.FP16_MIXED])
@pytest.mark.parametrize("loss", Loss)
def test_every_precision_learns(precision: Precision, loss: Loss) -> None:
    stepper = made(precision=precision, loss=loss)
    passes, num_targets = first(data(packing=True), PACKED)
    losses = [
        train_step(stepper, passes, num_targets=num_targets, learning_rate=1e-2).loss.item()
        for _ in range(8)
    ]

    assert losses[0] == pytest.approx(math.log(VOCAB), rel=0.05)
    assert losses[-1] < 0.9 * losses[0]


def test_a_step_that_is_not_finite_leaves_everything_as_it_was() -> None:
    stepper = made()
    passes, num_targets = first(data(packing=True), PACKED)
    train_step(stepper, passes, num_targets=num_targets, learning_rate=1e-2)
    weights = [p.detach().clone() for p in stepper.model.parameters()]
    state = {key: value.clone() for key, value in stepper.update.state().items()}
    hook = stepper.model.base_model.register_forward_hook(poison)
    outcome = train_step(stepper, passes, num_targets=num_targets, learning_rate=1e-2)
    hook.remove()

    assert outcome.skipped.item() == 1.0
    assert all(torch.equal(a, b) for a, b in zip(weights, stepper.model.parameters(), strict=True))
    assert all(torch.equal(value, state[key]) for key, value in stepper.update.state().items())


def poison(_: Any, __: Any, out: Any) -> None:
    """One hidden state that is infinite."""
    out.last_hidden_state = out.last_hidden_state * torch.tensor(torch.inf)


def test_fp16_scales_the_loss_and_not_what_is_reported() -> None:
    """The scaler alone, in fp32: autocast to fp16 has no kernels for all ops on a processor."""
    plain, scaled = made(), made(scale=LossScale(value=2.0**12))
    passes, num_targets = first(data(packing=True), PACKED)
    for _ in range(3):
        expected = train_step(plain, passes, num_targets=num_targets, learning_rate=1e-2)
        found = train_step(scaled, passes, num_targets=num_targets, learning_rate=1e-2)

        assert found.loss.item() == pytest.approx(expected.loss.item(), rel=1e-6)
        assert found.grad_norm.item() == pytest.approx(expected.grad_norm.item(), rel=1e-5)
    for mine, theirs in zip(scaled.model.parameters(), plain.model.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


def test_the_loss_scale_halves_on_overflow_and_doubles_after_good_steps() -> None:
    scale = LossScale(value=8.0, interval=2)
    for overflow in (True, False, False, False):
        scale.seen(overflow=overflow)

    assert (scale.value, scale.good_steps, scale.skipped) == (8.0, 1, 1)


def test_evaluation_weighs_tokens_and_draws_nothing() -> None:
    stepper = made()
    both = [data(packing=True, train_on_prompt=each, row_len=64) for each in (False, True)]
    before = torch.get_rng_state()
    found = evaluate(stepper, Evaluation(responses=both[0], all_tokens=both[1], layout=PACKED))
    everything = [replace(e, trained=b"\0" + b"\1" * (len(e) - 1)) for e in examples()]

    assert torch.equal(torch.get_rng_state(), before)
    assert found["eval_loss"] == pytest.approx(by_hand(stepper.model, examples()).item(), rel=1e-5)
    assert found["eval_loss_all_tokens"] == pytest.approx(
        by_hand(stepper.model, everything).item(), rel=1e-5
    )
    assert found["eval_response_tokens"] == sum(e.num_trained for e in examples())
    assert stepper.model.training


def test_blocks_are_found_in_every_family() -> None:
    for name in CONFIGS:
        implementation = "eager" if name == "gemma-2" else "sdpa"
        assert len(blocks_of(made(name, implementation=implementation).model)) == 2


@pytest.mark.parametrize(("warmup", "steps"), [(0, 1), (0, 2), (3, 4), (3, 50), (49, 50)])
def test_the_schedule_rises_then_falls_to_its_floor(warmup: int, steps: int) -> None:
    schedule = Schedule(peak=3e-4, floor=1e-5, warmup_steps=warmup, num_steps=steps)
    values = [schedule(step) for step in range(steps)]

    assert values[:warmup] == pytest.approx(
        [3e-4 * (k + 1) / max(warmup, 1) for k in range(warmup)]
    )
    assert all(a >= b for a, b in zip(values[warmup:], values[warmup + 1 :], strict=False))
    if steps - warmup > 1:
        assert values[warmup] == 3e-4
        assert values[-1] == 1e-5

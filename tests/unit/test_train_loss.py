"""The losses against hand computations, and against each other."""

# ruff: noqa: TID253
from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from tiny_step import (
    CONFIGS,
    PACKED,
    ROWS,
    by_hand,
    data,
    examples,
    first,
    gradients,
    made,
)

from sftplan.facts.strategy import Loss
from sftplan.train.compiled import loss_functions
from sftplan.train.loss import (
    Head,
    chunk_gradient,
    chunked_loss,
    fused_chunk_gradient,
    gather,
    head_of,
    response_loss,
)
from sftplan.train.step import scaled_loss


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("loss", Loss)
@pytest.mark.parametrize("packing", [False, True])
def test_the_loss_is_the_one_computed_by_hand(name: str, loss: Loss, packing: bool) -> None:
    stepper = made(name, loss=loss, implementation="eager" if name == "gemma-2" else "sdpa")
    source = data(packing=packing, micro_batch=12)
    passes, num_targets = first(source, PACKED if packing else ROWS)

    found, _ = gradients(stepper, passes, num_targets)
    assert found == pytest.approx(by_hand(stepper.model, examples()).item(), rel=1e-5)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("loss", [Loss.FULL, Loss.CHUNKED])
def test_all_losses_have_the_same_gradients(
    name: str, loss: Loss, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sftplan.train.loss.CHUNK_ROWS", 7)  # several chunks, the last one short
    implementation = "eager" if name == "gemma-2" else "sdpa"
    passes, num_targets = first(data(packing=True), PACKED)
    expected = gradients(made(name, implementation=implementation), passes, num_targets)
    found = gradients(made(name, loss=loss, implementation=implementation), passes, num_targets)

    assert found[0] == pytest.approx(expected[0], rel=1e-5)
    assert len(found[1]) == len(expected[1]) > 10
    for mine, plain in zip(found[1], expected[1], strict=True):
        torch.testing.assert_close(mine, plain, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("loss", Loss)
def test_the_prompts_share_is_exactly_zero(loss: Loss) -> None:
    """Logits of positions without a target get a gradient of exactly 0."""
    stepper = made(loss=loss)
    passes, num_targets = first(data(packing=False), ROWS)
    captured: list[torch.Tensor] = []

    def capture(_: Any, __: Any, out: Any) -> None:
        out.last_hidden_state.register_hook(captured.append)

    stepper.model.base_model.register_forward_hook(capture)
    gradients(stepper, passes, num_targets)
    flat = captured[0].reshape(-1, captured[0].shape[-1])
    kept = torch.zeros(len(flat), dtype=torch.bool)
    kept[passes[0].keep[passes[0].targets != -100]] = True

    assert flat[~kept].abs().max().item() == 0.0
    assert flat[kept].abs().sum(-1).min().item() > 0.0


def test_gathered_rows_are_those_of_plain_indexing() -> None:
    x = torch.randn(6, 3, dtype=torch.float64, requires_grad=True)
    index = torch.tensor([4, 0, 6, 6])  # 6 is one past the end, as unused places are
    gathered = gather(x, index)
    expected = torch.cat([x[[4, 0]], torch.zeros(2, 3, dtype=torch.float64)])

    assert torch.equal(gathered, expected)
    assert torch.autograd.gradcheck(lambda y: gather(y, index), (x,))


@pytest.mark.parametrize("gradient_of", [chunk_gradient, fused_chunk_gradient])
def test_chunked_gradients_carry_the_factor_and_a_bias(gradient_of: Any) -> None:
    """fp16 multiplies the loss: gradients formed in the forward pass have to be multiplied too."""
    torch.manual_seed(0)
    stepper = made("phi")
    head = head_of(stepper.model)
    assert head.bias is not None
    kept, targets = torch.randn(9, 32, requires_grad=True), torch.arange(9)
    targets[4] = -100
    inputs = (kept, head.weight, head.bias)
    plain = response_loss(kept, targets, head.weight, head.bias, 3.0) * 0.25
    expected = torch.autograd.grad(plain, inputs)
    capped = replace(head, softcap=3.0)
    loss = chunked_loss(kept, targets, capped, torch.tensor(0.125), gradient_of) * 2
    found = torch.autograd.grad(loss, inputs)

    assert loss.item() == pytest.approx(plain.item(), rel=1e-6)
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-6)


# Too few for an aligned part, no rest and no padding (twice), a rest of 3.
@pytest.mark.parametrize("vocab", [5, 64, 72, 83])
@pytest.mark.parametrize("low", [None, torch.bfloat16])
def test_columns_in_parts_are_all_columns(
    vocab: int, low: torch.dtype | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also onto a gradient that is there: then nothing is left to hand on."""
    monkeypatch.setattr("sftplan.train.loss.CHUNK_ROWS", 4)
    torch.manual_seed(0)
    kept, weight = torch.randn(9, 16, requires_grad=True), torch.randn(vocab, 16)
    weight.requires_grad_()
    targets, factor = torch.randint(0, vocab, (9,)), torch.tensor(0.125)
    tolerance: dict[str, Any] = (
        {"rtol": 1e-5, "atol": 1e-6} if low is None else {"rtol": 0.05, "atol": 0.02}
    )
    plain = response_loss(kept, targets, weight, None, None) * factor
    expected = torch.autograd.grad(plain, (kept, weight))
    before = torch.randn(vocab, 16)
    onto = before.clone()
    head = Head(weight=weight, bias=None, softcap=None)
    with torch.autocast("cpu", low, enabled=low is not None):
        handed = chunked_loss(kept, targets, head, factor)
        added = chunked_loss(kept, targets, head, factor, onto=onto)
    found = torch.autograd.grad(handed, (kept, weight))
    others: tuple[Any, ...] = torch.autograd.grad(added, (kept, weight), allow_unused=True)

    assert handed.item() == pytest.approx(plain.item(), rel=1e-5 if low is None else 0.01)
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs, **tolerance)
    assert others[1] is None
    torch.testing.assert_close(others[0], found[0])
    torch.testing.assert_close(onto, before + found[1], rtol=1e-5, atol=1e-5)


def test_passes_add_to_one_gradient_of_the_head() -> None:
    stepper = made(loss=Loss.CHUNKED)
    head = stepper.model.get_output_embeddings().weight
    passes, num_targets = first(data(packing=False, micro_batch=4, accumulation=3), ROWS)
    places = []
    for inputs in passes:
        factor = torch.tensor(1 / num_targets)
        stepper.update.backward(scaled_loss(stepper, inputs, factor), scale=1.0, last=False)
        places.append(head.grad.data_ptr())
    before = head.grad.clone()
    with torch.no_grad():
        scaled_loss(stepper, passes[0], torch.tensor(1.0))

    assert len(set(places)) == 1
    assert torch.equal(head.grad, before)  # evaluation adds nothing
    assert stepper.update.gradient_to_add_to(head) is head.grad


@pytest.mark.filterwarnings("default")  # the compiler itself warns
@pytest.mark.parametrize("softcap", [None, 30.0])
def test_a_compiled_chunk_becomes_the_same_gradient_in_place(softcap: float | None) -> None:
    torch.manual_seed(0)
    plain, targets = torch.randn(48, 192).bfloat16() * 4, torch.randint(0, 170, (48,))
    targets[5] = -100
    compiled = plain.clone()
    others = targets, torch.tensor(0.125), 170, softcap  # of 192 columns
    expected = chunk_gradient(plain, *others)
    found = loss_functions(compiled=True)[1](compiled, *others)

    assert found.item() == pytest.approx(expected.item(), rel=1e-5)
    torch.testing.assert_close(compiled, plain, rtol=1e-2, atol=1e-5)  # a last bit of bf16
    assert not compiled[:, 170:].any()
    assert not compiled[5].any()


@pytest.mark.parametrize("loss", Loss)
def test_accumulated_passes_are_one_large_batch(loss: Loss) -> None:
    """Also where the passes have unequal numbers of targets."""
    whole, num_targets = first(data(packing=False, micro_batch=12), ROWS)
    parts, same = first(data(packing=False, micro_batch=4, accumulation=3), ROWS)
    counts = {int((inputs.targets != -100).sum()) for inputs in parts}
    expected = gradients(made(loss=loss), whole, num_targets)
    found = gradients(made(loss=loss), parts, same)

    assert same == num_targets
    assert len(counts) > 1
    assert found[0] == pytest.approx(expected[0], rel=1e-6)
    for mine, plain in zip(found[1], expected[1], strict=True):
        torch.testing.assert_close(mine, plain, rtol=1e-4, atol=1e-6)

"""The step against hand computations, against itself in other forms, and against plain PyTorch."""

# ruff: noqa: TID253
from __future__ import annotations

import math
from array import array
from dataclasses import replace
from typing import Any

import pytest
import torch
import transformers
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode

from sftplan.data.batches import Batches, Sharing, batches
from sftplan.data.conversation import Place
from sftplan.data.mask import Example
from sftplan.errors import TrainingFailedError
from sftplan.facts.strategy import Attention, Checkpointing, Loss, Optimizer, Precision
from sftplan.step.update import buckets
from sftplan.train import attention
from sftplan.train.compiled import blocks_of, loss_functions, prepare_blocks
from sftplan.train.evaluate import Evaluation, evaluate
from sftplan.train.inputs import Inputs, Layout, to_device
from sftplan.train.loss import (
    chunk_gradient,
    chunked_loss,
    fused_chunk_gradient,
    gather,
    head_of,
    response_loss,
)
from sftplan.train.model import build_model
from sftplan.train.packing_check import check_packing
from sftplan.train.schedule import Schedule
from sftplan.train.settings import Settings
from sftplan.train.step import LossScale, Stepper, hidden_states, scaled_loss, train_step
from sftplan.train.update import Update

CPU = torch.device("cpu")
VOCAB = 99  # not a multiple of 64: the product is padded, the weight is not
ROWS, PACKED = Layout(flat=False, packed=False), Layout(flat=False, packed=True)
LLAMA = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": VOCAB, "max_position_embeddings": 64,
}  # fmt: skip
CONFIGS = {
    "gpt2": transformers.GPT2Config(
        n_layer=2, n_embd=32, n_head=2, vocab_size=VOCAB, n_positions=64, bos_token_id=0,
        eos_token_id=0, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
    ),
    "llama": transformers.LlamaConfig(**LLAMA),
    "gemma-2": transformers.Gemma2Config(
        **LLAMA, head_dim=8, query_pre_attn_scalar=8, sliding_window=8, final_logit_softcapping=2.0,
        pad_token_id=0, bos_token_id=0, eos_token_id=0,
    ),
    "phi": transformers.PhiConfig(**LLAMA, bos_token_id=0, eos_token_id=0),
}  # fmt: skip


def examples(count: int = 12, seed: int = 0) -> list[Example]:
    """Prompts and answers of unequal lengths."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for number in range(count):
        prompt, answer = torch.randint(2, 12, (2,), generator=generator).tolist()
        ids = torch.randint(1, VOCAB, (prompt + answer,), generator=generator).tolist()
        place = Place(file="a.jsonl", row=number + 1, line=number + 1)
        trained = bytes(prompt) + b"\1" * answer
        found.append(Example(input_ids=array("i", ids), trained=trained, place=place))
    return found


def made(
    name: str = "gpt2",
    *,
    precision: Precision = Precision.FP32,
    loss: Loss = Loss.RESPONSE,
    implementation: str = "sdpa",
    **options: Any,
) -> Stepper:
    """A stepper over a tiny model; the same weights every time."""
    model = build_model(CONFIGS[name], precision=precision, attention=implementation, device=CPU)
    settings = Settings(learning_rate=1e-2, weight_decay=0.1)
    update = Update(model, precision=precision, kind=Optimizer.ADAMW, settings=settings)
    return Stepper(
        model=model, update=update, precision=precision, loss=loss, max_grad_norm=1.0, device=CPU,
        **options,
    )  # fmt: skip


def data(*, packing: bool, micro_batch: int = 4, accumulation: int = 1, **options: Any) -> Batches:
    """The examples in rows of 64 tokens."""
    sharing = Sharing(micro_batch=micro_batch, accumulation=accumulation)
    return batches(examples(), seq_len=64, sharing=sharing, packing=packing, **options)


def first(source: Batches, layout: Layout, index: int = 0) -> tuple[list[Inputs], int]:
    """The passes of a step and its targets."""
    step = source.step(0, index)
    return [to_device(batch, layout, CPU) for batch in step.micro_batches], step.num_targets


def gradients(stepper: Stepper, passes: list[Inputs], num_targets: int) -> tuple[float, list[Any]]:
    """Loss and gradients before any clipping."""
    total = 0.0
    for inputs in passes:
        loss = scaled_loss(stepper, inputs, torch.tensor(1 / num_targets))
        loss.backward()  # type: ignore[no-untyped-call]
        total += loss.item()
    found = [p.grad.clone() for p in stepper.update.parameters if p.grad is not None]
    stepper.update.clear()
    return total, found


def by_hand(model: Any, chosen: list[Example]) -> torch.Tensor:
    """Mean of -log softmax at the answers' tokens, each example alone, in plain Python."""
    parts = []
    for example in chosen:
        ids = torch.tensor(list(example.input_ids))
        logs = model(input_ids=ids[None], use_cache=False).logits[0].float().log_softmax(-1)
        parts += [-logs[at - 1, ids[at]] for at in range(len(ids)) if example.trained[at]]
    return torch.stack(parts).mean()


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


@pytest.mark.parametrize("kind", Checkpointing)
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_checkpointing_changes_nothing(name: str, kind: Checkpointing) -> None:
    passes, num_targets = first(data(packing=True), PACKED)
    expected = gradients(made(name), passes, num_targets)
    stepper = made(name)
    prepare_blocks(stepper.model, checkpointing=kind, compiled=False)
    found = gradients(stepper, passes, num_targets)

    assert found[0] == expected[0]
    assert all(torch.equal(a, b) for a, b in zip(found[1], expected[1], strict=True))


def test_selective_checkpointing_keeps_products_and_full_keeps_none() -> None:
    """Counted by the work of the backward pass: modes below the cache see only what is computed."""
    passes, num_targets = first(data(packing=True), PACKED)
    work = {}
    for kind in Checkpointing:
        stepper = made()
        prepare_blocks(stepper.model, checkpointing=kind, compiled=False)
        loss = scaled_loss(stepper, passes[0], torch.tensor(1 / num_targets))
        with FlopCounterMode(display=False) as counter:
            loss.backward()  # type: ignore[no-untyped-call]
        work[kind] = counter.get_total_flops()
    tokens, size = 4 * 64, 32
    last_product = 2 * tokens * 4 * size * size  # of each block: nothing needs its result again
    again = 2 * (2 * tokens * 12 * size * size - last_product)

    assert work[Checkpointing.SELECTIVE] == work[Checkpointing.NONE]
    assert work[Checkpointing.FULL] >= work[Checkpointing.NONE] + again


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # the compiler itself warns
@pytest.mark.parametrize(
    ("precision", "kind"),
    [
        (Precision.FP32, Checkpointing.NONE),
        (Precision.BF16_MIXED, Checkpointing.NONE),
        (Precision.FP32, Checkpointing.SELECTIVE),
    ],
)
def test_a_compiled_model_trains_alike(precision: Precision, kind: Checkpointing) -> None:
    passes, num_targets = first(data(packing=True), PACKED)
    expected = gradients(made("llama", precision=precision), passes, num_targets)
    stepper = made("llama", precision=precision)
    torch._dynamo.utils.counters.clear()
    prepare_blocks(stepper.model, checkpointing=kind, compiled=True)
    found = gradients(stepper, passes, num_targets)
    tolerance = 1e-4 if precision is Precision.FP32 else 3e-2

    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1  # all blocks share it
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


def test_packed_documents_do_not_see_each_other() -> None:
    for name in ("gpt2", "llama"):
        stepper = made(name)
        batch = data(packing=True).step(0, 0).micro_batches[0]
        found = check_packing(stepper, batch, to_device(batch, PACKED, CPU))

        assert found is not None
        assert found.documents > 1
        assert found.separate < 1e-5
        assert found.leak == 0.0
        assert stepper.model.training


def test_documents_that_see_each_other_are_refused() -> None:
    """Without positions that start again, transformers attends across the documents of a row."""
    stepper = made()
    batch = data(packing=True).step(0, 0).micro_batches[0]
    mixed = replace(to_device(batch, PACKED, CPU), position_ids=None)

    with pytest.raises(TrainingFailedError, match="packed documents see each other"):
        check_packing(stepper, batch, mixed)


def test_rows_of_one_document_need_no_check() -> None:
    batch = data(packing=False).step(0, 0).micro_batches[0]

    assert check_packing(made(), batch, to_device(batch, ROWS, CPU)) is None


def varlen_by_definition(
    q: Any, k: Any, v: Any, cu: Any, _: Any, longest: int, __: int, **options: Any
) -> torch.Tensor:
    """What the kernel computes: causal attention within each document."""
    assert options.pop("window_size") == (-1, 0)
    out = torch.zeros_like(q)
    for start, stop in zip(cu[:-1].tolist(), cu[1:].tolist(), strict=True):
        if stop > start:
            assert stop - start <= longest
            query, key, value = (x[start:stop].transpose(0, 1) for x in (q, k, v))
            attended = functional.scaled_dot_product_attention(
                query, key, value, is_causal=True, scale=options.get("scale"),
                enable_gqa=options.get("enable_gqa", False),
            )  # fmt: skip
            out[start:stop] = attended.transpose(0, 1)
    return out


@pytest.mark.parametrize("name", ["gpt2", "llama", "phi"])
def test_flat_rows_attend_as_separate_documents(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The layout that varlen attention needs, around a kernel written out in plain PyTorch."""
    monkeypatch.setattr(attention, "varlen_attn", varlen_by_definition)
    attention.register(torch.float32)
    stepper = made(name, implementation=attention.VARLEN)
    source, flat = data(packing=True), Layout(flat=True, packed=True)
    batch = source.step(0, 0).micro_batches[0]
    inputs = to_device(batch, flat, CPU)
    found = check_packing(stepper, batch, inputs)
    rows = hidden_states(made(name).model, to_device(batch, PACKED, CPU))

    assert inputs.input_ids.shape == (1, 4 * 64)
    assert found is not None
    assert found.separate < 1e-5
    assert found.leak == 0.0
    torch.testing.assert_close(hidden_states(stepper.model, inputs), rows, rtol=1e-4, atol=1e-5)


def test_varlen_attention_gives_way_where_it_cannot_run() -> None:
    config = CONFIGS["gpt2"]
    on_cpu = attention.choose_kernel(
        Attention.VARLEN, device=CPU, low=torch.bfloat16, config=config
    )
    in_fp32 = attention.choose_kernel(
        Attention.VARLEN, device=torch.device("cuda"), low=torch.float32, config=config
    )
    on_gpu = attention.choose_kernel(
        Attention.VARLEN, device=torch.device("cuda"), low=torch.bfloat16, config=config
    )

    assert (on_cpu.name, on_cpu.flat) == ("sdpa", False)
    assert on_cpu.note is not None
    assert "GPU" in on_cpu.note
    assert in_fp32.name == "sdpa"
    for wanted in Attention:  # its capped scores have one implementation only
        kernel = attention.choose_kernel(
            wanted, device=CPU, low=torch.bfloat16, config=CONFIGS["gemma-2"]
        )
        assert kernel.name == "eager"
    assert (on_gpu.name, on_gpu.flat, on_gpu.note) == (attention.VARLEN, True, None)


@pytest.mark.parametrize("name", ["gpt2", "llama", "phi"])
def test_merely_causal_rows_are_those_of_transformers_own_attention(name: str) -> None:
    """Padding behind a document reaches no token before it, with no mask at all."""
    stepper, batch = made(name), data(packing=False, row_len=64).step(0, 0).micro_batches[0]
    inputs = to_device(batch, replace(PACKED, packed=False), CPU)
    rows = hidden_states(stepper.model, inputs)
    attention.register_causal()
    stepper.model.set_attn_implementation(attention.CAUSAL)

    torch.testing.assert_close(hidden_states(stepper.model, inputs), rows, rtol=0, atol=0)


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

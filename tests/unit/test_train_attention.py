"""Attention within documents, however rows lie."""

# ruff: noqa: TID253
from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from tiny_step import (
    CONFIGS,
    CPU,
    PACKED,
    ROWS,
    data,
    made,
)
from torch.nn import functional

from sftplan.errors import TrainingFailedError
from sftplan.facts.strategy import Attention
from sftplan.train import attention
from sftplan.train.inputs import Layout, to_device
from sftplan.train.packing_check import check_packing
from sftplan.train.step import hidden_states


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

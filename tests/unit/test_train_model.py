"""The model as it is built: where its random weights are drawn."""

# ruff: noqa: TID253
from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers

from sftplan.facts.strategy import Precision
from sftplan.train.model import build_model

SMALL = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "vocab_size": 99,
}  # fmt: skip
CONFIGS = {
    "gpt2": transformers.GPT2Config(n_layer=2, n_embd=32, n_head=2, vocab_size=99, n_positions=64),
    "llama": transformers.LlamaConfig(**SMALL),
    "phi": transformers.PhiConfig(**SMALL),
}
CPU, BESIDE = torch.device("cpu"), torch.device("cpu", 0)  # the same place by another name


def built(name: str, device: torch.device, drawn_on: torch.device | None = None) -> list[Any]:
    model = build_model(
        CONFIGS[name], precision=Precision.BF16_MASTER, attention="eager", device=device, seed=3,
        drawn_on=drawn_on,
    )  # fmt: skip
    return list(model.parameters())


@pytest.mark.parametrize("name", sorted(CONFIGS))
def test_weights_may_be_drawn_on_another_device(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    elsewhere: set[int] = set()
    empty_like = torch.empty_like

    def spy(tensor: torch.Tensor, *, device: torch.device) -> torch.Tensor:
        elsewhere.add(tensor.data_ptr())
        return empty_like(tensor, device=device)

    monkeypatch.setattr(torch, "empty_like", spy)
    found = built(name, CPU, BESIDE)
    monkeypatch.undo()

    assert all(torch.equal(a, b) for a, b in zip(found, built(name, CPU), strict=True))
    assert {p.data_ptr() for p in found if p.std() > 0} <= elsewhere  # none by the processor


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_host_has_what_the_gpu_has() -> None:
    gpu = torch.device("cuda")
    found, there = built("gpt2", CPU, gpu), built("gpt2", gpu)
    assert all(p.device == CPU for p in found)
    assert all(torch.equal(a, b.cpu()) for a, b in zip(found, there, strict=True))

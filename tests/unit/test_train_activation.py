"""Tanh GELUs by a sigmoid: the same values and gradients, put in place inside of the blocks alone."""

# ruff: noqa: TID253
from __future__ import annotations

import torch
from torch.nn import functional
from transformers.activations import ACT2FN

from sftplan.facts.catalogue import builtin
from sftplan.facts.strategy import Precision
from sftplan.train.activation import SigmoidGELU, sigmoid_gelus
from sftplan.train.compiled import blocks_of
from sftplan.train.model import build_model, config_of


def test_values_and_gradients_are_those_of_the_tanh_form() -> None:
    x = torch.linspace(-12, 12, 4001, dtype=torch.float64, requires_grad=True)
    mine, theirs = SigmoidGELU()(x), functional.gelu(x, approximate="tanh")
    torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-14)
    gradients = [torch.autograd.grad(y.sum(), x)[0] for y in (mine, theirs)]
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-11, atol=1e-12)
    for name in ("gelu_new", "gelu_pytorch_tanh", "gelu_fast"):
        torch.testing.assert_close(ACT2FN[name](x.detach()), mine.detach(), rtol=1e-6, atol=1e-9)


def test_a_model_computes_the_same_afterwards() -> None:
    config = config_of(builtin("gpt2"))
    config.num_hidden_layers, config.resid_pdrop, config.embd_pdrop = 2, 0.0, 0.0
    cpu = torch.device("cpu")
    model = build_model(config, precision=Precision.FP32, attention="sdpa", device=cpu)
    ids = torch.arange(64)[None]
    with torch.no_grad():
        before = model(ids).logits
        sigmoid_gelus(blocks_of(model))
        assert sum(type(module) is SigmoidGELU for module in model.modules()) == 2
        torch.testing.assert_close(model(ids).logits, before, rtol=1e-5, atol=1e-5)

"""A block as its compiled graphs see it: projections, masks, types."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING

from sftplan.facts.model import Family
from sftplan.facts.params import parameters

if TYPE_CHECKING:
    from sftplan.facts.model import ModelShape
    from sftplan.step.tensor import DType

SUPPORTED = (Family.GPT2, Family.LLAMA, Family.GEMMA, Family.PHI3, Family.NEOX, Family.OPT)


@dataclass(frozen=True, slots=True)
class Block:
    """One block: what of the model and of its precision decides what is kept."""

    model: ModelShape
    tokens: int
    weights: DType
    autocast: DType | None
    dropout: bool
    by_token: bool
    repeats: bool

    @property
    def keeps_mask(self) -> bool:
        """Whether the MLP's dropout keeps its mask, though it is drawn by hash: GPT-2's."""
        return self.dropout and self.model.family is Family.GPT2

    @property
    def residual_apart(self) -> bool:
        """Whether x + attention(x) has a buffer of its own, over which the result is written."""
        dropped = self.dropout and not self.widens
        return dropped and self.model.family in (Family.GPT2, Family.OPT)

    @property
    def as_allocated(self) -> bool:
        """GPT-2 with dropout and 16-bit weights: its buffers come and go as an H200 allocated them (torch 2.11)."""
        return self.model.family is Family.GPT2 and self.dropout and not self.widens

    @property
    def attended_kv_size(self) -> int:
        """Columns of keys, and of values, as the attention reads them."""
        return self.model.query_size if self.repeats else self.model.kv_size

    @property
    def low(self) -> DType:
        """The type of products."""
        return self.autocast or self.weights

    @property
    def gated(self) -> bool:
        """Whether the MLP multiplies two projections."""
        return self.model.family in (Family.LLAMA, Family.GEMMA, Family.PHI3)

    @property
    def relu(self) -> bool:
        """Whether only what comes out of the activation is kept."""
        return self.model.activation == "relu"

    @property
    def fused_qkv(self) -> bool:
        """Whether queries, keys and values are one product."""
        return self.model.family in (Family.GPT2, Family.NEOX, Family.PHI3)

    def projections(self) -> list[tuple[str, str, int, int]]:
        """Weight's name, its result's, columns in and out, in the order of the forward pass."""
        m = self.model
        d, f, q, kv = m.hidden_size, m.intermediate_size, m.query_size, m.kv_size
        if m.family is Family.GPT2:
            return [
                ("attn.c_attn", "qkv", d, q + 2 * kv),
                ("attn.c_proj", "projected", q, d),
                ("mlp.c_fc", "pre", d, f),
                ("mlp.c_proj", "down", f, d),
            ]
        if m.family is Family.NEOX:
            return [
                ("query_key_value", "qkv", d, q + 2 * kv),
                ("dense", "projected", q, d),
                ("dense_h_to_4h", "pre", d, f),
                ("dense_4h_to_h", "down", f, d),
            ]
        if m.family is Family.PHI3:
            return [
                ("qkv_proj", "qkv", d, q + 2 * kv),
                ("o_proj", "projected", q, d),
                ("gate_up_proj", "pre", d, 2 * f),
                ("down_proj", "down", f, d),
            ]
        attention = [
            ("q_proj", "q", d, q),
            ("k_proj", "k", d, kv),
            ("v_proj", "v", d, kv),
            ("o_proj", "projected", q, d),
        ]
        if self.gated:
            return [
                *attention,
                ("gate_proj", "pre", d, f),
                ("up_proj", "up", d, f),
                ("down_proj", "down", f, d),
            ]
        return [*attention, ("fc1", "act" if self.relu else "pre", d, f), ("fc2", "down", f, d)]

    @property
    def linear(self) -> dict[str, tuple[str, int, int]]:
        """By result: the weight's name, columns in and out."""
        return {
            result: (weight, rows, columns) for weight, result, rows, columns in self.projections()
        }

    @property
    def widens(self) -> bool:
        """Whether weights are wider than products, so that their gradients are brought to their type."""
        return self.weights is not self.low

    def num_small(self) -> int:
        """Elements of the biases and of the norms' weights, whose gradients come last here."""
        layer = (x for x in parameters(self.model) if ".0." in x.name)
        return sum(prod(x.shape) for x in layer if len(x.shape) == 1)

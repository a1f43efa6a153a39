"""A forward pass of a few fake tokens: which weights they meet, and what makes logits of hidden states."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from sftplan.train.model import without_pad_token
from sftplan.verify.trace.flops import PRODUCTS, flops_of

PROBE_DTYPE = torch.bfloat16  # fake grouped products know no other
PROBE_TOKENS = 8
EXPERTS = ".experts."
HEAD_OPS = frozenset(("mm", "addmm", "_unsafe_view"))


@dataclass(frozen=True, slots=True, kw_only=True)
class Probe:
    """Products with weights in FLOPs over all tokens, those with experts' apart."""

    flops: int
    expert_flops: int
    expert_parameters: int
    plain_head: bool


def build_untrained(config: Any, device: torch.device) -> Any:
    """The model with eager attention, which all of them have."""
    from transformers import AutoModelForCausalLM

    with device:
        return AutoModelForCausalLM.from_config(
            config, dtype=PROBE_DTYPE, attn_implementation="eager", trust_remote_code=False
        ).train()


def probe(config: Any) -> Probe:
    """What a forward pass of the whole model shows."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        model = build_untrained(config, torch.device("cpu"))
        names = {p.untyped_storage()._cdata: name for name, p in model.named_parameters()}
        ids = torch.zeros((1, PROBE_TOKENS), dtype=torch.int64)
        with _Operators(names) as seen, torch.no_grad(), without_pad_token(model):
            if model.base_model is not model:
                model.base_model.register_forward_hook(lambda *_: seen.after.clear())
            model(input_ids=ids, use_cache=False)
        return Probe(
            flops=sum(count for _, count in seen.products),
            expert_flops=sum(count for name, count in seen.products if EXPERTS in name),
            expert_parameters=sum(p.numel() for n, p in model.named_parameters() if EXPERTS in n),
            plain_head=model.get_output_embeddings() is not None and set(seen.after) <= HEAD_OPS,
        )


class _Operators(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """`products` with a weight: its name and FLOPs. `after`: what ran, views left out, since it was cleared."""

    def __init__(self, weights: dict[int, str]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.weights = weights
        self.products: list[tuple[str, int]] = []
        self.after: list[str] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Run an operator and note it."""
        name = str(func)
        if name.startswith("aten.") and not func.is_view:
            self.after.append(name.split(".")[1])
        if name in PRODUCTS:
            tensors = [x for x in args if isinstance(x, torch.Tensor) and x.ndim > 1]
            keys = (x.untyped_storage()._cdata for x in tensors)
            met = next((self.weights[key] for key in keys if key in self.weights), None)
            if met is not None:
                self.products.append((met, flops_of(name, args)))
        return func(*args, **(kwargs or {}))

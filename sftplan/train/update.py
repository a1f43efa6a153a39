"""AdamW on the weights of a model, in the types that the plan says.

Decay is decoupled, on matrices and tables only: not on biases and norms. Under bf16-master the
optimizer works on fp32 copies; gradients are brought to fp32 bucket by bucket. Dividing the
gradients and leaving out a bad step happen on the device: `divisor` and `skip` are tensors.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from sftplan.errors import NotReadyError
from sftplan.facts.strategy import Optimizer, Precision
from sftplan.step.update import MASTER_BUCKET_ELEMENTS

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from sftplan.train.settings import Settings

Tensor = torch.Tensor


@dataclass(frozen=True, slots=True)
class _Weight:
    """A parameter, and what the optimizer works on: itself, or its fp32 master copy."""

    name: str
    parameter: torch.nn.Parameter
    own: torch.nn.Parameter


@dataclass(frozen=True, slots=True)
class _Bucket:
    """Weights that are updated together."""

    weights: tuple[_Weight, ...]
    optimizer: torch.optim.Optimizer


class Update:
    """The optimizer of a model."""

    def __init__(
        self, model: torch.nn.Module, *, precision: Precision, kind: Optimizer, settings: Settings
    ) -> None:
        self.master = precision is Precision.BF16_MASTER
        self.eight_bit = kind is Optimizer.ADAMW_8BIT
        self.settings = settings
        named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        self.parameters = [parameter for _, parameter in named]
        weights = [_Weight(name, p, self._own(p)) for name, p in named]
        groups = buckets(weights, MASTER_BUCKET_ELEMENTS) if self.master else [weights]
        self.buckets = [_Bucket(tuple(group), self._optimizer(group)) for group in groups]

    def _own(self, parameter: torch.nn.Parameter) -> torch.nn.Parameter:
        if not self.master:
            return parameter
        return torch.nn.Parameter(parameter.detach().float())

    def _optimizer(self, weights: Iterable[_Weight]) -> torch.optim.Optimizer:
        chosen = self.settings
        matrices = [w.own for w in weights if w.own.ndim > 1]
        others = [w.own for w in weights if w.own.ndim <= 1]
        groups = [
            {"params": group, "weight_decay": decay}
            for group, decay in ((matrices, chosen.weight_decay), (others, 0.0))
            if group
        ]
        options: dict[str, Any] = {
            "lr": chosen.learning_rate,
            "betas": (chosen.beta1, chosen.beta2),
            "eps": chosen.epsilon,
        }
        if self.eight_bit:
            made: torch.optim.Optimizer = _bitsandbytes().optim.AdamW8bit(groups, **options)
            return made
        return torch.optim.AdamW(groups, fused=True, **options)

    @torch.no_grad()
    def step(self, *, learning_rate: float, divisor: Tensor, skip: Tensor) -> None:
        """Move the weights by their gradients / `divisor`, or not at all where `skip` is 1."""
        for bucket in self.buckets:
            optimizer: Any = bucket.optimizer
            for group in optimizer.param_groups:
                group["lr"] = learning_rate
            if self.master:
                _copy_gradients(bucket.weights)
            if self.eight_bit:
                if not bool(skip):
                    torch._foreach_div_(self._gradients(bucket), divisor)
                    optimizer.step()
            else:  # as torch's own GradScaler hands them to fused optimizers
                optimizer.grad_scale, optimizer.found_inf = divisor, skip
                optimizer.step()
            if self.master:
                torch._foreach_copy_(
                    [w.parameter for w in bucket.weights], [w.own for w in bucket.weights]
                )
                for weight in bucket.weights:
                    weight.own.grad = None

    def _gradients(self, bucket: _Bucket) -> list[Tensor]:
        return [w.own.grad for w in bucket.weights if w.own.grad is not None]

    def clear(self) -> None:
        """Let the gradients go."""
        for parameter in self.parameters:
            parameter.grad = None

    def state(self) -> dict[str, Tensor]:
        """Everything that the next step depends on, by `part/name of the weight`."""
        found: dict[str, Tensor] = {}
        for bucket in self.buckets:
            for weight in bucket.weights:
                if self.master:
                    found[f"master/{weight.name}"] = weight.own.detach()
                for part, value in bucket.optimizer.state.get(weight.own, {}).items():
                    number = value if isinstance(value, Tensor) else torch.tensor(value)
                    kept = number.detach()
                    if part.startswith(
                        "qmap"
                    ):  # one table for all weights: a file wants each its own
                        kept = kept.clone()
                    found[f"{part}/{weight.name}"] = kept
        return found

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Go on from what `state` returned."""
        by_name: dict[str, dict[str, Tensor]] = {}
        for key, value in state.items():
            part, _, name = key.partition("/")
            by_name.setdefault(name, {})[part] = value
        for bucket in self.buckets:
            for weight in bucket.weights:
                parts = by_name[weight.name]
                if self.master:
                    weight.own.data.copy_(parts.pop("master"))
                bucket.optimizer.state[weight.own] = {
                    part: self._placed(part, value, weight.own) for part, value in parts.items()
                }

    def _placed(self, part: str, value: Tensor, own: Tensor) -> Tensor | int:
        if self.eight_bit and part == "step":
            return int(value)
        return value.to(own.device, copy=True)


def _copy_gradients(weights: Iterable[_Weight]) -> None:
    """The gradients in fp32 on the master copies, in few kernels."""
    found = [(w.own, w.parameter.grad) for w in weights if w.parameter.grad is not None]
    copies = [torch.empty_like(gradient, dtype=torch.float32) for _, gradient in found]
    torch._foreach_copy_(copies, [gradient for _, gradient in found])
    for (own, _), copy in zip(found, copies, strict=True):
        own.grad = copy


def buckets(weights: list[_Weight], limit: int) -> list[list[_Weight]]:
    """Weights in their order, in groups of at most `limit` elements; a larger weight stands alone."""
    groups: list[list[_Weight]] = []
    room = 0
    for weight in weights:
        size = weight.parameter.numel()
        if not groups or size > room:
            groups.append([])
            room = limit
        groups[-1].append(weight)
        room -= size
    return groups


def _bitsandbytes() -> Any:
    try:
        return importlib.import_module("bitsandbytes")
    except ImportError:
        message = "--optimizer adamw-8bit needs bitsandbytes, which is not installed"
        raise NotReadyError(message, "`pip install bitsandbytes`, or `--optimizer adamw`") from None

"""AdamW on the weights of a model, in the types that the plan says.

Decay is decoupled, on matrices and tables only: not on biases and norms. Under bf16-master one kernel
moves fp32 masters that are the weights and 16 bits more (master_adamw.py); where there is no triton, or
with 8-bit states, the optimizer works on fp32 copies, gradients brought to fp32 bucket by bucket. Dividing
the gradients and leaving out a bad step happen on the device: `divisor` and `skip` are tensors.
"""

from __future__ import annotations

import importlib
import importlib.util
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from sftplan.errors import NotReadyError
from sftplan.facts.strategy import Optimizer, Precision
from sftplan.step.update import MASTER_BUCKET_ELEMENTS, buckets
from sftplan.train.halves import joined, split
from sftplan.train.summing import SummedGradients

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

    from sftplan.train.master_adamw import MasterAdamW
    from sftplan.train.settings import Settings

Tensor = torch.Tensor
CLIP_EPSILON = 1e-6  # as torch.nn.utils.clip_grad_norm_


@dataclass(frozen=True, slots=True)
class _Weight:
    """A parameter, and what the optimizer works on: itself, or its fp32 copy."""

    name: str
    parameter: torch.nn.Parameter
    own: torch.nn.Parameter


@dataclass(frozen=True, slots=True)
class _Bucket:
    """Weights that are updated together."""

    weights: tuple[_Weight, ...]
    optimizer: torch.optim.Optimizer | MasterAdamW


class Update:
    """The optimizer of a model whose weights and gradients every rank holds whole."""

    def __init__(
        self, model: torch.nn.Module, *, precision: Precision, kind: Optimizer, settings: Settings,
        world_size: int = 1,
    ) -> None:  # fmt: skip
        self.master = precision is Precision.BF16_MASTER
        self.eight_bit = kind is Optimizer.ADAMW_8BIT
        self.settings = settings
        self._model = model
        named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        self.parameters = [parameter for _, parameter in named]
        self.one_kernel = self.master and not self.eight_bit and _has_triton(self.parameters[0])
        self.copies = self.master and not self.one_kernel
        weights = [_Weight(name, p, self._own(p)) for name, p in named]
        groups = [range(len(weights))]
        if self.copies:
            groups = buckets([w.parameter.numel() for w in weights], MASTER_BUCKET_ELEMENTS)
        self.buckets = [self._bucket([weights[number] for number in group]) for group in groups]
        self.summed = SummedGradients(self.parameters) if world_size > 1 else None

    def _own(self, parameter: torch.nn.Parameter) -> torch.nn.Parameter:
        if not self.copies:
            return parameter
        return torch.nn.Parameter(parameter.detach().float())

    def _bucket(self, weights: Sequence[_Weight]) -> _Bucket:
        return _Bucket(tuple(weights), self._optimizer(weights))

    def _optimizer(self, weights: Sequence[_Weight]) -> torch.optim.Optimizer | MasterAdamW:
        chosen = self.settings
        if self.one_kernel:
            kernel = _master_adamw()
            return kernel([w.parameter for w in weights], chosen)
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

    def whole(self, function: Callable[[], Any]) -> Any:
        """What `function` gives, which runs the model: its weights are all there."""
        return function()

    def at_head(self, function: Callable[[Tensor], Any], kept: Tensor) -> Any:
        """What `function` makes of the head's input with the head's weight."""
        return function(kept)

    def gradient_to_add_to(self, weight: Tensor) -> Tensor | None:
        """The head's gradient of the passes before, to which this pass adds in its forward pass.

        Autograd adds to it, too, if it is the embeddings'; if not, whoever sums over ranks is told not to wait.
        """
        if self.summed is not None and weight.grad is not None:
            embeddings: Any = self._model.get_input_embeddings()  # type: ignore[operator]
            if weight is not embeddings.weight:
                self.summed.formed(weight)
        return weight.grad

    def backward(self, loss: Tensor, *, scale: float, last: bool) -> None:
        """Add the gradients of one pass; with the last one they are on their way to the other ranks."""
        if self.summed is not None and last:
            self.summed.begin()
        loss.backward()  # type: ignore[no-untyped-call]

    def sum_over_ranks(self) -> None:
        """Wait, on the device, for what is on its way."""
        if self.summed is not None:
            self.summed.finish()

    def advance(
        self, loss: Tensor, *, scale: float, learning_rate: float, max_grad_norm: float
    ) -> tuple[Tensor, Tensor]:
        """Clip by the global norm and move the weights, unless loss or norm is not finite.

        Returns:
            The norm before clipping, and 1 where the weights stayed.
        """
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        norms = torch._foreach_norm(gradients, 2, dtype=torch.float32)
        norm = torch.linalg.vector_norm(torch.stack(norms)) / scale
        del gradients, norms
        divisor = torch.full_like(norm, scale)
        if max_grad_norm:
            divisor = divisor * ((norm + CLIP_EPSILON) / max_grad_norm).clamp(min=1.0)
        skip = (~(norm.isfinite() & loss.isfinite())).float()
        divisor = torch.where(skip.bool(), torch.ones_like(divisor), divisor)
        self.step(learning_rate=learning_rate, divisor=divisor, skip=skip)
        self.clear()
        return norm, skip

    @torch.no_grad()
    def step(self, *, learning_rate: float, divisor: Tensor, skip: Tensor) -> None:
        """Move the weights by their gradients / `divisor`, or not at all where `skip` is 1."""
        for bucket in self.buckets:
            optimizer: Any = bucket.optimizer
            if self.one_kernel:
                optimizer.step(learning_rate=learning_rate, divisor=divisor, skip=skip)
                continue
            for group in optimizer.param_groups:
                group["lr"] = learning_rate
            if self.copies:
                _copy_gradients(bucket.weights)
            if self.eight_bit:
                if not _is_set(skip):
                    torch._foreach_div_(self._gradients(bucket), divisor)
                    optimizer.step()
            else:  # as torch's own GradScaler hands them to fused optimizers
                optimizer.grad_scale, optimizer.found_inf = divisor, skip
                optimizer.step()
            if self.copies:
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
        """What is held beside the weights, by `part/name of the weight`."""
        found: dict[str, Tensor] = {}
        for bucket in self.buckets:
            for weight in bucket.weights:
                if self.copies:
                    found[f"master/{weight.name}"] = weight.own.detach()
                for part, value in bucket.optimizer.state.get(weight.own, {}).items():
                    number = value if isinstance(value, Tensor) else torch.tensor(value)
                    kept = number.detach()
                    if part.startswith("qmap") or (part == "step" and self.one_kernel):
                        kept = kept.clone()  # of one tensor for all: a file wants each its own
                    found[f"{part}/{weight.name}"] = kept
        return found

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """The model's own weights."""
        for name, parameter in self._model.named_parameters():
            yield name, parameter.detach()

    def saved(self) -> Iterator[tuple[str, Tensor]]:
        """What the next step depends on beside the weights, one after the other; masters in fp32.

        They are joined in host memory: on the device that would take more than the step does.
        """
        weights = dict(self.weights())
        for key, value in self.state().items():
            part, _, name = key.partition("/")
            if part == "rest":
                yield f"master/{name}", joined(weights[name].cpu(), value.cpu())
            else:
                yield key, value

    def saved_bytes(self) -> int:
        """Bytes of a checkpoint."""
        held = [*self.weights(), *self.state().items()]
        wider = sum(value.nbytes for key, value in held if key.startswith("rest/"))  # 4 for 2
        return wider + sum(value.nbytes for _, value in held)

    def gathered(self, *, keep: bool) -> dict[str, Tensor] | None:
        """The whole weights where the model has them in parts: never."""
        return None

    @torch.no_grad()
    def restore(self, weights: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> None:
        """Stand where `weights` and `saved` were taken."""
        for name, parameter in self._model.named_parameters():
            parameter.copy_(weights[name])
        self.load(state)

    @torch.no_grad()
    def load(self, state: Mapping[str, Tensor]) -> None:
        """Go on from what `saved` returned."""
        by_name: dict[str, list[str]] = {}
        for key in state:
            part, _, name = key.partition("/")
            by_name.setdefault(name, []).append(part)
        for bucket in self.buckets:
            optimizer: Any = bucket.optimizer
            for weight in bucket.weights:
                parts = {part: state[f"{part}/{weight.name}"] for part in by_name[weight.name]}
                if self.copies:
                    weight.own.data.copy_(parts.pop("master"))
                elif self.one_kernel:
                    nearest, parts["rest"] = split(parts.pop("master"))
                    weight.parameter.copy_(nearest)
                optimizer.state[weight.own] = {
                    part: self._placed(part, value, weight.own) for part, value in parts.items()
                }
            if self.one_kernel:
                optimizer.restored()

    def _placed(self, part: str, value: Tensor, own: Tensor) -> Tensor | int:
        if self.eight_bit and part == "step":
            return int(value)
        return value.to(own.device, copy=True)


def _has_triton(parameter: Tensor) -> bool:
    return parameter.device.type == "cuda" and importlib.util.find_spec("triton") is not None


def _master_adamw() -> type[MasterAdamW]:
    from sftplan.train.master_adamw import MasterAdamW  # imports triton

    return MasterAdamW


def _is_set(flag: Tensor) -> bool:
    """Waits for the device."""
    return bool(flag)


def _copy_gradients(weights: Iterable[_Weight]) -> None:
    """The gradients in fp32 on the master copies, in few kernels."""
    found = [(w.own, w.parameter.grad) for w in weights if w.parameter.grad is not None]
    copies = [torch.empty_like(gradient, dtype=torch.float32) for _, gradient in found]
    torch._foreach_copy_(copies, [gradient for _, gradient in found])
    for (own, _), copy in zip(found, copies, strict=True):
        own.grad = copy


def _bitsandbytes() -> Any:
    try:
        return importlib.import_module("bitsandbytes")
    except ImportError:
        message = "--optimizer adamw-8bit needs bitsandbytes, which is not installed"
        raise NotReadyError(message, "`pip install bitsandbytes`, or `--optimizer adamw`") from None

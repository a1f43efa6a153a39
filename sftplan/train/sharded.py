"""Weights, gradients and optimizer states shared out over ranks and host, by DeepSpeed's engine.

It is asked for no more than `Update` is: run this with the weights there, take these gradients, move
the weights. What it does beyond, it is told to leave: it divides by the passes and averages over the
ranks, while our loss is divided by the targets of all of them already.
"""

from __future__ import annotations

import warnings
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import distributed

from sftplan.facts.strategy import Precision
from sftplan.train.ahead import RunAhead
from sftplan.train.compiled import blocks_of
from sftplan.train.engine import join_group, load_deepspeed, make_optimizer, settings_here
from sftplan.train.sharded_state import States

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping

    from sftplan.plan.record_inputs import StrategyRecord
    from sftplan.train.settings import Settings

Tensor = torch.Tensor


class _Head(torch.nn.Module):
    """The LM head's weights for whoever multiplies with them outside of the layer that has them.

    Stage 3 gathers the parameters of a module while the module runs, so that is what runs here.
    """

    def __init__(self, layer: torch.nn.Module) -> None:
        super().__init__()
        for name, parameter in layer.named_parameters(recurse=False):
            self.register_parameter(name, parameter)
        self.function: Callable[[Tensor], Any] | None = None

    def forward(self, kept: Tensor) -> Any:
        """What the function in hand makes of `kept`."""
        assert self.function is not None
        return self.function(kept)


class _Whole(torch.nn.Module):
    """The model as DeepSpeed knows it: a module whose forward pass runs whatever is asked for.

    DeepSpeed looks for tensors in what a module returns, so anything else is handed over in `found`.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model
        self.head = _Head(model.get_output_embeddings())
        self.function: Callable[[], Any] | None = None
        self.found: Any = None

    def forward(self) -> Tensor | None:
        """What the function in hand gives, if that is a tensor."""
        assert self.function is not None
        self.found = self.function()
        return self.found if isinstance(self.found, Tensor) else None


def _partition(
    deepspeed: Any, root: torch.nn.Module, settings: Mapping[str, Any], device: torch.device
) -> None:
    """Take the weights from the first rank's host one by one, each rank its share of each.

    DeepSpeed sends every weight from the first rank, so the others have shapes alone until it does.
    What is no weight comes from there too.
    """

    class Init(deepspeed.zero.Init):  # type: ignore[misc]  # it is Any
        def _convert_to_zero_parameters(self, param_list: Iterable[torch.nn.Parameter]) -> None:
            for parameter in param_list:
                if parameter.is_meta:
                    _make_room(parameter, device)
                super()._convert_to_zero_parameters([parameter])

    dtype = next(root.parameters()).dtype
    Init(module=root, config_dict_or_path=dict(settings), dtype=dtype)
    for module in root.modules():
        for name, buffer in module.named_buffers(recurse=False):
            here = torch.empty_like(buffer, device=device) if buffer.is_meta else buffer.to(device)
            here = here.contiguous()
            if distributed.get_world_size() > 1:
                distributed.broadcast(here.view(-1).view(torch.uint8), 0)
            module._buffers[name] = here


def _make_room(parameter: torch.nn.Parameter, device: torch.device) -> None:
    """Memory for a weight that has a shape alone; whoever refers to it still does."""
    empty = torch.nn.Parameter(
        torch.empty_like(parameter, device=device), requires_grad=parameter.requires_grad
    )
    torch.utils.swap_tensors(parameter, empty)  # type: ignore[no-untyped-call]


class ShardedUpdate:
    """The optimizer of a model that DeepSpeed shards."""

    def __init__(
        self, model: torch.nn.Module, *, strategy: StrategyRecord, planned: Mapping[str, Any],
        settings: Settings, device: torch.device, world_size: int,
    ) -> None:  # fmt: skip
        deepspeed = load_deepspeed(device)
        join_group(deepspeed, device)
        self.world_size = world_size
        self.device = device
        self.named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        self.parameters = [parameter for _, parameter in self.named]
        groups = [
            {"params": group, "weight_decay": decay}
            for group, decay in (
                ([p for p in self.parameters if p.ndim > 1], settings.weight_decay),
                ([p for p in self.parameters if p.ndim <= 1], 0.0),
            )
            if group
        ]
        optimizer = make_optimizer(groups, strategy, settings, device)
        self._root = _Whole(model)
        here = settings_here(
            planned, world_size=world_size, device=device, nvme_path=settings.nvme_path
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # deprecations between DeepSpeed and PyTorch
            if strategy.zero == 3:
                _partition(deepspeed, self._root, here, device)
                if device.type == "cuda":
                    RunAhead(blocks_of(model), partial(torch.cuda.Event, blocking=True))
            self.engine, self.optimizer, *_ = deepspeed.initialize(
                model=self._root, optimizer=optimizer, config=here, dist_init_required=False
            )
        self.states = States(
            deepspeed, self.optimizer, self.named, stage=strategy.zero,
            master=strategy.precision is Precision.BF16_MASTER, device=device,
        )  # fmt: skip

    def whole(self, function: Callable[[], Any]) -> Any:
        """What `function` gives, with each module's weights there while it runs."""
        root = self._root
        root.function = function
        try:
            output = self.engine()
            return root.found if output is None else output
        finally:
            root.function = root.found = None

    def at_head(self, function: Callable[[Tensor], Any], kept: Tensor) -> Any:
        """What `function` makes of the head's input, with the head's weight there."""
        self._root.head.function = function
        try:
            return self._root.head(kept)
        finally:
            self._root.head.function = None

    def gradient_to_add_to(self, weight: Tensor) -> None:
        """None: DeepSpeed takes gradients when they come, and the loss is scaled on its way to them."""

    def backward(self, loss: Tensor, *, scale: float, last: bool) -> None:
        """Add the gradients of one pass; with the last one they are on their way to who needs them."""
        self.optimizer.override_loss_scale(scale)  # it multiplies the loss by it, and the norm back
        self.engine.set_gradient_accumulation_boundary(last)
        self.engine.backward(loss * (self.world_size / scale), scale_wrt_gas=False)

    def sum_over_ranks(self) -> None:
        """DeepSpeed has done that, bucket by bucket, while the backward pass ran."""

    def advance(
        self, loss: Tensor, *, scale: float, learning_rate: float, max_grad_norm: float
    ) -> tuple[Tensor, Tensor]:
        """Clip by the global norm and move the weights, unless the norm is not finite.

        `scale` and `max_grad_norm` are in DeepSpeed's settings already. A loss that is not finite
        stops the run, so it is told as a step that was skipped.
        """
        self.optimizer.set_lr(learning_rate)
        self.engine.step()
        norm = torch.as_tensor(self.optimizer._global_grad_norm, device=self.device).float()
        stayed = torch.tensor(float(self.optimizer.overflow), device=self.device)
        return norm, torch.maximum(stayed, (~loss.isfinite()).float())

    def clear(self) -> None:
        """Let the gradients go."""
        self.optimizer.zero_grad()

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """Every weight whole, one after the other; all ranks have to ask together."""
        return self.states.weights()

    def saved(self) -> Iterator[tuple[str, Tensor]]:
        """What the next step depends on, whole; all ranks have to ask together."""
        return self.states.saved()

    def saved_bytes(self) -> int:
        """Bytes of a checkpoint."""
        return self.states.saved_bytes()

    def gathered(self, *, keep: bool) -> dict[str, Tensor] | None:
        """The whole weights on the host, where the model has them in parts; empty unless kept."""
        if self.states.stage < 3:
            return None
        return {name: whole.to("cpu", copy=True) for name, whole in self.weights() if keep}

    def restore(self, weights: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> None:
        """Stand where `weights` and `saved` were taken, by whatever ranks and stage."""
        with torch.no_grad():
            self.states.load(weights, state)

    def state(self) -> dict[str, Tensor]:
        """This rank's share of the states, as it lies in memory."""
        return self.states.held()

    def close(self) -> None:
        """Take DeepSpeed's hooks off the model."""
        self.engine.destroy()

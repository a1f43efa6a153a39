"""States that are shared out, put together whole for a checkpoint and taken apart again.

What is saved knows nothing of ranks and stages: a run goes on with others, or with neither.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import distributed

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

Tensor = torch.Tensor
MOMENTS = ("exp_avg", "exp_avg_sq")


class _Share(NamedTuple):
    """`size` elements from `start` in the flat tensor of `group`, from `offset` in the parameter."""

    group: int
    start: int
    offset: int
    size: int


class States:
    """fp32 weights and moments of a model under ZeRO.

    `master` says that the model's own weights are of fewer bits, so that both have to be saved.
    """

    def __init__(
        self, deepspeed: Any, optimizer: Any, named: Sequence[tuple[str, torch.nn.Parameter]], *,
        stage: int, master: bool, device: torch.device,
    ) -> None:  # fmt: skip
        self.deepspeed = deepspeed
        self.optimizer = optimizer
        self.named = named
        self.stage = stage
        self.master = master
        self.device = device

    @property
    def _flat(self) -> list[Tensor]:
        """This rank's share of the fp32 weights, a tensor per group."""
        found: list[Tensor] = (
            self.optimizer.fp32_partitioned_groups_flat
            if self.stage == 3
            else self.optimizer.single_partition_of_fp32_groups
        )
        return found

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """The model's own weights."""
        for name, parameter in self.named:
            if self.stage < 3:
                yield name, parameter.detach()
                continue
            with self.deepspeed.zero.GatheredParameters([parameter]):
                yield name, parameter.detach()

    def saved(self) -> Iterator[tuple[str, Tensor]]:
        """`part/name of the weight`, as `Update.state` has it."""
        inner = self.optimizer.optimizer
        begun = [inner.state[flat] for flat in self._flat if inner.state.get(flat)]
        for name, parameter in self.named:
            if self.master:
                yield f"master/{name}", self._whole(parameter, None)
            if not begun:
                continue
            yield f"step/{name}", torch.tensor(float(begun[0]["step"]))
            for part in MOMENTS:
                yield f"{part}/{name}", self._whole(parameter, part)

    def _whole(self, parameter: Any, part: str | None) -> Tensor:
        """The sum of what the ranks have of it, each in its place and zeros elsewhere."""
        shape = parameter.ds_shape if self.stage == 3 else parameter.shape
        whole = torch.zeros(shape, dtype=torch.float32, device=self.device)
        share = self._share(parameter)
        if share is not None:
            source = self._tensor(share.group, part)[share.start : share.start + share.size]
            whole.view(-1)[share.offset : share.offset + share.size] = source.to(self.device)
        if distributed.get_world_size() > 1:
            distributed.all_reduce(whole)
        return whole

    def _tensor(self, group: int, part: str | None) -> Tensor:
        flat = self._flat[group]
        found: Tensor = flat if part is None else self.optimizer.optimizer.state[flat][part]
        return found.detach()

    def _share(self, parameter: Any) -> _Share | None:
        """Which part of a parameter this rank updates; None if none."""
        if self.stage < 3:
            found = parameter._hp_mapping
            if found is None:
                return None
            inside, here = found.lp_fragment_address, found.hp_fragment_address
            return _Share(found.param_group_index, here.start, inside.start, inside.numel)
        group, start, size = self.optimizer.grad_position[self.optimizer.get_param_id(parameter)]
        offset = size * distributed.get_rank()
        count = min(size, parameter.ds_numel - offset)  # shares are rounded up: the last are short
        return _Share(group, start, offset, count) if count > 0 else None

    def held(self) -> dict[str, Tensor]:
        """This rank's shares, by number."""
        inner = self.optimizer.optimizer
        found = {f"fp32/{number}": flat.detach() for number, flat in enumerate(self._flat)}
        for number, flat in enumerate(self._flat):
            parts = inner.state.get(flat, {})
            found |= {f"{part}/{number}": parts[part] for part in MOMENTS if part in parts}
        return found

    def saved_bytes(self) -> int:
        """Bytes of a checkpoint: weights, moments and, beside weights of fewer bits, fp32 ones."""
        elements = sum(self._numel(p) for _, p in self.named)
        parts = len(MOMENTS) + self.master
        return elements * (self.named[0][1].element_size() + parts * torch.float32.itemsize)

    def _numel(self, parameter: Any) -> int:
        return int(parameter.ds_numel if self.stage == 3 else parameter.numel())

    def load(self, weights: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> None:
        """Put this rank's share of everything in its place; the model's weights follow."""
        first = self.named[0][0]
        begun = f"step/{first}" in state
        if begun:
            self._begin(float(state[f"step/{first}"]))
        for name, parameter in self.named:
            whole = state[f"master/{name}"] if self.master else weights[name]
            self._place(parameter, whole, None)
            for part in MOMENTS if begun else ():
                self._place(parameter, state[f"{part}/{name}"], part)
        self._hand_on()

    def _begin(self, step: float) -> None:
        """The optimizer's states exist from its first step on: make them as it would."""
        inner = self.optimizer.optimizer
        counts_itself = type(inner).__name__ == "DeepSpeedCPUAdam"
        for flat in self._flat:
            inner.state[flat] = {
                "step": int(step) if counts_itself else torch.tensor(step, device=flat.device),
                **{part: torch.zeros_like(flat, requires_grad=False) for part in MOMENTS},
            }

    def _place(self, parameter: Any, whole: Tensor, part: str | None) -> None:
        share = self._share(parameter)
        if share is not None:
            mine = whole.flatten()[share.offset : share.offset + share.size]
            self._tensor(share.group, part)[share.start : share.start + share.size].copy_(mine)

    def _hand_on(self) -> None:
        """The fp32 weights to the model's own, as DeepSpeed does after a step."""
        optimizer = self.optimizer
        if self.stage < 3:
            optimizer.update_lp_params()
            return
        optimizer._partition_all_parameters()
        for group in range(len(optimizer.fp16_groups)):
            optimizer._reassign_or_swap_out_partitioned_parameters(group)
        if optimizer.persistent_parameters:
            optimizer.persistent_parameters[0].all_gather(optimizer.persistent_parameters)

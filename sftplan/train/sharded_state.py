"""States that are shared out, put together whole for a checkpoint and taken apart again.

What is saved knows nothing of ranks and stages: a run goes on with others, or with neither.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

Tensor = torch.Tensor
MOMENTS = ("exp_avg", "exp_avg_sq")


class States:
    """fp32 weights and moments of a model under ZeRO.

    `master` says that the model's own weights are of fewer bits, so that both have to be saved.
    """

    def __init__(
        self, deepspeed: Any, optimizer: Any, named: Sequence[tuple[str, torch.nn.Parameter]], *,
        stage: int, master: bool,
    ) -> None:  # fmt: skip
        self.deepspeed = deepspeed
        self.optimizer = optimizer
        self.named = named
        self.stage = stage
        self.master = master

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
        utils, inner = self.deepspeed.utils, self.optimizer.optimizer
        begun = [inner.state[flat] for flat in self._flat if flat in inner.state]
        step = float(begun[0]["step"]) if begun and begun[0] else None
        for name, parameter in self.named:
            if self.master:
                yield f"master/{name}", utils.safe_get_full_fp32_param(parameter).detach()
            if step is None:
                continue
            yield f"step/{name}", torch.tensor(step)
            for part in MOMENTS:
                whole = utils.safe_get_full_optimizer_state(parameter, part)
                yield f"{part}/{name}", whole.detach()

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
        if self.stage < 3:
            self.optimizer._lazy_init_hp_params_optimizer_state()

    def _place(self, parameter: Any, whole: Tensor, part: str | None) -> None:
        if self.stage < 3:
            parameter.set_full_hp_param(whole, part)
            return
        group, start, count = self.optimizer.grad_position[self.optimizer.get_param_id(parameter)]
        flat = self._flat[group]
        target = flat if part is None else self.optimizer.optimizer.state[flat][part]
        begin = count * torch.distributed.get_rank()
        mine = whole.flatten()[begin : begin + count]  # the last ranks' shares may be short
        target.data[start : start + mine.numel()].copy_(mine)

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

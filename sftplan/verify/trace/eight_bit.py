"""bitsandbytes' AdamW8bit as memory sees it: its kernels need a GPU, its states do not."""

from __future__ import annotations

from typing import Any

import torch

from sftplan.step.update import EIGHT_BIT_BLOCK_ELEMENTS, EIGHT_BIT_MIN_ELEMENTS


class AdamW8bit(torch.optim.Optimizer):
    """A byte per element and moment with a scale per block; small tensors keep fp32 moments."""

    def __init__(self, params: Any, **options: Any) -> None:
        super().__init__(params, options)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Bring the states into being."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None and not self.state[parameter]:
                    self.state[parameter] = _states(parameter)


def _states(parameter: torch.Tensor) -> dict[str, torch.Tensor]:
    small = parameter.numel() < EIGHT_BIT_MIN_ELEMENTS
    found: dict[str, torch.Tensor] = {}
    for number in (1, 2):
        dtype = torch.float32 if small else torch.uint8
        found[f"state{number}"] = torch.zeros_like(parameter, dtype=dtype)
        if not small:
            blocks = -(-parameter.numel() // EIGHT_BIT_BLOCK_ELEMENTS)
            found[f"absmax{number}"] = torch.zeros(blocks, device=parameter.device)
    return found


class Library:
    """What the update asks of the library."""

    class optim:  # noqa: N801 - the library's own name
        """Its optimizers."""

        AdamW8bit = AdamW8bit

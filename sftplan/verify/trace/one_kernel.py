"""train/master_adamw.py as memory sees it: its kernel needs a GPU and triton, its states do not."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Sequence

Tensor = torch.Tensor


class MasterAdamW:
    """The state of each weight from the beginning, and no copy of a gradient."""

    def __init__(self, weights: Sequence[Tensor], settings: Any) -> None:
        parts = {"rest": torch.int16, "exp_avg": torch.float32, "exp_avg_sq": torch.float32}
        self.state = {
            weight: {part: torch.zeros_like(weight, dtype=dtype) for part, dtype in parts.items()}
            for weight in weights
        }

    def step(self, **_: Any) -> None:
        """Move nothing."""

"""train/master_adamw.py as memory sees it: its kernel needs a GPU and triton, its states do not."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Sequence

Tensor = torch.Tensor


class MasterAdamW:
    """Two fp32 moments of each master copy from the beginning, and no copy of a gradient."""

    def __init__(self, weights: Sequence[Tensor], masters: Sequence[Tensor], settings: Any) -> None:
        parts = ("exp_avg", "exp_avg_sq")
        self.state = {
            master: {part: torch.zeros_like(master) for part in parts} for master in masters
        }

    def step(self, **_: Any) -> None:
        """Move nothing."""

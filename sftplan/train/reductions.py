"""inductor's choice of kernel for sums over the hidden size: the whole row at once."""

from __future__ import annotations

from typing import Any

from torch._inductor import config
from torch._inductor.choices import InductorChoices
from torch._inductor.runtime.hints import ReductionHint
from torch._inductor.virtualized import V

# inductor reads rows of more than 1,024 elements twice, and draws the dropout in front of a norm
# twice as well. Measured on an H200, torch 2.11, 32,768 rows of 1,280: 425 µs a norm with its
# dropout, 287 µs as whole rows. 4,096 elements are 8 registers a thread in a block of 512.
WHOLE_ROW_ELEMENTS = 4096


class WholeRows(InductorChoices):
    """Rows of the size of a hidden state are kept in registers between their sum and its use."""

    def uuid(self) -> str:
        """What inductor's cache knows the choice by."""
        return f"sftplan-whole-rows-{WHOLE_ROW_ELEMENTS}"

    @staticmethod
    def should_use_persistent_reduction(features: Any, cooperative_reduction: bool) -> bool:
        """Whether a kernel holds all of a row; overrides `InductorChoices`."""
        if InductorChoices.should_use_persistent_reduction(features, cooperative_reduction):
            return True
        if features.get_reduction_hint() != ReductionHint.INNER or cooperative_reduction:
            return False
        size = features.reduction_numel
        return bool(V.graph.sizevars.statically_known_leq(size, WHOLE_ROW_ELEMENTS))


def hold_whole_rows() -> None:
    """Compile so from here on: in this process, or with an older inductor in this thread."""
    if hasattr(config, "inductor_choices_class"):
        config.inductor_choices_class = WholeRows
    else:
        V.set_choices_handler(WholeRows())

"""The blocks that models repeat, in the op order of transformers' modelling code.

Local variables mirror the modelling code's: a tensor lives as long as a name holds it. Each block takes
the tape, the context, the number and the weights of its layer, and the hidden states (B, T, d).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from sftplan.facts.model import Family
from sftplan.step.blocks.gpt2 import gpt2_block
from sftplan.step.blocks.llama import llama_block
from sftplan.step.blocks.opt import opt_block
from sftplan.step.blocks.parallel import neox_block, phi_block

if TYPE_CHECKING:
    from collections.abc import Callable

    from sftplan.step.blocks.context import Context, LayerWeights
    from sftplan.step.tape import Tape
    from sftplan.step.tensor import Tensor

    Block = Callable[[Tape, Context, int, LayerWeights, Tensor], Tensor]

# Modules that a block calls beside linear layers and norms: itself, attention, MLP, activation, and dropouts,
# which are called with p = 0 too. OPT has no MLP of its own, and functions for dropouts.
OTHER_MODULES: dict[Family, int] = {
    Family.GPT2: 6, Family.LLAMA: 4, Family.GEMMA: 4, Family.PHI3: 6, Family.MOE: 5, Family.PHI: 6,
    Family.NEOX: 6, Family.OPT: 3,
}  # fmt: skip

BLOCKS: dict[Family, Block] = {
    Family.GPT2: gpt2_block,
    Family.LLAMA: llama_block,
    Family.GEMMA: llama_block,
    Family.PHI3: llama_block,
    Family.MOE: llama_block,
    Family.PHI: phi_block,
    Family.NEOX: neox_block,
    Family.OPT: opt_block,
}

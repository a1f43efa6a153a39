"""What torch.compile keeps and allocates where every block is compiled on its own.

AOTAutograd and inductor of PyTorch 2.13.

The partitioner keeps what a product or the attention needs again, the mean and rstd of norms, and
the sources of what it recomputes; chains of pointwise ops between them leave no tensor behind. So
a block keeps
- its own input, which is the block before's result and is not counted here;
- every linear layer's input, shared by the layers that read it, and under autocast the copy of
  every weight;
- q, k and v as the attention read them, its result and its log-sum-exp; with query and key norms
  also their inputs;
- the output projection's result, from which x + attention(x) is formed again (not where MLP and
  attention are parallel);
- what enters the activation, and up(x) where the MLP is gated; for ReLU only what comes out;
- of dropouts, all drawn by hash (train/dropout.py), that of GPT-2's MLP, one byte per element; the
  others are drawn again.

tests/unit/test_step_compiled.py has the sizes that inductor's own wrapper code shows.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from sftplan.step.compiled.again import forgetful_forward, kept_by
from sftplan.step.compiled.again_backward import recomputing_backward
from sftplan.step.compiled.backward import backward_graph
from sftplan.step.compiled.block import SUPPORTED, Block
from sftplan.step.compiled.forward import forward_graph
from sftplan.step.compiled.gpt2 import gpt2_backward_graph
from sftplan.step.compiled.graph import Compiled
from sftplan.step.compiled.parallel import parallel_backward_graph
from sftplan.step.tensor import DType

if TYPE_CHECKING:
    from sftplan.facts.model import ModelShape


def compiled_block(
    model: ModelShape,
    tokens: int,
    *,
    weights: DType = DType.FP32,
    autocast: DType | None = DType.BF16,
    dropout: bool | None = None,
    by_token: bool = False,
    repeats: bool = False,
    given: frozenset[str] | None = None,
) -> Compiled:
    """One block over `tokens` tokens, attention by `varlen_attn`.

    `dropout` None is as the model has it. `by_token` says that attention gets q and k contiguous as
    (tokens, heads, d_head): without it NeoX's rotated heads lie head by head, so does the result, and
    the output projection needs and keeps a copy. `repeats` says that grouped keys and values are
    copied to every head before the attention, and kept so. `given` makes it checkpointed: of what products
    and the attention give only these are kept.

    GPT-2 under autocast with dropout, per token: 31·d bytes, the statistics and the weights' copies

    >>> from sftplan.facts.catalogue import builtin
    >>> gpt2 = compiled_block(builtin("gpt2"), 2048)
    >>> gpt2.saved_bytes
    63045648
    >>> 31 * 2048 * 768 + 2 * 12 * 768**2 + 4 * 2048 * (4 + 12) + 16
    63045648
    >>> [x.name for x in gpt2.saved][:6]
    ['norm1.mean', 'norm1.rstd', 'norm1', 'cast attn.c_attn', 'qkv', 'attended']
    >>> compiled_block(builtin("tinyllama"), 2048, weights=DType.BF16, autocast=None).saved_bytes
    113524752
    """
    if model.family not in SUPPORTED or model.sandwich_norms or model.post_norm:
        message = f"no study of a compiled block of {model.name} ({model.family})"
        raise NotImplementedError(message)
    if dropout is None:
        dropout = model.residual_dropout > 0
    block = Block(model, tokens, weights, autocast, dropout, by_token, repeats)
    if given is not None:
        kept = kept_by(block, given)
        forgetful = forgetful_forward(block, kept).planned()
        held = {name: forgetful.held[name] for name in forgetful.held if name in kept}
        backward = recomputing_backward(block, held).planned()
        return Compiled(tuple(held.values()), forgetful, backward)
    forward = forward_graph(block)
    saved = {name: buffer for name, buffer in forward.held.items() if name != "out"}
    going_back = parallel_backward_graph if model.parallel_residual else backward_graph
    going_back = gpt2_backward_graph if block.as_allocated else going_back
    return Compiled(tuple(saved.values()), forward, going_back(block, saved))

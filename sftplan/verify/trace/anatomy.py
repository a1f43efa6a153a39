"""What transformers builds from a configuration: its tensors, its layers, and what can be asked of it."""

from __future__ import annotations

import inspect
import re
from typing import TYPE_CHECKING, Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from sftplan.facts.anatomy import layer_of
from sftplan.facts.strategy import Attention
from sftplan.step.repeat import FEW_LAYERS
from sftplan.train.compiled import blocks_of
from sftplan.train.model import without_pad_token
from sftplan.verify.trace.configs import first, with_layers

if TYPE_CHECKING:
    from collections.abc import Sequence

PROBE_TOKENS = 8  # of a forward pass that only shows which operators run
HEAD_OPS = frozenset(("mm", "addmm", "_unsafe_view"))
EXPERT = re.compile(r"\.experts\.(\d+)\.")
INNER_SIZES = ("intermediate_size", "ffn_dim", "n_inner", "ffn_hidden_size", "d_ff")
POSITIONS = ("max_position_embeddings", "max_seq_len", "max_sequence_length", "seq_length")
UNBOUNDED_POSITIONS = 2**30  # where the configuration names no limit
ATTENTION_DROPOUTS = ("attn_pdrop", "attention_dropout")


def anatomy_of(config: Any) -> dict[str, Any]:
    """Everything that planning asks of a model, in JSON's types."""
    model = built(config, torch.device("meta"))
    blocks = blocks_of(model)
    prefix = next(
        name.rpartition(".")[0] for name, module in model.named_modules() if module is blocks[0]
    )
    parameters = [(name, list(p.shape)) for name, p in model.named_parameters()]
    return {
        "sizes": _sizes(config, model),
        "parameters": parameters,
        "buffers": [(name, b.nbytes) for name, b in model.named_buffers() if b.nbytes],
        "tables": _tables(model),
        "blocks": prefix,
        "alike": _alike(config, blocks) and _same_when_few(config, parameters, prefix),
        "idle_parameters": _idle(config, parameters),
        "attention_layers": sum(_attends(block) for block in blocks),
        "attentions": _attentions(model),
        "plain_head": _plain_head(config),
        "takes_positions": "position_ids" in inspect.signature(model.base_model.forward).parameters,
    }


def built(config: Any, device: torch.device) -> Any:
    """The model with eager attention, which all of them have."""
    from transformers import AutoModelForCausalLM

    with device:
        return AutoModelForCausalLM.from_config(
            config, attn_implementation="eager", trust_remote_code=False
        ).train()


def _sizes(config: Any, model: Any) -> dict[str, Any]:
    """Under the names of `facts.model.ModelShape`."""
    hidden = config.hidden_size
    heads = first(config, "num_attention_heads", default=0) or 0
    dropout = first(config, *ATTENTION_DROPOUTS, default=0.0)
    output = model.get_output_embeddings()
    return {
        "num_layers": config.num_hidden_layers,
        "hidden_size": hidden,
        "intermediate_size": first(config, *INNER_SIZES, default=4 * hidden),
        "num_heads": heads,
        "num_kv_heads": first(config, "num_key_value_heads", "num_kv_heads", default=heads),
        "head_dim": first(config, "head_dim", default=hidden // heads if heads else 0),
        "vocab_size": config.vocab_size,
        "max_positions": first(config, *POSITIONS, default=UNBOUNDED_POSITIONS),
        "tied_embeddings": output is not None
        and output.weight is model.get_input_embeddings().weight,
        "activation": str(first(config, "hidden_act", "activation_function", default="")),
        "attention_dropout": float(dropout),
    }


def _tables(model: Any) -> list[str]:
    return [
        f"{name}.weight"
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Embedding)
    ]


def _alike(config: Any, blocks: Sequence[torch.nn.Module]) -> bool:
    """Whether every layer is built of the same modules with the same numbers in them."""
    for value in vars(config).values():
        if isinstance(value, list) and len(value) == len(blocks) and len(set(map(str, value))) > 1:
            return False
    return len({_signature(block) for block in blocks}) == 1


def _signature(block: torch.nn.Module) -> str:
    found = []
    for name, module in block.named_modules():
        plain = {
            key: value
            for key, value in vars(module).items()
            if isinstance(value, (bool, int, float, str, type(None))) and "idx" not in key
        }
        shapes = [(n, tuple(p.shape)) for n, p in module.named_parameters(recurse=False)]
        found.append((name, type(module).__name__, sorted(plain.items(), key=str), shapes))
    return repr(found)


def _attends(block: torch.nn.Module) -> bool:
    return any("attention" in type(module).__name__.lower() for module in block.modules())


def _idle(config: Any, parameters: Sequence[tuple[str, list[int]]]) -> int:
    """Parameters of experts that a token is not sent to: of all but `k` in `n`."""
    number = first(config, "num_local_experts", "num_experts", "n_routed_experts", default=0) or 0
    chosen = first(config, "num_experts_per_tok", "num_experts_per_token", "moe_topk", default=number)
    of_experts = sum(
        torch.Size(shape).numel()
        for name, shape in parameters
        if EXPERT.search(name) or (".experts." in name and shape[0] == number)
    )
    return of_experts - of_experts * chosen // number if number else 0


def _attentions(model: Any) -> list[str]:
    found = [str(Attention.EAGER)]
    if getattr(model, "_supports_sdpa", False):
        found.append(str(Attention.SDPA))
    if getattr(model, "_supports_attention_backend", False):
        found.append(str(Attention.VARLEN))
    return found


class _Ops(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Names of what runs and is no view."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.names: list[str] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        space, name, _ = str(func).split(".")
        if space == "aten" and not func.is_view:
            self.names.append(name)
        return func(*args, **(kwargs or {}))


def _plain_head(config: Any) -> bool:
    """Whether nothing but the head's product stands between the last hidden states and the logits."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        model = built(with_layers(config, 1), torch.device("cpu"))
        if model.get_output_embeddings() is None or model.base_model is model:
            return False
        ids = torch.zeros((1, PROBE_TOKENS), dtype=torch.int64)
        with _Ops() as ops, torch.no_grad(), without_pad_token(model):
            model.base_model.register_forward_hook(lambda *_: ops.names.clear())
            model(input_ids=ids, use_cache=False)
        return set(ops.names) <= HEAD_OPS


def _same_when_few(config: Any, parameters: Sequence[tuple[str, list[int]]], prefix: str) -> bool:
    """Whether the model with few layers has the first of the whole one's, and all that is around them."""
    number = min(FEW_LAYERS, config.num_hidden_layers)
    few = built(with_layers(config, number), torch.device("meta"))
    here = [(name, list(p.shape)) for name, p in few.named_parameters()]
    return here == [each for each in parameters if (layer_of(each[0], prefix) or 0) < number]

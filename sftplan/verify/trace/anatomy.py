"""What transformers builds from a configuration: its tensors, its layers, and what can be asked of it."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

import torch

from sftplan.errors import UsageError
from sftplan.facts.anatomy import layer_of
from sftplan.facts.dimensions import MAX_LAYERS
from sftplan.facts.strategy import Attention
from sftplan.step.repeat import FEW_LAYERS
from sftplan.train.compiled import blocks_of
from sftplan.verify.trace.configs import first, with_layers
from sftplan.verify.trace.probe import PROBE_TOKENS, build_untrained, probe

if TYPE_CHECKING:
    from collections.abc import Sequence

INNER_SIZES = ("intermediate_size", "ffn_dim", "n_inner", "ffn_hidden_size", "d_ff")
POSITIONS = ("max_position_embeddings", "max_seq_len", "max_sequence_length", "seq_length")
UNBOUNDED_POSITIONS = 2**30  # where the configuration names no limit
ATTENTION_DROPOUTS = ("attn_pdrop", "attention_dropout")


def anatomy_of(config: Any) -> dict[str, Any]:
    """Everything that planning asks of a model, in JSON's types."""
    if not 0 < config.num_hidden_layers <= MAX_LAYERS:
        message = f"it has {config.num_hidden_layers:,} layers: at most {MAX_LAYERS:,} can be built"
        raise UsageError(message)
    model = build_untrained(config, torch.device("meta"))
    blocks = blocks_of(model)
    prefix = next(
        name.rpartition(".")[0] for name, module in model.named_modules() if module is blocks[0]
    )
    parameters = [(name, list(p.shape)) for name, p in model.named_parameters()]
    found = probe(config)
    return {
        "sizes": _sizes(config, model),
        "parameters": parameters,
        "buffers": [(name, b.nbytes) for name, b in model.named_buffers() if b.nbytes],
        "tables": _tables(model),
        "blocks": prefix,
        "alike": _alike(config, blocks) and _same_when_few(config, parameters, prefix),
        "product_flops": found.flops // PROBE_TOKENS,
        "idle_parameters": found.expert_parameters - found.expert_flops // (2 * PROBE_TOKENS),
        "attention_layers": sum(_attends(block) for block in blocks),
        "attentions": _attentions(model),
        "plain_head": found.plain_head,
        "takes_positions": "position_ids" in inspect.signature(model.base_model.forward).parameters,
    }


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


def _attentions(model: Any) -> list[str]:
    found = [str(Attention.EAGER)]
    if getattr(model, "_supports_sdpa", False):
        found.append(str(Attention.SDPA))
    if getattr(model, "_supports_attention_backend", False):
        found.append(str(Attention.VARLEN))
    return found


def _same_when_few(config: Any, parameters: Sequence[tuple[str, list[int]]], prefix: str) -> bool:
    """Whether the model with few layers has the first of the whole one's, and all that is around them."""
    number = min(FEW_LAYERS, config.num_hidden_layers)
    few = build_untrained(with_layers(config, number), torch.device("meta"))
    here = [(name, list(p.shape)) for name, p in few.named_parameters()]
    return here == [each for each in parameters if (layer_of(each[0], prefix) or 0) < number]

"""Models for people and for programs: the catalogue as a table, one model part by part."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from sftplan.facts import params
from sftplan.facts.anatomy import block_counts
from sftplan.facts.tensors import count
from sftplan.units import format_count

if TYPE_CHECKING:
    from collections.abc import Sequence

    from sftplan.facts.model import Anatomy, ModelShape

_HUB_COLUMN_WIDTH = 110  # narrower screens do without the hub ids


def describe(model: ModelShape) -> dict[str, object]:
    """A model as `--json` shows it; sizes are counts, unknown is None."""
    experts = model.experts
    number = params.num_parameters(model)
    return {
        "name": model.name,
        "source": model.source,
        "hub_id": model.hub_id,
        "architecture": model.model_type,
        "num_parameters": number,
        "num_trainable": number,
        "num_active_parameters": params.num_active_parameters(model),
        "num_layers": model.num_layers,
        "hidden_size": model.hidden_size,
        "intermediate_size": model.intermediate_size,
        "num_heads": model.num_heads,
        "num_kv_heads": model.num_kv_heads,
        "head_dim": model.head_dim,
        "vocab_size": model.vocab_size,
        "max_positions": model.max_positions,
        "tied_embeddings": model.tied_embeddings,
        "sliding_window": model.sliding_window,
        "num_experts": experts.num_experts if experts else None,
        "experts_per_token": experts.experts_per_token if experts else None,
        "attention_dropout": model.attention_dropout,
        "residual_dropout": model.residual_dropout,
        "embedding_dropout": model.embedding_dropout,
        "parameters_by_part": parts(model),
    }


def parts(model: ModelShape) -> dict[str, int]:
    """Parameters of each part of the model over all layers; they add up to the whole.

    >>> from sftplan.facts.catalogue import builtin
    >>> parts(builtin("gpt2"))["attention"]  # 12 * 2362368
    28348416
    """
    if model.anatomy is not None:
        return _listed_parts(model, model.anatomy)
    found = {
        "embeddings": count(params.embeddings(model)),
        "attention": model.num_layers * count(params.attention(model)),
    }
    num_dense = len(model.dense_layers) if model.experts else model.num_layers
    if num_dense:
        found["mlp"] = num_dense * count(params.mlp(model))
    if model.experts:
        sparse = count(params.sparse_mlp(model, model.experts))
        found["experts"] = (model.num_layers - num_dense) * sparse
    found["head"] = count(params.head(model))
    found["norms"] = params.num_parameters(model) - sum(found.values())
    return found


def _listed_parts(model: ModelShape, anatomy: Anatomy) -> dict[str, int]:
    """Of a model of which only its parameters are known: tables, layers, and what is around them."""
    tables = [p for p in anatomy.parameters if p.name in anatomy.tables]
    found = {"embeddings": count(tables), "layers": block_counts(anatomy).total()}
    found["head and norms"] = params.num_parameters(model) - sum(found.values())
    return found


def render_catalogue(models: Sequence[ModelShape], *, width: int, colour: bool) -> str:
    """The table of the built-in models."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for heading in ("model", "parameters", "layers", "hidden", "heads", "vocabulary", "positions"):
        table.add_column(heading, justify="left" if heading == "model" else "right", no_wrap=True)
    with_hub = width >= _HUB_COLUMN_WIDTH
    if with_hub:
        table.add_column("hub id", style="dim", overflow="ellipsis")  # the one that may be cut
    for model in models:
        cells = [
            model.name,
            format_count(params.num_parameters(model)),
            f"{model.num_layers}",
            f"{model.hidden_size:,}",
            _heads(model),
            f"{model.vocab_size:,}",
            f"{model.max_positions:,}",
        ]
        table.add_row(*cells, *([model.hub_id or ""] if with_hub else []))
    return _render(table, width=width, colour=colour)


def render_model(model: ModelShape, *, width: int, colour: bool) -> str:
    """One model: its sizes, then its parameters part by part."""
    total = params.num_parameters(model)
    facts = Table(box=None, pad_edge=False, show_header=False)
    facts.add_column(style="dim", no_wrap=True)
    facts.add_column(overflow="fold")
    for label, value in _facts(model):
        facts.add_row(label, value)
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("part", no_wrap=True)
    table.add_column("parameters", justify="right", no_wrap=True)
    table.add_column("share", justify="right", no_wrap=True)
    for part, number in parts(model).items():
        table.add_row(part, f"{number:,}", f"{number / total:.1%}")
    table.add_row("total", f"{total:,}", "", style="bold")
    return "\n\n".join(_render(each, width=width, colour=colour) for each in (facts, table))


def _facts(model: ModelShape) -> list[tuple[str, str]]:
    experts = model.experts
    found = [
        ("model", model.name),
        ("architecture", model.model_type),
        ("source", model.source),
        ("hub id", model.hub_id or "none"),
        ("layers", f"{model.num_layers}"),
        ("hidden size", f"{model.hidden_size:,}"),
        ("MLP size", f"{model.intermediate_size:,}, {model.activation}"),
        ("heads", f"{_heads(model)} of {model.head_dim}"),
        ("vocabulary", f"{model.vocab_size:,}, {'tied' if model.tied_embeddings else 'not tied'}"),
        ("positions", f"{model.max_positions:,}"),
    ]
    if model.anatomy is not None:
        found.append(("planned", "from the real model, traced: its blocks are not modelled"))
    if model.sliding_window:
        sliding = model.layer_kinds.count("sliding") or model.num_layers
        window = f"{model.sliding_window:,} tokens in {sliding} of {model.num_layers} layers"
        found.append(("window", window))
    if experts:
        routed = f"{experts.experts_per_token} of {experts.num_experts}"
        found.append(("experts", f"{routed}, MLP size {experts.intermediate_size:,}"))
        active = format_count(params.num_active_parameters(model))
        found.append(("active", f"{active} parameters per token"))
    return found


def _heads(model: ModelShape) -> str:
    """Query heads, and key heads where they are fewer."""
    if model.num_kv_heads == model.num_heads:
        return f"{model.num_heads}"
    return f"{model.num_heads}/{model.num_kv_heads}"


def _render(table: Table, *, width: int, colour: bool) -> str:
    buffer = io.StringIO()
    console = Console(
        file=buffer,
        width=width,
        force_terminal=colour,
        color_system="standard" if colour else None,
        highlight=False,
    )
    console.print(table)
    return "\n".join(line.rstrip() for line in buffer.getvalue().splitlines())

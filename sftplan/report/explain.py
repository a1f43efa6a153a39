"""A term of the plan explained: formula, source, and the numbers put in."""

from __future__ import annotations

import dataclasses
import textwrap
from typing import TYPE_CHECKING

from sftplan.errors import UsageError, did_you_mean
from sftplan.report import terms
from sftplan.report.terms import TERMS, Term
from sftplan.report.words import checkpointing_words
from sftplan.units import format_duration, format_gib

if TYPE_CHECKING:
    from sftplan.plan.record import Plan

WIDTH = 80
EXAMPLE_MODEL = "gpt2-large"
# Where a plan holds the value of a term; `{}` is by_category.
_CATEGORIES = ("weights", "gradients", "optimizer", "activations", "logits", "temporary")


def list_terms() -> dict[str, str]:
    """Every term with its summary."""
    return {name: term.summary for name, term in TERMS.items()}


def explain_term(name: str) -> Term:
    """The term, or a UsageError that names the closest."""
    term = TERMS.get(name.strip().lower().replace("_", "-"))
    if term is None:
        message = f"no term {name!r}"
        hint = did_you_mean(name, TERMS) or f"terms: {', '.join(TERMS)}"
        raise UsageError(message, hint)
    return term


def attention_flops_per_token(num_layers: int, query_size: int, seq_len: int) -> int:
    """12 L d_a T.                                                    [PALM] appendix B.

    >>> attention_flops_per_token(36, 1280, 1024)  # 12 * 36 * 1280 * 1024
    566231040
    """
    return 12 * num_layers * query_size * seq_len


def doubling_lines() -> list[str]:
    """What T 512 to 1024 costs on gpt2-large: 4 times in attention, 2.1 times in all."""
    from sftplan.facts.catalogue import builtin
    from sftplan.facts.params import num_parameters

    model = builtin(EXAMPLE_MODEL)
    linear = 6 * num_parameters(model)  # tied: the head's product stands for the look-up
    lines = ["GFLOP of one row      linear   attention      in all"]
    totals = []
    for seq_len in (512, 1024):
        attention = attention_flops_per_token(model.num_layers, model.query_size, seq_len)
        row = [seq_len * linear, seq_len * attention, seq_len * (linear + attention)]
        totals.append(row)
        cells = "".join(f"{value / 1e9:>12,.0f}" for value in row)
        lines.append(f"{EXAMPLE_MODEL}, T {seq_len:<5}{cells[2:]}")
    ratios = [after / before for before, after in zip(*totals, strict=True)]
    lines.append(f"{'times':<18}" + "".join(f"{ratio:>12.2f}" for ratio in ratios)[2:])
    share = totals[1][1] / totals[1][2]
    lines += textwrap.wrap(
        f"Twice the length costs {ratios[1]:.0f} times the attention, but {ratios[2]:.1f} times in "
        f"all: attention is {share:.0%} of the FLOPs at T 1024, and the rest grows with T.",
        WIDTH - 2,
    )
    return lines


def _compute_numbers(plan: Plan) -> dict[str, str]:
    model, work, compute = plan.inputs.model, plan.inputs.workload, plan.compute
    size = model.num_heads * model.head_dim
    attention = compute.attention_flops_per_token
    return {
        "attention": f"12 x {model.num_layers} x {size} x {work.seq_len} = "
        f"{attention_flops_per_token(model.num_layers, size, work.seq_len):,} FLOPs per token; "
        f"in the plan {attention:,}, {attention / compute.flops_per_token:.1%} of all",
        "linear": f"{compute.linear_flops_per_token:,} FLOPs per token",
    }


def _memory_numbers(plan: Plan) -> dict[str, str]:
    gpu = plan.memory.gpu
    numbers = {
        name: f"{gpu.by_category[name]:,} bytes ({format_gib(gpu.by_category[name])} GiB) "
        f"at the peak, {gpu.peak_at}"
        for name in _CATEGORIES
        if name in gpu.by_category
    }
    reserved, allocated = gpu.peak_reserved_bytes, gpu.peak_allocated_bytes
    numbers["allocator"] = (
        f"{format_gib(reserved)} reserved - {format_gib(allocated)} allocated = "
        f"{format_gib(reserved - allocated)} GiB"
    )
    numbers["context"] = f"{format_gib(gpu.context_bytes)} GiB"
    free = plan.inputs.margin_fraction
    numbers["margin"] = (
        f"{format_gib(gpu.used_bytes)} used, (1 - {free:g}) x {format_gib(gpu.capacity_bytes)} = "
        f"{format_gib((1 - free) * gpu.capacity_bytes)} GiB may be"
    )
    return numbers


def _run_numbers(plan: Plan) -> dict[str, str]:
    time, cost, strategy = plan.time, plan.cost, plan.strategy
    numbers = {
        "parameters": f"{plan.inputs.model.num_parameters:,}",
        "zero": f"stage {strategy.zero} on {plan.inputs.hardware.num_gpus} GPUs",
        "offload": strategy.offload.value,
        "checkpointing": checkpointing_words(strategy),
    }
    if time.step_s is not None:
        numbers["step-time"] = format_duration(time.step_s)
    if time.dispatch_s is not None:
        numbers["dispatch"] = f"{format_duration(time.dispatch_s)} per step"
    if time.mfu_fraction is not None and time.tokens_per_s is not None:
        numbers["mfu"] = (
            f"{plan.compute.flops_per_token:,} x {time.tokens_per_s:,.0f} tokens per s: "
            f"{time.mfu_fraction:.1%}"
        )
    if cost.usd is not None and time.total_s is not None:
        numbers["cost"] = (
            f"{time.total_s:,.0f} s x ${cost.usd_per_hour:,.2f} / 3600 = ${cost.usd:,.2f}"
        )
    return numbers


def numbers_of(plan: Plan) -> dict[str, str]:
    """What a plan puts into each term's formula, as far as it says."""
    return _compute_numbers(plan) | _memory_numbers(plan) | _run_numbers(plan)


def _source_lines(source: str) -> list[str]:
    """The source, and the reference behind each of its tags."""
    references = [line.strip() for line in (terms.__doc__ or "").splitlines()]
    found = [line for line in references if line.startswith("[") and line.split()[0] in source]
    return [source, *(" ".join(line.split()) for line in found)]


def _block(label: str, texts: list[str]) -> list[str]:
    lines = []
    for index, text in enumerate(texts):
        lines += textwrap.wrap(
            text,
            WIDTH,
            initial_indent=(label if index == 0 else "").ljust(10),
            subsequent_indent=" " * 10,
        )
    return lines


def render_term(term: Term, plan: Plan | None) -> str:
    """The term for people; with a plan its numbers, and for attention always the doubling of T."""
    lines = [f"{term.name}: {term.summary}", ""]
    lines += _block("Formula", [term.formula])
    lines += _block("Source", _source_lines(term.source))
    lines += _block("Code", [term.where])
    if plan is not None:
        name = plan.inputs.model.name
        numbers = numbers_of(plan).get(term.name, "the plan holds no figure of its own for this")
        lines += _block("Numbers", [f"{name}: {numbers}"])
    if term.name == "attention":
        lines += ["", *(f"  {line}" for line in doubling_lines())]
    return "\n".join(lines)


def term_document(term: Term, plan: Plan | None) -> dict[str, object]:
    """The JSON object of a term."""
    return {
        "format": "sftplan.term",
        "format_version": "1.0",
        **{field.name: getattr(term, field.name) for field in dataclasses.fields(term)},
        "numbers": None if plan is None else numbers_of(plan).get(term.name),
    }

"""Knobs in words: how a strategy and a change of it are said in one line."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

    from sftplan.plan.record_costs import KnobValue, Verdict
    from sftplan.plan.record_inputs import StrategyRecord

VERDICTS: Mapping[Verdict, str] = {
    "fits": "Fits",
    "tight": "Fits, tight",
    "does_not_fit": "Does not fit",
}
_COLOURS: Mapping[Verdict, str] = {"fits": "green", "tight": "yellow", "does_not_fit": "red"}


def verdict_colour(verdict: Verdict) -> str:
    """Green, yellow or red."""
    return _COLOURS[verdict]


def knob_words(knob: str, value: KnobValue) -> str:
    """One knob with its value.

    >>> knob_words("zero", 2), knob_words("micro_batch", 8), knob_words("compile", False)
    ('ZeRO-2', 'micro-batch 8', 'not compiled')
    >>> knob_words("offload", "none"), knob_words("checkpointing", "full")
    ('no offload', 'full checkpointing')
    """
    match knob, value:
        case "zero", _:
            return f"ZeRO-{value}" if value else "no ZeRO"
        case "compile", _:
            return "compiled" if value else "not compiled"
        case "packing", _:
            return "packed" if value else "not packed"
        case (("offload" | "checkpointing"), "none"):
            return f"no {knob}"
        case "offload", "all":
            return "offload of everything"
        case (("precision" | "optimizer"), _):
            return str(value)
        case "offload", _:
            return f"offload to {value}" if value == "nvme" else f"{value} offload"
        case "checkpointed_layers", None:
            return "all layers checkpointed"
        case "checkpointed_layers", _:
            return f"{value} layers checkpointed"
        case (("checkpointing" | "attention" | "loss"), _):
            return f"{value} {knob}"
        case "allocator", _:
            return "expandable segments" if value == "expandable" else "default allocator"
        case (("hardware" | "model"), _):
            return str(value)
        case _:
            return f"{knob.replace('_', '-')} {value}"


def change_words(change: Mapping[str, KnobValue]) -> str:
    """A change of knobs; the accumulation that only follows the micro-batch is left unsaid.

    >>> change_words({"micro_batch": 8, "accumulation": 4})
    'micro-batch 8'
    >>> change_words({"checkpointing": "full", "checkpointed_layers": None})
    'full checkpointing'
    """
    shown = dict(change)
    if "micro_batch" in shown:
        shown.pop("accumulation", None)
    if "checkpointing" in shown and shown.get("checkpointed_layers") is None:
        shown.pop("checkpointed_layers", None)
    return ", ".join(knob_words(knob, value) for knob, value in shown.items())


def options_of(change: Mapping[str, KnobValue]) -> str:
    """A change as one would type it; None is what an option left out means.

    >>> options_of({"gpus": 2, "packing": False})
    '--gpus 2 --no-packing'
    """
    words = []
    for knob, value in change.items():
        if value is None:
            continue
        name = "seq" if knob == "seq_len" else knob.replace("_", "-")
        if isinstance(value, bool):
            words.append(f"--{name}" if value else f"--no-{name}")
        else:
            words.append(f"--{name} {value}")
    return " ".join(words)


def checkpointing_words(strategy: StrategyRecord) -> str:
    """What is computed again, and in how many layers where not in all."""
    words = knob_words("checkpointing", strategy.checkpointing.value)
    if strategy.checkpointed_layers is None:
        return words
    return f"{words} of {strategy.checkpointed_layers} layers, {strategy.checkpointing.lighter} of the others"


def strategy_words(strategy: StrategyRecord) -> list[str]:
    """A strategy as a list of decisions, the defaults that say nothing left out."""
    words = [
        knob_words("precision", strategy.precision.value),
        f"micro-batch {strategy.micro_batch}",
        knob_words("attention", strategy.attention.value),
        knob_words("loss", strategy.loss.value),
        checkpointing_words(strategy),
        knob_words("packing", strategy.packing),
        knob_words("compile", strategy.compile),
    ]
    if strategy.zero:
        words.insert(1, f"ZeRO-{strategy.zero}")
    if strategy.offload != "none":
        words.append(knob_words("offload", strategy.offload.value))
    if strategy.optimizer != "adamw":
        words.append(strategy.optimizer.value)
    if strategy.allocator != "expandable":
        words.append(knob_words("allocator", strategy.allocator.value))
    return words

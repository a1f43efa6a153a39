"""Which few layers stand for all of a model's."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from sftplan.step.repeat import FEW_LAYERS, times_of

if TYPE_CHECKING:
    from collections.abc import Mapping

    from sftplan.facts.model import ModelShape
    from sftplan.facts.strategy import Strategy


@dataclass(frozen=True, slots=True)
class Few:
    """A model and its strategy with few layers; `times`: for how many a layer stands, where for several."""

    model: ModelShape
    strategy: Strategy
    times: Mapping[int, int]


def few_layers(model: ModelShape, strategy: Strategy, seq_len: int) -> Few:
    """The few layers that stand for all; all of them where layers differ in their ops."""
    if not _alike(model, seq_len):
        return Few(model, strategy, {})
    stretches = _stretches(model, strategy)
    shown = [min(layers, FEW_LAYERS) for layers in stretches]
    if sum(shown) == model.num_layers:
        return Few(model, strategy, {})
    return Few(
        model=replace(model, num_layers=sum(shown), layer_kinds=()),
        strategy=replace(strategy, checkpointed_layers=shown[0] if len(shown) > 1 else None),
        times=times_of(*stretches),
    )


def shallower(model: ModelShape, seq_len: int, num_layers: int) -> ModelShape:
    """The same with at most so many layers, or all where they differ."""
    if not _alike(model, seq_len) or model.num_layers <= num_layers:
        return model
    return replace(model, num_layers=num_layers, layer_kinds=())


def _stretches(model: ModelShape, strategy: Strategy) -> list[int]:
    """Layers in a row that forget the same."""
    checkpointed = strategy.checkpointed_layers
    if checkpointed is None:
        return [model.num_layers]
    return [checkpointed, model.num_layers - checkpointed]


def _alike(model: ModelShape, seq_len: int) -> bool:
    """Whether all layers do the same."""
    if model.dense_layers or (model.anatomy is not None and not model.anatomy.alike):
        return False
    window = model.sliding_window
    return not (model.layer_kinds and window is not None and seq_len > window)

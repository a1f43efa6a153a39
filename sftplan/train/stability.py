"""How steady a run is: gradient norm and its variance against response length, clipping, stops.

References:
    [ARTICLE] The analysis that sftplan starts from, §2.2: Var(∇L) ∝ T.
    [WELFORD] Welford 1962, "Note on a method for calculating corrected sums of squares".
    [WEST]    West 1979, "Updating mean and variance estimates", with decaying weights.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from sftplan.errors import TrainingFailedError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from sftplan.data.conversation import Place

PLACES_SHOWN = 20  # the rest is counted
DECAY = 0.98  # weight of a step fifty steps later: about a third
SPIKE_AFTER = 20  # steps before a spike can be told


@dataclass(slots=True)
class Decaying:
    """Mean and variance in which older values count less [WEST]."""

    count: int = 0
    mean: float = 0.0
    variance: float = 0.0

    def add(self, value: float) -> None:
        """Take one value in.

        >>> running = Decaying()
        >>> for value in (1.0, 3.0): running.add(value)
        >>> running.mean, running.variance  # the plain ones, as long as few values are there
        (2.0, 1.0)
        """
        self.count += 1
        weight = max(1 / self.count, 1 - DECAY)
        delta = value - self.mean
        self.mean += weight * delta
        self.variance = (1 - weight) * (self.variance + weight * delta * delta)


@dataclass(slots=True)
class Spread:
    """Mean and variance of all values [WELFORD]."""

    count: int = 0
    mean: float = 0.0
    squares: float = 0.0

    def add(self, value: float) -> None:
        """Take one value in."""
        self.count += 1
        delta = value - self.mean
        self.mean += delta / self.count
        self.squares += delta * (value - self.mean)


@dataclass(slots=True)
class Stability:
    """What is kept of all steps; part of every checkpoint."""

    norm: Decaying = field(default_factory=Decaying)
    loss: Decaying = field(default_factory=Decaying)
    by_length: dict[int, Spread] = field(default_factory=dict)  # least power of two above
    steps: int = 0
    clipped: int = 0
    skipped: int = 0

    def seen(
        self, *, loss: float, grad_norm: float, response_mean: float, clip_at: float, skipped: bool
    ) -> dict[str, float]:
        """Take note of a step; its figures for metrics.jsonl."""
        self.steps += 1
        self.skipped += skipped
        if not skipped:
            self.clipped += bool(clip_at and grad_norm > clip_at)
            self.norm.add(grad_norm)
            self.loss.add(loss)
            edge = 2 ** math.ceil(math.log2(max(response_mean, 1.0)))
            self.by_length.setdefault(edge, Spread()).add(grad_norm)
        return {
            "grad_norm_variance": self.norm.variance,
            "response_mean_tokens": response_mean,
            "clip_fraction": self.clipped / self.steps,
            "skipped_steps": self.skipped,
        }

    def is_spike(self, loss: float, threshold: float) -> bool:
        """Whether a loss lies more than `threshold` standard deviations above the recent mean."""
        if not threshold or self.loss.count < SPIKE_AFTER:
            return False
        return loss > self.loss.mean + threshold * math.sqrt(self.loss.variance)

    def grad_norm_by_response_length(self) -> list[dict[str, float]]:
        """Gradient norm against the mean response length of a step [ARTICLE] §2.2."""
        return [
            {
                "response_tokens_up_to": edge,
                "steps": spread.count,
                "grad_norm_mean": spread.mean,
                "grad_norm_variance": spread.squares / spread.count,
            }
            for edge, spread in sorted(self.by_length.items())
        ]

    def state(self) -> dict[str, Any]:
        """As JSON."""
        return asdict(self)

    @classmethod
    def of(cls, state: Mapping[str, Any]) -> Stability:
        """From what `state` returned."""
        return cls(
            norm=Decaying(**state["norm"]),
            loss=Decaying(**state["loss"]),
            by_length={int(k): Spread(**v) for k, v in state["by_length"].items()},
            steps=state["steps"],
            clipped=state["clipped"],
            skipped=state["skipped"],
        )


def stop(reason: str, *, step: int, places: Iterable[Place]) -> TrainingFailedError:
    """The error that ends a run, with the lines of the step's examples."""
    message = f"step {step}: {reason}; the weights are those before it. It trains on {name(places)}"
    hint = "look at these examples, lower --learning-rate, or --resume from the last checkpoint"
    return TrainingFailedError(message, hint)


def name(places: Iterable[Place]) -> str:
    """Files with their lines, the first ones spelled out.

    >>> from sftplan.data.conversation import Place
    >>> name([Place(file="a.jsonl", row=3, line=3), Place(file="a.jsonl", row=1, line=1)])
    'a.jsonl:1,3'
    """
    ordered = sorted(places, key=lambda place: (place.file, place.row))
    if not ordered:
        return "no example"
    files: dict[str, list[str]] = {}
    for place in ordered[:PLACES_SHOWN]:
        at = f"row {place.row}" if place.line is None else str(place.line)
        files.setdefault(place.file, []).append(at)
    text = "; ".join(f"{file}:{','.join(lines)}" for file, lines in files.items())
    more = Counter(place.file for place in ordered[PLACES_SHOWN:]).total()
    return f"{text} and {more:,} more" if more else text

"""What a run decides beside its plan: learning rate, order, what is written and when."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sftplan.errors import UsageError, did_you_mean

if TYPE_CHECKING:
    from collections.abc import Mapping


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """Names are those of the options of `launch`, with `_` for `-`."""

    learning_rate: float = 2e-5
    min_learning_rate: float = 0.0  # η_min, where the cosine ends
    warmup: float = 0.03  # share of the steps; whole numbers from 1 on are steps
    weight_decay: float = 0.01
    beta1: float = 0.9
    beta2: float = 0.999
    epsilon: float = 1e-8
    seed: int = 0
    train_on_prompt: bool = False
    eval_split: float = 0.0  # share of the examples held out
    eval_every: int = 0  # steps; 0: at checkpoints and at the end
    save_every: int = 500  # steps; 0: only at the end and when interrupted
    keep: int = 2  # checkpoints, beside the best one
    spike: float = 0.0  # stop at a loss of so many standard deviations above its mean; 0: off
    max_steps: int = 0  # stop early; the schedule stays that of the whole run. 0: off
    skip_bad: int = 0
    tokenizer: str | None = None
    random_weights: bool = False
    cpu: bool = False
    tracker: str | None = None
    nvme_path: str | None = None  # of `--offload nvme`

    def __post_init__(self) -> None:
        for name in ("learning_rate", "epsilon"):
            _check(name, getattr(self, name), above=0.0)
        for name in ("min_learning_rate", "warmup", "weight_decay", "spike"):
            _check(name, getattr(self, name), least=0.0)
        for name in ("beta1", "beta2", "eval_split"):
            _check(name, getattr(self, name), least=0.0, below=1.0)
        for name in ("eval_every", "save_every", "max_steps", "skip_bad"):
            _check(name, getattr(self, name), least=0)
        _check("keep", self.keep, least=1)
        if self.min_learning_rate > self.learning_rate:
            message = (
                f"--min-learning-rate {self.min_learning_rate:g} is above "
                f"--learning-rate {self.learning_rate:g}"
            )
            raise UsageError(message)

    def warmup_steps(self, num_steps: int) -> int:
        """Steps of linear warm-up.

        >>> Settings(warmup=0.03).warmup_steps(200), Settings(warmup=10).warmup_steps(200)
        (6, 10)
        """
        steps = int(self.warmup) if self.warmup >= 1 else round(self.warmup * num_steps)
        return min(steps, max(num_steps - 1, 0))


def settings_of(options: Mapping[str, Any]) -> Settings:
    """Settings from options; those that are None keep their defaults."""
    known = [field.name for field in dataclasses.fields(Settings)]
    for name in options:
        if name not in known:
            message = f"no option {name!r} of a run"
            raise UsageError(message, did_you_mean(name, known))
    return Settings(**{name: value for name, value in options.items() if value is not None})


def _check(
    name: str,
    value: float,
    *,
    least: float | None = None,
    above: float | None = None,
    below: float | None = None,
) -> None:
    bounds = []
    if least is not None and not value >= least:
        bounds.append(f"at least {least:g}")
    if above is not None and not value > above:
        bounds.append(f"above {above:g}")
    if below is not None and not value < below:
        bounds.append(f"below {below:g}")
    if bounds or value in (float("inf"), float("-inf")):
        message = (
            f"--{name.replace('_', '-')} {value:g} has to be {' and '.join(bounds) or 'finite'}"
        )
        raise UsageError(message)

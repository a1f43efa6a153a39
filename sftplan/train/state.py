"""What a run works with, and where it stands."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from sftplan.train.stability import Stability

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from sftplan.data.batches import Batches
    from sftplan.train.evaluate import Evaluation
    from sftplan.train.inputs import Layout
    from sftplan.train.metrics import Meter, MetricsFile
    from sftplan.train.progress import Progress
    from sftplan.train.schedule import Schedule
    from sftplan.train.settings import Settings
    from sftplan.train.step import Stepper


@dataclass(slots=True, kw_only=True)
class Run:
    """Everything a run works with, and where it stands."""

    stepper: Stepper
    batches: Batches
    layout: Layout
    schedule: Schedule
    settings: Settings
    checkpoints: Path
    metrics: MetricsFile | None  # of rank 0
    meter: Meter
    progress: Progress
    tracker: Any = None
    evaluation: Evaluation | None = None
    rank: int = 0
    identity: Mapping[str, Any] = field(default_factory=dict)
    stability: Stability = field(default_factory=Stability)
    done: int = 0  # steps
    tokens: int = 0
    best: tuple[float, int] | None = None  # evaluation loss and step
    last: dict[str, Any] = field(default_factory=dict)
    saved: int = 0  # step of the newest checkpoint

    @property
    def waits(self) -> bool:
        """Whether reading a step's numbers waits for a device that could be at the next step."""
        return self.stepper.device.type == "cuda"

    @property
    def last_step(self) -> int:
        """Where this run ends."""
        total = self.batches.num_steps
        return min(total, self.settings.max_steps) if self.settings.max_steps else total

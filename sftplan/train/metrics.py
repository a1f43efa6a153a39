"""What a run writes about itself: metrics.jsonl, one line per step, and run.json."""

from __future__ import annotations

import contextlib
import json
import math
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TextIO

import torch

from sftplan.errors import NotReadyError, TrainingFailedError, UsageError, did_you_mean
from sftplan.facts.strategy import Precision
from sftplan.plan.file import write_text
from sftplan.train.job import RUN

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from sftplan.plan.record import Plan

METRICS = "metrics.jsonl"


def peak_flops_per_s(plan: Plan) -> float | None:
    """The GPU's dense peak for the products of the plan's precision."""
    gpu = plan.inputs.hardware.gpu
    match plan.strategy.precision:
        case Precision.FP32:
            return gpu.fp32_flops_per_s
        case Precision.FP16_MIXED:
            return gpu.fp16_flops_per_s
        case _:
            return gpu.bf16_flops_per_s


@dataclass(slots=True)
class Meter:
    """Speed and memory of the steps. `flops_per_token` and the peak are None on a processor."""

    flops_per_token: float | None
    peak_flops_per_s: float | None
    predicted_reserved_bytes: int | None
    device: torch.device
    last: float = field(default_factory=time.perf_counter)
    first_step_s: float | None = None
    steps: int = 0
    warm_seconds: float = 0.0
    warm_tokens: int = 0

    def start(self) -> None:
        """Steps begin; peaks of what was done to get here do not count."""
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        self.restart()

    def restart(self) -> None:
        """What was done until now is not part of a step."""
        self.last = time.perf_counter()

    def seen(self, tokens: int) -> dict[str, Any]:
        """Figures of the step that has just ended."""
        now = time.perf_counter()
        seconds, self.last = max(now - self.last, 1e-9), now
        self.steps += 1
        if self.first_step_s is None:
            self.first_step_s = seconds
        elif self.steps > 2:  # the second still waits for what the first has left to do
            self.warm_seconds += seconds
            self.warm_tokens += tokens
        speed = tokens / seconds
        return {
            "step_s": seconds,
            "tokens_per_s": speed,
            "mfu_fraction": self.mfu(speed),
            "memory": self.memory(),
        }

    def mfu(self, tokens_per_s: float) -> float | None:
        """Share of the peak [PaLM, appendix B]; the plan's own count of FLOPs."""
        if self.flops_per_token is None or not self.peak_flops_per_s:
            return None
        return self.flops_per_token * tokens_per_s / self.peak_flops_per_s

    def memory(self) -> dict[str, int | None]:
        """Peaks of PyTorch's allocator, beside the prediction."""
        cuda = self.device.type == "cuda"
        return {
            "peak_allocated_bytes": torch.cuda.max_memory_allocated() if cuda else None,
            "peak_reserved_bytes": torch.cuda.max_memory_reserved() if cuda else None,
            "predicted_reserved_bytes": self.predicted_reserved_bytes if cuda else None,
        }

    def summary(self) -> dict[str, Any]:
        """The steady speed of the run, without its first two steps."""
        speed = self.warm_tokens / self.warm_seconds if self.warm_seconds else None
        return {
            "first_step_s": self.first_step_s,
            "tokens_per_s": speed,
            "mfu_fraction": None if speed is None else self.mfu(speed),
            "memory": self.memory(),
        }


class MetricsFile:
    """metrics.jsonl; on resuming, lines of steps that come again are taken out."""

    def __init__(self, folder: Path, *, done: int) -> None:
        self.path = folder / METRICS
        kept = []
        if self.path.exists() and done:
            for line in self.path.read_text(encoding="utf-8").splitlines():
                try:
                    if json.loads(line)["step"] <= done:
                        kept.append(line)
                except (ValueError, KeyError, TypeError):
                    continue  # a line that was being written when the process died
        write_text("".join(f"{line}\n" for line in kept), self.path)
        self._stream: TextIO | None = None  # opened by the first line

    def write(self, record: Mapping[str, Any]) -> None:
        """Append one line."""
        line = json.dumps(finite(record), ensure_ascii=False, allow_nan=False) + "\n"
        try:
            if self._stream is None:
                self._stream = self.path.open("a", encoding="utf-8")
            self._stream.write(line)
            self._stream.flush()
        except OSError as error:
            message = f"{self.path} cannot be written: {error.strerror or error}"
            raise TrainingFailedError(message, "make room and go on with --resume") from None

    def close(self) -> None:
        """No more lines."""
        if self._stream is not None:
            with contextlib.suppress(OSError):  # of a line that could not be written: said already
                self._stream.close()


def finite(value: Any) -> Any:
    """NaN and infinities as None: JSON has neither.

    >>> finite({"a": [1.0, float("nan")]})
    {'a': [1.0, None]}
    """
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def write_run(folder: Path, record: Mapping[str, Any]) -> None:
    """Replace run.json in one step."""
    text = json.dumps(finite(dict(record)), indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    write_text(text, folder / RUN)


def check_tracker(name: str) -> None:
    """Raise NotReadyError unless accelerate and the tracker are installed."""
    try:
        from accelerate import tracking
    except ImportError:
        message = "--tracker needs accelerate, which is not installed"
        raise NotReadyError(message, "`pip install 'sftplan[train]'`") from None
    known = sorted(tracking.LOGGER_TYPE_TO_CLASS)
    if name not in known:
        message = f"--tracker {name!r} is none that accelerate knows"
        raise UsageError(message, did_you_mean(name, known) or f"trackers: {', '.join(known)}")
    available = {kind.value: kind for kind in tracking.get_available_trackers()}
    if name not in available:
        message = f"--tracker {name} is not installed"
        installed = ", ".join(sorted(available)) or "none"
        raise NotReadyError(message, f"`pip install {name}`; installed: {installed}")


def start_tracker(name: str, folder: Path, config: Mapping[str, Any]) -> Any:
    """One of accelerate's trackers: tensorboard, wandb, trackio ..."""
    check_tracker(name)
    from accelerate import tracking

    kind = tracking.LOGGER_TYPE_TO_CLASS[name]
    where = {"logging_dir": str(folder)} if kind.requires_logging_directory else {}
    tracker = kind("sftplan", **where)
    tracker.start()
    tracker.store_init_configuration(dict(config))
    return tracker

"""The loop: steps in order, what is said and written of each, checkpoints, and when to stop.

The numbers of a step are read while the next one runs, so that the device never waits for us.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import distributed

from sftplan.train import stability
from sftplan.train.evaluate import evaluate
from sftplan.train.inputs import Ready, prefetched
from sftplan.train.interrupt import Asked, InterruptedRunError, deferred
from sftplan.train.saving import save
from sftplan.train.step import Reading, scaled_loss, train_step

if TYPE_CHECKING:
    from sftplan.train.state import Run


@dataclass(frozen=True, slots=True)
class _Pending:
    """A step that the device may still be at."""

    number: int  # from 1
    ready: Ready
    reading: Reading  # loss, norm of the gradient, skipped, ranks that want to stop
    learning_rate: float


def train(run: Run) -> None:
    """All steps that are left.

    Raises:
        TrainingFailedError: Loss or gradient is not finite, or the loss has a spike.
        InterruptedRunError: After a signal; the checkpoint is written.
    """
    if run.done >= run.last_step:
        return
    start = divmod(run.done, run.batches.steps_per_epoch)
    pending: deque[_Pending] = deque()
    source = prefetched(run.batches, run.layout, run.stepper.device, start=start, rank=run.rank)
    run.meter.start()
    with deferred() as asked:
        for ready in source:
            pending.append(_begin(run, ready, asked))
            if run.stepper.captured is not None:
                run.stepper.captured.explain(run.progress.say)
            alone = asked.by is not None and run.stepper.world_size == 1
            behind = 0 if alone or _is_due(run) or not run.waits else 1
            stopped = alone
            while len(pending) > behind:
                stopped |= _settle(run, pending.popleft())
            if stopped:
                while pending:
                    _settle(run, pending.popleft())
                _stop(run, asked)
            if _saves(run):
                save(run)
            if run.done >= run.last_step:
                break


def _begin(run: Run, ready: Ready, asked: Asked) -> _Pending:
    """Start a step; with several ranks they agree on stopping, on the device."""
    scale = run.stepper.scale
    rate = run.schedule(run.done - (0 if scale is None else scale.skipped))
    outcome = train_step(
        run.stepper, ready.inputs, num_targets=ready.step.num_targets, learning_rate=rate
    )
    stop = torch.full((), float(asked.by is not None), device=run.stepper.device)
    if run.stepper.world_size > 1:
        distributed.all_reduce(stop)
    run.done += 1
    reading = Reading(outcome.loss, outcome.grad_norm, outcome.skipped, stop)
    return _Pending(run.done, ready, reading, rate)


def _is_due(run: Run) -> bool:
    """Whether a checkpoint or an evaluation follows this step."""
    every, evaluations = run.settings.save_every, run.settings.eval_every
    due = bool(every) and run.done % every == 0
    return due or (bool(evaluations) and run.done % evaluations == 0) or run.done >= run.last_step


def _saves(run: Run) -> bool:
    """Whether a checkpoint follows this step; at the very end `final` is enough without a best."""
    if run.done >= run.last_step:
        return run.evaluation is not None or run.done < run.batches.num_steps
    return bool(run.settings.save_every) and run.done % run.settings.save_every == 0


def _settle(run: Run, pending: _Pending) -> bool:
    """Read a step's numbers, judge them, write them; whether the ranks have agreed to stop."""
    step = pending.ready.step
    loss, norm, skipped, stop = pending.reading.values()
    speed = run.meter.seen(step.num_tokens)
    _judge(run, pending, loss, norm, skipped=bool(skipped))
    run.tokens += step.num_tokens
    figures = run.stability.seen(
        loss=loss, grad_norm=norm, response_mean=step.num_targets / step.num_examples,
        clip_at=run.stepper.max_grad_norm, skipped=bool(skipped),
    )  # fmt: skip
    record = {
        "step": pending.number, "epoch": pending.number / run.batches.steps_per_epoch,
        "loss": loss, "learning_rate": pending.learning_rate, "grad_norm": norm,
        "tokens": step.num_tokens, "response_tokens": step.num_targets, "tokens_total": run.tokens,
        **speed, **figures,
    }  # fmt: skip
    if run.stepper.scale is not None:
        record["loss_scale"] = run.stepper.scale.value
    if pending.number == run.done and _evaluates(run):
        record |= _evaluated(run, pending.number)
    _write(run, record)
    return stop > 0


def _write(run: Run, record: dict[str, Any]) -> None:
    run.last = record
    if run.metrics is not None:
        run.metrics.write(record)
        run.progress.update(record)
    if run.tracker is not None:
        numbers = {k: v for k, v in record.items() if isinstance(v, int | float)}
        run.tracker.log(numbers, step=record["step"])


def _judge(run: Run, pending: _Pending, loss: float, norm: float, *, skipped: bool) -> None:
    """Stop where the numbers are no numbers, naming the lines that the step trained on."""
    scale = run.stepper.scale
    reason = None
    if skipped and (scale is None or scale.value < 1.0):
        reason = f"the loss is {loss:g}, the gradient's norm {norm:g}"
    elif not skipped and run.stability.is_spike(loss, run.settings.spike):
        reason = (
            f"the loss of {loss:.4f} is a spike: the recent mean is {run.stability.loss.mean:.4f}"
        )
    if reason is None:
        return
    passes = zip(pending.ready.step.micro_batches, pending.ready.inputs, strict=True)
    batches = [batch for batch, inputs in passes if not skipped or not _is_finite(run, inputs)]
    batches = batches or list(pending.ready.step.micro_batches)
    examples = run.batches.examples
    places = [examples[index].place for batch in batches for index in batch.examples]
    raise stability.stop(reason, step=pending.number, places=places)


def _is_finite(run: Run, inputs: Any) -> bool:
    run.stepper.release()
    with torch.no_grad():
        factor = torch.ones((), device=run.stepper.device)
        return bool(scaled_loss(run.stepper, inputs, factor).isfinite())


def _evaluates(run: Run) -> bool:
    every = run.settings.eval_every
    if run.evaluation is None or not _is_due(run):
        return False
    return not every or run.done % every == 0 or run.done >= run.last_step


def _evaluated(run: Run, step: int) -> dict[str, float]:
    """Losses on the held-out examples; keeps note of the best."""
    assert run.evaluation is not None
    run.stepper.release()
    found = evaluate(run.stepper, run.evaluation)
    run.meter.restart()
    if run.best is None or found["eval_loss"] < run.best[0]:
        run.best = (found["eval_loss"], step)
    return found


def _stop(run: Run, asked: Asked) -> None:
    if run.saved != run.done:
        save(run)
    message = (
        f"{asked.by or 'another rank'}: saved after step {run.done}, --resume goes on from there"
    )
    run.progress.say(message)
    raise InterruptedRunError(message)

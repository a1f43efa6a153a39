"""From a run to its checkpoint and back, to the same bits."""

from __future__ import annotations

from itertools import chain
from typing import TYPE_CHECKING, Any

import torch
from torch import distributed

from sftplan.train import checkpoint
from sftplan.train.stability import Stability

if TYPE_CHECKING:
    from pathlib import Path

    from sftplan.train.state import Run


def save(run: Run) -> None:
    """Write the checkpoint of where the run stands; rank 0 does, the others hand it their RNG."""
    randoms, update = _random_states(run), run.stepper.update
    streams = {"model": update.weights(), "optimizer": update.saved()}
    if run.rank > 0:
        for _ in chain(*streams.values()):
            """What is shared out is put together by all ranks."""
    else:
        scale = run.stepper.scale
        content = checkpoint.Content(
            tensors={"random.safetensors": randoms},
            streams=streams,
            streamed_bytes=update.saved_bytes(),
            state={
                "ranks": run.stepper.world_size,
                "identity": dict(run.identity),
                "tokens": run.tokens,
                "best": run.best,
                "scale": None if scale is None else [scale.value, scale.good_steps, scale.skipped],
                "stability": run.stability.state(),
            },
        )
        folder = checkpoint.save(run.checkpoints, run.done, content)
        best = None if run.best is None else run.best[1]
        if best == run.done:
            checkpoint.point(run.checkpoints / "best", folder)
        checkpoint.rotate(run.checkpoints, keep=run.settings.keep, best=best)
    run.saved = run.done
    if run.stepper.world_size > 1:
        distributed.barrier()
    run.meter.restart()


def _random_states(run: Run) -> dict[str, torch.Tensor]:
    """The state of every generator of every rank."""
    own = {"cpu": torch.get_rng_state()}
    if run.stepper.device.type == "cuda":
        own["cuda"] = torch.cuda.get_rng_state(run.stepper.device)
    if run.stepper.world_size == 1:
        return {f"0/{kind}": state for kind, state in own.items()}
    everyone: list[Any] = [None] * run.stepper.world_size
    distributed.all_gather_object(everyone, own)
    return {f"{rank}/{k}": v for rank, states in enumerate(everyone) for k, v in states.items()}


def restore(run: Run, folder: Path) -> None:
    """Stand where `save` stood."""
    content = checkpoint.load(folder)
    state = content.state
    checkpoint.check_same(state["identity"], run.identity)
    run.stepper.update.restore(
        content.tensors["model.safetensors"], content.tensors["optimizer.safetensors"]
    )
    if state["ranks"] == run.stepper.world_size:
        randoms = content.tensors["random.safetensors"]
        torch.set_rng_state(randoms[f"{run.rank}/cpu"])
        if run.stepper.device.type == "cuda":
            torch.cuda.set_rng_state(randoms[f"{run.rank}/cuda"], run.stepper.device)
    else:
        torch.manual_seed(run.settings.seed + 1 + run.rank + state["step"])
        run.progress.say(
            f"saved by {state['ranks']} ranks, going on with {run.stepper.world_size}: the same "
            "batches, other rounding and other random numbers"
        )
    run.done = run.saved = state["step"]
    run.tokens, run.stability = state["tokens"], Stability.of(state["stability"])
    run.best = None if state["best"] is None else (state["best"][0], state["best"][1])
    if run.stepper.scale is not None:
        scale = run.stepper.scale
        scale.value, scale.good_steps, scale.skipped = state["scale"]

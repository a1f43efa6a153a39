"""From a run to its checkpoint and back, to the same bits."""

from __future__ import annotations

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
    randoms = _random_states(run)
    if run.rank == 0:
        names = dict(run.stepper.model.named_parameters())
        scale = run.stepper.scale
        content = checkpoint.Content(
            tensors={
                "model.safetensors": {name: p.detach() for name, p in names.items()},
                "optimizer.safetensors": run.stepper.update.state(),
                "random.safetensors": randoms,
            },
            state={
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
    checkpoint.check_same(content.state["identity"], run.identity)
    with torch.no_grad():
        for name, parameter in run.stepper.model.named_parameters():
            parameter.copy_(content.tensors["model.safetensors"][name])
    run.stepper.update.load(content.tensors["optimizer.safetensors"])
    randoms = content.tensors["random.safetensors"]
    torch.set_rng_state(randoms[f"{run.rank}/cpu"])
    if run.stepper.device.type == "cuda":
        torch.cuda.set_rng_state(randoms[f"{run.rank}/cuda"], run.stepper.device)
    state = content.state
    run.done = run.saved = state["step"]
    run.tokens, run.stability = state["tokens"], Stability.of(state["stability"])
    run.best = None if state["best"] is None else (state["best"][0], state["best"][1])
    if run.stepper.scale is not None:
        scale = run.stepper.scale
        scale.value, scale.good_steps, scale.skipped = state["scale"]

"""What a run leaves: its figures, and the model with its tokenizer."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from sftplan.train import checkpoint
from sftplan.train.job import FINAL
from sftplan.train.model import config_of, without_bars

if TYPE_CHECKING:
    from pathlib import Path

    from sftplan.train.job import Job
    from sftplan.train.material import Material
    from sftplan.train.state import Run


def summary_of(run: Run, material: Material) -> dict[str, Any]:
    """The final figures, for run.json."""
    last = run.last
    return {
        "steps": run.done,
        "tokens": run.tokens,
        "loss": last.get("loss"),
        "eval_loss": last.get("eval_loss"),
        "eval_loss_all_tokens": last.get("eval_loss_all_tokens"),
        "best": None if run.best is None else {"eval_loss": run.best[0], "step": run.best[1]},
        "learning_rate": last.get("learning_rate"),
        "grad_norm_by_response_length": run.stability.grad_norm_by_response_length(),
        "clip_fraction": run.stability.clipped / max(run.stability.steps, 1),
        "skipped_steps": run.stability.skipped,
        "examples": len(run.batches.examples),
        "dropped_examples": len(material.prepared.fitted.dropped),
        "cut_examples": material.prepared.fitted.num_cut,
        "skipped_examples": len(material.prepared.skipped),
        **run.meter.summary(),
        "settings": asdict(run.settings),
        "identity": dict(run.identity),
    }


def write_final(job: Job, run: Run, material: Material) -> None:
    """The model with its own configuration and its tokenizer, as transformers loads them."""
    model, rank_0 = run.stepper.model, run.rank == 0
    gathered = run.stepper.update.gathered(keep=rank_0)
    if not rank_0:
        return
    original = config_of(material.shape, attention_dropout="model")
    original.use_cache = True
    for name in ("attn_pdrop", "attention_dropout"):
        if hasattr(original, name):
            setattr(model.config, name, getattr(original, name))
    model.config.use_cache = True

    def fill(folder: Path) -> None:
        with without_bars():
            model.save_pretrained(folder, state_dict=gathered)
        material.tokenizer.save(folder)

    needed = sum(tensor.nbytes for tensor in (gathered or dict(model.named_parameters())).values())
    checkpoint.write_folder(job.out / FINAL, fill, needed_bytes=needed)
    run.progress.say(f"the model is in {job.out / FINAL}")

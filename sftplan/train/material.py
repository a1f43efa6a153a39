"""What a run is made of, all of it checked before the GPU is touched: model, tokenizer, examples."""

from __future__ import annotations

import hashlib
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from sftplan.data.batches import Batches, Sharing, batches, split
from sftplan.data.cache import default_cache_folder
from sftplan.data.lengths import tokenizer_names
from sftplan.data.locate import find_tokenizer
from sftplan.data.prepare import Prepared, prepare
from sftplan.data.store import Selected, counts
from sftplan.data.tokenizer import BpeTokenizer
from sftplan.errors import DriftError, NotReadyError, UsageError
from sftplan.facts.strategy import Optimizer, Precision
from sftplan.plan.build import shape_sha256
from sftplan.plan.timeline import model_of
from sftplan.train.metrics import check_tracker
from sftplan.train.model import check_weights
from sftplan.train.nvme import check_nvme

if TYPE_CHECKING:
    from collections.abc import Sequence

    from sftplan.data.mask import Example
    from sftplan.facts.model import ModelShape
    from sftplan.plan.record import Plan
    from sftplan.train.job import Job


@dataclass(frozen=True, slots=True, kw_only=True)
class Material:
    """Checked and ready; `weights` is None for random ones."""

    shape: ModelShape
    weights: str | None
    tokenizer: BpeTokenizer
    prepared: Prepared
    training: Batches
    held_out: tuple[Batches, Batches] | None  # responses, all tokens


def check_supported(plan: Plan) -> None:
    """Refuse what cannot be run, naming what can."""
    strategy = plan.strategy
    if strategy.zero and strategy.optimizer is Optimizer.ADAMW_8BIT:
        message = f"--optimizer adamw-8bit cannot be sharded by --zero {strategy.zero}"
        raise UsageError(message, "`--optimizer adamw`, whose states are shared out, or `--zero 0`")
    if strategy.zero and strategy.precision is Precision.BF16_TRUE:
        message = f"--precision bf16-true has no ZeRO: DeepSpeed keeps fp32 states under --zero {strategy.zero}"
        raise UsageError(message, "`--precision bf16-master`, or `--zero 0`")
    if strategy.optimizer is Optimizer.ADAMW_8BIT and find_spec("bitsandbytes") is None:
        message = "--optimizer adamw-8bit needs bitsandbytes, which is not installed"
        raise NotReadyError(message, "`pip install bitsandbytes`, or `--optimizer adamw`")


def shape_of(plan: Plan) -> ModelShape:
    """The model of a plan, looked up again: it has to be the one that was planned for."""
    facts, shape = plan.inputs.model, model_of(plan)
    if shape_sha256(shape) != facts.shape_sha256:
        message = f"{facts.source}: {facts.name} is not the model that was planned for"
        raise DriftError(message, "plan again")
    return shape


def gather_material(job: Job, *, world_size: int) -> Material:
    """Model, tokenizer and examples of a job.

    Raises:
        UsageError: One of them cannot be used, or they do not match.
        DriftError: The model has changed since it was planned for.
    """
    check_supported(job.plan)
    settings, seq_len = job.settings, job.plan.inputs.workload.seq_len
    if settings.tracker is not None:
        check_tracker(settings.tracker)
    shape = shape_of(job.plan)
    check_nvme(job.plan, shape, settings.nvme_path)
    weights = check_weights(shape, random=settings.random_weights)
    tokenizer = find_tokenizer(*tokenizer_names(shape), folder=settings.tokenizer)
    if not isinstance(tokenizer, BpeTokenizer):
        message = f"no tokenizer of {shape.name} on this machine"
        raise UsageError(message, "--tokenizer DIR names a folder with one")
    prepared = prepare(
        job.data,
        tokenizer=tokenizer,
        seq_len=seq_len,
        skip_bad=settings.skip_bad,
        vocab_size=shape.vocab_size,
        model=shape.name,
        cache=default_cache_folder(),
    )
    training, held_out = _split(job, prepared, world_size)
    return Material(
        shape=shape,
        weights=weights,
        tokenizer=tokenizer,
        prepared=prepared,
        training=training,
        held_out=held_out,
    )


def _split(
    job: Job, prepared: Prepared, world_size: int
) -> tuple[Batches, tuple[Batches, Batches] | None]:
    """What is trained on, and what is held out."""
    settings, examples = job.settings, prepared.examples
    chosen, held_out = split(len(examples), fraction=settings.eval_split, seed=settings.seed)
    if not chosen or (settings.eval_split and not held_out):
        message = f"--eval-split {settings.eval_split:g} of {len(examples)} examples leaves none"
        raise UsageError(message)
    training = _batches(Selected(examples, chosen), job, world_size)
    if not held_out:
        return training, None
    return training, _evaluation(Selected(examples, held_out), job, world_size, training.row_len)


def _batches(examples: Sequence[Example], job: Job, world_size: int, **changes: Any) -> Batches:
    strategy, settings = job.plan.strategy, job.settings
    options: dict[str, Any] = {
        "seq_len": job.plan.inputs.workload.seq_len,
        "sharing": Sharing(
            micro_batch=strategy.micro_batch,
            accumulation=strategy.accumulation,
            world_size=world_size,
        ),
        "packing": strategy.packing,
        "epochs": job.plan.inputs.workload.epochs,
        "seed": settings.seed,
        "train_on_prompt": settings.train_on_prompt,
    }
    return batches(examples, **(options | changes))


def _evaluation(
    examples: Sequence[Example], job: Job, world_size: int, row_len: int
) -> tuple[Batches, Batches]:
    """The held-out rows, with the responses' targets and with all; no longer than training's."""
    longest = max(counts(examples)[0])
    if not job.plan.strategy.packing:
        row_len = max(row_len, longest)
    sharing = Sharing(micro_batch=job.plan.strategy.micro_batch, world_size=world_size)
    both = [
        _batches(
            examples, job, world_size, sharing=sharing, epochs=1.0, row_len=row_len,
            train_on_prompt=everything,
        )
        for everything in (False, True)
    ]  # fmt: skip
    return both[0], both[1]


def identity_of(job: Job, material: Material, *, kernel: str) -> dict[str, Any]:
    """What decides on the numbers of a run: a checkpoint goes on only where all of it is the same."""
    strategy = asdict(job.plan.strategy)
    if strategy["checkpointed_layers"] is not None:
        strategy["checkpointing"] += f" of {strategy['checkpointed_layers']} layers"
    same = ("precision", "loss", "checkpointing", "packing", "compile", "optimizer",
            "attention_dropout", "max_grad_norm")  # fmt: skip
    free = (
        "eval_every",
        "save_every",
        "keep",
        "spike",
        "max_steps",
        "tokenizer",
        "tracker",
        "skip_bad",
        "nvme_path",
    )
    settings = {k: v for k, v in asdict(job.settings).items() if k not in free}
    digest = hashlib.sha256()
    for example in material.training.examples:
        digest.update(example.input_ids.tobytes())
        digest.update(example.trained)
    return {
        "model": job.plan.inputs.model.shape_sha256,
        "data": digest.hexdigest(),
        "examples": len(material.training.examples),
        "steps": material.training.num_steps,
        "rows per step": material.training.sharing.rows_per_step,
        "attention": kernel,
        **{name.replace("_", " "): str(strategy[name]) for name in same},
        **settings,
    }

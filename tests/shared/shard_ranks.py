"""`python shard_ranks.py FOLDER`: all cases on two ranks, on one and on four, forked from one process."""

# ruff: noqa: TID253
from __future__ import annotations

import json
import os
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from shard_cases import (
    CASES,
    EXAMPLES,
    OVERFLOWS,
    ROWS_PER_STEP,
    SAVED_AFTER,
    SEQ_LEN,
    SETTINGS,
    SINGLE,
    SMALL_BUCKET,
    STEPS,
    TIED,
    UNTIED,
    Case,
)
from tiny_step import CPU, PACKED, examples
from torch import distributed

from sftplan.data.batches import Batches, Sharing, batches
from sftplan.facts.strategy import Optimizer, Strategy
from sftplan.plan.build import strategy_record
from sftplan.plan.launch import deepspeed_settings
from sftplan.train import checkpoint, summing
from sftplan.train.compiled import prepare_blocks
from sftplan.train.evaluate import Evaluation, evaluate
from sftplan.train.inputs import to_device
from sftplan.train.model import build_model, place_to_build
from sftplan.train.packing_check import check_packing
from sftplan.train.sharded import ShardedUpdate
from sftplan.train.step import LossScale, Stepper, train_step
from sftplan.train.update import Update

# -- in the ranks ---------------------------------------------------------------------------------


@dataclass(slots=True, kw_only=True)
class Rank:
    """One process of one group; what it finds goes into `found`."""

    rank: int
    world_size: int
    folder: Path
    found: dict[str, Any] = field(default_factory=dict)

    def run(self) -> None:
        """All cases of this number of ranks."""
        torch.set_num_threads(1)
        pytest.MonkeyPatch().setattr(summing, "SUM_BUCKET_ELEMENTS", SMALL_BUCKET)
        if self.world_size > 1:
            group = f"file://{self.folder}/group-{self.world_size}"
            distributed.init_process_group(
                "gloo", init_method=group, rank=self.rank, world_size=self.world_size
            )
        for name, case in (SINGLE if self.world_size == 1 else CASES).items():
            self.found[name] = self.trained(name, case)
        if self.world_size > 1:
            self.found["overflow"] = {
                str(stage): self.overflowed(case) for stage, case in OVERFLOWS.items()
            }
            self.found["summed"] = self.summed()
        if self.world_size != 2:  # from what two ranks have saved
            for name, zero in (("0", 3), ("3", 1), ("2 bf16", 3), ("3 all", 0)):
                stage = zero if self.world_size > 1 else 0
                self.found[f"from {name}"] = self.taken_over(name, stage)
        path = self.folder / f"found-{self.world_size}-{self.rank}.json"
        path.write_text(json.dumps(self.found))
        if self.world_size > 1:
            distributed.barrier()
            distributed.destroy_process_group()

    def stepper(self, case: Case, *, seed: int = 0) -> Stepper:
        """The model and its optimizer, as `sftplan.train.session` makes them."""
        config = TIED if case.tied else UNTIED
        model = build_model(
            config, precision=case.precision, attention="sdpa", seed=seed,
            device=place_to_build(case.zero, CPU, self.world_size),
        )  # fmt: skip
        prepare_blocks(
            model, checkpointing=case.checkpointing, checkpointed_layers=case.checkpointed_layers,
            compiled=False,
        )  # fmt: skip
        return Stepper(
            model=model, update=self.update(model, case), precision=case.precision, loss=case.loss,
            max_grad_norm=1.0, device=CPU, world_size=self.world_size,
            scale=None if case.scale is None else LossScale(value=case.scale),
        )  # fmt: skip

    def update(self, model: Any, case: Case) -> Update | ShardedUpdate:
        """With the settings that a plan of this case holds, but small buckets."""
        if not case.zero:
            return Update(
                model, precision=case.precision, kind=Optimizer.ADAMW, settings=SETTINGS,
                world_size=self.world_size,
            )  # fmt: skip
        strategy = Strategy(
            zero=case.zero, offload=case.offload, precision=case.precision, micro_batch=1,
            accumulation=ROWS_PER_STEP // self.world_size,
        )  # fmt: skip
        planned: dict[str, Any] = deepspeed_settings(strategy, self.world_size)
        planned["zero_optimization"] |= {"reduce_bucket_size": SMALL_BUCKET}
        if case.zero == 3:
            planned["zero_optimization"] |= {"stage3_param_persistence_threshold": 100}
        return ShardedUpdate(
            model, strategy=strategy_record(strategy, []), planned=planned, settings=SETTINGS,
            device=CPU, world_size=self.world_size,
        )  # fmt: skip

    def source(self) -> Batches:
        """Packed rows, whose numbers of targets differ from pass to pass and from rank to rank."""
        accumulation = ROWS_PER_STEP // self.world_size
        sharing = Sharing(micro_batch=1, accumulation=accumulation, world_size=self.world_size)
        return batches(
            examples(EXAMPLES), seq_len=SEQ_LEN, sharing=sharing, packing=True, epochs=STEPS * 1.0
        )

    def steps(self, stepper: Stepper, *, start: int = 0) -> list[list[float]]:
        """Loss, norm, skipped, and this rank's and all targets, of each step."""
        found = []
        source = self.source()
        for number in range(start, STEPS):
            step = source.step(*divmod(number, source.steps_per_epoch), rank=self.rank)
            passes = [to_device(batch, PACKED, CPU) for batch in step.micro_batches]
            out = train_step(
                stepper, passes, num_targets=step.num_targets, learning_rate=1e-2 / (1 + number)
            )
            own = sum(batch.num_targets for batch in step.micro_batches)
            numbers = [float(x) for x in (out.loss, out.grad_norm, out.skipped)]
            found.append([*numbers, own, step.num_targets])
            if number + 1 == SAVED_AFTER and start == 0:
                self.save(stepper, "half")
        return found

    def save(self, stepper: Stepper, name: str) -> None:
        """A checkpoint, as `sftplan.train.saving` writes it."""
        update = stepper.update
        streams = {"model": update.weights(), "optimizer": update.saved()}
        if self.rank:
            for stream in streams.values():
                list(stream)
            return
        content = checkpoint.Content(
            tensors={}, streams=streams, streamed_bytes=update.saved_bytes(), state={}
        )
        checkpoint.save(self.folder / f"{self.world_size} {name}", 0, content)

    def restore(self, stepper: Stepper, path: Path) -> None:
        """Stand where that checkpoint was taken."""
        if self.world_size > 1:
            distributed.barrier()
        tensors = checkpoint.load(path).tensors
        stepper.update.restore(tensors["model.safetensors"], tensors["optimizer.safetensors"])

    def trained(self, name: str, case: Case) -> dict[str, Any]:
        """All steps, perhaps again from the middle; what is left at the end goes into files."""
        stepper = self.stepper(case)
        found: dict[str, Any] = {"steps": self.steps(stepper)}
        found["evaluation"] = self.evaluated(stepper)
        if case.tied:
            model = stepper.model
            found["tied"] = model.lm_head.weight is model.transformer.wte.weight
        found["parameters"] = len(stepper.update.parameters)
        self.save(stepper, f"{name} end")
        half = self.folder / f"{self.world_size} half"
        if self.rank == 0:
            half.rename(half.with_name(f"{self.world_size} {name} half"))
        self.keep_final(stepper, name)
        if case.resumes:
            again = self.stepper(case, seed=1)
            self.restore(again, half.with_name(f"{self.world_size} {name} half") / "step-0")
            found["again"] = self.steps(again, start=SAVED_AFTER)
            self.save(again, f"{name} again")
        return found

    def keep_final(self, stepper: Stepper, name: str) -> None:
        """The model's folder, as `sftplan.train.session` writes it."""
        gathered = stepper.update.gathered(keep=self.rank == 0)
        if self.rank == 0:
            folder = self.folder / f"{self.world_size} {name} final"
            stepper.model.save_pretrained(folder, state_dict=gathered)

    def evaluated(self, stepper: Stepper) -> list[float]:
        """Losses on rows that are shared out too; packed documents do not see each other."""
        rows = [
            batches(
                examples(EXAMPLES, seed=1), seq_len=SEQ_LEN, packing=True, train_on_prompt=everything,
                sharing=Sharing(micro_batch=1, world_size=self.world_size),
            )
            for everything in (False, True)
        ]  # fmt: skip
        evaluation = Evaluation(
            responses=rows[0], all_tokens=rows[1], layout=PACKED, rank=self.rank
        )
        batch = rows[0].step(0, 0, rank=self.rank).micro_batches[0]
        assert check_packing(stepper, batch, to_device(batch, PACKED, CPU)) is not None
        found = evaluate(stepper, evaluation)
        return [found["eval_loss"], found["eval_loss_all_tokens"]]

    def overflowed(self, case: Case) -> dict[str, Any]:
        """Steps under a loss scale that no gradient survives: the weights stay."""
        stepper = self.stepper(case)
        before = [weight.clone() for _, weight in stepper.update.weights()]
        steps = self.steps(stepper)
        after = [weight.clone() for _, weight in stepper.update.weights()]
        assert stepper.scale is not None
        return {
            "skipped": [step[2] for step in steps],
            "scale": stepper.scale.value,
            "same": all(torch.equal(a, b) for a, b in zip(before, after, strict=True)),
        }

    def summed(self) -> dict[str, Any]:
        """Gradients of weights that each rank uses in an order of its own, one of them on the first rank alone."""
        weights = [torch.nn.Parameter(torch.ones(SMALL_BUCKET)) for _ in range(4)]
        gradients = summing.SummedGradients(weights)
        sent: list[int] = []
        first: Any = weights[0]
        first.register_post_accumulate_grad_hook(lambda _: sent.append(gradients._sent))
        at = self.rank % 2  # the last one used has its gradient first
        used = [weights[n] for n in ([0, 3, 1], [3, 1, 0])[at] + ([] if self.rank else [2])]
        found = []
        for _ in range(2):
            for times in (1, 2):  # a pass that is accumulated, and the last one
                if times == 2:
                    gradients.begin()
                total: Any = torch.stack([weight.sum() for weight in used]).sum()
                (times * (self.rank + 1) * total).backward()
            gradients.finish()
            found.append([float(torch.as_tensor(weight.grad).mean()) for weight in weights])
            for weight in weights:
                weight.grad = None
        return {"means": found, "sent": sent}

    def taken_over(self, name: str, zero: int) -> list[list[float]]:
        """The second half of a run whose first half other ranks made, on another stage."""
        case = Case(zero=zero, precision=CASES[name].precision)
        stepper = self.stepper(case, seed=1)
        self.restore(stepper, self.folder / f"2 {name} half" / "step-0")
        return self.steps(stepper, start=SAVED_AFTER)


def main(folder: Path) -> int:
    """Fork the ranks of each group, two ranks first: others go on from what they saved."""
    from sftplan.train.engine import load_deepspeed

    load_deepspeed(CPU)
    for world_size in (2, 1, 4):
        children = []
        for rank in range(world_size):
            child = os.fork()
            if child == 0:
                Rank(rank=rank, world_size=world_size, folder=folder).run()
                sys.stdout.flush()
                os._exit(0)
            children.append(child)
        codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
        if any(codes):
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))

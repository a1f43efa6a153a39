"""ZeRO and offload against one process: the same losses, norms and weights on every stage.

The ranks are processes of their own, forked from one that has imported everything; each number of
ranks runs all of its cases in one process group. What they found is compared here.
"""

# ruff: noqa: TID253
from __future__ import annotations

import json
import os
import subprocess
import sys
from array import array
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import distributed

from sftplan.data.batches import Batches, Sharing, batches
from sftplan.data.conversation import Place
from sftplan.data.mask import Example
from sftplan.facts.strategy import Checkpointing, Loss, Offload, Optimizer, Precision, Strategy
from sftplan.plan.build import strategy_record
from sftplan.plan.launch import deepspeed_settings
from sftplan.train import checkpoint, summing
from sftplan.train.compiled import prepare_blocks
from sftplan.train.evaluate import Evaluation, evaluate
from sftplan.train.inputs import Layout, to_device
from sftplan.train.model import build_model, place_to_build
from sftplan.train.packing_check import check_packing
from sftplan.train.settings import Settings
from sftplan.train.sharded import ShardedUpdate
from sftplan.train.step import LossScale, Stepper, train_step
from sftplan.train.update import Update

if TYPE_CHECKING:
    from collections.abc import Iterable

pytestmark = pytest.mark.xdist_group("shard")  # the groups of ranks are run once, in one worker
STEPS, SAVED_AFTER = 8, 4
ROWS_PER_STEP = 8  # of one row per pass: what ranks there are share them out
SEQ_LEN, VOCAB = 32, 99
SMALL_BUCKET = 20_000  # elements: a step fills it several times, and the embedding is larger
CPU, PACKED = torch.device("cpu"), Layout(flat=False, packed=True)
SETTINGS = Settings(learning_rate=1e-2, weight_decay=0.1, epsilon=1e-5)
TIED = transformers.GPT2Config(
    n_layer=2, n_embd=32, n_head=2, vocab_size=1000, n_positions=64, bos_token_id=0,
    eos_token_id=0, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
)  # fmt: skip
UNTIED = transformers.LlamaConfig(
    hidden_size=36, intermediate_size=50, num_hidden_layers=2, num_attention_heads=3,
    num_key_value_heads=1, vocab_size=VOCAB, max_position_embeddings=64,
)  # fmt: skip  # sizes that two and four ranks do not divide


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One way to train; `like` names the single process that has to find the same."""

    zero: int = 0
    offload: Offload = Offload.NONE
    tied: bool = True
    precision: Precision = Precision.FP32
    loss: Loss = Loss.RESPONSE
    checkpointing: Checkpointing = Checkpointing.NONE
    scale: float | None = None
    resumes: bool = False
    like: str = "tied"


SINGLE = {
    "tied": Case(),
    "untied": Case(tied=False),
    "bf16": Case(precision=Precision.BF16_MASTER),
    "fp16": Case(precision=Precision.FP16_MIXED, scale=2.0**12),
}
CASES = {
    "0": Case(resumes=True),
    "1": Case(zero=1, resumes=True),
    "2": Case(zero=2, resumes=True),
    "3": Case(zero=3, resumes=True),
    "1 optimizer": Case(zero=1, offload=Offload.OPTIMIZER),
    "2 optimizer": Case(zero=2, offload=Offload.OPTIMIZER, resumes=True),
    "3 optimizer": Case(zero=3, offload=Offload.OPTIMIZER),
    "3 all": Case(zero=3, offload=Offload.ALL, resumes=True),
    "1 untied": Case(zero=1, tied=False, like="untied"),
    "2 untied chunked": Case(zero=2, tied=False, loss=Loss.CHUNKED, like="untied"),
    "3 untied chunked checkpointed": Case(
        zero=3, tied=False, loss=Loss.CHUNKED, checkpointing=Checkpointing.FULL, like="untied",
        resumes=True,
    ),
    "3 all untied full": Case(
        zero=3, offload=Offload.ALL, tied=False, loss=Loss.FULL, like="untied"
    ),
    "2 bf16": Case(zero=2, precision=Precision.BF16_MASTER, like="bf16", resumes=True),
    "3 bf16": Case(zero=3, precision=Precision.BF16_MASTER, like="bf16", resumes=True),
    "2 fp16": Case(zero=2, precision=Precision.FP16_MIXED, scale=2.0**12, like="fp16"),
}  # fmt: skip
EXACT = [name for name, case in CASES.items() if case.precision is Precision.FP32]
OVERFLOWS = {
    stage: Case(zero=stage, precision=Precision.FP16_MIXED, scale=2.0**60, like="fp16")
    for stage in (1, 3)
}


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
        prepare_blocks(model, checkpointing=case.checkpointing, compiled=False)
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
            examples(), seq_len=SEQ_LEN, sharing=sharing, packing=True, epochs=STEPS * 1.0
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
                examples(seed=1), seq_len=SEQ_LEN, packing=True, train_on_prompt=everything,
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


def examples(count: int = 44, seed: int = 0) -> list[Example]:
    """Prompts and answers of unequal lengths."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for number in range(count):
        prompt, answer = torch.randint(2, 12, (2,), generator=generator).tolist()
        ids = torch.randint(1, VOCAB, (prompt + answer,), generator=generator).tolist()
        place = Place(file="a.jsonl", row=number + 1, line=number + 1)
        trained = bytes(prompt) + b"\1" * answer
        found.append(Example(input_ids=array("i", ids), trained=trained, place=place))
    return found


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


# -- what they found ------------------------------------------------------------------------------

Found = dict[int, list[dict[str, Any]]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the ranks of all groups have left what they found."""
    path = tmp_path_factory.mktemp("shards")
    environment = os.environ | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    with (path / "log").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, __file__, str(path)], env=environment, stdout=log, stderr=log,
            start_new_session=True,
        )  # fmt: skip
        try:
            code = process.wait(480)  # 170 s alone on two cores, more beside other tests
        finally:
            if process.poll() is None:
                os.killpg(process.pid, 9)
    assert code == 0, (path / "log").read_text()[-4000:]
    return path


@pytest.fixture(scope="module")
def found(folder: Path) -> Found:
    """By number of ranks, of each rank."""
    return {
        ranks: [
            json.loads((folder / f"found-{ranks}-{rank}.json").read_text()) for rank in range(ranks)
        ]
        for ranks in (1, 2, 4)
    }


def column(steps: Iterable[list[float]], at: int) -> list[float]:
    """One number of each step."""
    return [step[at] for step in steps]


def test_the_targets_of_the_ranks_differ(found: Found) -> None:
    """Or a mean over ranks would do as well as the mean over targets."""
    for ranks in (2, 4):
        own = [column(rank["3"]["steps"], 3) for rank in found[ranks]]
        totals = column(found[1][0]["tied"]["steps"], 4)

        assert [sum(each) for each in zip(*own, strict=True)] == totals
        assert all(len(set(each)) > 1 for each in zip(*own, strict=True))


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("name", EXACT)
def test_every_stage_finds_the_loss_of_one_process(found: Found, name: str, ranks: int) -> None:
    single = found[1][0][CASES[name].like]
    for rank in found[ranks]:
        steps = rank[name]["steps"]
        for at in (0, 1):
            expected = column(single["steps"], at)

            assert column(steps, at) == pytest.approx(expected, abs=5e-6, rel=0)
        assert len(steps) == STEPS
        assert not any(column(steps, 2))
        assert rank[name]["evaluation"] == pytest.approx(single["evaluation"], abs=5e-6, rel=0)
        assert rank[name]["parameters"] == single["parameters"]
        assert rank[name].get("tied") == single.get("tied")
    assert single.get("tied", True)


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("name", [name for name in CASES if name not in EXACT])
def test_low_precision_is_close(found: Found, name: str, ranks: int) -> None:
    steps, single = found[ranks][0][name]["steps"], found[1][0][CASES[name].like]["steps"]

    assert column(steps, 0) == pytest.approx(column(single, 0), abs=0.02, rel=0)
    assert column(steps, 1) == pytest.approx(column(single, 1), rel=0.05)
    assert not any(column(steps, 2))


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("name", EXACT)
def test_the_final_model_is_that_of_one_process(folder: Path, name: str, ranks: int) -> None:
    mine = load_file(folder / f"{ranks} {name} final" / "model.safetensors")
    theirs = load_file(folder / f"1 {CASES[name].like} final" / "model.safetensors")

    assert mine.keys() == theirs.keys()
    for key, weight in mine.items():
        torch.testing.assert_close(weight, theirs[key], rtol=1e-3, atol=2e-5)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder / f"{ranks} {name} final")
    head = model.get_output_embeddings().weight
    assert (head is model.get_input_embeddings().weight) is CASES[name].tied


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.resumes])
def test_a_sharded_run_resumes_to_the_same_bits(
    found: Found, folder: Path, name: str, ranks: int
) -> None:
    for rank in found[ranks]:
        assert rank[name]["again"] == rank[name]["steps"][SAVED_AFTER:]
    for file in ("model.safetensors", "optimizer.safetensors"):
        ends = [folder / f"{ranks} {name} {end}" / "step-0" / file for end in ("end", "again")]
        whole, again = (load_file(path) for path in ends)

        assert whole.keys() == again.keys()
        assert all(torch.equal(tensor, again[key]) for key, tensor in whole.items())


@pytest.mark.parametrize("ranks", [1, 4])
@pytest.mark.parametrize("name", ["0", "3", "3 all", "2 bf16"])
def test_other_ranks_and_stages_go_on(found: Found, name: str, ranks: int) -> None:
    """What two ranks saved half-way, with one process or four, on a stage of their own."""
    whole = found[2][0][name]["steps"][SAVED_AFTER:]
    close = 5e-6 if name in EXACT else 0.02
    for rank in found[ranks]:
        assert column(rank[f"from {name}"], 0) == pytest.approx(column(whole, 0), abs=close, rel=0)


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("stage", ["1", "3"])
def test_an_overflow_leaves_the_weights(found: Found, stage: str, ranks: int) -> None:
    for rank in found[ranks]:
        overflow = rank["overflow"][stage]

        assert overflow["skipped"] == [1.0] * STEPS
        assert overflow["scale"] == 2.0 ** (60 - STEPS)
        assert overflow["same"]


@pytest.mark.parametrize("ranks", [2, 4])
def test_gradients_are_summed_whichever_rank_has_which(found: Found, ranks: int) -> None:
    """Three times what one pass gives: the pass before is in it, that of the step before is not."""
    all_of_them = 3.0 * sum(range(1, ranks + 1))
    for rank in found[ranks]:
        assert rank["summed"]["means"] == [[all_of_them, all_of_them, 3.0, all_of_them]] * 2


def test_buckets_leave_while_the_backward_pass_goes_on(found: Found) -> None:
    """The first bucket, of the last weight, has gone when the first weight's gradient comes."""
    assert any(sent for rank in found[2] for sent in rank["summed"]["sent"])


def test_a_file_is_no_larger_than_it_has_to_be(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tensors that come one after the other lie in several files and are read as one."""
    monkeypatch.setattr(checkpoint, "FILE_BYTES", 100)
    tensors = {f"w{number}": torch.full((16,), float(number)) for number in range(5)}
    content = checkpoint.Content(
        tensors={}, streams={"model": iter(tensors.items())}, streamed_bytes=320, state={}
    )
    folder = checkpoint.save(tmp_path, 1, content)
    stored = checkpoint.load(folder).tensors["model.safetensors"]

    assert sorted(path.name for path in folder.glob("*.safetensors")) == [
        "model-2.safetensors",
        "model-3.safetensors",
        "model.safetensors",
    ]
    assert set(stored) == set(tensors)
    assert all(torch.equal(stored[name], tensor) for name, tensor in tensors.items())


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))

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
from typing import TYPE_CHECKING, Any

import pytest
import torch
import transformers
from safetensors.torch import load_file

from sftplan.train import checkpoint

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

import shard_ranks
from shard_cases import (
    CASES,
    EXACT,
    SAVED_AFTER,
    STEPS,
)

pytestmark = pytest.mark.xdist_group("shard")  # the groups of ranks are run once, in one worker


# -- what they found ------------------------------------------------------------------------------

Found = dict[int, list[dict[str, Any]]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the ranks of all groups have left what they found."""
    path = tmp_path_factory.mktemp("shards")
    environment = os.environ | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    with (path / "log").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, shard_ranks.__file__, str(path)], env=environment, stdout=log, stderr=log,
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

"""`launch` on data in every layout: the same examples train the same model; bad ones are refused."""

# ruff: noqa: TID253
from __future__ import annotations

import csv
import json
from typing import TYPE_CHECKING, Any

import pytest
import torch

from sftplan.cli.main import run as command
from sftplan.data.demo import DEMO_FILE
from sftplan.errors import ExitCode
from sftplan.train.demo import write_demo_model

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

KNOBS = [
    "--precision=fp32", "--zero=0", "--offload=none", "--checkpointing=none", "--attention=sdpa",
    "--loss=response", "--packing", "--no-compile", "--micro-batch=2", "--accumulation=1",
    "--hardware=h200-sxm", "--gpus=1",
]  # fmt: skip
RUN = ("--cpu", "--random-weights", "-q", "--max-steps", "3", "--warmup", "0", "--save-every", "0")
SAME = ("loss", "grad_norm", "tokens", "response_tokens")


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Sums depend on how many threads share them."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    write_demo_model(folder)
    return folder


def launch(model: Path, data: Path, out: Path, *more: str, seq: str = "256") -> int:
    length = ("--seq", seq) if seq else ()
    source = ("--model", str(model), "--data", str(data), "--out", str(out))
    return command(["launch", *source, *length, *KNOBS, *RUN, *more])


def numbers(out: Path) -> list[tuple[Any, ...]]:
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [tuple(line[key] for key in SAME) for line in lines]


def records() -> list[dict[str, Any]]:
    """Forty examples of the demo set, as instruction and output."""
    found = []
    for line in DEMO_FILE.read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        if set(record) <= {"instruction", "input", "output"}:
            found.append({key: record.get(key, "") for key in ("instruction", "input", "output")})
    assert len(found) >= 40
    return found[:40]


def asked(record: dict[str, Any]) -> str:
    parts = [record["instruction"], record["input"]]
    return "\n\n".join(part for part in parts if part)


def said(user: str, answer: str, names: tuple[str, str, str, str]) -> list[dict[str, str]]:
    who, what, first, second = names
    return [{who: first, what: user}, {who: second, what: answer}]


def lines_of(items: list[Any]) -> str:
    return "".join(json.dumps(item) + "\n" for item in items)


def write_as(kind: str, folder: Path) -> Path:
    """The forty examples in one of the layouts and formats."""
    items = records()
    chat = ("role", "content", "user", "assistant")
    share = ("from", "value", "human", "gpt")
    file = folder / f"data.{kind}"
    match kind:
        case "json":
            file.write_text(json.dumps(items))
        case "jsonl":
            file.write_text(lines_of(items))
        case "csv":
            with file.open("w", newline="") as stream:
                writer = csv.DictWriter(stream, list(items[0]))
                writer.writeheader()
                writer.writerows(items)
        case "parquet":
            pyarrow = pytest.importorskip("pyarrow")
            parquet = pytest.importorskip("pyarrow.parquet")
            parquet.write_table(pyarrow.Table.from_pylist(items), file)
        case "messages":
            file = folder / "data.jsonl"
            file.write_text(
                lines_of([{"messages": said(asked(i), i["output"], chat)} for i in items])
            )
        case "sharegpt":
            file = folder / "data.jsonl"
            file.write_text(
                lines_of([{"conversations": said(asked(i), i["output"], share)} for i in items])
            )
        case _:
            (folder / "a.jsonl").write_text(lines_of(items[:15]))
            (folder / "b").mkdir()
            (folder / "b" / "c.json").write_text(json.dumps(items[15:]))
            return folder
    return file


@pytest.fixture(scope="module")
def expected(model: Path, tmp_path_factory: pytest.TempPathFactory) -> list[tuple[Any, ...]]:
    folder = tmp_path_factory.mktemp("expected")
    assert launch(model, write_as("jsonl", folder), folder / "run") == ExitCode.OK
    return numbers(folder / "run")


@pytest.mark.parametrize("kind", ["json", "csv", "parquet", "messages", "sharegpt", "folder"])
def test_the_same_examples_train_alike_in_every_layout(
    kind: str, model: Path, expected: list[tuple[Any, ...]], tmp_path: Path
) -> None:
    (tmp_path / "in").mkdir()
    data = write_as(kind, tmp_path / "in")
    assert launch(model, data, tmp_path / "run") == ExitCode.OK
    assert len(expected) == 3
    assert numbers(tmp_path / "run") == expected


def test_without_a_length_the_longest_example_is_held(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "data.jsonl"
    data.write_text(lines_of([{"prompt": "a" * 70, "completion": "7"}, records()[0]]))
    assert launch(model, data, tmp_path / "run", seq="") == ExitCode.OK
    plan = json.loads((tmp_path / "run" / "plan.json").read_text())
    longest = plan["inputs"]["workload"]["lengths"]["total_max_tokens"]
    assert plan["inputs"]["workload"]["seq_len"] == -(-longest // 64) * 64


def test_bad_lines_are_left_out_in_counting_as_in_training(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "data.jsonl"
    data.write_text(lines_of(records()[:4]) + '{"instruction": "a", "output": null}\n')
    out = tmp_path / "run"

    assert launch(model, data, out) == ExitCode.USAGE
    assert f"{data}:5: output: is null, expected text" in capsys.readouterr().err
    assert not (out / "run.json").exists()
    assert launch(model, data, out, "--skip-bad", "1") == ExitCode.OK
    found = json.loads((out / "run.json").read_text())
    assert (found["examples"], found["skipped_examples"]) == (4, 1)


def test_responses_that_are_all_cut_away_are_refused(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "data.jsonl"
    data.write_text(lines_of([{"prompt": "Count.", "completion": "one two three " * 200}] * 3))
    assert launch(model, data, tmp_path / "run") == ExitCode.USAGE
    told = capsys.readouterr().err
    assert "no answer fits into 256 tokens: there is nothing to train on" in told
    assert not (tmp_path / "run" / "run.json").exists()


def test_the_plans_tokenizer_is_the_runs(model: Path, tmp_path: Path) -> None:
    """A model without a tokenizer of its own is counted with the one that is given."""
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "config.json").write_text((model / "config.json").read_text())
    data = tmp_path / "data.jsonl"
    data.write_text(lines_of(records()))
    assert launch(bare, data, tmp_path / "run", "--tokenizer", str(model)) == ExitCode.OK
    plan = json.loads((tmp_path / "run" / "plan.json").read_text())
    lengths = plan["inputs"]["workload"]["lengths"]
    assert not lengths["estimated"]
    assert lengths["tokenizer"] == str(model)

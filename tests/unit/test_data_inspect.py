"""`sftplan data inspect`, the statistics behind it, and the demo set."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest

from sftplan.cli.main import run
from sftplan.data.batches import Sharing, batches, shuffled
from sftplan.data.demo import DEMO_FILE, demo_tokenizer
from sftplan.data.lengths import measure_lengths
from sftplan.data.prepare import prepare
from sftplan.data.statistics import histogram, target_maxima
from sftplan.facts.catalogue import builtin
from sftplan.facts.strategy import Loss, Strategy
from sftplan.facts.workload import LengthStatistics, Workload
from sftplan.step.batch import full_batch

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with the demo's tokenizer."""
    demo_tokenizer().save(tmp_path / "tokenizer")
    return tmp_path


def inspect(folder: Path, *more: str, data: Path = DEMO_FILE) -> int:
    tokenizer = str(folder / "tokenizer")
    return run(["data", "inspect", str(data), "-m", "gpt2", "--tokenizer", tokenizer, *more])


def test_screen_tells_context_and_answers_apart_without_colour(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = folder / "data.jsonl"
    data.write_text('{"instruction": "Add \\u001b[31m", "output": "7 \\u202e"}\n')
    assert inspect(folder, data=data) == 0
    out = capsys.readouterr().out
    assert "1 examples" in out
    assert "\x1b" not in out
    assert "\u202e" not in out
    answer = out[out.rindex("\n[") :].replace("|", "")
    assert "7" in answer
    assert "<endoftext>]" in answer
    assert "Instruction" in out[out.index("\n(") : out.rindex("\n[")].replace("|", "")


def test_json_is_one_document(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert inspect(folder, "--json", "--num", "3", "--seq", "64") == 0
    captured = capsys.readouterr()
    document: dict[str, Any] = json.loads(captured.out)
    assert document["format"] == "sftplan.data"
    assert len(document["examples"]) == 3
    assert document["lengths"]["num_examples"] + len(document["dropped"]) == 195
    assert document["num_cut"] > 0
    first = document["examples"][0]["tokens"]
    assert not first[0]["trained"]
    assert first[-1]["trained"]
    assert first[-1]["text"] == "<|endoftext|>"
    assert document["generalisation"]["warning"]
    for kind in ("prompt", "response"):
        shown = document[f"{kind}_lengths"]
        assert shown["mean_tokens"] == pytest.approx(document["lengths"][f"{kind}_mean_tokens"])
        assert 0 < shown["p50_tokens"] <= shown["p95_tokens"] <= shown["max_tokens"] <= 64
    assert captured.err == ""


def test_everything_of_the_data_is_on_the_screen(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Lengths, histogram, packing, seams that merge, what is cut, dropped and skipped, and why."""
    data = folder / "data.jsonl"
    records: list[dict[str, str]] = [
        {"prompt": "fine. ", "completion": "fine", "source": "here"},  # merges in this alphabet
        {"prompt": "Count to ten. " * 30 + "Now:", "completion": "one two three"},
        {"prompt": "Say.", "completion": "yes " * 100},
    ]
    data.write_text("".join(json.dumps(record) + "\n" for record in records) + "{}\n")
    assert inspect(folder, "--seq", "64", "--skip-bad", "1", data=data) == 0
    out = capsys.readouterr().out
    for line in (
        "prompt E|Q|", "response E|A|", "p95", "Up to   examples", "Packed    ", "Padded    ",
        "Template  none: prompt and completion as they are",
        "Seams     3 from prompt to response: 1 would merge if tokenised as one text",
        f"    {data}:1: 'fine. ' + 'fine'",
        "Cut       1 examples lose ",
        "Dropped   1 whose answers do not fit into 64 tokens",
        f"    {data}:3: no answer fits: ",
        "Skipped   1 bad examples",
        f"    {data}:4: example: has no field that is known",
        "Note      field 'source' is not used (1 examples)",
    ):  # fmt: skip
        assert line in out


def test_skipped_and_dropped_are_said(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = folder / "data.jsonl"
    long = json.dumps({"instruction": "Say.", "output": "yes " * 100})
    data.write_text('{"instruction": "a", "output": "b"}\nbroken\n' + long)
    assert inspect(folder, data=data) == 2
    assert f"{data}:2: broken JSON in column 1" in capsys.readouterr().err
    assert inspect(folder, "--skip-bad", "1", "--seq", "64", data=data) == 0
    out = capsys.readouterr().out
    assert f"{data}:2: broken JSON" in out
    assert f"{data}:3: no answer fits" in out


@pytest.mark.parametrize("seq", ["1", "1025", "many"])
def test_lengths_that_the_model_does_not_have_are_refused(folder: Path, seq: str) -> None:
    assert inspect(folder, "--seq", seq) == 2


def test_without_a_tokenizer_lengths_are_estimated_and_it_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    assert run(["data", "inspect", str(DEMO_FILE), "-m", "gpt2", "-v"]) == 0
    captured = capsys.readouterr()
    assert "estimated" in captured.err
    assert "Tokenizer estimated" in captured.out
    lengths = measure_lengths(DEMO_FILE, model=builtin("gpt2"), seq_len=1024)
    assert lengths.estimated
    assert lengths.num_examples == 195


def test_statistics_agree_with_the_examples(folder: Path) -> None:
    model = builtin("gpt2")
    lengths = measure_lengths(DEMO_FILE, model=model, seq_len=128, tokenizer=folder / "tokenizer")
    examples = prepare(DEMO_FILE, tokenizer=demo_tokenizer(), seq_len=128).examples
    total = sum(map(len, examples))
    assert lengths.total_mean_tokens == pytest.approx(total / 195)
    assert lengths.prompt_mean_tokens + lengths.response_mean_tokens == pytest.approx(total / 195)
    assert lengths.total_max_tokens == max(map(len, examples))
    assert sum(count for _, count in lengths.histogram) == 195
    assert lengths.packed_fill_fraction == pytest.approx(total / lengths.num_packed_rows / 128)


@pytest.mark.parametrize("loss", [Loss.RESPONSE, Loss.CHUNKED])
@pytest.mark.parametrize("rows", [1, 2, 8, 32])
def test_the_plan_knows_the_shape_of_unpacked_training(folder: Path, loss: Loss, rows: int) -> None:
    model = builtin("gpt2")
    lengths = measure_lengths(DEMO_FILE, model=model, seq_len=512, tokenizer=folder / "tokenizer")
    workload = Workload(seq_len=512, global_batch=64, lengths=lengths)
    planned = full_batch(Strategy(micro_batch=rows, loss=loss, packing=False), workload)
    examples = prepare(DEMO_FILE, tokenizer=demo_tokenizer(), seq_len=512).examples
    shape = batches(
        examples, seq_len=512, sharing=Sharing(micro_batch=rows, accumulation=2), packing=False
    ).shape
    assert planned.length == shape.row_len < 512
    assert shape.target_capacity <= planned.num_targets <= 1.1 * shape.target_capacity + 128
    assert planned.num_targets < planned.num_tokens


def test_targets_between_two_sizes_are_not_below_what_comes() -> None:
    trained = [n * 37 % 97 + 1 for n in range(2000)]
    lengths = LengthStatistics(
        source="x", num_examples=2000, num_dropped=0, prompt_mean_tokens=9.0,
        response_mean_tokens=49.0, total_mean_tokens=58.0, total_max_tokens=128,
        total_p50_tokens=50, total_p95_tokens=90, packed_fill_fraction=0.9, estimated=False,
        tokenizer="x", target_maxima=target_maxima(trained),
    )  # fmt: skip
    workload = Workload(seq_len=128, global_batch=64, lengths=lengths)
    order = [trained[index] for index in shuffled(len(trained), 0, 0)]
    found = [workload.most_targets(rows) for rows in range(1, 300)]
    for rows, most in enumerate(found, start=1):
        chunks = [order[start : start + rows] for start in range(0, len(order), rows)]
        assert max(map(sum, chunks)) <= most <= rows * max(trained)


def test_histogram_of_one_length() -> None:
    assert histogram([1]) == ((1, 1),)
    assert histogram([16] * 3, bins=4)[-1] == (16, 3)


def test_the_demo_needs_nothing_but_tokenizers(tmp_path: Path) -> None:
    tokenizer = demo_tokenizer()
    assert tokenizer.fingerprint == demo_tokenizer().fingerprint
    prepared = prepare(DEMO_FILE, tokenizer=tokenizer, seq_len=128, vocab_size=512)
    assert len(prepared.examples) == 195
    assert not prepared.fitted.dropped


def test_import_pays_for_nothing() -> None:
    code = (
        "import sys, sftplan.cli.data, sftplan.data.prepare, sftplan.data.lengths\n"
        "import sftplan.data.batches, sftplan.data.demo\n"
        "heavy = {'torch', 'transformers', 'numpy', 'datasets', 'pyarrow'}\n"
        "heavy |= {'tokenizers', 'jinja2'}\n"
        "sys.exit(repr(heavy & sys.modules.keys()) if heavy & sys.modules.keys() else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr

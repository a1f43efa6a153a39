"""Data sets of the hub: through `datasets`, as any other data, or a refusal that says what to do."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import pytest

from sftplan.cli.main import run
from sftplan.data.demo import demo_tokenizer
from sftplan.data.hub import is_hub_name
from sftplan.data.prepare import prepare
from sftplan.data.read import read_instructions
from sftplan.errors import ExitCode, NotReadyError, UsageError

if TYPE_CHECKING:
    from pathlib import Path

datasets: Any = pytest.importorskip("datasets")

RECORDS = [
    {"messages": [{"role": "user", "content": f"Q{n}", "tool_calls": None},
                  {"role": "assistant", "content": f"A{n}", "tool_calls": None}]}
    for n in range(3)
]  # fmt: skip


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """A hub with one data set; what was asked of it."""
    asked: list[tuple[Any, ...]] = []
    datasets.Dataset.from_list(RECORDS).save_to_disk(tmp_path / "arrow")

    def load_dataset(name: str, configuration: str | None, *, split: str) -> Any:
        asked.append((name, configuration, split))
        if split not in ("train", "test"):
            message = f"Unknown split {split!r}.\nMore lines."
            raise ValueError(message)
        return datasets.load_from_disk(tmp_path / "arrow")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.chdir(tmp_path)
    return asked


@pytest.mark.parametrize(("name", "asked"), [
    ("org/chat", ("org/chat", None, "train")),
    ("org/chat:test", ("org/chat", None, "test")),
    ("org/chat:main:test", ("org/chat", "main", "test")),
])  # fmt: skip
def test_a_split_is_read_as_a_file_is(
    hub: list[tuple[Any, ...]], name: str, asked: tuple[Any, ...]
) -> None:
    found = read_instructions(name)
    assert [c.turns[1].text for c in found.conversations] == ["A0", "A1", "A2"]
    assert str(found.conversations[2].place) == f"{name}, row 3"
    assert hub == [asked]


def test_what_was_tokenised_is_kept_by_the_content(
    hub: list[tuple[Any, ...]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "cache"
    first = prepare("org/chat", tokenizer=demo_tokenizer(), seq_len=64, cache=cache)
    monkeypatch.setattr("sftplan.data.prepare.encoded_batches", None)  # would fail if called
    again = prepare("org/chat", tokenizer=demo_tokenizer(), seq_len=64, cache=cache)
    assert again == first
    assert len(again.examples) == 3


def test_a_local_folder_comes_first(hub: list[tuple[Any, ...]], tmp_path: Path) -> None:
    (tmp_path / "org" / "chat").mkdir(parents=True)
    (tmp_path / "org" / "chat" / "a.jsonl").write_text('{"prompt": "a", "completion": "b"}')
    assert len(read_instructions("org/chat").conversations) == 1
    assert hub == []


def test_what_the_hub_says_is_told(hub: list[tuple[Any, ...]]) -> None:
    with pytest.raises(UsageError) as refused:
        read_instructions("org/chat:dev")
    assert refused.value.message == (
        "no file or folder org/chat:dev, and the hub gives no such data set: Unknown split 'dev'."
    )
    assert "hf download --repo-type dataset org/chat" in str(refused.value.hint)


def test_without_a_network_it_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The real library, told that there is no network."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    code = run(["data", "inspect", "org/none:train", "-m", "gpt2"])
    told = capsys.readouterr().err
    assert code == ExitCode.USAGE
    assert "no file or folder org/none:train, and the hub gives no such data set" in told
    assert "offline" in told.lower()


def test_without_the_library_its_command_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(NotReadyError) as refused:
        read_instructions("org/chat")
    assert refused.value.hint == "`pip install 'sftplan[train]'`"


@pytest.mark.parametrize("path", ["trian", "a/b/c", "/org/name", "~/name", "org/name:a:b:c",
                                  "data/trian.jsonl", "data/set.parquet:train"])  # fmt: skip
def test_paths_are_no_names_of_the_hub(path: str) -> None:
    assert not is_hub_name(path)

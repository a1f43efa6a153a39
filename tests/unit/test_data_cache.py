"""The cache gives back what tokenising gave, or nothing."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from sftplan.data.demo import DEMO_FILE, demo_tokenizer
from sftplan.data.prepare import Prepared, prepare
from sftplan.errors import UsageError

if TYPE_CHECKING:
    from pathlib import Path


def prepared(data: Path, cache: Path | None, skip_bad: int = 0) -> Prepared:
    return prepare(data, tokenizer=demo_tokenizer(), seq_len=96, cache=cache, skip_bad=skip_bad)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    file = tmp_path / "data.jsonl"
    file.write_text(DEMO_FILE.read_text(encoding="utf-8") + "broken\n", encoding="utf-8")
    return file


def test_a_second_run_reads_what_the_first_one_wrote(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "cache"
    first = prepared(data, cache, skip_bad=1)
    assert first == prepared(data, None, skip_bad=1)
    assert len(list(cache.iterdir())) == 1
    would_fail = "sftplan.data.prepare.encoded_batches"
    monkeypatch.setattr(would_fail, None)
    assert prepared(data, cache, skip_bad=1) == first
    with pytest.raises(UsageError, match=r"data\.jsonl:196: broken JSON"):
        prepared(data, cache)


def test_other_data_is_another_entry(data: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    prepared(data, cache, skip_bad=1)
    data.write_text('{"prompt": "a", "completion": "b"}')
    assert len(prepared(data, cache).examples) == 1
    assert len(list(cache.iterdir())) == 2


@pytest.mark.parametrize("damage", ["cut", "flip", "empty"])
def test_a_damaged_entry_is_made_again(data: Path, tmp_path: Path, damage: str) -> None:
    cache = tmp_path / "cache"
    first = prepared(data, cache, skip_bad=1)
    (entry,) = cache.iterdir()
    whole = bytearray(entry.read_bytes())
    good = bytes(whole)
    if damage == "flip":
        whole[len(whole) // 2] ^= 1
    elif damage == "cut":
        del whole[-7:]
    else:
        whole.clear()
    entry.unlink()  # what is mapped stays
    entry.write_bytes(whole)
    assert prepared(data, cache, skip_bad=1) == first
    assert entry.read_bytes() == good


def test_a_cache_that_cannot_be_written_costs_nothing_else(data: Path, tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("")
    assert prepared(data, blocked / "cache", skip_bad=1).examples

"""Files of other kinds, folders, and any bytes at all."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sftplan.data.read import read_instructions
from sftplan.errors import SftplanError, UsageError

if TYPE_CHECKING:
    from pathlib import Path

from data_lines import CHAT, GOOD, said, write


def test_csv(tmp_path: Path) -> None:
    text = 'instruction,input,output\nQ,,"A, b\nc"\nR,I,D\n'
    file = write(tmp_path, text, "data.csv")
    assert said(file)[0] == [("user", "Q"), ("assistant", "A, b\nc")]
    assert [c.place.line for c in read_instructions(file).conversations] == [2, 4]
    short = write(tmp_path, "instruction,output\nQ,A\nQ\n", "short.csv")
    with pytest.raises(UsageError, match=r"short.csv:3: has 1 fields, the header has 2"):
        read_instructions(short)
    broken: dict[str, str | bytes] = {
        "quote.csv": 'instruction,output\n"Q,A\n',
        "twice.csv": "output,output\na,b\n",
        "latin.csv": b"instruction,output\n\xe9,b\n",
    }
    for name, bad in broken.items():
        with pytest.raises(UsageError, match=name):
            read_instructions(write(tmp_path, bad, name))


def test_parquet(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    rows = [json.loads(GOOD), {"instruction": "Q", "output": None}]
    file = tmp_path / "data.parquet"
    parquet.write_table(pyarrow.Table.from_pylist(rows), file)
    with pytest.raises(UsageError, match=r"data.parquet, row 2: output: is null, expected text"):
        read_instructions(file)
    assert len(read_instructions(file, skip_bad=1).conversations) == 1


def test_a_folder_is_read_in_order_and_says_what_it_leaves_out(tmp_path: Path) -> None:
    write(tmp_path, GOOD, "b.jsonl")
    write(tmp_path, f"[{GOOD}]", "a.json")
    write(tmp_path, "# about", "README.md")
    read = read_instructions(tmp_path)
    assert [c.place.file for c in read.conversations] == [
        str(tmp_path / "a.json"),
        str(tmp_path / "b.jsonl"),
    ]
    assert read.notes == ("README.md is no instruction file: not read",)


def test_missing_file_suggests_its_neighbour(tmp_path: Path) -> None:
    write(tmp_path, GOOD, "train.jsonl")
    with pytest.raises(UsageError) as refusal:
        read_instructions(tmp_path / "trian.jsonl")
    assert refusal.value.hint == "did you mean train.jsonl?"
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match="no instruction file"):
        read_instructions(tmp_path / "empty")


def refused(file: Path) -> str:
    """The message of the refusal, or the file's own name where it is read."""
    try:
        read_instructions(file)
    except SftplanError as error:
        return error.message
    return file.name


SUFFIXES = st.sampled_from([".json", ".jsonl", ".csv", ".parquet"])


@given(data=st.binary(max_size=200), suffix=SUFFIXES)
def test_any_bytes_are_read_or_refused(
    tmp_path_factory: pytest.TempPathFactory, data: bytes, suffix: str
) -> None:
    file = tmp_path_factory.getbasetemp() / f"fuzz{suffix}"
    file.write_bytes(data)
    assert file.name in refused(file)


@given(position=st.integers(0, len(CHAT) - 1), byte=st.integers(0, 255))
def test_one_changed_byte_is_read_or_refused(
    tmp_path_factory: pytest.TempPathFactory, position: int, byte: int
) -> None:
    data = bytearray(CHAT.encode())
    data[position] = byte
    file = tmp_path_factory.getbasetemp() / "changed.jsonl"
    file.write_bytes(data)
    assert file.name in refused(file)

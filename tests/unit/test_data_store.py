"""Examples in one buffer come back as they went in, whole or not at all."""

from __future__ import annotations

import errno
import io
import json
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sftplan.data import cache
from sftplan.data.conversation import Place
from sftplan.data.demo import demo_tokenizer
from sftplan.data.fit import fitted
from sftplan.data.mask import Example, masked
from sftplan.data.prepare import prepare
from sftplan.data.store import Selected, Writer, counts, opened

if TYPE_CHECKING:
    from pathlib import Path

PLACES = st.builds(
    Place,
    file=st.sampled_from(["a.jsonl", "b.parquet"]),
    row=st.integers(1, 10**12),
    line=st.none() | st.integers(1, 10**12),
)
IDS = st.lists(st.integers(0, 2**31 - 1), max_size=9)
EXAMPLES = st.builds(
    lambda prompt, answer, place: masked([(prompt, False), (answer, True)], place),
    IDS, IDS, PLACES,
)  # fmt: skip


def written(examples: list[Example]) -> bytes:
    stream = io.BytesIO()
    writer = Writer(stream)
    writer.add(examples)
    writer.finish({"notes": ["é"]})
    return stream.getvalue()


@given(examples=st.lists(EXAMPLES, max_size=6))
def test_what_is_written_is_read(examples: list[Example]) -> None:
    found = opened(memoryview(written(examples)))
    assert found is not None
    stored, header = found
    assert list(stored) == examples
    assert stored == tuple(examples)
    assert stored[1:] == examples[1:]
    assert [list(each) for each in counts(stored)] == [list(each) for each in counts(examples)]
    assert header["largest_id"] == max((max(e.input_ids, default=0) for e in examples), default=0)
    assert header["notes"] == ["é"]


@given(examples=st.lists(EXAMPLES, max_size=3), cut=st.integers(1, 50), bit=st.integers(0))
def test_a_buffer_that_is_not_whole_is_none(examples: list[Example], cut: int, bit: int) -> None:
    data = bytearray(written(examples))
    assert opened(memoryview(data[:-cut])) is None
    data[bit // 8 % len(data)] ^= 1 << bit % 8
    assert opened(memoryview(data)) is None


@given(examples=st.lists(EXAMPLES, min_size=1, max_size=8), seq_len=st.integers(2, 12))
def test_fitting_stored_examples_is_fitting_a_list(examples: list[Example], seq_len: int) -> None:
    examples = [*examples, masked([([1], False), ([2], True)], Place(file="c", row=1))]
    found = opened(memoryview(written(examples)))
    assert found is not None
    kept = fitted(found[0], seq_len)
    assert kept == fitted(examples, seq_len)
    assert list(kept.examples.lengths) == [len(example) for example in kept.examples]
    assert list(kept.examples.trained) == [example.num_trained for example in kept.examples]


def test_a_selection_has_its_own_order_and_bounds() -> None:
    examples = [
        masked([([n], False), ([n] * n, True)], Place(file="a", row=n)) for n in range(1, 5)
    ]
    chosen = Selected(examples, [3, 0])
    assert list(chosen) == [examples[3], examples[0]]
    assert chosen[-1] == examples[0]
    with pytest.raises(IndexError):
        chosen[2]


def test_a_disk_that_fills_up_costs_only_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = tmp_path / "data.jsonl"
    data.write_text('{"prompt": "a", "completion": "b"}\n')

    def full(self: Any, data: bytes) -> None:
        with cache._told():
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(cache._Disk, "write", full)
    folder = tmp_path / "cache"
    assert len(prepare(data, tokenizer=demo_tokenizer(), seq_len=64, cache=folder).examples) == 1
    assert list(folder.iterdir()) == []


MEMORY = """
import resource, sys
from pathlib import Path
from sftplan.data.demo import demo_tokenizer
from sftplan.data.prepare import prepare
def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
file, folder = Path(sys.argv[1]), Path(sys.argv[2])
tokenizer = demo_tokenizer()
prepare(file.with_name("small.jsonl"), tokenizer=tokenizer, seq_len=512)
before = peak()
found = prepare(file, tokenizer=tokenizer, seq_len=512, cache=folder)
(entry,) = folder.iterdir()
print(peak() - before - entry.stat().st_size, len(found.examples))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="counts kilobytes as Linux does")
def test_memory_beyond_the_mapped_file_is_a_fraction_of_the_data(tmp_path: Path) -> None:
    """20,000 examples, 6 MB of text: as objects they take 35 MB beyond the file, as a store 4."""
    file = tmp_path / "data.jsonl"
    line = {"instruction": "Is the number even or odd? " * 8}
    texts = [
        json.dumps(line | {"output": f"{number} is the number. " * 3}) + "\n"
        for number in range(20_000)
    ]
    file.write_text("".join(texts))
    (tmp_path / "small.jsonl").write_text("".join(texts[:4096]))
    command = [sys.executable, "-c", MEMORY, str(file), str(tmp_path / "cache")]
    told = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    beyond_bytes, count = map(int, told.split())

    assert count == 20_000
    assert beyond_bytes < 2 * file.stat().st_size

"""CUDA_VISIBLE_DEVICES as CUDA reads it."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sftplan.detect.visible import hint_of, select

GPUS = ["GPU-aa11", "GPU-aa22", "GPU-bb33"]
SLICES = ["MIG-1", "MIG-2"]


@pytest.mark.parametrize(
    ("text", "positions", "stopped_at"),
    [
        ("0", (0,), None),
        ("2,0", (2, 0), None),
        (" 1 , 2 ", (1, 2), None),
        ("1gpu,2", (1, 2), None),  # CUDA reads the digits
        ("0,-1,1", (0,), "-1"),
        ("0,3,1", (0,), "3"),
        ("0,,1", (0,), ""),
        ("", (), ""),
        ("none", (), "none"),
        ("GPU-aa11", (0,), None),
        ("GPU-bb", (2,), None),  # a prefix, as long as it is one GPU's
        ("GPU-aa", (), "GPU-aa"),
        ("GPU-bb33,GPU-aa1", (2, 0), None),
        ("GPU-bb33,0", (2,), "0"),  # no mixing of the two ways
        ("0,GPU-bb33", (0,), "GPU-bb33"),
        ("MIG-2", (4,), None),
        ("MIG-9", (), "MIG-9"),
        ("²", (), "²"),
        ("9" * 5000, (), "9" * 5000),
    ],
)
def test_select(text: str, positions: tuple[int, ...], stopped_at: str | None) -> None:
    selection = select(text, GPUS, SLICES)
    assert selection.positions == positions
    assert selection.stopped_at == stopped_at


@pytest.mark.parametrize("text", ["1,1", "0,1,0", "GPU-bb33,GPU-bb"])
def test_a_gpu_named_twice_hides_all(text: str) -> None:
    selection = select(text, GPUS)
    assert selection.positions == ()
    assert selection.repeated
    assert "twice" in hint_of(text, selection)


@given(st.text(alphabet="0123456789-+, GPUMIGab", max_size=40) | st.text(max_size=20))
def test_any_text_selects_distinct_devices_that_exist(text: str) -> None:
    positions = select(text, GPUS, SLICES).positions
    assert len(set(positions)) == len(positions)
    assert all(0 <= position < len(GPUS) + len(SLICES) for position in positions)


@given(st.permutations(range(3)))
def test_every_order_of_all_gpus_is_kept(order: list[int]) -> None:
    assert select(",".join(map(str, order)), GPUS).positions == tuple(order)
    assert select(",".join(GPUS[place] for place in order), GPUS).positions == tuple(order)

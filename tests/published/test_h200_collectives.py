"""Measured collectives between two H200 against what a plan takes for them."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

from sftplan.cost import comm
from sftplan.facts.profiles import load_hardware

TEXT = (Path(__file__).parent / "h200_collectives.csv").read_text()
ROWS = list(csv.DictReader(TEXT.splitlines()))
RATES = load_hardware("h200-sxm").rates
CASES = {
    "all_reduce": (comm.all_reduce_s, RATES.allreduce_fraction),
    "all_gather": (comm.all_gather_s, RATES.allgather_fraction),
    "reduce_scatter": (comm.reduce_scatter_s, RATES.reducescatter_fraction),
}


@pytest.mark.parametrize("kind", CASES)
def test_every_size_is_near(kind: str) -> None:
    """From 64 KiB, where the call is all there is, to 1 GiB, where the link is."""
    seconds, fraction = CASES[kind]
    rate = comm.link_bytes_per_s(load_hardware("h200-sxm"), fraction)
    found = [row for row in ROWS if row["collective"] == kind]

    assert len(found) == 7
    for row in found:
        expected = pytest.approx(float(row["seconds"]), rel=0.12)
        assert seconds(int(row["bytes"]), int(row["ranks"]), rate) == expected

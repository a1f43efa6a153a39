"""What a run costs."""

from __future__ import annotations

from dataclasses import replace

import pytest

from sftplan.cost.money import run_usd, usd_per_hour, usd_per_million_tokens
from sftplan.facts.profiles import load_hardware

OFFER = load_hardware("aws/p5.48xlarge")  # 55.04 USD/h


def test_half_an_hour_of_eight_h100() -> None:
    # 55.04 * 1800 / 3600 = 27.52
    assert run_usd(OFFER, 1800.0) == pytest.approx(27.52)


def test_two_machines_cost_twice() -> None:
    assert usd_per_hour(replace(OFFER, num_nodes=2)) == pytest.approx(110.08)


def test_tokens() -> None:
    # 55.04 / 3600 / 100000 * 1e6 = 0.15289
    assert usd_per_million_tokens(OFFER, 1e5) == pytest.approx(0.152889, rel=1e-5)
    assert usd_per_million_tokens(OFFER, 0.0) is None


def test_without_a_price_the_cost_is_unknown_not_zero() -> None:
    unpriced = load_hardware("h200-sxm")
    assert run_usd(unpriced, 3600.0) is None
    assert usd_per_million_tokens(unpriced, 1e5) is None

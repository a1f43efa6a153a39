"""What a run costs."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import pytest

from sftplan.cost.money import run_usd, usd_per_hour, usd_per_million_tokens
from sftplan.facts.hardware import Rates
from sftplan.facts.profiles import load_hardware
from sftplan.search.coster import machine_key

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


def test_machines_share_a_search_only_where_every_rate_is_the_same() -> None:
    h200 = load_hardware("h200-sxm")
    renamed = replace(h200, rates=replace(h200.rates, sources={}))
    names = [each.name for each in fields(Rates) if each.name != "sources"]
    changes: list[dict[str, Any]] = [{name: 123} for name in names]
    others = [replace(h200, rates=replace(h200.rates, **change)) for change in changes]

    assert machine_key(renamed) == machine_key(h200)
    assert len({machine_key(machine) for machine in (h200, *others)}) == len(others) + 1

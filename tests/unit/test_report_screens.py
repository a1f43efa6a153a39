"""The screens, byte for byte. After a wanted change: `UPDATE_GOLDEN=1 python -m pytest`."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from sftplan.plan.comparison import Comparison, Row
from sftplan.report.compare import render_comparison
from sftplan.report.explain import explain_term, render_term
from sftplan.report.style import PLAIN, Style
from sftplan.report.text import WIDTH, render_plan_screen, verdict_line

if TYPE_CHECKING:
    from sftplan.plan.record import Plan

GOLDEN = Path(__file__).parents[1] / "golden"


def check(name: str, screen: str) -> None:
    """Compare a screen with its file, or rewrite the file."""
    path = GOLDEN / f"{name}.txt"
    if os.environ.get("UPDATE_GOLDEN"):
        path.write_text(screen + "\n", encoding="utf-8")

    assert screen + "\n" == path.read_text(encoding="utf-8")
    assert max(len(line) for line in screen.splitlines()) <= WIDTH


@pytest.fixture
def comparison(fitting: Plan) -> Comparison:
    """Three machines: one fits, one is tight, one does not fit."""
    row = Row(
        hardware="h200-sxm",
        num_gpus=1,
        gpu="H200-SXM",
        fits=True,
        verdict="fits",
        strategy=fitting.strategy,
        used_bytes=fitting.memory.gpu.used_bytes,
        capacity_bytes=fitting.memory.gpu.capacity_bytes,
        step_s=1.0,
        tokens_per_s=65536.0,
        mfu_fraction=0.34,
        total_s=346.0,
        usd=0.34,
        usd_per_hour=3.5,
        usd_per_million_tokens=0.0148,
        price_as_of="2026-08-01",
    )
    small = Row(hardware="rtx-3060-12gb", num_gpus=1, reason="4.20 GiB over")
    tight = replace(row, hardware="a100-80gb-sxm", verdict="tight", step_s=2.2, usd=0.51)
    return Comparison(
        created_by="sftplan 0.1.0",
        command=["sftplan", "compare"],
        model="gpt2-large",
        seq_len=1024,
        global_batch=64,
        sort="cost",
        rows=[row, tight, small],
    )


def test_plan_that_fits(fitting: Plan) -> None:
    check("plan_fits", render_plan_screen(fitting, Style(), path="plan.json"))


def test_plan_that_fits_in_ascii(fitting: Plan) -> None:
    screen = render_plan_screen(fitting, PLAIN, path="plan.json", verbose=True)

    check("plan_fits_ascii", screen)
    assert screen.isascii()


def test_plan_that_does_not_fit(not_fitting: Plan) -> None:
    check("plan_does_not_fit", render_plan_screen(not_fitting, PLAIN, path="plan.json"))


def test_comparison(comparison: Comparison) -> None:
    check("compare", render_comparison(comparison, PLAIN, verbose=True))


def test_comparison_without_an_amount_of_work(comparison: Comparison) -> None:
    rows = [replace(row, usd=None, total_s=None) for row in comparison.rows]
    check("compare_no_work", render_comparison(replace(comparison, rows=rows), PLAIN, limit=1))


def test_explained_attention(fitting: Plan) -> None:
    screen = render_term(explain_term("attention"), fitting)

    check("explain_attention", screen)
    assert "4.00" in screen
    assert "2.11" in screen


def test_colour_adds_nothing_but_colour(fitting: Plan) -> None:
    import re

    coloured = render_plan_screen(fitting, Style(colour=True), path="plan.json")

    assert "\x1b[" in coloured
    assert re.sub(r"\x1b\[[\d;]*m", "", coloured) == render_plan_screen(
        fitting, Style(), path="plan.json"
    )


def test_the_verdict_answers_alone(fitting: Plan, not_fitting: Plan) -> None:
    assert verdict_line(fitting, PLAIN) == "Fits: 62.50 of 140.00 GiB per GPU, 77.50 GiB headroom"
    assert verdict_line(not_fitting, PLAIN).endswith("38.50 GiB over")

"""Pictures of memory over one step: they show what the plan says, on a terminal and on a page."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any
from xml.dom import minidom

import pytest

import sftplan.api
from sftplan.cli.main import run
from sftplan.cost.timeline import Timeline
from sftplan.errors import ExitCode
from sftplan.plan.file import write_plan
from sftplan.plan.timeline import plan_timeline
from sftplan.report.style import Style
from sftplan.report.timeline import Panel, letter, render_chart, render_page
from sftplan.verify.measurement import Measurement

if TYPE_CHECKING:
    from pathlib import Path

    from sftplan.plan.record import Plan

PLAIN, RICH = Style(), Style(colour=True)
ASCII = Style(unicode=False)
ESCAPES = re.compile(r"\x1b\[[0-9;]*m")
KNOBS: tuple[dict[str, Any], ...] = (
    {"compile": False, "loss": "full", "packing": False, "micro_batch": 8, "accumulation": 2},
    {"compile": True, "loss": "chunked", "packing": True, "micro_batch": 4, "accumulation": 1},
    {"precision": "fp32", "checkpointing": "full", "micro_batch": 2, "accumulation": 1},
)
RAMP = Timeline(
    categories=("weights", "activations"),
    points=tuple((2**30, n * 2**30 // 10) for n in range(40)),
    phases=((0, "forward"), (20, "backward")),
)


def planned(**knobs: Any) -> Plan:
    return sftplan.api.plan(
        model="gpt2-large", seq_len=1024, hardware="h200-sxm", command=["x"], **knobs
    )


@pytest.mark.parametrize("knobs", KNOBS)
def test_the_highest_point_is_the_plans_peak(knobs: dict[str, Any]) -> None:
    plan = planned(**knobs)
    found = plan_timeline(plan)
    gpu = plan.memory.gpu
    peak = dict(zip(found.categories, found.points[found.peak], strict=True))

    rounding = gpu.by_category["rounding"]
    assert sum(peak.values()) == pytest.approx(gpu.peak_allocated_bytes - rounding, rel=1e-4)
    for name, size in peak.items():
        assert size == pytest.approx(gpu.by_category[name], rel=1e-3, abs=2**20), name
    names = [name for _, name in found.phases]
    passes = min(knobs["accumulation"], 2)
    assert names == [*(["forward", "backward"] * passes), "clip", "optimizer", "zero_grad"]


def test_a_step_begins_and_ends_without_gradients() -> None:
    found = plan_timeline(planned(**KNOBS[0]))
    gradients = found.categories.index("gradients")
    weights = found.categories.index("weights")

    assert found.points[0][gradients] == 0
    most = max(point[gradients] for point in found.points)
    assert found.points[-1][gradients] < most / 20  # the highest of the last stretch
    assert len({point[weights] for point in found.points}) == 1


@pytest.mark.parametrize("style", [PLAIN, RICH, ASCII])
@pytest.mark.parametrize("width", [20, 60, 80, 200])
def test_the_chart_keeps_to_its_width(style: Style, width: int) -> None:
    text = render_chart(plan_timeline(planned(**KNOBS[0])), style, width=width)

    assert max(len(ESCAPES.sub("", line)) for line in text.splitlines()) <= max(width, 40)
    assert ("\x1b" in text) is style.colour
    assert text.isascii() or style.unicode
    assert "forward" in text


def test_letters_fill_the_chart_from_below() -> None:
    rows = render_chart(RAMP, ASCII, width=49).splitlines()[:12]
    columns = [[row[9 + column] for row in rows] for column in range(40)]

    assert all(column[-1] == "w" for column in columns)  # weights carry everything
    assert columns[-1][0] == "a"
    assert columns[0].count("w") == 2  # 1 of 4.9 GiB, twelve rows
    heights = [sum(cell != " " for cell in column) for column in columns]
    assert heights == sorted(heights)
    assert rows[0].startswith("   4.90 |")


def test_every_category_has_a_letter_of_its_own() -> None:
    names = [
        "weights",
        "optimizer",
        "gradients",
        "activations",
        "logits",
        "temporary",
        "workspace",
        "other",
    ]
    letters = [letter(name, names) for name in names]

    assert len(set(letters)) == len(letters)
    assert letters[:6] == list("wogalt")


def svgs(page: str) -> list[minidom.Document]:
    return [minidom.parseString(text) for text in re.findall(r"<svg.*?</svg>", page, re.DOTALL)]


def test_the_page_stacks_predicted_and_measured_to_one_scale() -> None:
    higher = Timeline(categories=("weights", "<odd>"), points=((2**30, 8 * 2**30),) * 3, phases=())
    panels = [
        Panel(title="Predicted", timeline=RAMP, limit_bytes=10 * 2**30),
        Panel(title="Measured & more", timeline=higher),
    ]
    page = render_page("a <plan>", panels, screen="1 < 2")
    pictures = svgs(page)

    assert len(pictures) == 2
    assert "a &lt;plan&gt;" in page
    assert "1 &lt; 2" in page
    assert "<script" not in page
    assert "http" not in page.replace("http-equiv", "")
    labels = [
        [text for text in re.findall(r">([^<]*)</text>", each.toxml()) if "GiB" in text]
        for each in pictures
    ]
    assert [text for text in labels[0] if "capacity" not in text] == labels[1]
    assert any("capacity 10.00 GiB" in text for text in labels[0])
    assert len(pictures[0].getElementsByTagName("polygon")) == 2


def test_areas_are_as_high_as_their_bytes() -> None:
    flat = Timeline(categories=("weights",), points=((2**30,), (2**30,)), phases=())
    panel = Panel(title="x", timeline=flat, limit_bytes=4 * 2**30)
    picture = svgs(render_page("x", [panel]))[0]
    corners = picture.getElementsByTagName("polygon")[0].getAttribute("points").split()
    heights = sorted({float(corner.split(",")[1]) for corner in corners})
    line = float(
        next(
            each.getAttribute("y1")
            for each in picture.getElementsByTagName("line")
            if each.getAttribute("stroke-dasharray") == "6 4"
        )
    )
    bottom = heights[1]

    assert (bottom - heights[0]) / (bottom - line) == pytest.approx(1 / 4, abs=0.01)


def test_show_draws_a_plan(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "70")
    monkeypatch.setenv("NO_COLOR", "1")
    plan, page = tmp_path / "plan.json", tmp_path / "memory.html"
    write_plan(planned(**KNOBS[1]), plan)

    assert run(["show", str(plan), "--memory", "--html", str(page)]) == ExitCode.OK
    said = capsys.readouterr()
    assert "weights" in said.out
    assert "\x1b" not in said.out
    assert "wrote" in said.err
    assert len(svgs(page.read_text())) == 1


def test_show_draws_nothing_but_plans(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "run.json").write_text('{"format": "sftplan.run"}')

    assert run(["show", str(tmp_path / "run.json"), "--memory"]) == ExitCode.USAGE
    assert "sftplan.run" in capsys.readouterr().err


def test_verify_draws_predicted_beside_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan, page = tmp_path / "plan.json", tmp_path / "memory.html"
    made = planned(**KNOBS[1])
    write_plan(made, plan)
    gpu = made.memory.gpu
    quantities = {
        "memory.gpu.peak_allocated_bytes": gpu.peak_allocated_bytes,
        "memory.gpu.peak_reserved_bytes": gpu.peak_reserved_bytes,
        "time.step_s": made.time.step_s or 0.0,
    }
    measured = Measurement(mode="gpu", quantities=quantities, timeline=RAMP)
    monkeypatch.setattr("sftplan.verify.profile.measure", lambda *_, **__: measured)

    assert run(["verify", str(plan), "--html", str(page), "-q"]) == ExitCode.OK
    assert len(svgs(page.read_text())) == 2
    assert "memory.gpu.peak_reserved_bytes" in page.read_text()
    kept = json.loads((tmp_path / "plan.verification.json").read_text())
    assert kept["timeline"]["categories"] == ["weights", "activations"]

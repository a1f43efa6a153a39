"""The plan file: what is written is what is read, and what is broken is named."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest

from sftplan.errors import UsageError
from sftplan.plan.file import plan_document, plan_sha256, read_plan, render_plan, write_plan

if TYPE_CHECKING:
    from pathlib import Path

    from sftplan.plan.record import Plan


def damaged(plan: Plan, path: Path, keys: str, value: object) -> Path:
    """A plan file in which the value at `keys` is another one."""
    document: Any = json.loads(render_plan(plan))
    *parents, last = keys.split(".")
    inner = document
    for key in parents:
        inner = inner[key]
    inner[last] = value
    path.write_text(json.dumps(document, indent=2))
    return path


@pytest.mark.parametrize("name", ["fitting", "not_fitting"])
def test_reading_what_was_written_gives_the_same_plan(
    tmp_path: Path, name: str, request: pytest.FixtureRequest
) -> None:
    plan: Plan = request.getfixturevalue(name)
    path = tmp_path / "plan.json"
    write_plan(plan, path)

    assert read_plan(path) == plan
    assert render_plan(read_plan(path)) == path.read_text()


def test_the_file_is_the_json_document_with_a_final_newline(tmp_path: Path, fitting: Plan) -> None:
    path = tmp_path / "plan.json"
    write_plan(fitting, path)

    assert json.loads(path.read_text()) == plan_document(fitting)
    assert path.read_text().endswith("}\n")
    assert list(tmp_path.iterdir()) == [path]
    assert hashlib.sha256(path.read_bytes()).hexdigest() == plan_sha256(fitting)


def test_a_file_that_does_not_say_how_many_layers_means_all(tmp_path: Path, fitting: Plan) -> None:
    document: Any = json.loads(render_plan(fitting))
    del document["strategy"]["checkpointed_layers"]
    (tmp_path / "plan.json").write_text(json.dumps(document))

    assert read_plan(tmp_path / "plan.json").strategy.checkpointed_layers is None


def test_another_plan_has_another_hash(not_fitting: Plan, fitting: Plan) -> None:
    assert plan_sha256(fitting) != plan_sha256(not_fitting)


def test_whole_floats_do_not_change_the_hash_when_read_back(tmp_path: Path, fitting: Plan) -> None:
    path = tmp_path / "plan.json"
    write_plan(fitting, path)

    assert plan_sha256(read_plan(path)) == plan_sha256(fitting)


def test_a_newer_minor_version_may_hold_unknown_keys(tmp_path: Path, fitting: Plan) -> None:
    path = damaged(fitting, tmp_path / "plan.json", "format_version", "1.7")
    document = json.loads(path.read_text())
    document["strategy"]["new_knob"] = 3
    path.write_text(json.dumps(document))

    assert replace(read_plan(path), format_version="1.0") == fitting


def test_this_version_may_not(tmp_path: Path, fitting: Plan) -> None:
    path = damaged(fitting, tmp_path / "plan.json", "strategy.new_knob", 3)

    with pytest.raises(UsageError, match=r"plan.json:\d+: strategy.new_knob: no such field"):
        read_plan(path)


def test_a_newer_major_version_is_refused_with_both_versions(tmp_path: Path, fitting: Plan) -> None:
    path = damaged(fitting, tmp_path / "plan.json", "format_version", "2.0")

    with pytest.raises(UsageError, match=r"plan.json:3: plan format 2.0, this sftplan reads 1.0"):
        read_plan(path)


def test_a_wrong_type_is_named_with_its_line(tmp_path: Path, fitting: Plan) -> None:
    path = damaged(fitting, tmp_path / "plan.json", "inputs.model.num_layers", "many")
    line = 1 + next(
        number for number, text in enumerate(path.read_text().splitlines()) if '"many"' in text
    )

    with pytest.raises(UsageError, match=rf"plan.json:{line}: inputs.model.num_layers: .*integer"):
        read_plan(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", r"p.json:1: not JSON"),
        (b'{\n "format": }', r"p.json:2: not JSON"),
        (b"[1]", r"expected an object, found list"),
        (b'{"format": "other"}', r"format is 'other'"),
        (b'{"format": "sftplan.plan"}', r"format_version None"),
        (b'{"format": "sftplan.plan", "format_version": "1.0"}', r"created_by: field required"),
        (b'{"a": NaN}', r"NaN is not a JSON number"),
        (b"\xff\xfe", r"p.json: 'utf-8' codec"),
        (b"[" * 200_000, r"nested too deeply"),
        (b'{"format": "sftplan.plan", "format_version": "\xc2\xb2.0"}', r"is not a version"),
    ],
)
def test_broken_files_are_a_usage_error(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "p.json"
    path.write_bytes(content)

    with pytest.raises(UsageError, match=message):
        read_plan(path)


def test_a_missing_file_and_an_unwritable_place_are_named(tmp_path: Path, fitting: Plan) -> None:
    with pytest.raises(UsageError, match=r"cannot read .*missing.json: No such file"):
        read_plan(tmp_path / "missing.json")
    with pytest.raises(UsageError, match=r"cannot write .*plan.json: No such file"):
        write_plan(fitting, tmp_path / "nowhere" / "plan.json")


def test_a_device_is_written_to_and_stays_a_device(fitting: Plan) -> None:
    write_plan(fitting, "/dev/null")
    from pathlib import Path

    assert not Path("/dev/null").is_file()


def test_the_contracts_nested_keys_of_a_neighbour(fitting: Plan) -> None:
    first: Any = plan_document(fitting)["neighbours"]

    assert first[0]["memory"]["gpu"]["used_bytes"] == 40 * 2**30
    assert first[0]["time"]["step_s"] == 1.08


@pytest.mark.parametrize(
    ("keys", "value", "bound"),
    [
        ("strategy.micro_batch", 0, "at least 1"),
        ("strategy.accumulation", -3, "at least 1"),
        ("strategy.zero", 7, "at most 3"),
        ("inputs.workload.seq_len", -5, "at least 2"),
        ("inputs.hardware.num_gpus", 0, "at least 1"),
    ],
)
def test_a_figure_that_no_run_can_have_is_refused(
    tmp_path: Path, fitting: Plan, keys: str, value: int, bound: str
) -> None:
    path = damaged(fitting, tmp_path / "plan.json", keys, value)
    with pytest.raises(UsageError, match=rf"plan\.json:\d+: {keys}: {value} has to be {bound}"):
        read_plan(path)

"""`sftplan models`: the table, one model, JSON."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest

from sftplan.cli.main import run
from sftplan.facts.catalogue import builtin_names

if TYPE_CHECKING:
    from pathlib import Path


def documents(capsys: pytest.CaptureFixture[str], *args: str) -> Any:
    assert run(["models", *args, "--json"]) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    return json.loads(captured.out)


def test_the_table_has_every_model_uncut(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    assert run(["models"]) == 0
    lines = capsys.readouterr().out.splitlines()

    assert [line.split()[0] for line in lines[1:]] == list(builtin_names())
    assert "…" not in "".join(lines)
    assert " ".join(lines[1].split()) == "gpt2 124 M 12 768 12 50,257 1,024 openai-community/gpt2"


@pytest.mark.parametrize("columns", ["80", "110", "40"])
def test_narrow_screens(
    columns: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    assert run(["models"]) == 0
    assert max(map(len, capsys.readouterr().out.splitlines())) <= int(columns)


def test_quiet_is_names_only(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["models", "-q"]) == 0
    assert capsys.readouterr().out.split() == list(builtin_names())


def test_one_model_adds_up(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["models", "GPT2-large"]) == 0
    out = capsys.readouterr().out

    assert "774,030,080" in out
    assert "\x1b" not in out


@pytest.mark.parametrize("name", ["gpt2", "gemma-2-2b", "qwen3-30b-a3b", "qwen1.5-moe-a2.7b"])
def test_json_of_one_model(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    document = documents(capsys, name)

    assert (document["format"], document["name"], document["source"]) == (
        "sftplan.model",
        name,
        "builtin",
    )
    assert sum(document["parameters_by_part"].values()) == document["num_parameters"]
    assert document["num_trainable"] == document["num_parameters"]


def test_json_of_all(capsys: pytest.CaptureFixture[str]) -> None:
    document = documents(capsys)

    assert document["format"] == "sftplan.models"
    assert [each["name"] for each in document["models"]] == list(builtin_names())


def test_unknown_is_usage(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert run(["models", "gpt2-larg"]) == 2
    captured = capsys.readouterr()

    assert captured.out == ""
    assert "did you mean gpt2-large?" in captured.err
    assert run(["models", str(tmp_path)]) == 2

"""Planning imports no torch, transformers or numpy: seen in sys.modules, not on a clock."""

from __future__ import annotations

import subprocess
import sys

import pytest

HEAVY = ("torch", "transformers", "numpy", "deepspeed", "accelerate", "datasets")
PLANNING = [
    "sftplan",
    "sftplan.api",
    "sftplan.cli.main",
    "sftplan.cli.plan",
    "sftplan.cli.compare",
    "sftplan.cli.launch",
    "sftplan.cli.verify",
    "sftplan.cost.estimate",
    "sftplan.export",
    "sftplan.facts.resolve",
    "sftplan.plan.build",
    "sftplan.plan.comparison",
    "sftplan.plan.file",
    "sftplan.report.compare",
    "sftplan.report.explain",
    "sftplan.report.text",
]


def imported_by(code: str, modules: tuple[str, ...]) -> set[str]:
    """Which of `modules` are imported after running `code` in a fresh interpreter."""
    probe = f"{code}\nimport sys\nprint(*(m for m in {modules!r} if m in sys.modules))"
    result = subprocess.run(
        [sys.executable, "-c", probe], capture_output=True, text=True, check=True
    )
    return set(result.stdout.split())


@pytest.mark.parametrize("module", PLANNING)
def test_planning_imports_nothing_heavy(module: str) -> None:
    assert imported_by(f"import {module}", HEAVY) == set()


def test_the_probe_can_fail() -> None:
    assert imported_by("import json", ("json", "torch")) == {"json"}


def test_importing_sftplan_imports_none_of_its_dependencies() -> None:
    assert imported_by("import sftplan", ("click", "rich", "pydantic", "sftplan.api")) == set()


def test_help_imports_no_command() -> None:
    code = "from sftplan.cli.main import run\nrun(['--help'])"
    modules = ("pydantic", "rich", "sftplan.cli.plan", "sftplan.facts.resolve")

    assert imported_by(f"import io, contextlib\n{_silenced(code)}", modules) == set()


def test_looking_for_a_model_does_not_import_pydantic() -> None:
    code = "from sftplan.facts.resolve import resolve_model\nresolve_model('gpt2-large')"

    assert imported_by(code, ("pydantic", *HEAVY)) == set()


def _silenced(code: str) -> str:
    body = "\n".join(f"    {line}" for line in code.splitlines())
    return f"with contextlib.redirect_stdout(io.StringIO()):\n{body}"

"""The verification that lies beside a plan's file, if it is of this very plan and came out well."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sftplan.errors import UsageError
from sftplan.plan.file import plan_sha256, read_json
from sftplan.plan.record import Plan  # noqa: TC001

FORMAT = "sftplan.verification"


def verification_file(plan_path: str | Path) -> Path:
    """Where `verify` leaves what it found.

    >>> verification_file("runs/plan.json").as_posix()
    'runs/plan.verification.json'
    """
    path = Path(plan_path)
    return path.with_name(f"{path.stem}.verification.json")


def verification_beside(plan: Plan, plan_path: str | Path) -> dict[str, Any] | None:
    """A good verification on a GPU of this plan; None where there is none, or of another plan."""
    path = verification_file(plan_path)
    if not path.is_file():
        return None
    try:
        _, found = read_json(path)
    except UsageError:
        return None  # half a file is no verification: verify again
    same = found.get("format") == FORMAT and found.get("plan_sha256") == plan_sha256(plan)
    return found if same and found.get("ok") is True and found.get("mode") == "gpu" else None

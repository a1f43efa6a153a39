"""Where the user's own files are: profiles and calibrations, and what is kept between runs."""

from __future__ import annotations

import os
from pathlib import Path

FOLDER_VARIABLE = "SFTPLAN_CONFIG_DIR"


def config_folder() -> Path | None:
    """`$SFTPLAN_CONFIG_DIR`, else `sftplan` under `$XDG_CONFIG_HOME` or `~/.config`; None without a home."""
    own = os.environ.get(FOLDER_VARIABLE, "")
    if own:
        return Path(own).expanduser()
    configured = os.environ.get("XDG_CONFIG_HOME", "")
    try:
        base = Path(configured) if Path(configured).is_absolute() else Path.home() / ".config"
    except RuntimeError:
        return None
    return base / "sftplan"


def cache_folder() -> Path:
    """Where what can be made again lies: `sftplan` under `$XDG_CACHE_HOME` or `~/.cache`."""
    home = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(home).expanduser() / "sftplan"

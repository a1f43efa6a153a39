"""Python's cycle collector, asked to come less often while many small objects are made."""

from __future__ import annotations

import gc
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

ALLOCATIONS = 50_000  # between collections instead of Python's 700: a search makes millions


@contextmanager
def seldom_collected() -> Iterator[None]:
    """Tapes free themselves by reference counts; looking for cycles in them was a tenth of a search."""
    before = gc.get_threshold()
    gc.set_threshold(max(ALLOCATIONS, before[0]), *before[1:])
    try:
        yield
    finally:
        gc.set_threshold(*before)

"""Bytes, times and counts as people write and read them. Inside, everything is in base units."""

from __future__ import annotations

import math
import re

KIB = 1024
MIB = 1024 * KIB
GIB = 1024 * MIB

_FACTORS = {
    "": 1, "B": 1,
    "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12,
    "KIB": KIB, "MIB": MIB, "GIB": GIB, "TIB": 1024 * GIB,
}  # fmt: skip
_COUNTS = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}
_QUANTITY = re.compile(r"\s*(\d+(?:\.\d+)?(?:e\d+)?)\s*([a-zA-Z]*)\s*", re.IGNORECASE)


def _parse(text: str, factors: dict[str, int], what: str) -> int:
    match = _QUANTITY.fullmatch(text)
    if match is None or match[2].upper() not in factors:
        message = f"{text!r} is not {what}"
        raise ValueError(message)
    value = float(match[1]) * factors[match[2].upper()]
    if not math.isfinite(value):
        message = f"{text!r} is not {what}"
        raise ValueError(message)
    return round(value)


def parse_bytes(text: str) -> int:
    """Bytes from text; GiB is 1024³ and GB is 1000³.

    >>> parse_bytes("24GiB"), parse_bytes("80 GB"), parse_bytes("512")
    (25769803776, 80000000000, 512)
    """
    return _parse(text, _FACTORS, "an amount of memory such as 24GiB")


def parse_count(text: str) -> int:
    """A count from text.

    >>> parse_count("20M"), parse_count("1.5B"), parse_count("4096")
    (20000000, 1500000000, 4096)
    """
    return _parse(text, _COUNTS, "a count such as 20M")


def format_gib(num_bytes: float) -> str:
    """GiB with two decimals, without the unit: a table names its unit once.

    >>> format_gib(48_496_875_520)
    '45.17'
    """
    return f"{num_bytes / GIB:,.2f}"


def format_count(count: float) -> str:
    """A count to three digits with its SI suffix.

    >>> format_count(774_030_080), format_count(512), format_count(5.2e9)
    ('774 M', '512', '5.20 B')
    """
    for factor, suffix in ((1e12, " T"), (1e9, " B"), (1e6, " M"), (1e3, " K")):
        if count >= factor:
            scaled = count / factor
            decimals = 2 if scaled < 10 else 1 if scaled < 100 else 0
            return f"{scaled:.{decimals}f}{suffix}"
    return f"{count:g}"


def format_duration(seconds: float) -> str:
    """A time span in the two largest units that matter.

    >>> format_duration(0.0421), format_duration(6.53), format_duration(2000), format_duration(90_061)
    ('42.1 ms', '6.53 s', '33 min 20 s', '1 d 1 h')
    """
    if seconds < 1:
        return f"{seconds * 1e3:.3g} ms"
    if seconds < 60:
        return f"{seconds:.2f} s"
    total = round(seconds)
    for size, name, smaller, small_name in (
        (86_400, "d", 3_600, "h"),
        (3_600, "h", 60, "min"),
        (60, "min", 1, "s"),
    ):
        if total >= size:
            return f"{total // size} {name} {total % size // smaller} {small_name}"
    return f"{total} s"

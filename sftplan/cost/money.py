"""What a run costs: the price of every machine, for as long as it runs."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sftplan.facts.hardware import Hardware

SECONDS_PER_HOUR = 3600


def usd_per_hour(hardware: Hardware) -> float | None:
    """US dollars per hour of all machines together; None where no price is known."""
    price = hardware.usd_per_hour
    return None if price is None else price * hardware.num_nodes


def run_usd(hardware: Hardware, seconds: float) -> float | None:
    """US dollars for `seconds` of all machines.

    Eight H100 at 55.04 USD/h for 30 minutes are 27.52 USD: machines are rented whole, so GPUs that
    a plan leaves idle are paid for too.
    """
    price = usd_per_hour(hardware)
    return None if price is None else price * seconds / SECONDS_PER_HOUR


def usd_per_million_tokens(hardware: Hardware, tokens_per_s: float) -> float | None:
    """US dollars per million tokens at a steady rate; None without a price or without a rate."""
    price = usd_per_hour(hardware)
    if price is None or tokens_per_s <= 0:
        return None
    return price / SECONDS_PER_HOUR / tokens_per_s * 1e6

"""Machines that clouds rent out: one CSV file per cloud, one row per machine."""

from __future__ import annotations

import csv
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path  # noqa: TC003 - a cached function's argument

from sftplan.facts.hardware import Hardware, Host, Offer
from sftplan.units import GIB


@dataclass(frozen=True, slots=True, kw_only=True)
class OfferRow:
    """One row as it stands in the file; prices are of the whole machine."""

    name: str  # cloud/instance
    gpu: str  # name of a GPU profile
    num_gpus: int
    num_cpus: int | None
    host_memory_bytes: int | None
    usd_per_hour: float
    price_as_of: str
    offer: Offer


@lru_cache(maxsize=64)
def read_offers(path: Path) -> dict[str, OfferRow]:
    """The offers of one cloud by name, in the order of the file."""
    with path.open(encoding="utf-8", newline="") as file:
        return {row["name"]: _row(row) for row in csv.DictReader(file)}


def _row(row: dict[str, str]) -> OfferRow:
    cloud, _, instance = row["name"].partition("/")
    memory, cpus, spot = row["host_memory_gib"], row["num_cpus"], row["spot_usd_per_hour"]
    return OfferRow(
        name=row["name"],
        gpu=row["gpu"],
        num_gpus=int(row["num_gpus"]),
        num_cpus=int(cpus) if cpus else None,
        host_memory_bytes=round(float(memory) * GIB) if memory else None,
        usd_per_hour=float(row["usd_per_hour"]),
        price_as_of=row["as_of"],
        offer=Offer(
            cloud=cloud,
            instance=instance,
            region=row["region"],
            spot_usd_per_hour=float(spot) if spot else None,
            tier=row["tier"],
            unverified=row["unverified"] == "yes",
            source=row["source"],
            note=row["note"] or None,
        ),
    )


def offered_hardware(row: OfferRow, profile: Hardware) -> Hardware:
    """The machine of an offer; `profile` tells what its GPUs are."""
    notes = profile.notes
    if row.offer.tier != "catalog":
        notes += (f"{row.name}: the price is from secondary tables, not from the cloud's own list",)
    if row.offer.unverified:
        notes += (f"{row.name}: unverified ({row.offer.note})",)
    return Hardware(
        name=row.name,
        gpu=profile.gpu,
        rates=profile.rates,
        gpus_per_node=row.num_gpus,
        host=Host(memory_bytes=row.host_memory_bytes, num_cpus=row.num_cpus),
        usd_per_hour=row.usd_per_hour,
        price_as_of=row.price_as_of,
        notes=notes,
        offer=row.offer,
        provenance=profile.provenance,
    )

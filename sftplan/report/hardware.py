"""Hardware on the screen and as JSON: every figure with the source it has."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from sftplan.facts.hardware import Source
from sftplan.units import format_gib

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from sftplan.facts.hardware import Hardware, Host

_FIGURES = (
    ("memory", "memory_bytes", "GiB", None),
    ("  of it unusable", "unusable_bytes", "GiB", None),
    ("memory bandwidth", "hbm_bytes_per_s", "GB/s", 1e9),
    ("bf16", "bf16_flops_per_s", "TFLOP/s", 1e12),
    ("fp16", "fp16_flops_per_s", "TFLOP/s", 1e12),
    ("tf32", "tf32_flops_per_s", "TFLOP/s", 1e12),
    ("fp32", "fp32_flops_per_s", "TFLOP/s", 1e12),
    ("NVLink", "nvlink_bytes_per_s", "GB/s", 1e9),
    ("host link", "pcie_bytes_per_s", "GB/s", 1e9),
    ("power", "tdp_w", "W", 1.0),
    ("  at the full clock", "power_flops_per_s", "TFLOP/s", 1e12),
)
_RATES = (
    ("products", "matmul_fraction", "of peak", 1.0),
    ("memory streams", "hbm_fraction", "of bandwidth", 1.0),
    ("all-reduce", "allreduce_fraction", "of the link", 1.0),
    ("all-gather", "allgather_fraction", "of the link", 1.0),
    ("reduce-scatter", "reducescatter_fraction", "of the link", 1.0),
    ("host copies", "pcie_fraction", "of the link", 1.0),
    ("context", "context_bytes", "GiB", None),
    ("idle device", "device_bytes", "GiB", None),
    ("dispatch", "dispatch_scale", "x reference", 1.0),
    ("  compiled", "compiled_dispatch_scale", "x reference", 1.0),
    ("host memory", "host_bytes_per_s", "GB/s", 1e9),
    ("AdamW on the host", "cpu_adam_bytes_per_s", "GB/s", 1e9),
)


def hardware_document(hardware: Hardware) -> dict[str, Any]:
    """Hardware as JSON: the fields of the facts, whose names carry their units."""
    document = asdict(hardware)
    return {
        "format": "sftplan.hardware",
        "format_version": 1,
        "name": document.pop("name"),
        "num_gpus": hardware.num_gpus,
        **document,
    }


def render_hardware(hardware: Hardware) -> str:
    """Hardware as text: what it is, its figures with their sources, and notes."""
    gpu, provenance = hardware.gpu, hardware.provenance
    lines = [f"{hardware.name}: {hardware.num_gpus} x {gpu.name} ({gpu.architecture})"]
    lines += render_host(hardware.host)
    if hardware.memory_taken_bytes:
        lines.append(f"  {format_gib(hardware.memory_taken_bytes)} GiB taken by other processes")
    lines += _price(hardware)
    lines += ["", "One GPU"]
    lines += _rows(_FIGURES, gpu, provenance.sources, provenance.unverified)
    if not gpu.bf16_native:
        lines.append("    bf16 is emulated: plan fp16")
    lines += ["", "What software reaches"]
    lines += _rows(_RATES, hardware.rates, hardware.rates.sources, ())
    if hardware.calibration is not None:
        lines.append(f"    calibrated {hardware.calibration}")
    if provenance.as_of:
        confidence = f", confidence {provenance.confidence}" if provenance.confidence else ""
        lines += ["", f"Figures as of {provenance.as_of}{confidence}"]
    lines += [f"    from {reference}" for reference in provenance.references]
    notes = (*hardware.notes, *provenance.notes)
    lines += ["", "Notes", *(f"    {note}" for note in notes)] if notes else []
    return "\n".join(lines)


def render_host(host: Host) -> list[str]:
    """The host in one line; no line where nothing is known."""
    known = []
    if host.memory_bytes is not None:
        known.append(f"{format_gib(host.memory_bytes)} GiB of host memory")
    if host.num_cpus is not None:
        known.append(f"{host.num_cpus} processors")
    return [f"  {', '.join(known)}"] if known else []


def _price(hardware: Hardware) -> list[str]:
    if hardware.usd_per_hour is None:
        return []
    per_gpu = hardware.usd_per_hour / hardware.gpus_per_node
    lines = [f"  ${hardware.usd_per_hour:.2f} per hour, ${per_gpu:.2f} per GPU"]
    offer = hardware.offer
    if offer is None:
        return lines
    if offer.spot_usd_per_hour is not None:
        lines.append(f"  ${offer.spot_usd_per_hour:.2f} per hour on the spot market")
    mark = ", unverified" if offer.unverified else ""
    lines.append(f"  {offer.region}; price of {hardware.price_as_of}, {offer.tier}{mark}")
    lines.append(f"  from {offer.source}")
    return lines + ([f"  {offer.note}"] if offer.note else [])


def _rows(
    figures: Sequence[tuple[str, str, str, float | None]],
    values: object,
    sources: Mapping[str, Source],
    unverified: Sequence[str],
) -> list[str]:
    lines = []
    for label, key, unit, scale in figures:
        value = getattr(values, key)
        if value is None:
            continue
        shown = format_gib(value) if scale is None else f"{value / scale:,.4g}"
        if scale is not None and value / scale >= 10_000:
            shown = f"{value / scale:,.0f}"
        source = sources.get(key, Source.ASSUMED).value
        mark = "  unverified" if key in unverified else ""
        lines.append(f"    {label:<18}{shown:>10} {unit:<13} {source}{mark}".rstrip())
    return lines


def render_profiles(profiles: Sequence[Hardware], offers: Sequence[Hardware]) -> str:
    """All GPU profiles, then all offers; `*` marks what is unverified."""
    width = max(len(each.name) for each in (*profiles, *offers)) + 2
    lines = [f"{'GPU':<{width}}{'GiB':>8}{'TFLOP/s':>9}{'GB/s':>7}  confidence"]
    for each in profiles:
        gpu = each.gpu
        rate = gpu.bf16_flops_per_s or gpu.fp16_flops_per_s or gpu.fp32_flops_per_s
        mark = "*" if each.provenance.unverified else ""
        confidence = each.provenance.confidence or "-"
        lines.append(
            f"{each.name:<{width}}{format_gib(gpu.memory_bytes):>8}{rate / 1e12:>9.1f}"
            f"{gpu.hbm_bytes_per_s / 1e9:>7.0f}  {confidence}{mark}"
        )
    lines += ["", f"{'Offer':<{width}}{'GPUs':>5}  {'GPU':<24}{'USD/h':>8}  as of"]
    for each in offers:
        mark = "*" if each.offer is not None and each.offer.unverified else ""
        lines.append(
            f"{each.name:<{width}}{each.gpus_per_node:>5}  {each.gpu.name:<24}"
            f"{each.usd_per_hour or 0:>8.2f}  {each.price_as_of}{mark}"
        )
    lines += ["", "TFLOP/s dense in bf16 (fp16 where bf16 is emulated); * has unverified figures"]
    return "\n".join(lines)

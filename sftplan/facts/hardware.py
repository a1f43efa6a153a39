"""GPUs, hosts and offers: what a step has to run on. Rates are per GPU and in one direction."""

from __future__ import annotations

from collections.abc import Mapping  # noqa: TC003 - the file border resolves it
from dataclasses import dataclass, field
from enum import StrEnum


class Source(StrEnum):
    """Where a figure is from."""

    FORMULA = "formula"
    DATASHEET = "datasheet"
    MEASURED = "measured"
    ASSUMED = "assumed"


@dataclass(frozen=True, slots=True, kw_only=True)
class Gpu:
    """One GPU model.

    A rate that the part does not have is None; `memory_bytes` as the driver shows it.
    """

    name: str
    nvml_name: str
    vendor: str
    architecture: str
    compute_capability: float | None
    memory_bytes: int
    hbm_bytes_per_s: float
    bf16_flops_per_s: float | None  # dense, fp32 accumulation
    fp16_flops_per_s: float | None
    tf32_flops_per_s: float | None
    fp32_flops_per_s: float  # without tensor cores
    nvlink_bytes_per_s: float | None  # all links, one direction
    pcie_bytes_per_s: float  # host link, one direction
    tdp_w: float | None = None
    # FLOP/s on tensor cores that the power limit allows at the highest clock (cost/power.py).
    power_flops_per_s: float | None = None
    bf16_native: bool = True
    # What PyTorch's total lacks of `memory_bytes`. `Rates.device_bytes` is the same memory, seen as
    # used on an idle device: take the larger, never the sum.
    unusable_bytes: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Rates:
    """What software reaches on a GPU and its host, as shares of the datasheet or in seconds.

    `sources` tells for each field where its value is from.
    """

    matmul_fraction: float  # large bf16 products over the dense peak
    hbm_fraction: float  # streaming kernels over the datasheet bandwidth
    context_bytes: int  # driver context and loaded kernels of one process
    device_bytes: int  # what the idle device already shows as used
    dispatch_scale: float  # host time per operation, relative to the measured reference host
    allreduce_fraction: float  # bus bandwidth of a large all-reduce over the link's
    pcie_fraction: float  # pinned copies over the host link's
    host_bytes_per_s: float  # streaming bandwidth of host memory
    compiled_dispatch_scale: float = 1.0  # the same of a call of a compiled block
    allgather_fraction: float | None = None  # the same of an all-gather; None: as an all-reduce
    reducescatter_fraction: float | None = None  # and of a reduce-scatter
    cpu_adam_bytes_per_s: float | None = None  # AdamW on the host, all cores; None: not measured
    sources: Mapping[str, Source] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Host:
    """The machine around the GPUs; None where a profile does not know."""

    memory_bytes: int | None = None
    num_cpus: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Provenance:
    """Where the figures of a GPU are from, and how far to trust them.

    `sources` has one entry per figure of `Gpu`; `unverified` names those without a source that
    could be read again.
    """

    as_of: str | None = None
    confidence: str | None = None  # "high", "medium" or "low"
    references: tuple[str, ...] = ()
    sources: Mapping[str, Source] = field(default_factory=dict)
    unverified: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()  # where sources disagree, and traps


@dataclass(frozen=True, slots=True, kw_only=True)
class Offer:
    """A machine that a cloud rents out; its price on demand is `Hardware.usd_per_hour`."""

    cloud: str
    instance: str
    region: str
    spot_usd_per_hour: float | None = None  # of the whole machine
    tier: str | None = None  # "catalog": a cloud's price list; "secondary": tables that others keep
    unverified: bool = False
    source: str | None = None
    note: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Hardware:
    """What a plan is made for: `num_nodes` machines of `gpus_per_node` equal GPUs."""

    name: str
    gpu: Gpu
    rates: Rates
    gpus_per_node: int = 1
    num_nodes: int = 1
    host: Host = field(default_factory=Host)
    memory_taken_bytes: int = 0  # by other processes, on the fullest GPU
    usd_per_hour: float | None = None  # of one whole machine, all its GPUs
    price_as_of: str | None = None
    internode_bytes_per_s: float | None = None  # per GPU, one direction
    notes: tuple[str, ...] = ()
    offer: Offer | None = None
    calibration: str | None = None  # when, with which versions and where, if rates were measured
    provenance: Provenance = field(default_factory=Provenance)

    @property
    def num_gpus(self) -> int:
        """GPUs over all nodes."""
        return self.gpus_per_node * self.num_nodes

"""What a plan has to say about itself: warnings, and where its figures are from."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sftplan.facts.hardware import Source
from sftplan.facts.params import num_parameters
from sftplan.facts.strategy import Attention, Offload, Optimizer, Precision
from sftplan.units import format_gib

if TYPE_CHECKING:
    from collections.abc import Iterable

    from sftplan.facts.hardware import Gpu, Hardware, Host
    from sftplan.facts.model import Anatomy, ModelShape
    from sftplan.facts.strategy import Strategy
    from sftplan.facts.workload import Workload

# What the step time is computed from, beside the datasheet.
_TIME_RATES = ("matmul_fraction", "hbm_fraction", "dispatch_scale")
TRACED = "traced"  # from the real model on fake tensors
# A chain of figures is as sure as its least sure one.
_SURENESS = (Source.MEASURED, Source.FORMULA, Source.DATASHEET, Source.ASSUMED)


def least_sure(sources: Iterable[Source]) -> Source:
    """The source of a figure that was computed from others.

    >>> least_sure([Source.MEASURED, Source.ASSUMED, Source.DATASHEET])
    <Source.ASSUMED: 'assumed'>
    """
    return max(sources, key=_SURENESS.index)


def find_sources(hardware: Hardware, model: ModelShape) -> dict[str, str]:
    """Where each figure of the plan is from, by its key in the plan."""
    rates = hardware.rates.sources
    memory = Source.FORMULA if model.anatomy is None else TRACED
    time = [rates.get(name, Source.ASSUMED) for name in _TIME_RATES]
    sources: dict[str, str] = {
        "inputs.model": memory,
        "inputs.hardware.gpu": Source.DATASHEET,
        "memory.gpu.peak_allocated_bytes": memory,
        "memory.gpu.peak_reserved_bytes": memory,
        "memory.gpu.context_bytes": rates.get("context_bytes", Source.ASSUMED),
        "memory.host.peak_bytes": Source.FORMULA,
        "compute": Source.FORMULA,
        "time.step_s": least_sure(time),
        "time.startup_s": Source.ASSUMED,
    }
    if hardware.usd_per_hour is not None:
        sources["cost.usd_per_hour"] = Source.DATASHEET
    if hardware.calibration is not None:
        sources["calibration"] = hardware.calibration
    sources |= {f"inputs.hardware.rates.{name}": source for name, source in rates.items()}
    return {key: str(source) for key, source in sources.items()}


# torch/_inductor/config.py, decide_compile_threads: min(32, CPUs). 2 ranks of gpt2-large beside 2 x H200 and
# 32 CPUs held 3.85 GB more than uncompiled (2026-11-24).
COMPILE_WORKERS = (
    "host memory without inductor's compile workers: up to 32 a rank while the first step compiles, "
    "about 60 MB each; TORCHINDUCTOR_COMPILE_THREADS limits them"
)


def find_assumptions(model: ModelShape, strategy: Strategy, num_gpus: int) -> list[str]:
    """What the plan leaves out, or does not know of a model that is not modelled."""
    apart = []
    if strategy.compile and (num_gpus > 1 or strategy.offload is not Offload.NONE):
        apart = [COMPILE_WORKERS]
    return apart if model.anatomy is None else [*apart, _not_modelled(model, model.anatomy)]


def _not_modelled(model: ModelShape, anatomy: Anatomy) -> str:
    found = (
        f"{model.model_type} is not modelled: planned from the passes of transformers' own model, traced; "
        "searched without compiling, packing, ZeRO and offload"
    )
    if anatomy.idle_parameters or not anatomy.alike:
        found += ", in bf16-master alone"
    if not anatomy.plain_head:
        found += ", with transformers' own loss"
    return found


def _attention_warnings(model: ModelShape, strategy: Strategy) -> list[str]:
    shipped = model.attention_dropout
    if not shipped or strategy.attention_dropout == "model":
        return []
    return [
        f"attention dropout is {strategy.attention_dropout:g}, the configuration of {model.name} "
        f"says {shipped:g}: `--attention-dropout model` keeps it"
        + (" and rules out varlen" if strategy.attention is Attention.VARLEN else "")
    ]


def _data_warnings(model: ModelShape, workload: Workload) -> list[str]:
    warnings = []
    lengths = workload.lengths
    if lengths is not None and lengths.estimated:
        warnings.append(
            f"no tokenizer of {model.name} at hand: token counts of {lengths.source} are estimated, "
            "`--tokenizer DIR` counts them"
        )
    if lengths is not None and lengths.num_dropped:
        warnings.append(
            f"{lengths.num_dropped} of {lengths.num_dropped + lengths.num_examples} examples will "
            "be dropped: `sftplan data inspect` shows why"
        )
    if workload.num_examples is not None:
        from sftplan.data.lengths import generalisation_ratio

        _, warning = generalisation_ratio(workload.num_examples, num_parameters(model))
        warnings += [warning] if warning else []
    return warnings


def host_warnings(needed_bytes: int | None, host: Host) -> list[str]:
    """What an offload that the GPU fits would need of a host that has less."""
    if needed_bytes is None or host.memory_bytes is None:
        return []
    return [
        f"offload fits the GPU but needs {format_gib(needed_bytes)} GiB of host memory per node, "
        f"{format_gib(host.memory_bytes)} GiB are there"
    ]


def find_warnings(model: ModelShape, gpu: Gpu, strategy: Strategy, workload: Workload) -> list[str]:
    """What the user should know before spending money, each actionable."""
    warnings = _attention_warnings(model, strategy) + _data_warnings(model, workload)
    if strategy.precision.value.startswith("bf16") and not gpu.bf16_native:
        warnings.append(
            f"{gpu.name} has no bf16 of its own, products are emulated: `--precision fp16-mixed`"
        )
    if strategy.precision is Precision.BF16_TRUE:
        warnings.append("bf16-true rounds small updates away: bf16-master keeps fp32 weights")
    if strategy.optimizer is Optimizer.ADAMW_8BIT:
        warnings.append("8-bit moments change the training: adamw keeps them in full")
    return warnings

"""Hand-made plans for the screens and the file: their tests need no cost model."""

from __future__ import annotations

from dataclasses import replace

import pytest

import sftplan.api
from sftplan.facts.hardware import Gpu, Host, Rates, Source
from sftplan.facts.strategy import (
    Allocator,
    Attention,
    Checkpointing,
    Loss,
    Offload,
    Optimizer,
    Precision,
)
from sftplan.plan.record import Launch, Plan, Reason
from sftplan.plan.record_costs import (
    Compute,
    Cost,
    GpuMemory,
    HostMemory,
    KnobValue,
    Memory,
    Neighbour,
    NeighbourMemory,
    NeighbourTime,
    Remedy,
    Time,
    UsedBytes,
    Verdict,
)
from sftplan.plan.record_inputs import (
    HardwareFacts,
    Inputs,
    ModelFacts,
    StrategyRecord,
    WorkloadFacts,
)
from sftplan.train.demo import DEMO_KNOBS, DEMO_SEQ_LEN, write_demo_model
from sftplan.units import GIB


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is tokenised is kept with the tests, not among the user's caches."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "cache"))


H200 = Gpu(
    name="H200-SXM",
    nvml_name="NVIDIA H200",
    vendor="nvidia",
    architecture="Hopper",
    compute_capability=9.0,
    memory_bytes=150_754_820_096,  # 143,771 MiB
    hbm_bytes_per_s=4.8e12,
    bf16_flops_per_s=989e12,
    fp16_flops_per_s=989e12,
    tf32_flops_per_s=494e12,
    fp32_flops_per_s=67e12,
    nvlink_bytes_per_s=450e9,
    pcie_bytes_per_s=64e9,
    tdp_w=700.0,
)
RATES = Rates(
    matmul_fraction=0.75,
    hbm_fraction=0.9,
    context_bytes=600 * 2**20,
    device_bytes=0,
    dispatch_scale=1.0,
    allreduce_fraction=0.8,
    pcie_fraction=0.8,
    host_bytes_per_s=200e9,
    sources={"matmul_fraction": Source.MEASURED, "hbm_fraction": Source.ASSUMED},
)
MODEL = ModelFacts(
    name="gpt2-large",
    source="builtin",
    hub_id="openai-community/gpt2-large",
    model_type="gpt2",
    num_parameters=774_030_080,
    num_trainable=774_030_080,
    num_layers=36,
    hidden_size=1280,
    intermediate_size=5120,
    num_heads=20,
    num_kv_heads=20,
    head_dim=64,
    vocab_size=50257,
    max_positions=1024,
    tied_embeddings=True,
    shape_sha256="0" * 64,
)
HARDWARE = HardwareFacts(
    name="h200-sxm",
    num_gpus=1,
    gpus_per_node=1,
    num_nodes=1,
    gpu=H200,
    host=Host(),
    rates=RATES,
    usd_per_hour=3.5,
    price_as_of="2026-08-01",
)
WORKLOAD = WorkloadFacts(
    seq_len=1024,
    global_batch=64,
    tokens_per_step=65536.0,
    examples_per_step=64.0,
    epochs=1.0,
    num_tokens=20_000_000,
)
STRATEGY = StrategyRecord(
    precision=Precision.BF16_MIXED,
    zero=0,
    offload=Offload.NONE,
    checkpointing=Checkpointing.NONE,
    attention=Attention.SDPA,
    loss=Loss.RESPONSE,
    packing=False,
    compile=True,
    micro_batch=16,
    accumulation=4,
    optimizer=Optimizer.ADAMW,
    allocator=Allocator.EXPANDABLE,
    attention_dropout=0.0,
    max_grad_norm=1.0,
    pinned=["attention"],
)
GPU_MEMORY = GpuMemory(
    peak_allocated_bytes=60 * GIB,
    peak_reserved_bytes=62 * GIB,
    context_bytes=GIB // 2,
    used_bytes=62 * GIB + GIB // 2,
    capacity_bytes=140 * GIB,
    headroom_bytes=140 * GIB - 62 * GIB - GIB // 2,
    peak_at="loss backward",
    by_category={
        "weights": 3 * GIB,
        "gradients": 0,
        "optimizer": 6 * GIB,
        "activations": 41 * GIB,
        "logits": 9 * GIB,
        "temporary": GIB,
    },
)
TIME = Time(
    step_s=1.0,
    compute_s=0.55,
    memory_s=0.4,
    dispatch_s=0.02,
    communication_s=0.0,
    offload_s=0.0,
    optimizer_s=0.03,
    tokens_per_s=65536.0,
    mfu_fraction=0.345,
    num_steps=306,
    startup_s=40.0,
    total_s=346.0,
)


def neighbour(
    change: dict[str, KnobValue],
    gib: int,
    step_s: float | None,
    verdict: Verdict = "fits",
    reason: str | None = None,
) -> Neighbour:
    """One decision changed."""
    return Neighbour(
        change=change,
        memory=NeighbourMemory(gpu=UsedBytes(used_bytes=gib * GIB)),
        time=NeighbourTime(step_s=step_s),
        verdict=verdict,
        reason=reason,
    )


FITTING = Plan(
    created_by="sftplan 0.1.0",
    command=["sftplan", "plan", "--model", "gpt2-large", "--seq", "1024"],
    inputs=Inputs(
        model=MODEL,
        hardware=HARDWARE,
        workload=WORKLOAD,
        margin_fraction=0.05,
        minimize="time",
    ),
    strategy=STRATEGY,
    fits=True,
    verdict="fits",
    memory=Memory(
        gpu=GPU_MEMORY,
        host=HostMemory(peak_bytes=4 * GIB, capacity_bytes=None, by_category={"process": 4 * GIB}),
    ),
    compute=Compute(
        flops_per_token=5_210_000_000,
        linear_flops_per_token=4_644_000_000,
        attention_flops_per_token=566_000_000,
        step_flops=341_442_560_000_000,
    ),
    time=TIME,
    cost=Cost(usd=346 / 3600 * 3.5, usd_per_hour=3.5, price_as_of="2026-08-01"),
    neighbours=[
        neighbour({"checkpointing": "selective"}, 40, 1.08),
        neighbour({"micro_batch": 8, "accumulation": 8}, 34, 1.06),
        neighbour({"compile": False}, 75, 1.4),
        neighbour({"micro_batch": 64, "accumulation": 1}, 230, None, "does_not_fit"),
        neighbour({"offload": "optimizer"}, 57, 1.9, "fits", "waits for the host's AdamW"),
    ],
    why=[Reason(choice="precision bf16-mixed", reason="fp32 weights, products on tensor cores")],
    warnings=["attention dropout is 0, the configuration of gpt2-large says 0.1"],
    assumptions=["global batch 64: pin it with --global-batch"],
    sources={"memory": "formula", "time": "datasheet", "rates.matmul_fraction": "measured"},
    launch=Launch(
        argv=["python", "-m", "sftplan.train"],
        env={"PYTORCH_ALLOC_CONF": "expandable_segments:True"},
    ),
)

NOT_FITTING = replace(
    FITTING,
    fits=False,
    verdict="does_not_fit",
    memory=replace(
        FITTING.memory,
        gpu=replace(GPU_MEMORY, capacity_bytes=24 * GIB, headroom_bytes=-38 * GIB - GIB // 2),
    ),
    neighbours=[],
    remedies=[Remedy(change={"gpus": 4}, used_bytes=21 * GIB, verdict="fits")],
    cost=Cost(usd=None, usd_per_hour=None, price_as_of=None),
)


@pytest.fixture
def fitting() -> Plan:
    """A plan that fits: gpt2-large on one H200."""
    return FITTING


@pytest.fixture
def not_fitting() -> Plan:
    """A plan for which nothing fits."""
    return NOT_FITTING


@pytest.fixture(scope="session")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Plan:
    """A plan of the demo's model, without statistics of any data."""
    folder = tmp_path_factory.mktemp("model")
    write_demo_model(folder)
    knobs = {name: value for name, value in DEMO_KNOBS.items() if name not in ("data", "epochs")}
    return sftplan.api.plan(
        model=str(folder), seq_len=DEMO_SEQ_LEN, hardware="h200-sxm", gpus=1, command=["x"], **knobs
    )


@pytest.fixture
def one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")

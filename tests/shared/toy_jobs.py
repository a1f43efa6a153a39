"""Searches of all kinds, drawn."""

from __future__ import annotations

from functools import partial
from typing import Any

from hypothesis import strategies as st
from toy_search import Job, ToyCoster, hardware, workload

from sftplan.facts.strategy import (
    Allocator,
    Checkpointing,
    Loss,
    Offload,
    Precision,
)

VALUES: dict[str, st.SearchStrategy[Any]] = {
    "precision": st.sampled_from(Precision),
    "zero": st.sampled_from([0, 1, 2, 3]),
    "checkpointing": st.sampled_from(Checkpointing),
    "loss": st.sampled_from(Loss),
    "compile": st.booleans(),
    "micro_batch": st.sampled_from([1, 2, 4]),
    "accumulation": st.sampled_from([1, 2]),
    "allocator": st.sampled_from(Allocator),
    "offload": st.just(Offload.NONE),
}


MULTIPLES = st.sampled_from([1, 2, 6, 7, 16])


@st.composite
def jobs(draw: st.DrawFn) -> Job:
    """Small jobs of all kinds."""
    gpus = draw(st.sampled_from([1, 2, 8]))
    names = draw(st.sets(st.sampled_from(sorted(VALUES)), max_size=3))
    pins = {name: draw(VALUES[name]) for name in sorted(names)}
    unit = gpus * pins.get("micro_batch", 1) * pins.get("accumulation", 1)
    batch = unit if {"micro_batch", "accumulation"} <= names else unit * draw(MULTIPLES)
    floats = partial(st.floats, allow_nan=False)
    selective = draw(floats(0, 0.2))
    toy = ToyCoster(
        workload=workload(batch, data=draw(st.booleans())),
        num_gpus=gpus,
        weights_gib=draw(floats(0.1, 4)),
        row_gib=draw(floats(0.05, 6)),
        logits_gib=draw(floats(0, 2)),
        recompute=(0.0, selective, selective + draw(floats(0, 0.3))),
        compiled=draw(floats(0.5, 1.2)),
        mixed=draw(floats(0.9, 1.2)),
        dispatch_s=draw(floats(0, 0.2)),
        chunk=draw(floats(0, 0.05)),
        stage_s=draw(st.tuples(*[floats(0, 0.5)] * 4)),
        excess=(draw(floats(1, 1.2)),),
        startup_s=draw(floats(0, 100)),
    )
    return Job(
        machine=hardware(draw(floats(2, 100)), gpus=gpus),
        toy=toy,
        pins=pins,
        margin=draw(st.sampled_from([0.0, 0.05, 0.2])),
    )

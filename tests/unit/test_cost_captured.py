"""Laws of passes that are CUDA graphs: what the capture changes of a job's events, and what it must not."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

from hypothesis import given, settings
from hypothesis import strategies as st

from sftplan.cost.captured import PASSES, as_captured
from sftplan.cost.memory import exact_peaks
from sftplan.cost.timeline import last_step_start
from sftplan.facts.catalogue import builtin
from sftplan.facts.strategy import Attention, Loss, Precision, Strategy
from sftplan.step.batch import Batch
from sftplan.step.repeat import Events, stretches
from sftplan.step.simulate import simulate

strategies = st.builds(
    Strategy,
    precision=st.sampled_from([Precision.BF16_MASTER, Precision.BF16_MIXED]),
    attention=st.just(Attention.VARLEN),
    packing=st.just(True),
    loss=st.sampled_from([Loss.RESPONSE, Loss.CHUNKED]),
    accumulation=st.integers(1, 3),
    compile=st.booleans(),
)


def job(strategy: Strategy, name: str = "gpt2") -> Events:
    """The first two steps of three layers."""
    model = replace(builtin(name), num_layers=3)
    tape = simulate(model, strategy, Batch(rows=2, length=256, num_targets=300))
    return Events(tape.events, tape.sizes, tape.kinds, tape.marks)


@settings(max_examples=12, deadline=None)
@given(strategies, st.sampled_from(["gpt2", "llama-3.2-1b"]))
def test_a_capture_moves_memory_and_makes_none(strategy: Strategy, name: str) -> None:
    plain = job(strategy, name)
    graphs = as_captured(plain)
    events = graphs.events
    assert max(Counter(events.events).values()) == 1  # everything is born once, and dies once
    born: set[int] = set()
    for event in events.events:
        assert event >= 0 or ~event in born
        born.add(event)
    assert [label for *_, label in stretches(events)] == [label for *_, label in stretches(plain)]
    one, other = (exact_peaks(plain, expandable=True, captured=c) for c in (False, True))
    later = sum(graphs.events.sizes[old] for old in set(workspaces(plain, "backward")))
    assert 0 <= one.allocated_bytes - other.allocated_bytes <= 1.01 * later
    if one.allocated_bytes == other.allocated_bytes:
        assert one.by_category == other.by_category


@settings(max_examples=12, deadline=None)
@given(strategies)
def test_only_passes_of_later_steps_have_a_pool_of_their_own(strategy: Strategy) -> None:
    plain = job(strategy)
    graphs = as_captured(plain)
    first = {e for e in plain.events[: last_step_start(plain)] if e >= 0}
    assert not any(graphs.pools[storage] for storage in first)
    kinds = [graphs.events.kinds[n] for n, pool in enumerate(graphs.pools) if pool == PASSES]
    assert {"workspace", "activations", "gradients"} <= set(kinds)
    assert not {"weights", "optimizer"} & set(kinds)


def test_the_pool_is_empty_until_the_capture() -> None:
    graphs = as_captured(job(Strategy(attention=Attention.VARLEN, packing=True)))
    before = graphs.events.events[: graphs.emptied_at]
    assert PASSES not in {graphs.pools[storage] for storage in before if storage >= 0}
    assert PASSES in graphs.pools


def test_workspaces_are_taken_anew() -> None:
    events = job(Strategy(attention=Attention.VARLEN, packing=True))
    graphs = as_captured(events)
    before, after = (kinds.count("workspace") for kinds in (events.kinds, graphs.events.kinds))
    assert after == 2 * before > 0


def test_the_backward_pass_has_its_workspace_from_its_beginning_on() -> None:
    events = job(Strategy(attention=Attention.VARLEN, packing=True))
    graphs = as_captured(events).events
    begins = last_step_start(graphs)
    backward = next(
        p for p, label in graphs.marks if p > begins and label.partition(" ")[0] == "backward"
    )
    (old,) = workspaces(events, "backward")
    new = graphs.events[begins:].index(len(events.sizes) + workspaces(events, "").index(old))
    assert begins + new >= backward
    assert graphs.sizes[graphs.events[begins + new]] == events.sizes[old]


def workspaces(events: Events, phase: str) -> list[int]:
    """Those that a first step's phase had need of first; of any phase, without one."""
    return [
        event
        for begin, end, label in stretches(events)
        for event in events.events[begin:end]
        if event >= 0 and events.kinds[event] == "workspace" and label.startswith(phase)
    ]

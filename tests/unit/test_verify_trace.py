"""The trace without a GPU: it proves the tape, names what differs, and says what it cannot show."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import torch  # noqa: TID253 - the real model runs here

import sftplan.api
from sftplan.cli.main import run
from sftplan.cost.allocator import replay
from sftplan.cost.evaluate import Evaluator
from sftplan.data.demo import DEMO_FILE
from sftplan.errors import ExitCode, NotReadyError, UsageError
from sftplan.facts.catalogue import entries
from sftplan.facts.resolve import resolve_model
from sftplan.facts.strategy import Offload, Precision
from sftplan.plan.timeline import strategy_of, workload_of
from sftplan.step.chip import BEFORE_HOPPER, HOPPER
from sftplan.verify import measurement as keys
from sftplan.verify.trace.compare import differences
from sftplan.verify.trace.measure import COMPILED, SHARDED, measure_traced
from sftplan.verify.trace.run import recording, trace_of, trace_plan

if TYPE_CHECKING:
    from pathlib import Path

    from sftplan.plan.record import Plan
    from sftplan.step.repeat import Events
    from sftplan.verify.trace.run import Trace

LAYERS = {"n_layer": 3, "num_hidden_layers": 3, "layer_types": None}  # widths as published
FAMILIES = [
    "gpt2", "llama-3.2-1b", "qwen2.5-0.5b", "qwen3-0.6b", "mistral-7b", "gemma-2b", "opt-125m",
    "opt-350m", "pythia-160m", "phi-1.5",
]  # fmt: skip
KNOBS: dict[str, Any] = {
    "compile": False, "micro_batch": 2, "global_batch": 2, "attention": "sdpa", "packing": False,
    "loss": "response", "checkpointing": "none", "precision": "bf16-master",
}  # fmt: skip
STEPS: list[dict[str, Any]] = [
    {},
    {"precision": "fp32", "loss": "full"},
    {"precision": "bf16-mixed", "checkpointing": "full", "global_batch": 8},
    {"precision": "fp16-mixed", "checkpointing": "selective", "loss": "chunked"},
    {"precision": "bf16-true", "optimizer": "adamw-8bit", "attention": "eager"},
    {"packing": True, "precision": "fp32"},
    {"checkpointing": "full", "checkpointed_layers": 1},
    {
        "precision": "bf16-mixed",
        "checkpointing": "selective",
        "checkpointed_layers": 2,
        "global_batch": 4,
    },
]

CASES = [
    (name, knobs)
    for name in FAMILIES
    for knobs in STEPS
    # Of OPT's positions transformers makes no mask: launch finds it out and does not pack.
    if not (name.startswith("opt") and knobs.get("packing"))
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The configuration of a model of every family, with few layers."""
    made = {}
    for name in FAMILIES:
        config = dict(next(entry for entry in entries() if entry.name == name).config)
        config |= {key: value for key, value in LAYERS.items() if key in config}
        made[name] = tmp_path_factory.mktemp(name)
        (made[name] / "config.json").write_text(json.dumps(config))
    return made


def plan_of(folder: Path, **knobs: Any) -> Plan:
    return sftplan.api.plan(
        model=str(folder), seq_len=512, hardware="h200-sxm", gpus=1, command=["x"], **KNOBS | knobs
    )


def both(plan: Plan) -> tuple[Trace, Events]:
    """The trace of a plan's step and its tape."""
    model = resolve_model(plan.inputs.model.source)
    evaluator = Evaluator(model, workload_of(plan), num_gpus=1, gpus_per_node=1)
    tape = evaluator.events(strategy_of(plan.strategy), HOPPER)
    return trace_plan(plan, HOPPER), tape


@pytest.mark.parametrize(
    ("name", "knobs"),
    CASES,
    ids=lambda x: x if isinstance(x, str) else "-".join(map(str, x.values())),
)
def test_the_tape_allocates_what_the_real_model_allocates(
    folders: dict[str, Path], name: str, knobs: dict[str, Any]
) -> None:
    """A forgotten copy of a hidden state would be 0.1 % of the largest of them; what goes too late leaves gaps."""
    trace, tape = both(plan_of(folders[name], **knobs))
    for expandable, share in ((False, 0.01), (True, 0.06)):
        traced, modelled = (replay(x.events, x.sizes, expandable=expandable) for x in (trace, tape))
        reserved = modelled.peak_reserved_bytes
        assert reserved == pytest.approx(traced.peak_reserved_bytes, rel=share)
    # The last replay's, with expandable segments: the other allocator gives larger blocks than were asked for.
    assert modelled.peak_allocated_bytes == pytest.approx(traced.peak_allocated_bytes, rel=5e-4)


@pytest.mark.parametrize("loss", ["full", "response", "chunked"])
@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("prompts", [False, True])
def test_rows_of_data_have_the_shape_that_training_gives_them(
    folders: dict[str, Path], *, packing: bool, prompts: bool, loss: str
) -> None:
    trace, tape = both(
        plan_of(
            folders["gpt2"], packing=packing, loss=loss, train_on_prompt=prompts,
            data=str(DEMO_FILE), global_batch=8,
        )
    )  # fmt: skip
    traced, modelled = (replay(x.events, x.sizes, expandable=True) for x in (trace, tape))

    assert modelled.peak_allocated_bytes == pytest.approx(traced.peak_allocated_bytes, rel=5e-4)


@pytest.mark.parametrize("name", ["gpt2", "opt-125m"])
def test_varlen_attention_is_traced_by_its_own_operator(
    folders: dict[str, Path], name: str
) -> None:
    trace, tape = both(plan_of(folders[name], packing=True, attention="varlen"))
    traced, modelled = (replay(x.events, x.sizes, expandable=True) for x in (trace, tape))

    assert "torch_attn._varlen_attn_backward.default" in trace.makers
    assert modelled.peak_allocated_bytes == pytest.approx(traced.peak_allocated_bytes, rel=0.01)


@pytest.mark.parametrize("checkpointing", ["none", "full"])
def test_work_is_counted_once(folders: dict[str, Path], checkpointing: str) -> None:
    """FLOPs of the plan, but for the columns that pad the head's product."""
    plan = plan_of(
        folders["llama-3.2-1b"], checkpointing=checkpointing, loss="full", micro_batch=1,
        global_batch=4,
    )  # fmt: skip

    assert trace_plan(plan, HOPPER).step_flops == plan.compute.step_flops


def test_a_forgotten_storage_is_named(folders: dict[str, Path]) -> None:
    """A tape that forgets what SiLU keeps, and one that lets it live to the end."""
    trace, tape = both(plan_of(folders["llama-3.2-1b"]))
    same = [d for d in differences(trace, tape) if d.what.startswith("only")]
    number = max(n for n, maker in enumerate(trace.makers) if maker == "aten.silu.default")
    index = next(
        n for n in range(len(tape.sizes) - 1, 0, -1) if tape.sizes[n] == trace.sizes[number]
    )
    without = replace(
        tape, events=[event for event in tape.events if (event if event >= 0 else ~event) != index]
    )
    found = differences(trace, without)

    assert len([d for d in found if d.what == "only traced"]) > len(
        [d for d in same if d.what == "only traced"]
    )


def test_a_chip_without_cudnn_runs_the_flash_kernel(folders: dict[str, Path]) -> None:
    makers = set(trace_plan(plan_of(folders["gpt2"]), BEFORE_HOPPER).makers)

    assert "aten._scaled_dot_product_flash_attention.default" in makers
    assert not any("cudnn" in maker for maker in makers)


def test_a_gradient_is_added_in_place_where_nothing_else_holds_it() -> None:
    """x feeds two products: one gradient dies in the sum, unless a view of it keeps its base."""
    with recording(HOPPER) as recorder:
        x = torch.empty(64, 64, requires_grad=True)
        inner = x * 1.0
        recorder.mark("forward")
        loss = (inner.sin() + inner.cos()).sum()
        recorder.mark("backward")
        loss.backward()  # type: ignore[no-untyped-call]
        recorder.marks += [(0, "zero_grad"), (0, "zero_grad")]
        trace = trace_of(recorder)
    born = [event for event in trace.events if event >= 0]

    assert [trace.makers[n] for n in born].count("aten.add.Tensor") == 1  # only the forward's own


def test_nothing_of_the_stand_in_stays(folders: dict[str, Path]) -> None:
    attention, dropout = (
        torch.nn.functional.scaled_dot_product_attention,
        torch.nn.functional.dropout,
    )
    trace_plan(plan_of(folders["gpt2"], precision="bf16-mixed"), HOPPER)

    assert torch.nn.functional.scaled_dot_product_attention is attention
    assert torch.nn.functional.dropout is dropout
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.ones(2, dtype=torch.bfloat16).exp().dtype is torch.bfloat16


def test_what_cannot_be_traced_is_said_and_predicted_alike(folders: dict[str, Path]) -> None:
    plan = plan_of(folders["gpt2"])
    other = replace(
        plan,
        strategy=replace(plan.strategy, compile=True, zero=2, offload=Offload.OPTIMIZER),
    )
    found = measure_traced(other).measurement

    assert found.notes == (COMPILED, SHARDED)
    assert found.quantities[keys.ALLOCATED] == pytest.approx(
        found.instead[keys.ALLOCATED], rel=0.01
    )
    assert measure_traced(plan).measurement.notes == ()


def test_the_command_verifies_without_a_gpu(
    folders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "plan.json"
    assert run([
        "plan", "--model", str(folders["qwen3-0.6b"]), "--seq", "512", "--hardware", "h200-sxm",
        "--out", str(path), "--quiet",
    ]) == ExitCode.OK  # fmt: skip
    capsys.readouterr()

    assert run(["verify", str(path), "--no-gpu", "--diff", "--json"]) == ExitCode.OK
    found = json.loads(capsys.readouterr().out)
    assert found["mode"] == "trace"
    assert {row["quantity"] for row in found["rows"]} >= {keys.ALLOCATED, keys.RESERVED, keys.FLOPS}
    assert [phase["name"] for phase in found["phases"]] == ["forward", "backward", "optimizer"]
    assert run(["show", str(tmp_path / "plan.verification.json")]) == ExitCode.OK
    assert capsys.readouterr().out.startswith("Verified: the prediction holds")
    assert run(["verify", str(path), "--no-gpu"]) == ExitCode.OK
    assert "without it" in capsys.readouterr().out  # compiled blocks show only on a GPU


def test_experts_are_traced_where_fake_kernels_allow_it(tmp_path: Path) -> None:
    config = dict(next(entry for entry in entries() if entry.name == "qwen3-30b-a3b").config)
    (tmp_path / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 2}))
    trace, tape = both(plan_of(tmp_path))
    traced, modelled = (replay(x.events, x.sizes, expandable=True) for x in (trace, tape))

    assert modelled.peak_allocated_bytes == pytest.approx(traced.peak_allocated_bytes, rel=5e-4)
    with pytest.raises(NotReadyError, match="grouped products are bf16"):
        trace_plan(plan_of(tmp_path, precision="bf16-mixed"), HOPPER)


@pytest.mark.parametrize(
    ("options", "said"),
    [({"no_gpu": True, "steps": 3}, "--steps"), ({"diff": True}, "--no-gpu --diff")],
)
def test_options_that_do_not_go_together(
    folders: dict[str, Path], options: dict[str, Any], said: str
) -> None:
    with pytest.raises(UsageError) as caught:
        sftplan.api.verify(plan_of(folders["gpt2"]), **options)
    assert said in f"{caught.value.message} {caught.value.hint}"


def test_precisions_are_all_traced() -> None:
    assert {Precision(str(step.get("precision", "bf16-master"))) for step in STEPS} == set(
        Precision
    )

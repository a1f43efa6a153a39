"""Models whose family is not modelled: their traced passes agree with the tape's, and limits are said."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest

import sftplan.api
from sftplan.cli.main import run
from sftplan.data.demo import DEMO_FILE, DEMO_VOCAB_SIZE, demo_tokenizer
from sftplan.errors import ExitCode, NotReadyError, UsageError
from sftplan.facts import tracing
from sftplan.facts.captured import is_captured
from sftplan.facts.config import shape_from_config
from sftplan.facts.params import num_active_parameters, num_parameters
from sftplan.facts.profiles import load_hardware
from sftplan.facts.strategy import Attention, Checkpointing, Loss, Precision, Strategy
from sftplan.facts.unknown import traced_shape
from sftplan.facts.workload import Workload
from sftplan.plan.evaluator import make_evaluator
from sftplan.verify.trace.measure import measure_traced

if TYPE_CHECKING:
    from pathlib import Path

GPT2: dict[str, object] = {
    "model_type": "gpt2", "n_embd": 256, "n_layer": 9, "n_head": 4, "vocab_size": 5000,
}  # fmt: skip
LLAMA: dict[str, object] = {
    "model_type": "llama", "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 9,
    "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 5000,
    "max_position_embeddings": 512,
}  # fmt: skip
GRANITE: dict[str, object] = {  # its logits are scaled
    "model_type": "granite", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 7,
    "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": DEMO_VOCAB_SIZE,
    "max_position_embeddings": 256,
}  # fmt: skip
BLOOM: dict[str, object] = {  # takes no positions, has eager attention only
    "model_type": "bloom", "hidden_size": 32, "n_layer": 2, "n_head": 4, "vocab_size": 512,
}  # fmt: skip
PINS: dict[str, Any] = {
    "precision": "bf16-master", "micro_batch": 2, "global_batch": 4, "checkpointing": "none",
}  # fmt: skip
STRATEGIES = [
    Strategy(precision=Precision.BF16_MASTER, loss=Loss.RESPONSE, micro_batch=4, accumulation=4),
    Strategy(
        precision=Precision.BF16_MIXED, loss=Loss.FULL, micro_batch=4,
        checkpointing=Checkpointing.FULL,
    ),
    Strategy(precision=Precision.BF16_MASTER, loss=Loss.FULL, micro_batch=4, accumulation=4),
    Strategy(
        precision=Precision.FP32, loss=Loss.RESPONSE, micro_batch=4, attention=Attention.EAGER
    ),
]  # fmt: skip


def written(folder: Path, config: dict[str, object]) -> str:
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


def planned(model: str, **knobs: Any) -> Any:
    return sftplan.api.plan(
        model=model, seq_len=128, hardware="h200-sxm", command=["x"], **PINS | knobs
    )


@pytest.mark.parametrize("config", [GPT2, LLAMA], ids=["gpt2", "llama"])
def test_a_known_family_is_planned_alike_from_its_trace(config: dict[str, object]) -> None:
    known = shape_from_config(config, name="m", source="m")
    traced = traced_shape(config, name="m", source="m")
    assert num_parameters(traced) == num_parameters(known)
    assert num_active_parameters(traced) == num_active_parameters(known)
    machine, work = load_hardware("h200-sxm"), Workload(seq_len=512, global_batch=16)
    ours, theirs = (make_evaluator(m, work, num_gpus=1, gpus_per_node=1) for m in (known, traced))
    for strategy in STRATEGIES:
        tape, trace = ours.estimate(strategy, machine), theirs.estimate(strategy, machine)
        allocated = tape.memory.peak_allocated_bytes
        assert trace.memory.peak_allocated_bytes == pytest.approx(allocated, rel=0.01)
        assert trace.time.step_s is not None
        assert tape.time.step_s is not None
        if is_captured(strategy, known, 512):  # a trace may need a mask, and waits for its host
            assert trace.time.step_s > tape.time.step_s
        else:
            assert trace.time.step_s == pytest.approx(tape.time.step_s, rel=0.10)
        assert trace.compute == tape.compute


def test_an_unknown_model_is_planned_and_its_whole_trace_agrees(tmp_path: Path) -> None:
    plan = planned(written(tmp_path, GRANITE))
    assert plan.sources["memory.gpu.peak_allocated_bytes"] == "traced"
    assert any("granite is not modelled" in each for each in plan.assumptions)
    assert plan.strategy.loss == "full"  # transformers' own, which scales the logits
    assert not plan.strategy.compile
    found = measure_traced(plan, diff=True)
    measured = found.measurement.quantities
    predicted = plan.memory.gpu.peak_allocated_bytes
    assert predicted == pytest.approx(measured["memory.gpu.peak_allocated_bytes"], rel=0.001)
    assert plan.compute.step_flops == measured["compute.step_flops"]
    assert found.differences == []


@pytest.mark.parametrize(
    ("config", "knobs", "expected"),
    [
        (GRANITE, {"zero": 2}, "--zero 2: granite is traced unsharded"),
        (GRANITE, {"offload": "optimizer"}, "--offload optimizer: granite is traced unsharded"),
        (GRANITE, {"compile": True}, "--compile: granite is traced uncompiled"),
        (GRANITE, {"loss": "response"}, "the logits of granite are more than the product"),
        (BLOOM, {"attention": "sdpa"}, "transformers' bloom does not have it"),
        (BLOOM, {"packing": True}, "takes no positions and cannot tell documents apart"),
    ],
)
def test_what_a_trace_cannot_show_is_refused(
    tmp_path: Path, config: dict[str, object], knobs: dict[str, Any], expected: str
) -> None:
    with pytest.raises(UsageError) as caught:
        planned(written(tmp_path, config), **knobs)
    assert expected in caught.value.message


@pytest.mark.parametrize(
    ("config", "kind", "expected"),
    [
        ({"model_type": "nonesuch"}, UsageError, "does not know it either"),
        ({"model_type": "bert"}, UsageError, "it is an encoder"),
        (GRANITE | {"num_hidden_layers": 10**9}, UsageError, "1,000,000,000 layers"),
        ({"model_type": "blt"}, NotReadyError, "cannot be traced on fake tensors"),
    ],
)
def test_a_model_that_cannot_be_traced_is_refused(
    config: dict[str, object], kind: type[Exception], expected: str
) -> None:
    with pytest.raises(kind, match="is not modelled") as caught:
        traced_shape(config, name="m", source="config.json")
    assert expected in str(caught.value)


def test_without_the_extra_the_command_that_installs_it_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    code = run(["plan", "--model", written(tmp_path, GRANITE), "--seq", "128", "--no-out"])
    assert code == ExitCode.NOT_READY
    assert "pip install 'sftplan[train]'" in capsys.readouterr().err


def test_a_process_that_dies_leaves_what_it_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracing, "MODULE", "sftplan.nonesuch")
    tracing._process.cache_clear()
    with pytest.raises(NotReadyError, match=r"No module named sftplan\.nonesuch"):
        tracing.ask({"what": "nothing at all"})


def test_planning_imports_no_torch_and_answers_are_kept(tmp_path: Path) -> None:
    folder = written(tmp_path, GRANITE)
    planned(folder)
    code = (
        "import sys, sftplan.api; from sftplan.facts import tracing; "
        "tracing._process = None; "  # the answers are all in the cache
        f"sftplan.api.plan(model={folder!r}, seq_len=128, hardware='h200-sxm', command=[], **{PINS!r}); "
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_it_is_listed_inspected_and_trained(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = written(tmp_path, GRANITE | {"num_hidden_layers": 2})
    demo_tokenizer().save(tmp_path)
    assert run(["models", model, "--json"]) == ExitCode.OK
    shown = json.loads(capsys.readouterr().out)
    assert sum(shown["parameters_by_part"].values()) == shown["num_parameters"]
    assert run(["data", "inspect", str(DEMO_FILE), "--model", model]) == ExitCode.OK
    out = tmp_path / "run"
    options = ["--model", model, "--data", str(DEMO_FILE), "--out", str(out), "--seq", "256"]
    pins = ["--precision", "fp32", "--micro-batch", "4", "--hardware", "h200-sxm"]
    rest = ["--cpu", "--random-weights", "--max-steps", "1", "-q"]
    assert run(["launch", *options, *pins, *rest]) == ExitCode.OK
    assert (out / "final" / "model.safetensors").is_file()

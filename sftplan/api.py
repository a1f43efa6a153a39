"""The Python API; the commands are thin layers over it. Names are those of the options."""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import sys
from typing import TYPE_CHECKING, Any

from sftplan.collector import seldom_collected
from sftplan.errors import NotReadyError, UsageError
from sftplan.plan.asked import Request
from sftplan.plan.request import (
    DEFAULT_GLOBAL_BATCH,
    DEFAULT_MARGIN_FRACTION,
    LARGEST_EPOCHS,
    check_count,
    check_minimize,
    check_number,
    check_seq_len,
    read_pins,
)

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from sftplan.facts.hardware import Hardware
    from sftplan.facts.model import ModelShape
    from sftplan.plan.comparison import Comparison, Sort
    from sftplan.plan.record import Plan

# What is planned for where there is no GPU and no --hardware: the reference of our measurements.
REFERENCE_HARDWARE = "h200-sxm"


def _measure_data(
    data: str | Path | None,
    model: ModelShape,
    seq_len: int,
    *,
    tokenizer: str | Path | None,
    skip_bad: int,
) -> Any:
    if data is None:
        return None
    from sftplan.data.lengths import measure_lengths

    return measure_lengths(
        data, model=model, seq_len=seq_len, tokenizer=tokenizer, skip_bad=skip_bad
    )


def _request(model: str, seq_len: int, knobs: dict[str, Any]) -> Request:
    from sftplan.facts.resolve import resolve_model

    check_count("seq_len", seq_len)
    given = {name: value for name, value in knobs.items() if value is not None}
    shape = resolve_model(model)
    tokens, examples = given.pop("tokens", None), given.pop("examples", None)
    if tokens is not None and examples is not None:
        message = "--tokens and --examples both say how much work there is"
        raise UsageError(message, "give one of them")
    margin = given.pop("margin", DEFAULT_MARGIN_FRACTION)
    epochs, data = given.pop("epochs", 1.0), given.pop("data", None)
    minimize, batch = given.pop("minimize", None), given.pop("global_batch", None)
    tokenizer, skip_bad = given.pop("tokenizer", None), given.pop("skip_bad", 0)
    train_on_prompt = bool(given.pop("train_on_prompt", False))
    pins = read_pins(given)
    length = check_seq_len(seq_len, shape)
    epochs = check_number("epochs", epochs, 0.0, LARGEST_EPOCHS)
    if not epochs:
        message = "--epochs 0 is no work"
        raise UsageError(message)
    lengths = _measure_data(data, shape, length, tokenizer=tokenizer, skip_bad=skip_bad)
    if examples is None and tokens is None and lengths is not None:
        examples = lengths.num_examples
    return Request(
        model=shape,
        seq_len=length,
        pins=pins,
        global_batch=None if batch is None else check_count("global_batch", batch),
        epochs=epochs,
        num_examples=None if examples is None else check_count("examples", examples),
        num_tokens=None if tokens is None else check_count("tokens", tokens),
        lengths=lengths,
        train_on_prompt=train_on_prompt,
        margin=check_number("margin", margin, 0.0, 1.0),
        minimize=check_minimize(minimize),
    )


def _this_machine(gpus: int | None, nodes: int | None) -> Hardware:
    from sftplan.detect.gpus import detect

    found = detect()
    if gpus is not None and gpus > found.gpus_per_node:
        message = f"--gpus {gpus}: this machine has {found.gpus_per_node}"
        raise UsageError(message, "`--hardware NAME` plans for another machine")
    return dataclasses.replace(
        found,
        gpus_per_node=gpus or found.gpus_per_node,
        num_nodes=nodes or found.num_nodes,
    )


def _hardware(name: str | None, gpus: int | None, nodes: int | None) -> tuple[Hardware, list[str]]:
    """The hardware that was named, this machine, or the reference where there is no GPU."""
    from sftplan.facts.profiles import load_hardware

    gpus = None if gpus is None else check_count("gpus", gpus)
    nodes = None if nodes is None else check_count("nodes", nodes)
    if name not in (None, "auto"):
        return load_hardware(name, gpus=gpus, nodes=nodes), []
    try:
        return _this_machine(gpus, nodes), []
    except NotReadyError:
        if name == "auto":
            raise
    assumption = f"no GPU here, planned for {REFERENCE_HARDWARE}: `--hardware` names another"
    return load_hardware(REFERENCE_HARDWARE, gpus=gpus, nodes=nodes), [assumption]


@seldom_collected()
def plan(
    *,
    model: str,
    seq_len: int,
    hardware: str | None = None,
    gpus: int | None = None,
    nodes: int | None = None,
    command: Sequence[str] | None = None,
    **knobs: Any,
) -> Plan:
    """The best strategy for a job on a machine, and everything it was decided from.

    Each knob that is given is pinned, each one left out is chosen. `plan.fits` tells whether
    anything fits; what cannot be planned for raises an SftplanError.
    """
    from sftplan.plan.build import plan_from_choice
    from sftplan.plan.evaluator import make_evaluator
    from sftplan.search.choose import choose

    request = _request(model, seq_len, knobs)
    machine, assumed = _hardware(hardware, gpus, nodes)
    workload, assumptions = request.workload(machine.num_gpus)
    choice = choose(
        request.model,
        machine,
        workload,
        dict(request.pins),
        margin=request.margin,
        minimize=request.minimize,
        make_evaluator=make_evaluator,
    )
    return plan_from_choice(
        choice,
        model=request.model,
        hardware=machine,
        workload=workload,
        pinned=request.pinned,
        margin=request.margin,
        minimize=request.minimize,
        command=list(sys.argv) if command is None else command,
        assumptions=assumed + assumptions,
    )


@seldom_collected()
def compare(
    *,
    model: str,
    seq_len: int,
    on: Sequence[str] | None = None,
    gpus: int | None = None,
    nodes: int | None = None,
    sort: Sort = "cost",
    command: Sequence[str] | None = None,
    **knobs: Any,
) -> Comparison:
    """One row per machine of `on`; without it, all offers that the built-in profiles know."""
    from sftplan import __version__
    from sftplan.facts.profiles import offer_names
    from sftplan.plan.comparison import SORTS, Comparison, sorted_rows
    from sftplan.plan.rounds import Rounds

    if sort not in SORTS:
        message = f"--sort {sort!r} is none of {', '.join(SORTS)}"
        raise UsageError(message)
    request = _request(model, seq_len, knobs)
    sizes = {"gpus": gpus, "nodes": nodes}
    for name, value in sizes.items():
        if value is not None:
            check_count(name, value)
    rounds = Rounds(request)
    if on is None:
        rows = [rounds.offer_row(name, sizes) for name in offer_names()]
    else:
        rows = [rounds.row(_hardware(name, gpus, nodes)[0]) for name in on]
    return Comparison(
        created_by=f"sftplan {__version__}",
        command=list(sys.argv) if command is None else list(command),
        model=request.model.name,
        seq_len=request.seq_len,
        global_batch=knobs.get("global_batch") or DEFAULT_GLOBAL_BATCH,
        sort=sort,
        rows=sorted_rows(rows, sort),
    )


def _entry(module_name: str, function: str, what: str) -> Any:
    """A function of the training half, which planning never imports."""
    if importlib.util.find_spec("torch") is None:
        message = f"{what} needs PyTorch, which is not installed"
        raise NotReadyError(message, "`pip install 'sftplan[train]'`")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is not None and error.name.split(".")[0] != "sftplan":
            message = f"{what} needs {error.name}, which is not installed"
            raise NotReadyError(message, "`pip install 'sftplan[train]'`") from None
        message = f"this version of sftplan cannot {what} yet"
        raise NotReadyError(message) from None
    return getattr(module, function)


def verify(plan: Plan, **options: Any) -> Any:
    """Measure a plan in a dry run and judge its prediction."""
    return _entry("sftplan.verify.dry_run", "verify", "verify")(plan, **options)


def calibrate() -> Path:
    """Measure what this machine's GPU and host reach, for the plans to come; the file that keeps it."""
    kept: Path = _entry("sftplan.verify.calibrate", "calibrate", "calibrate")()[1]
    return kept


def launch(plan: Plan, *, data: str | Path, out: str | Path, **options: Any) -> Any:
    """Run the training of a plan on `data`, with everything it writes in the folder `out`."""
    return _entry("sftplan.train.launch", "launch", "launch")(plan, data=data, out=out, **options)

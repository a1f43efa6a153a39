"""Options that several commands share. An option that is not given is None: it is not pinned."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeVar

import click

from sftplan.facts.strategy import (
    Allocator,
    Attention,
    Checkpointing,
    Loss,
    Offload,
    Optimizer,
    Precision,
)
from sftplan.units import parse_count

if TYPE_CHECKING:
    from collections.abc import Callable
    from enum import StrEnum

F = TypeVar("F", bound="Callable[..., Any]")


class GroupedOption(click.Option):
    """An option that stands under the heading `group` in its command's help."""

    def __init__(self, *args: Any, group: str = "Options", **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.group = group


def _converted(
    convert: Callable[[str], object],
) -> Callable[[click.Context, click.Parameter, str | None], object]:
    """A callback that converts what was given and leaves what was not alone."""

    def callback(ctx: click.Context, param: click.Parameter, value: str | None) -> object:
        try:
            return None if value is None else convert(value)
        except ValueError as error:
            raise click.BadParameter(str(error), ctx, param) from None

    return callback


def share_option(*names: str, group: str, help: str) -> Callable[[F], F]:  # noqa: A002
    """An option that takes a share as 0.05 or 5%."""
    return option(*names, callback=_converted(_fraction), metavar="SHARE", group=group, help=help)


def _fraction(text: str) -> float:
    number = text.strip()
    try:
        return float(number[:-1]) / 100 if number.endswith("%") else float(number)
    except ValueError:
        message = f"{text!r} is not a share such as 0.05 or 5%"
        raise ValueError(message) from None


def _dropout(text: str) -> float | str:
    try:
        return text if text == "model" else float(text)
    except ValueError:
        message = f"{text!r} is neither a number nor `model`"
        raise ValueError(message) from None


def option(*names: str, group: str = "Options", **attributes: Any) -> Callable[[F], F]:
    """`click.option` under a heading of the help."""
    return click.option(*names, cls=GroupedOption, group=group, **attributes)


def _choice(kind: type[StrEnum]) -> click.Choice[str]:
    return click.Choice([member.value for member in kind])


def _apply(function: F, options: list[Callable[[F], F]]) -> F:
    for decorate in reversed(options):  # click lists the decorator applied last first
        function = decorate(function)
    return function


def common_options(function: F) -> F:
    """--json (as_json), -q/--quiet (quiet) and -v/--verbose (verbose, a count): every command."""
    group = "Output"
    return _apply(
        function,
        [
            option(
                "--json", "as_json", is_flag=True, group=group,
                help="Print one JSON document on standard output, nothing else.",
            ),
            option("-q", "--quiet", is_flag=True, group=group, help="Print the answer only."),
            option("-v", "--verbose", count=True, group=group, help="Print more; repeatable."),
        ],
    )  # fmt: skip


def model_options(*, required: bool) -> Callable[[F], F]:
    """--model and --seq (seq_len)."""

    def decorate(function: F) -> F:
        return _apply(
            function,
            [
                option(
                    "--model", "-m", required=required, metavar="NAME", group="Model",
                    help="A built-in name, a folder or file with a config.json, or a hub id.",
                ),
                option(
                    "--seq", "seq_len", required=required, metavar="TOKENS", group="Model",
                    callback=_converted(parse_count), help="Longest sequence, in tokens.",
                ),
            ],
        )  # fmt: skip

    return decorate


def hardware_options(function: F) -> F:
    """--hardware, --gpus, --nodes."""
    group = "Hardware"
    return _apply(
        function,
        [
            option("--hardware", metavar="NAME|FILE", group=group,
                   help="auto (this machine; the default), a profile, an offer, or a file."),
            option("--gpus", type=int, group=group, help="GPUs per node."),
            option("--nodes", type=int, group=group, help="Machines of that kind."),
        ],
    )  # fmt: skip


def work_options(function: F) -> F:
    """--data, --epochs, --tokens, --examples, --global-batch: how much work there is."""
    group = "Work"
    return _apply(
        function,
        [
            option("--data", metavar="FILE", group=group,
                   help="Instruction file whose lengths are counted."),
            option("--epochs", type=float, group=group, help="Passes over the data; 1."),
            option("--tokens", metavar="COUNT", group=group,
                   callback=_converted(parse_count), help="Tokens in one epoch, as 20M."),
            option("--examples", metavar="COUNT", group=group,
                   callback=_converted(parse_count), help="Examples in one epoch."),
            option("--global-batch", type=int, group=group,
                   help="Rows per step over all GPUs; 64."),
        ],
    )  # fmt: skip


def data_options(function: F) -> F:
    """--tokenizer and --skip-bad: how --data is read."""
    group = "Work"
    return _apply(
        function,
        [
            option("--tokenizer", metavar="DIR", group=group,
                   help="A folder with a tokenizer that counts --data, instead of the model's."),
            option("--skip-bad", type=click.IntRange(min=0), group=group,
                   help="How many bad examples of --data may be left out; 0."),
        ],
    )  # fmt: skip


def targets_option(function: F) -> F:
    """--train-on-prompt: what of --data counts."""
    return option("--train-on-prompt", is_flag=True, default=None, group="Work",
                  help="Every token of --data counts, not only the responses'.")(function)  # fmt: skip


def strategy_options(function: F) -> F:
    """The decisions of a plan; each one given is pinned."""
    group = "Pins (each one left out is chosen)"
    return _apply(
        function,
        [
            option("--precision", type=_choice(Precision), group=group,
                   help="Types of weights, gradients and products."),
            option("--zero", type=click.Choice(["0", "1", "2", "3"]), group=group,
                   callback=_converted(int),
                   help="ZeRO stage: what the GPUs share out."),
            option("--offload", type=_choice(Offload), group=group,
                   help="What leaves the GPU between its uses."),
            option("--checkpointing", type=_choice(Checkpointing), group=group,
                   help="What backward computes again."),
            option("--checkpointed-layers", type=int, group=group,
                   help="Layers that it is for, from the first; the others one step lighter. All if left out."),
            option("--attention", type=_choice(Attention), group=group,
                   help="How attention is computed."),
            option("--loss", type=_choice(Loss), group=group,
                   help="Which positions reach the LM head, and how many at once."),
            option("--packing/--no-packing", default=None, group=group,
                   help="Several examples in one row."),
            option("--compile/--no-compile", default=None, group=group,
                   help="torch.compile, block by block."),
            option("--micro-batch", type=int, group=group,
                   help="Rows per GPU and forward pass."),
            option("--accumulation", type=int, group=group,
                   help="Forward passes per step."),
            option("--optimizer", type=_choice(Optimizer), group=group,
                   help="Optimizer and the type of its moments."),
            option("--allocator", type=_choice(Allocator), group=group,
                   help="How PyTorch takes memory from the driver."),
            option("--attention-dropout", metavar="NUMBER|model", group=group,
                   callback=_converted(_dropout),
                   help="Probability, 0 by default; `model`: the configuration's."),
            option("--max-grad-norm", type=float, group=group,
                   help="Norm at which gradients are clipped, 1.0 by default; 0: off."),
        ],
    )  # fmt: skip


def search_options(function: F) -> F:
    """--margin and --minimize."""
    group = "Search"
    return _apply(
        function,
        [
            share_option("--margin", group=group,
                   help="Share of GPU memory kept free, as 0.05 or 5%; 5%."),
            option("--minimize", type=click.Choice(["time", "cost", "memory"]), group=group,
                   help="What the best strategy has least of; time."),
        ],
    )  # fmt: skip


def knob_options(function: F) -> F:
    """All knobs of `plan`, `compare` and `launch`, by their option's name with `_` for `-`."""
    for decorate in (
        search_options,
        strategy_options,
        work_options,
        hardware_options,
    ):
        function = decorate(function)
    return function

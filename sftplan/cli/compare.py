"""`sftplan compare`: one job on many machines."""

from __future__ import annotations

import json
from typing import Any

import click

import sftplan.api
from sftplan.cli.help import command
from sftplan.cli.options import (
    common_options,
    data_options,
    knob_options,
    model_options,
    option,
    targets_option,
)
from sftplan.cli.output import print_json, print_text, talk, terminal_style
from sftplan.cli.plan import invocation
from sftplan.errors import ExitCode, UsageError

DEFAULT_LIMIT = 20


def _machines(on: str | None, hardware: str | None, *, everything: bool) -> list[str] | None:
    """The names to compare; None is all offers."""
    if on is not None and everything:
        message = "--on and --all exclude each other"
        raise UsageError(message)
    if hardware is not None and (on is not None or everything):
        message = f"--hardware and {'--all' if everything else '--on'} exclude each other"
        raise UsageError(message, "--on takes several machines, with commas")
    names = on if on is not None else hardware
    if names is None or everything:
        return None
    listed = [name.strip() for name in names.split(",") if name.strip()]
    if not listed:
        message = "--on names no machine"
        raise UsageError(message, "`sftplan profiles` lists them")
    return listed


@command(
    "compare",
    examples=[
        "sftplan compare --model gpt2-large --seq 1024 --all",
        "sftplan compare --model llama-3-8b --seq 4096 --on h200-sxm,a100-80gb-sxm --gpus 8",
        "sftplan compare --model qwen3-0.6b --seq 2048 --all --tokens 20M --sort time",
    ],
)
@model_options(required=True)
@option("--on", metavar="A,B,C", group="Hardware", help="Profiles or offers, with commas.")
@option("--all", "everything", is_flag=True, group="Hardware", help="Every known offer.")
@knob_options
@data_options
@targets_option
@option("--sort", type=click.Choice(["cost", "time", "memory", "name"]), default="cost",
        group="Output", help="What the first row has least of; cost.")  # fmt: skip
@option("--limit", type=click.IntRange(min=0), default=DEFAULT_LIMIT, group="Output",
        help="Rows shown; 0: all; 20.")  # fmt: skip
@option("--out", metavar="FILE", group="Output", help="Write the comparison as JSON.")
@common_options
def compare(
    *,
    on: str | None,
    everything: bool,
    hardware: str | None,
    sort: Any,
    limit: int,
    out: str | None,
    as_json: bool,
    quiet: bool,
    verbose: int,
    **request: Any,
) -> ExitCode:
    """Compare machines for one job: what fits, how fast, what it costs."""
    from sftplan.plan.comparison import comparison_document
    from sftplan.plan.file import write_text
    from sftplan.report.compare import render_comparison

    names = _machines(on, hardware, everything=everything)
    made = sftplan.api.compare(on=names, sort=sort, command=invocation(), **request)
    if out is not None:
        text = json.dumps(comparison_document(made), indent=2, ensure_ascii=False, allow_nan=False)
        write_text(text + "\n", out)
        talk(f"wrote {click.format_filename(out)}", quiet=quiet)
    fitting = [row for row in made.rows if row.fits]
    if as_json:
        print_json(comparison_document(made))
    elif quiet:
        print_text("\n".join(row.hardware for row in fitting))
    else:
        shown = limit or None
        text = render_comparison(made, terminal_style(), limit=shown, verbose=verbose > 0)
        print_text(text)
    return ExitCode.OK if fitting else ExitCode.INFEASIBLE

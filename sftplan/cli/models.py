"""`sftplan models`: the built-in catalogue, or one model."""

from __future__ import annotations

import shutil

import click

from sftplan.cli.help import command
from sftplan.cli.options import common_options
from sftplan.cli.output import print_json, print_text, use_colour
from sftplan.facts.catalogue import builtin, builtin_names
from sftplan.facts.resolve import resolve_model

_PIPED_WIDTH = 160  # columns where no terminal says how many it has


@command(
    "models",
    examples=[
        "sftplan models",
        "sftplan models llama-3.2-1b",
        "sftplan models ./my-model --json",
    ],
)
@click.argument("name", required=False)
@common_options
def models(name: str | None, *, as_json: bool, quiet: bool, verbose: int) -> None:
    """List the built-in models, or show one."""
    from sftplan.report.models import describe, render_catalogue, render_model

    width = shutil.get_terminal_size((_PIPED_WIDTH, 24)).columns
    if name is not None:
        shape = resolve_model(name)
        if as_json:
            print_json({"format": "sftplan.model", "format_version": 1, **describe(shape)})
        else:
            print_text(render_model(shape, width=width, colour=use_colour()))
        return
    shapes = [builtin(each) for each in builtin_names()]
    if as_json:
        listed = [describe(shape) for shape in shapes]
        print_json({"format": "sftplan.models", "format_version": 1, "models": listed})
    elif quiet:
        print_text("\n".join(shape.name for shape in shapes))
    else:
        print_text(render_catalogue(shapes, width=width, colour=use_colour()))

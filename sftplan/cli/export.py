"""`sftplan export`: a plan as another tool's configuration."""

from __future__ import annotations

import click

from sftplan.cli.help import command
from sftplan.cli.options import common_options, option
from sftplan.cli.output import print_json, print_text, talk

TARGETS = ["deepspeed", "accelerate", "trl", "axolotl", "llamafactory", "slurm", "skypilot"]


@command(
    "export",
    examples=[
        "sftplan export plan.json --to deepspeed --out deepspeed.json",
        "sftplan export plan.json --to trl",
        "sftplan export plan.json --to slurm --out job.sh",
    ],
)
@click.argument("plan")
@option("--to", "target", type=click.Choice(TARGETS), required=True, group="Output",
        help="Whose configuration.")  # fmt: skip
@option("--out", metavar="FILE", group="Output", help="Write it there instead of printing it.")
@common_options
def export(
    plan: str, *, target: str, out: str | None, as_json: bool, quiet: bool, verbose: int
) -> None:
    """Write a plan as another tool's configuration."""
    from sftplan.export import render_export
    from sftplan.plan.file import read_plan, write_text

    text = render_export(read_plan(plan), target)
    if out is not None:
        write_text(text, out)
        talk(f"wrote {click.format_filename(out)}", quiet=quiet)
    if as_json:
        version = {"format": "sftplan.export", "format_version": "1.0"}
        print_json({**version, "to": target, "text": text, "file": out})
    elif out is None:
        print_text(text.rstrip("\n"))

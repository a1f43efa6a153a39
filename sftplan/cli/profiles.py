"""`sftplan profiles`: GPUs and offers with their sources, or one of them."""

from __future__ import annotations

import click

from sftplan.cli.help import command
from sftplan.cli.options import common_options
from sftplan.cli.output import print_json, print_text
from sftplan.facts.profiles import all_offers, all_profiles, load_hardware


@command(
    "profiles",
    examples=[
        "sftplan profiles",
        "sftplan profiles h200-sxm",
        "sftplan profiles aws/p5.4xlarge --json",
    ],
)
@click.argument("name", required=False)
@common_options
def profiles(name: str | None, *, as_json: bool, quiet: bool, verbose: int) -> None:
    """List GPUs and cloud offers with their sources, or show one."""
    from sftplan.report.hardware import hardware_document, render_hardware, render_profiles

    if name is not None:
        hardware = load_hardware(name)
        if as_json:
            print_json(hardware_document(hardware))
        else:
            print_text(render_hardware(hardware))
        return
    gpus, offers = all_profiles(), all_offers()
    if as_json:
        print_json(
            {
                "format": "sftplan.profiles",
                "format_version": 1,
                "profiles": [hardware_document(each) for each in gpus],
                "offers": [hardware_document(each) for each in offers],
            }
        )
    elif quiet:
        print_text("\n".join(each.name for each in (*gpus, *offers)))
    else:
        print_text(render_profiles(gpus, offers))

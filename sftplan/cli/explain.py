"""`sftplan explain`: the formula of a term, its source and the numbers put in."""

from __future__ import annotations

import click

from sftplan.cli.help import command
from sftplan.cli.options import common_options, option
from sftplan.cli.output import print_json, print_text


@command(
    "explain",
    examples=[
        "sftplan explain attention",
        "sftplan explain activations --plan plan.json",
        "sftplan explain",
    ],
)
@click.argument("term", required=False)
@option("--plan", "plan_file", metavar="FILE", group="Input", help="A plan to take numbers from.")
@common_options
def explain(
    term: str | None, *, plan_file: str | None, as_json: bool, quiet: bool, verbose: int
) -> None:
    """Explain a term: its formula, its source and the numbers put in."""
    from sftplan.plan.file import read_plan
    from sftplan.report.explain import explain_term, list_terms, render_term, term_document

    plan = read_plan(plan_file) if plan_file is not None else None
    if term is None:
        terms = list_terms()
        if as_json:
            print_json({"format": "sftplan.terms", "format_version": "1.0", "terms": terms})
        else:
            print_text("\n".join(f"{name:<16}{summary}" for name, summary in terms.items()))
        return
    found = explain_term(term)
    if as_json:
        print_json(term_document(found, plan))
    else:
        print_text(found.formula if quiet else render_term(found, plan))

"""`sftplan data inspect`: instruction data as the training would see it."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import click

from sftplan.cli.help import Group, command
from sftplan.cli.options import common_options, option
from sftplan.cli.output import print_json, print_text, talk, use_colour, use_unicode
from sftplan.errors import UsageError
from sftplan.units import parse_count

if TYPE_CHECKING:
    from collections.abc import Callable


@click.group("data", cls=Group)
def data() -> None:
    """Look at instruction data as the training would see it."""


def _tokens(ctx: click.Context, param: click.Parameter, value: str | None) -> int | None:
    """Text such as 1024 or 4K to a count of tokens."""
    if value is None:
        return None
    try:
        return parse_count(value)
    except ValueError as error:
        raise click.BadParameter(str(error), ctx=ctx, param=param) from None


@command(
    "inspect",
    examples=[
        "sftplan data inspect train.jsonl --model gpt2-large",
        "sftplan data inspect train.jsonl --model gpt2 --seq 512 --num 1",
        "sftplan data inspect folder/ --model ./my-model --skip-bad 10 --json",
    ],
)
@click.argument("file")
@option(
    "--model",
    "-m",
    required=True,
    metavar="NAME",
    group="Model",
    help="A built-in name, a folder or file with a config.json, or a hub id.",
)
@option(
    "--seq",
    "seq_len",
    callback=_tokens,
    metavar="TOKENS",
    group="Model",
    help="Longest sequence, in tokens; by default all of the model's positions.",
)
@option(
    "--tokenizer",
    metavar="DIR",
    group="Model",
    help="Folder with tokenizer.json, or vocab.json and merges.txt.",
)
@option(
    "--num",
    "num_shown",
    type=click.IntRange(min=0),
    default=2,
    show_default=True,
    group="Data",
    help="Examples shown token by token.",
)
@option(
    "--skip-bad",
    type=click.IntRange(min=0),
    default=0,
    show_default=True,
    group="Data",
    help="Bad examples that may be left out; each is reported.",
)
@common_options
def inspect(
    file: str,
    *,
    model: str,
    seq_len: int | None,
    tokenizer: str | None,
    num_shown: int,
    skip_bad: int,
    as_json: bool,
    quiet: bool,
    verbose: int,
) -> None:
    """Show lengths, masks token by token, seams, and what is dropped and why."""
    from sftplan.data.lengths import tokenizer_names
    from sftplan.data.locate import find_tokenizer
    from sftplan.data.prepare import prepare
    from sftplan.facts.params import num_parameters
    from sftplan.facts.resolve import resolve_model
    from sftplan.report.data import describe_data, headline, render_data
    from sftplan.report.style import Style

    shape = resolve_model(model)
    length = _checked_seq_len(seq_len, shape.max_positions, shape.name)
    found = find_tokenizer(*tokenizer_names(shape), folder=tokenizer)
    if found.estimated:
        talk("no tokenizer here: lengths are estimated; --tokenizer DIR counts them", quiet=quiet)
    progress = _progress(quiet=quiet)
    prepared = prepare(
        file,
        tokenizer=found,
        seq_len=length,
        skip_bad=skip_bad,
        vocab_size=None if found.estimated else shape.vocab_size,
        model=shape.name,
        seams=True,
        progress=progress,
    )
    progress(0)
    total = num_parameters(shape)
    if as_json:
        document = describe_data(
            prepared, tokenizer=found, model=shape.name, num_parameters=total, num_shown=num_shown
        )
        print_json(document)
    elif quiet:
        print_text(headline(prepared))
    else:
        style = Style(colour=use_colour(), unicode=use_unicode())
        text = render_data(
            prepared, tokenizer=found, num_parameters=total, num_shown=num_shown, style=style
        )
        print_text(text)


data.add_command(inspect)


def _checked_seq_len(seq_len: int | None, max_positions: int, model: str) -> int:
    length = max_positions if seq_len is None else seq_len
    if not 2 <= length <= max_positions:
        message = (
            f"--seq {length:,} is not between 2 and the {max_positions:,} positions of {model}"
        )
        raise UsageError(message)
    return length


def _progress(*, quiet: bool) -> Callable[[int], None]:
    """A counter on standard error, on a terminal only; 0 takes it away."""
    if quiet or not sys.stderr.isatty():
        return lambda _: None

    def show(done: int) -> None:
        text = f"{done:,} examples tokenised" if done else ""
        click.echo(f"\r{text}\x1b[K", err=True, nl=False)

    return show

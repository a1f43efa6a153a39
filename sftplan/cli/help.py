"""How help looks (a sentence, examples, options by group) and how a mistyped name is answered."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from sftplan.cli.options import GroupedOption
from sftplan.errors import UsageError, did_you_mean

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

CONTEXT: dict[str, Any] = {"help_option_names": ["-h", "--help"], "max_content_width": 80}


class Command(click.Command):
    """A command whose help shows `examples` before its options, and its options by group."""

    def __init__(self, *args: Any, examples: Sequence[str] = (), **kwargs: Any) -> None:
        kwargs["context_settings"] = {**CONTEXT, **kwargs.get("context_settings", {})}
        super().__init__(*args, **kwargs)
        self.examples = tuple(examples)

    def format_help_text(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The sentence, then the examples as one would type them."""
        super().format_help_text(ctx, formatter)
        if self.examples:
            with formatter.section("Examples"):
                for example in self.examples:
                    formatter.write(f"  {example}\n")

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The options, each under its group's heading."""
        groups: dict[str, list[tuple[str, str]]] = {}
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx)
            if record is not None:
                group = (
                    parameter.group
                    if isinstance(parameter, GroupedOption)
                    else _ungrouped(parameter)
                )
                groups.setdefault(group, []).append(record)
        for heading, records in groups.items():
            with formatter.section(heading):
                formatter.write_dl(records, col_max=26)


def _ungrouped(parameter: click.Parameter) -> str:
    return "Arguments" if isinstance(parameter, click.Argument) else "Output"


def command(name: str, *, examples: Sequence[str]) -> Callable[[Callable[..., Any]], Command]:
    """Decorator of a command's function; its docstring's first line says what the command does.

    The function may return an exit code; None is 0.
    """
    return click.command(name, cls=Command, examples=examples)


class Group(click.Group):
    """A group that answers an unknown command with the closest known ones."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        kwargs["context_settings"] = {**CONTEXT, **kwargs.get("context_settings", {})}
        super().__init__(*args, **kwargs)

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """The command that the first argument names."""
        name = args[0]
        known = self.list_commands(ctx)
        if name not in known and not name.startswith("-"):
            message = f"no command {name!r} in `{ctx.command_path}`"
            hint = did_you_mean(name, known) or f"commands: {', '.join(known)}"
            raise UsageError(message, hint)
        return super().resolve_command(ctx, args)

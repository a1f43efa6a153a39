"""The entry point: which commands there are, and what becomes of an error."""

from __future__ import annotations

import contextlib
import importlib
import os
import signal
import sys
from typing import TYPE_CHECKING, NamedTuple, NoReturn

import click

from sftplan import __version__
from sftplan.cli.help import Group
from sftplan.cli.output import has_answered, print_json
from sftplan.errors import ExitCode, SftplanError, did_you_mean

if TYPE_CHECKING:
    from collections.abc import Sequence

# Module `sftplan.cli.<name>` holds the command `<name>`. The summaries stand here so that
# `sftplan --help` imports none of them; a test holds them equal to each command's own.
COMMANDS = {
    "detect": "Show what this machine has: GPUs, memory, processors.",
    "plan": "Choose a strategy, show why, and write it as a plan.",
    "compare": "Compare machines for one job: what fits, how fast, what it costs.",
    "verify": "Measure a plan in a dry run and judge its prediction.",
    "launch": "Train: the real masked fine-tuning run of a plan.",
    "data": "Look at instruction data as the training would see it.",
    "models": "List the built-in models, or show one.",
    "profiles": "List GPUs and cloud offers with their sources, or show one.",
    "explain": "Explain a term: its formula, its source and the numbers put in.",
    "export": "Write a plan as another tool's configuration.",
    "show": "Print a file that sftplan wrote.",
    "env": "Print versions and drivers for a bug report.",
}

BUG_NOTICE = "this is a bug in sftplan; please report it with the output of `sftplan env`"


class LazyGroup(Group):
    """A group that imports a command's module when the command is called, not before."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """The names, in the order of a run."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """The command `cmd_name` of module `sftplan.cli.<cmd_name>`."""
        if cmd_name not in COMMANDS:
            return None
        module = importlib.import_module(f"sftplan.cli.{cmd_name}")
        loaded = getattr(module, cmd_name)
        assert isinstance(loaded, click.Command)
        return loaded

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Names and summaries, without importing any of them."""
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))


@click.group(cls=LazyGroup, invoke_without_command=True)
@click.version_option(__version__, message="%(prog)s %(version)s")
@click.pass_context
def cli(context: click.Context) -> None:
    """Plan, verify and launch the supervised fine-tuning of a language model.

    \b
      sftplan plan --model gpt2-large --seq 1024 --hardware h200-sxm
      sftplan compare --model llama-3-8b --seq 4096 --all
      sftplan verify plan.json

    Exit codes: 0 done, 1 a bug, 2 usage, 3 nothing fits, 4 drift, 5 mispredicted,
    6 no GPU or missing extra, 7 training failed, 130 interrupted.
    """  # noqa: D301 - \b is click's mark for text that keeps its lines
    if context.invoked_subcommand is None:
        click.echo(context.get_help(), err=True)
        context.exit(ExitCode.USAGE)


class _Failure(NamedTuple):
    """What becomes of an exception: an exit code, and in words what is wrong and what to do."""

    code: ExitCode
    message: str
    hint: str | None = None


def _failure(error: BaseException) -> _Failure | None:
    """None: no failure, but a way to end."""
    match error:
        case SftplanError():
            return _Failure(error.exit_code, error.message, error.hint)
        case click.exceptions.Exit() | BrokenPipeError():
            return None
        case KeyboardInterrupt() | click.Abort():
            return _Failure(ExitCode.INTERRUPTED, "interrupted")
        case click.ClickException():
            return _Failure(ExitCode.USAGE, _message_of(error), _usage_hint(error))
        case _:
            return _Failure(ExitCode.BUG, f"{type(error).__name__}: {error}", BUG_NOTICE)


def _report(failure: _Failure) -> None:
    click.echo(f"error: {failure.message}", err=True)
    if failure.hint:
        click.echo(f"\nhint: {failure.hint}", err=True)


def _usage_hint(error: click.ClickException) -> str | None:
    """What to do about an error of click's, which knows no hints."""
    context = error.ctx if isinstance(error, click.UsageError) else None
    if isinstance(error, click.NoSuchOption):
        known = [name for p in context.command.params for name in p.opts] if context else []
        close = did_you_mean(error.option_name, known)
        if close:
            return close
    return f"`{context.command_path} --help` shows the options" if context else None


def _message_of(error: click.ClickException) -> str:
    """Click's message in our form: no capital, no full stop, no possibilities of its own."""
    if isinstance(error, click.NoSuchOption):
        return f"no option {error.option_name}"
    text = " ".join(error.format_message().split()).rstrip(".")
    return text[:1].lower() + text[1:]


def _invoke(args: list[str]) -> int:
    with cli.make_context("sftplan", args) as context:
        try:
            code = cli.invoke(context)
        except BaseException as error:
            failure = _failure(error)
            if failure is not None and "--json" in args and not has_answered(context):
                print_json(_failure_document(failure))
            raise
        sys.stdout.flush()
    return code if isinstance(code, int) else ExitCode.OK


def _failure_document(failure: _Failure) -> dict[str, object]:
    """What `--json` prints in place of the answer that there is none of."""
    return {
        "format": "sftplan.error",
        "format_version": "1.0",
        "exit_code": int(failure.code),
        "error": failure.message,
        "hint": failure.hint,
    }


def _report_bug() -> None:
    import traceback

    traceback.print_exc()
    click.echo(BUG_NOTICE, err=True)


def _complete_shell(args: list[str]) -> int | None:
    """Answer the shell that asks for completions through `_SFTPLAN_COMPLETE`, else None."""
    instruction = os.environ.get("_SFTPLAN_COMPLETE")
    if not instruction or args:
        return None
    from click.shell_completion import shell_complete

    return shell_complete(cli, {}, "sftplan", "_SFTPLAN_COMPLETE", instruction)


def run(args: Sequence[str]) -> int:
    """Run one command line (without the program's name) and return its exit code."""
    try:
        completed = _complete_shell(list(args))
        return _invoke(list(args)) if completed is None else completed
    except click.exceptions.Exit as stop:
        return stop.exit_code
    except (SftplanError, click.ClickException) as error:
        failure = _failure(error)
        assert failure is not None
        _report(failure)
        return failure.code
    except (KeyboardInterrupt, click.Abort):
        click.echo("interrupted", err=True)
        return ExitCode.INTERRUPTED
    except BrokenPipeError:  # the reader, such as `head`, has seen enough
        _close_stdout()
        return ExitCode.OK
    except Exception:
        _report_bug()
        return ExitCode.BUG


def _close_stdout() -> None:
    """Let what is still buffered go nowhere, so that the interpreter's last flush is silent."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def main() -> NoReturn:
    """The console script."""
    for stream in (sys.stdout, sys.stderr):
        reconfigure = getattr(stream, "reconfigure", None)
        if reconfigure is not None:
            reconfigure(errors="replace")  # a terminal without × shows ?, not a traceback
    # As Ctrl-C: what was begun is put away, no process is left, and the code is that of resumable.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    sys.exit(run(sys.argv[1:]))

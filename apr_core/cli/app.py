"""
The command ``apr``: parse, dispatch, and turn whatever happens into one line on stderr and an exit code.

Nothing heavy is imported before a command runs: ``apr --help`` costs what Python and typer cost.
"""

from __future__ import annotations

import signal
import sys
import traceback
from collections.abc import Sequence
from typing import Annotated, NoReturn

import typer

from apr_core.cli import commands, dispatch
from apr_core.errors import AprError, Exit

INTERRUPTED = 130  # 128 + SIGINT, as shells have it
TERMINATED = 143  # 128 + SIGTERM

app = typer.Typer(
    name="apr",
    help="Run, check and try to refute language-model files (SafeTensors, GGUF, APR).",
    epilog="Exit codes: 0 nothing refuted, 2 usage, 3 not found, 4 format, 5 refuted, 6 load, 7 I/O, 8 inference, "
    "9 not available, 11 inconclusive, 1 anything else.",
    add_completion=False,
    rich_markup_mode=None,  # rich costs 0.1 s to import, and its markup would read a model's own text
    pretty_exceptions_enable=False,
)


def _version(wanted: bool) -> None:
    if wanted:
        from apr_core.provenance import git_state, version_of

        commit = git_state()["commit"][:9]
        print(f"apr {version_of('apr_core')}" + (f" ({commit})" if commit else ""))
        raise typer.Exit


@app.callback()
def options(
    context: typer.Context,
    skip_contract: dispatch.SkipContract = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """Take the options that stand before the command."""
    context.obj = {"skip_contract": skip_contract}


commands.register(app)


def main(argv: Sequence[str] | None = None) -> int:
    """
    Run one command.

    Args:
        argv: Arguments without the program's name; None for those of the process.

    Returns:
        The exit code.
    """
    if argv is None:
        # so that `timeout` and a stopped job clean up their temporary files as Ctrl-C does
        signal.signal(signal.SIGTERM, _terminated)
    arguments = sys.argv[1:] if argv is None else list(argv)
    try:
        gated = dispatch.attach(typer.main.get_command(app))
        code = int(gated(args=arguments, prog_name="apr", standalone_mode=False) or 0)
        # newer typer turns Ctrl-C into this code without a word, older into Abort
        return _say("interrupted", INTERRUPTED, []) if code == INTERRUPTED else code
    except AprError as error:
        return _say(str(error), error.exit_code, arguments)
    except (typer.Abort, KeyboardInterrupt):
        return _say("interrupted", INTERRUPTED, [])
    except MemoryError:
        return _say("not enough memory; take a smaller model or a machine with more", Exit.LOAD, arguments)
    except OSError as error:
        return _say(str(error), Exit.IO, arguments)
    except Exception as error:  # the border: what nobody foresaw becomes one line as well
        if hasattr(error, "format_message"):  # click's own errors; typer has its private copy of their class
            return _say(f"{str(error.format_message()).rstrip('.')}; see `apr --help`", Exit.USAGE, [])
        advice = "" if "--debug" in arguments else "; run `apr --debug ...` for the traceback"
        return _say(f"unexpected {type(error).__name__}: {_first_line(error)}{advice}", Exit.UNEXPECTED, arguments)


def _say(message: str, code: int, arguments: Sequence[str]) -> int:
    from apr_core.cli.output import note

    if "--debug" in arguments:
        traceback.print_exc()
    note(f"error: {message}")
    return int(code)


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), "without a message")


def _terminated(*_: object) -> NoReturn:
    raise SystemExit(TERMINATED)

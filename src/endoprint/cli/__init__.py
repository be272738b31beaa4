"""`endoprint <noun or job>`: every job without Prefect, each with `--help` and `--json`.

Heavy imports stand inside the commands, so that `endoprint --help` answers at once.
"""

from __future__ import annotations

import errno
import json
import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from endoprint.config import Refusal

Folder = Annotated[Path, typer.Option("--workspace", "-w", help="the workspace; default: here")]
Json = Annotated[bool, typer.Option("--json", help="machine-readable result on standard output")]


FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # a disk, a quota, a limit
UsageError: Any = typer.BadParameter.__base__  # typer exports only the narrower one


class Polite(TyperGroup):
    """A user's mistake is one line and exit status 2, never a traceback."""

    def invoke(self, ctx: Any) -> Any:
        """Run the command; turn a refusal into its line."""
        try:
            return super().invoke(ctx)
        except Refusal as refusal:
            typer.echo(f"endoprint: {refusal}", err=True)
            raise typer.Exit(2) from None
        except OSError as error:
            if error.errno not in FULL:
                raise
            said = f"{error.strerror}; make room and run the same command again"
            typer.echo(f"endoprint: {said}: what was finished is kept", err=True)
            raise typer.Exit(2) from None


app = typer.Typer(
    name="endoprint",
    cls=Polite,
    help="Read the endocrine fingerprint that an exposure leaves in a cell's transcriptome.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    rich_markup_mode=None,
)


def say(result: dict[str, Any], text: str, as_json: bool) -> None:
    """Print the result: text for people, JSON for machines."""
    typer.echo(json.dumps(result, indent=1, default=str) if as_json else text)


def show(screen: Any) -> None:
    """Print something drawn: in colour on a terminal, plain in a log."""
    from rich.console import Console

    width = None if sys.stdout.isatty() else 100
    Console(width=width).print(screen)


def main() -> None:
    """Entry point of the `endoprint` command."""
    from endoprint.cli import data, embedding, fitting, records, registry, scoring, story, up  # noqa: F401 -- they add commands
    from endoprint.workspace import settings

    for name, value in settings().items():  # before anything heavy reads them
        os.environ.setdefault(name, value)
    try:
        sys.exit(app(sys.argv[1:] or ["--help"], standalone_mode=False))
    except UsageError as mistake:  # an unknown option, a missing argument
        said = " ".join(mistake.format_message().split()).rstrip(".?")
        asked = f"{mistake.ctx.command_path} --help" if mistake.ctx else "endoprint --help"
        typer.echo(f"endoprint: {said}; see `{asked}`", err=True)
        sys.exit(2)
    except KeyboardInterrupt:
        typer.echo("endoprint: stopped by Ctrl-C; what was finished is kept", err=True)
        sys.exit(130)

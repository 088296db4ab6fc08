"""The program `optserve`: its commands, and how an error becomes one line and an exit code."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import click

from optserve.cli import exits
from optserve.cli.checkpoint import checkpoint
from optserve.cli.demo import demo
from optserve.cli.doctor import doctor
from optserve.cli.group import group
from optserve.cli.health import health
from optserve.cli.job import job
from optserve.cli.options import example
from optserve.cli.schedule import schedule
from optserve.cli.serve import serve
from optserve.wire.errors import OptserveError


def _fail(message: str) -> None:
    click.echo("error: " + " ".join(message.split()), err=True)


class _Program(click.Group):
    """Prints an error as one line `error: <message>` and exits with its code; --debug shows the traceback instead."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except (click.ClickException, click.Abort, click.exceptions.Exit, BrokenPipeError):
            raise
        except Exception as error:
            if ctx.params["debug"]:
                raise
            if isinstance(error, OptserveError):
                _fail(str(error))
                ctx.exit(exits.code_of(error))
            known = isinstance(error, OSError)
            _fail(str(error) if known else f"{type(error).__name__}: {error} (`optserve --debug ...` shows where)")
            ctx.exit(exits.FAILED)

    def main(  # type: ignore[override]  # click has overloads for the two modes
        self, args: Sequence[str] | None = None, prog_name: str | None = None, *, standalone_mode: bool = True, **extra: Any
    ) -> Any:
        if not standalone_mode:
            return super().main(args, prog_name, standalone_mode=False, **extra)
        try:
            code = super().main(args, prog_name, standalone_mode=False, **extra)
        except click.exceptions.NoArgsIsHelpError as error:
            error.show()  # the help, which is many lines
            code = exits.USAGE
        except click.UsageError as error:
            hint = f" (see `{error.ctx.command_path} --help`)" if error.ctx else ""
            _fail(error.format_message() + hint)
            code = exits.USAGE
        except click.ClickException as error:
            _fail(error.format_message())
            code = error.exit_code
        except click.Abort:
            _fail("interrupted")
            code = exits.INTERRUPTED
        sys.exit(code if isinstance(code, int) else exits.OK)


@click.group(
    cls=_Program,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog=example("optserve demo", "optserve serve", "optserve job list --json") + "\n\n" + exits.describe(),
)
@click.version_option(package_name="optserve", prog_name="optserve")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
def main(debug: bool) -> None:
    """An optimizer as a service: a server holds parameters and optimizer state, workers push gradients and pull weights."""
    del debug  # read from the context when something fails


for _command in (serve, demo, doctor, health, job, group, schedule, checkpoint):
    main.add_command(_command)

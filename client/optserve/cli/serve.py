"""`optserve serve`: runs the server."""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
from pathlib import Path

import click

from optserve.cli.destinations import check_writable
from optserve.cli.extras import SERVER_NEEDS, require
from optserve.cli.options import example


def _stop_when_input_ends() -> None:
    """Stops the server once whoever started it has closed its end of the pipe, by intent or by dying."""

    def watch() -> None:
        while os.read(sys.stdin.fileno(), 4096):
            pass
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, name="optserve-input", daemon=True).start()


def _writable(_ctx: click.Context, _param: click.Parameter, file: Path | None) -> Path | None:
    """Before the server starts, which otherwise serves for a moment and then fails."""
    if file is not None:
        check_writable(file.parent, file)
    return file


@click.command(
    epilog=example(
        "optserve serve",
        "optserve serve --data-dir /var/lib/optserve --tensorboard",
        "optserve serve --address 0.0.0.0:50051 --insecure --backend numpy",
    )
)
@click.option(
    "--address",
    metavar="HOST:PORT",
    default="127.0.0.1:50051",
    envvar="OPTSERVE_ADDRESS",
    show_default=True,
    show_envvar=True,
    help="Where to listen; port 0 takes a free one.",
)
@click.option(
    "--address-file",
    type=click.Path(dir_okay=False, path_type=Path),
    envvar="OPTSERVE_ADDRESS_FILE",
    show_envvar=True,
    callback=_writable,
    help="Write the address here once the server listens.",
)
@click.option(
    "--backend",
    type=click.Choice(["auto", "cupy", "numba", "numpy"]),
    default="auto",
    envvar="OPTSERVE_BACKEND",
    show_default=True,
    show_envvar=True,
    help="What runs the updates. auto: cupy, if there are CuPy and a GPU, else numba, else numpy.",
)
@click.option(
    "--data-dir",
    type=click.Path(file_okay=False, path_type=Path),
    envvar="OPTSERVE_DATA_DIR",
    show_envvar=True,
    help="Where checkpoints lie. Without it, state is in memory only.",
)
@click.option(
    "--tensorboard",
    is_flag=True,
    envvar="OPTSERVE_TENSORBOARD",
    show_envvar=True,
    help="Write TensorBoard files of every job's metrics into DATA_DIR/tensorboard.",
)
@click.option(
    "--max-streams",
    type=click.IntRange(min=1),
    default=256,
    envvar="OPTSERVE_MAX_STREAMS",
    show_default=True,
    show_envvar=True,
    help="Workers that may be connected at the same time.",
)
@click.option(
    "--insecure",
    is_flag=True,
    envvar="OPTSERVE_INSECURE",
    show_envvar=True,
    help="Allow an address beyond this machine. There is no encryption and no password yet.",
)
@click.option(
    "--log-level",
    type=click.Choice(["debug", "info", "warning", "error"], case_sensitive=False),
    default="info",
    envvar="OPTSERVE_LOG_LEVEL",
    show_default=True,
    show_envvar=True,
    help="What is logged on stderr.",
)
@click.option("--stop-at-input-end", is_flag=True, hidden=True, help="Stop when standard input ends.")
@click.pass_context
def serve(
    ctx: click.Context,
    address: str,
    address_file: Path | None,
    backend: str,
    data_dir: Path | None,
    tensorboard: bool,
    max_streams: int,
    insecure: bool,
    log_level: str,
    stop_at_input_end: bool,
) -> None:
    """Run a server until SIGTERM or Ctrl-C.

    An option beats its OPTSERVE_* variable, which beats the default.
    """
    require("serve", "server", SERVER_NEEDS)
    from optserve.server import app

    if stop_at_input_end:
        _stop_when_input_ends()
    logging.basicConfig(level=log_level.upper(), format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    config = app.ServerConfig(
        address=address,
        address_file=address_file,
        backend=backend,
        data_dir=data_dir,
        max_streams=max_streams,
        insecure=insecure,
        tensorboard=tensorboard,
    )
    ctx.exit(app.serve(config))

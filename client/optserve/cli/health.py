"""`optserve health`: is a server there and serving?"""

from __future__ import annotations

import click

from optserve.cli.options import connected, example, json_option, server_option
from optserve.cli.output import print_json


@click.command(epilog=example("optserve health --server localhost:50051"))
@server_option
@json_option
def health(server: str, as_json: bool) -> None:
    """Ask whether the server answers: prints SERVING and exits with 0.

    3 if nothing answers there, or the server is stopping. Made for a container's healthcheck.
    """
    with connected(server) as found:
        info = found.info()
    if as_json:
        print_json({"status": "SERVING", "server": server, "version": info.version, "backend": info.backend})
    else:
        click.echo("SERVING")

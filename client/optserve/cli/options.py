"""What several commands share: the server's address, --json, the example in a help text, a connection."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from optserve.client import Job, Server

DEFAULT_SERVER = "localhost:50051"
CONNECT_SECONDS = 5.0
"""A person waits for a command; a worker's 30 seconds are too long here."""

Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]

server_option: Decorator = click.option(
    "--server",
    metavar="ADDRESS",
    envvar="OPTSERVE_SERVER",
    default=DEFAULT_SERVER,
    show_default=True,
    show_envvar=True,
    help="The server's host:port.",
)
json_option: Decorator = click.option("--json", "as_json", is_flag=True, help="Print JSON, for programs.")


def example(*lines: str) -> str:
    """An epilog with examples, kept as it is by click."""
    return "\b\n" + ("Example:" if len(lines) == 1 else "Examples:") + "\n" + "\n".join(f"  {line}" for line in lines)


@contextmanager
def connected(address: str) -> Iterator[Server]:
    """The server at the address. ServerUnavailableError names it and the time waited."""
    from optserve.client import connect  # grpc: a command that needs no server starts without it

    with connect(address, timeout_seconds=CONNECT_SECONDS, retry_timeout_seconds=CONNECT_SECONDS) as server:
        yield server


@contextmanager
def opened(address: str, job: str) -> Iterator[Job]:
    """One job of the server at the address, by name or UUID."""
    with connected(address) as server:
        yield server.job(job)

"""`optserve demo`: a real training with separate processes, from nothing to a loss curve."""

from __future__ import annotations

from pathlib import Path

import click

from optserve.cli.extras import EXTRAS, SERVER_NEEDS, require
from optserve.cli.options import example


@click.command(
    epilog=example(
        "optserve demo",
        "optserve demo --workers 4 --output /tmp/demo",
        "optserve demo --connect localhost:50051 --workers 2    # as one of 2 workers of a server that runs",
    )
)
@click.option("--workers", type=click.IntRange(1, 16), default=2, show_default=True, help="Processes that train together.")
@click.option("--epochs", type=click.IntRange(min=3), default=30, show_default=True, help="Passes over the images.")
@click.option(
    "--output",
    type=click.Path(file_okay=False, path_type=Path),
    default=Path("demo-output"),
    show_default=True,
    help="Where loss.png goes.",
)
@click.option(
    "--backend",
    type=click.Choice(["auto", "cupy", "numba", "numpy"]),
    default="auto",
    show_default=True,
    help="What the demo's server runs the updates with.",
)
@click.option(
    "--connect",
    "address",
    metavar="ADDRESS",
    help="Do not start anything: be one of the workers of a job on the server at this host:port.",
)
@click.option(
    "--job",
    "name",
    default="digits",
    envvar="OPTSERVE_JOB",
    show_default=True,
    show_envvar=True,
    help="With --connect: the job.",
)
@click.option(
    "--rank",
    type=click.IntRange(min=0),
    envvar="RANK",
    show_envvar=True,
    help="With --connect: the rank; else the server gives one.",
)
def demo(workers: int, epochs: int, output: Path, backend: str, address: str | None, name: str, rank: int | None) -> None:
    """Train a small network on scikit-learn's digits, data-parallel, through a server.

    Starts a server and the workers as processes of their own, saves a checkpoint half-way, goes on, restores it, trains to the
    end, and ends everything that it started. Takes less than a minute. The last line is the accuracy, about 0.98.
    """
    require("demo", "demo", ["sklearn"] if address else [*EXTRAS["demo"], *SERVER_NEEDS])
    from optserve.cli.demo import participant, show
    from optserve.cli.demo.processes import terminated_as_interrupted

    with terminated_as_interrupted():
        if address:
            accuracy = participant.run(address, name, workers, epochs, rank)
        else:
            accuracy = show.run(workers, epochs, output, backend)
    click.echo(f"accuracy {accuracy:.3f}")

"""One worker process of the demo: `python -m optserve.cli.demo.worker`.

It reports as JSON lines on its output and stops when its input ends, that is when the demo is gone.
"""

from __future__ import annotations

import json
import os
import sys
import threading

import click

from optserve.cli.demo import digits
from optserve.cli.demo.training import Plan, Trainer
from optserve.client import connect
from optserve.wire.errors import OptserveError


def _end_when_input_ends() -> None:
    def watch() -> None:
        while os.read(sys.stdin.fileno(), 4096):
            pass
        os._exit(1)

    threading.Thread(target=watch, name="optserve-input", daemon=True).start()


@click.command()
@click.option("--connect", "address", required=True)
@click.option("--job", "name", required=True)
@click.option("--rank", type=int, required=True)
@click.option("--workers", type=int, required=True)
@click.option("--epochs", type=int, required=True)
def main(address: str, name: str, rank: int, workers: int, epochs: int) -> None:
    """Trains as one rank of the demo's job."""
    _end_when_input_ends()
    data = digits.load()
    plan = Plan(epochs, workers, data.steps_per_epoch, rehearse=True)
    try:
        with connect(address) as server:
            job = server.job(name)
            with job.join(rank=rank) as worker:
                Trainer(job, worker, plan, data, lambda report: print(json.dumps(report), flush=True)).run()
    except OptserveError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()

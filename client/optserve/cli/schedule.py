"""`optserve schedule ...`: a job's learning-rate schedule."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from optserve.cli.assignments import Assignment, collect
from optserve.cli.options import example, json_option, opened, server_option
from optserve.cli.output import print_json, print_pairs, text
from optserve.wire.errors import InvalidArgumentError
from optserve.wire.values import Value

if TYPE_CHECKING:
    from optserve.client import Schedule


@click.group(epilog=example("optserve schedule set digits StepLR step_size=30 gamma=0.1"))
def schedule() -> None:
    """Look at and change the learning-rate schedule while the job runs."""


def document(found: Schedule | None) -> dict[str, object]:
    """A schedule as --json shows it; its name is null if there is none."""
    if found is None:
        return {"name": None, "arguments": {}, "last_epoch": None, "learning_rates": []}
    return {
        "name": found.name,
        "arguments": dict(found.arguments),
        "last_epoch": found.last_epoch,
        "learning_rates": found.learning_rates,
    }


def describe(found: Schedule) -> str:
    """As torch's call would be written."""
    arguments = ", ".join(f"{key}={_argument(value)}" for key, value in found.arguments.items())
    return f"{found.name}({arguments})"


def _argument(value: Value) -> str:
    if isinstance(value, tuple):
        return f"({text(value)},)" if len(value) == 1 else f"({text(value)})"
    return text(value)


def _print(found: Schedule | None, as_json: bool) -> None:
    if as_json:
        print_json(document(found))
    elif found is None:
        click.echo("no schedule")
    else:
        print_pairs(
            [
                ("schedule", describe(found)),
                ("last epoch", found.last_epoch),
                ("learning rates", found.learning_rates),
            ]
        )


@schedule.command(epilog=example("optserve schedule show digits"))
@click.argument("job")
@server_option
@json_option
def show(job: str, server: str, as_json: bool) -> None:
    """Show the schedule and where it stands."""
    with opened(server, job) as found:
        _print(found.lr_schedule, as_json)


@schedule.command(
    "set",
    epilog=example(
        "optserve schedule set digits StepLR step_size=30 gamma=0.1",
        "optserve schedule set digits MultiStepLR milestones=10,20",
    ),
)
@click.argument("job")
@click.argument("name")
@click.argument("values", nargs=-1, type=Assignment())
@server_option
@json_option
def set_schedule(job: str, name: str, values: tuple[tuple[str, Value], ...], server: str, as_json: bool) -> None:
    """Set or replace the schedule by torch's NAME and arguments.

    A list is numbers with commas between them: milestones=10,20. One number does for milestones: milestones=10.
    """
    arguments = collect(values)
    with opened(server, job) as found:
        _print(found.set_lr_schedule(name, **arguments), as_json)


@schedule.command(epilog=example("optserve schedule step digits"))
@click.argument("job")
@server_option
@json_option
def step(job: str, server: str, as_json: bool) -> None:
    """Step the schedule once, now. Steps that workers take count beside it."""
    with opened(server, job) as found:
        if found.lr_schedule is None:
            raise InvalidArgumentError(f"job {job!r} has no schedule; `optserve schedule set {job} NAME ...` sets one")
        _print(found.step_schedule(), as_json)


@schedule.command(epilog=example("optserve schedule remove digits"))
@click.argument("job")
@server_option
@json_option
def remove(job: str, server: str, as_json: bool) -> None:
    """Remove the schedule; the learning rates stay as they are."""
    with opened(server, job) as found:
        _print(found.set_lr_schedule(None), as_json)

"""`optserve schedule ...`: a job's learning-rate schedule."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import click

from optserve.cli.assignments import Assignment, collect
from optserve.cli.options import example, json_option, opened, server_option
from optserve.cli.output import print_json, print_pairs
from optserve.wire.arguments import SCHEDULERS, WITH_FUNCTIONS, ScheduleValue, pairs
from optserve.wire.errors import InvalidArgumentError, MissingFunctionError

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
    """As torch's call would be written, and as `schedulers=` reads it again."""
    return _call(found.name, found.arguments)


def _call(name: str, given: Mapping[str, object]) -> str:
    return f"{name}({', '.join(f'{key}={_argument(key, value)}' for key, value in given.items())})"


def _argument(key: str, value: object) -> str:
    if key == SCHEDULERS:
        return f"[{', '.join(_call(name, inner) for name, inner in pairs(key, value))}]"
    if isinstance(value, tuple):
        entries = [_argument(key, entry) for entry in value]
        return f"({entries[0]},)" if len(entries) == 1 else f"({', '.join(entries)})"
    return str(value).removesuffix(".0")


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
        "optserve schedule set digits OneCycleLR max_lr=0.1,0.01 total_steps=100",
        "optserve schedule set digits SequentialLR milestones=5 \\",
        "    schedulers='LinearLR(total_iters=5), CosineAnnealingLR(T_max=20)'",
    ),
)
@click.argument("job")
@click.argument("name")
@click.argument("values", nargs=-1, type=Assignment())
@server_option
@json_option
def set_schedule(job: str, name: str, values: tuple[tuple[str, ScheduleValue], ...], server: str, as_json: bool) -> None:
    """Set or replace the schedule by torch's NAME and arguments.

    A list is numbers with commas between them: milestones=10,20. One number does for milestones: milestones=10. A list in
    the place of one number is one a param group: max_lr=0.1,0.01. The schedules in a SequentialLR or ChainedScheduler are
    written as torch's calls, in quotes.
    """
    arguments = collect(values)
    _check_no_functions(name, arguments)
    with opened(server, job) as found:
        _print(found.set_lr_schedule(name, **arguments), as_json)


def _check_no_functions(name: str, arguments: Mapping[str, ScheduleValue]) -> None:
    if name.lower() in WITH_FUNCTIONS:
        raise InvalidArgumentError(
            f"{name} calls a Python function, and functions never travel: a process that has it sets and steps the schedule, "
            f'with job.set_lr_schedule("{name}", lr_lambda=f)'
        )
    for part, inner in pairs(SCHEDULERS, arguments.get(SCHEDULERS, ())):
        _check_no_functions(part, inner)


@schedule.command(
    epilog=example("optserve schedule step digits", "optserve schedule step digits --metric 0.31"),
)
@click.argument("job")
@click.option("--metric", type=float, help="What ReduceLROnPlateau steps on.")
@server_option
@json_option
def step(job: str, metric: float | None, server: str, as_json: bool) -> None:
    """Step the schedule once, now. Steps that workers take count beside it."""
    with opened(server, job) as found:
        if found.lr_schedule is None:
            raise InvalidArgumentError(f"job {job!r} has no schedule; `optserve schedule set {job} NAME ...` sets one")
        try:
            _print(found.step_schedule(metric), as_json)
        except MissingFunctionError as error:
            raise MissingFunctionError(
                f"{error}; the command line has none: a process that has it steps the schedule"
            ) from error


@schedule.command(epilog=example("optserve schedule remove digits"))
@click.argument("job")
@server_option
@json_option
def remove(job: str, server: str, as_json: bool) -> None:
    """Remove the schedule; the learning rates stay as they are."""
    with opened(server, job) as found:
        _print(found.set_lr_schedule(None), as_json)

"""`optserve job ...`: the jobs of a server."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import click

from optserve.cli.assignments import Assignment, collect
from optserve.cli.events import events
from optserve.cli.fetch import export, pull
from optserve.cli.group import describe as describe_group
from optserve.cli.group import document as group_document
from optserve.cli.options import connected, example, json_option, opened, server_option
from optserve.cli.output import MOST_NUMBERS, numbers, print_json, print_pairs, print_table, size, text
from optserve.cli.parameters import remove_parameter, rename, replace
from optserve.cli.schedule import describe as describe_schedule
from optserve.cli.schedule import document as schedule_document
from optserve.wire.arguments import ScheduleValue

if TYPE_CHECKING:
    from optserve.client import JobInfo


@click.group(epilog=example("optserve job list", "optserve job show digits --json"))
def job() -> None:
    """List, look at, edit, fetch, watch and delete jobs."""


def document(info: JobInfo) -> dict[str, object]:
    """A job as --json shows it. Parameters are empty in a list."""
    return {
        "name": info.name,
        "job_id": info.job_id,
        "optimizer": info.optimizer,
        "consistency": info.consistency,
        "workers": info.workers,
        "initialized": info.initialized,
        "version": info.position.version,
        "step": info.position.step,
        "durable_version": info.position.durable_version,
        "lineage_id": info.position.lineage_id,
        "backend": info.backend,
        "state_bytes": info.state_bytes,
        **rules_document(info),
        "accumulated": info.accumulated,
        "metrics": dict(info.metrics),
        "groups": [group_document(index, entries) for index, entries in enumerate(info.groups)],
        "members": [
            {"name": member.name, "rank": member.rank, "epoch": member.epoch, "alive": member.alive} for member in info.members
        ],
        "parameters": [{"name": place.name, "shape": place.shape, "dtype": str(place.dtype)} for place in info.layout.places],
    }


def rules_document(info: JobInfo) -> dict[str, object]:
    """A job's rules as --json shows them."""
    return {
        "clip_grad_norm": info.clip_grad_norm,
        "clip_grad_value": info.clip_grad_value,
        "accumulation": info.accumulation,
    }


def _rules(info: JobInfo) -> str:
    """Those that do anything."""
    shown = [(name, value) for name, value in rules_document(info).items() if value is not None]
    return " ".join(f"{name}={text(value)}" for name, value in shown if (name, value) != ("accumulation", 1))


def _name(info: JobInfo) -> str:
    return info.name or f"({info.job_id})"


def _alive(info: JobInfo) -> str:
    return f"{sum(member.alive for member in info.members)}/{info.workers}"


@job.command("list", epilog=example("optserve job list", "optserve job list --json"))
@server_option
@json_option
def list_jobs(server: str, as_json: bool) -> None:
    """List the server's jobs."""
    with connected(server) as found:
        jobs = found.jobs()
    if as_json:
        print_json([document(info) for info in jobs])
        return
    rows = [
        [
            _name(info),
            info.optimizer,
            info.position.step,
            _alive(info),
            [entries["lr"] for entries in info.groups],
            size(info.state_bytes),
            numbers(info.metrics, MOST_NUMBERS),
        ]
        for info in jobs
    ]
    print_table(["JOB", "OPTIMIZER", "STEP", "WORKERS", "LR", "STATE", "METRICS"], rows, empty="no jobs")


@job.command(epilog=example("optserve job show digits", "optserve job show digits --json"))
@click.argument("job", metavar="JOB")
@server_option
@json_option
def show(job: str, server: str, as_json: bool) -> None:
    """Show one job: where it stands, its schedule, rules, groups, parameters and workers."""
    with opened(server, job) as found:
        info, schedule = found.info(), found.lr_schedule
    if as_json:
        print_json({**document(info), "schedule": schedule_document(schedule)})
        return
    standing = f"{describe_schedule(schedule)}, last epoch {schedule.last_epoch}" if schedule else "none"
    print_pairs(
        [
            ("job", _name(info)),
            ("id", info.job_id),
            ("optimizer", f"{info.optimizer}, {info.consistency}, {info.backend} kernels"),
            ("stands at", f"step {info.position.step}, version {info.position.version}"),
            ("workers", f"{_alive(info)} alive"),
            ("state", size(info.state_bytes)),
            ("metrics", numbers(info.metrics) or "-"),
            ("schedule", standing),
            ("rules", _rules(info) or "none"),
            *([("window", f"{info.accumulated} of {info.accumulation} rounds summed up")] if info.accumulation > 1 else []),
        ]
    )
    _print_tables(info)


def _print_tables(info: JobInfo) -> None:
    group_of = {array.array_id: array.group for array in info.layout.arrays}
    rows = [(place, group_of[place.array_id]) for place in info.layout.places]
    click.echo()
    print_table(
        ["GROUP", "LR", "HYPERPARAMETERS"],
        [[index, entries["lr"], describe_group(entries)] for index, entries in enumerate(info.groups)],
    )
    click.echo()
    print_table(
        ["PARAMETER", "SHAPE", "DTYPE", "GROUP"],
        [[place.name, str(place.shape), place.dtype, index] for place, index in rows],
    )
    if info.members:
        click.echo()
        print_table(["WORKER", "RANK", "EPOCH", "ALIVE"], [[m.name, m.rank, m.epoch, m.alive] for m in info.members])


@job.command("set", epilog=example("optserve job set digits clip_grad_norm=1.0 accumulation=4"))
@click.argument("job", metavar="JOB")
@click.argument("values", nargs=-1, required=True, type=Assignment())
@server_option
@json_option
def set_rules(job: str, values: tuple[tuple[str, ScheduleValue], ...], server: str, as_json: bool) -> None:
    """Change what happens to gradients before a step: clip_grad_norm, clip_grad_value, accumulation.

    From the next round on. `none` removes a clip rule.
    """
    changes = collect(values)
    with opened(server, job) as found:
        found.update_rules(**changes)
        info = found.info()
    if as_json:
        print_json(rules_document(info))
    else:
        click.echo(f"rules: {_rules(info) or 'none'}")


@job.command(epilog=example("optserve job delete digits --yes"))
@click.argument("job", metavar="JOB")
@click.option("--yes", is_flag=True, help="Do not ask.")
@server_option
@json_option
def delete(job: str, yes: bool, server: str, as_json: bool) -> None:
    """Delete a job with its state and all of its checkpoints. Nothing brings them back."""
    with opened(server, job) as found:
        if not yes:
            if not sys.stdin.isatty():
                raise click.UsageError("nobody is there to ask; give --yes to delete the job with its checkpoints")
            click.confirm(f"Delete job {job!r} at step {found.info().position.step} with its checkpoints?", abort=True)
        found.delete()
    if as_json:
        print_json({"job": job, "deleted": True})
    else:
        click.echo(f"deleted {job!r}")


for _command in (events, pull, export, rename, replace, remove_parameter):
    job.add_command(_command)

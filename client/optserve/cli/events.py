"""`optserve job events`: what happened to a job."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from optserve.cli.options import example, opened, server_option
from optserve.cli.output import MOST_NUMBERS, moment, numbers, print_json

if TYPE_CHECKING:
    from optserve.client import Event

FOLLOW_SECONDS = 10.0
"""One wait for new events; the server allows 30."""

_OF_A_ROUND = ("grad_norm", "clip_factor", "evaluations")


@click.command(epilog=example("optserve job events digits", "optserve job events digits --follow --json"))
@click.argument("job", metavar="JOB")
@click.option("--follow", "-f", is_flag=True, help="Go on with what happens from now, until Ctrl-C.")
@server_option
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object a line, for programs.")
def events(job: str, follow: bool, server: str, as_json: bool) -> None:
    """Tell what happened to a job: rounds, workers, edits, checkpoints. The server keeps the last 1,000."""
    with opened(server, job) as found:
        after = 0
        while True:
            for event in found.events(after=after, wait_seconds=FOLLOW_SECONDS if follow else 0):
                _print_event(event, as_json)
                after = event.index
            if not follow:
                return


def _print_event(event: Event, as_json: bool) -> None:
    if as_json:
        entry = {
            "index": event.index,
            "time_seconds": event.time_seconds,
            "kind": event.kind,
            "version": event.position.version,
            "step": event.position.step,
            "message": event.message,
            "fields": dict(event.fields),
            "metrics": dict(event.metrics),
        }
        print_json(entry, one_line=True)
    else:
        at = f"version {event.position.version:<6} step {event.position.step:<6}"
        click.echo("  ".join([moment(event.time_seconds), f"{at} {event.kind:<10} {event.message}", *_numbers(event)]))


def _numbers(event: Event) -> list[str]:
    """Of a round: the ranks' metrics, the gradient's norm, by what it was clipped, how often closures were called."""
    texts = [numbers(event.metrics, MOST_NUMBERS)] if event.metrics else []
    if event.kind == "round" and "skip_reason" not in event.fields:
        texts.append(numbers({name: float(event.fields[name]) for name in _OF_A_ROUND if name in event.fields}))
    return [" ".join(filter(None, texts))] if any(texts) else []

"""KEY=VALUE on the command line: hyperparameters and schedule arguments."""

from __future__ import annotations

import ast
import re

import click

from optserve.cli import schedulers
from optserve.wire.arguments import SCHEDULERS, ScheduleValue
from optserve.wire.values import Value

_NONE = re.compile(r"\bnone\b")
"""Within a list, as in Adafactor's eps=none,1e-3."""


class Assignment(click.ParamType):  # type: ignore[type-arg]  # generic from click 8.4 on only
    """One KEY=VALUE. Values are numbers, true, false, none, several numbers (0.9,0.99; one may be none), or text.

    That of `schedulers` is schedules: LinearLR(total_iters=5), CosineAnnealingLR(T_max=20).
    """

    name = "key=value"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, ScheduleValue]:
        key, equals, text = str(value).partition("=")
        if not equals or not key.isidentifier():
            self.fail(f"{value!r} is not of the form KEY=VALUE, as in lr=1e-4", param, ctx)
        if key == SCHEDULERS:
            try:
                return key, schedulers.parse(text)
            except ValueError as error:
                self.fail(str(error), param, ctx)
        return key, schedulers.listed(key, _parse(text))


def _parse(text: str) -> Value:
    word = text.strip()
    if word.lower() in schedulers.WORDS:
        return schedulers.WORDS[word.lower()]
    try:
        found = ast.literal_eval(word if {"'", '"'} & set(word) else _NONE.sub("None", word))
    except (ValueError, SyntaxError):
        try:
            return float(word)  # nan and inf, which the server refuses by name
        except ValueError:
            return word
    if isinstance(found, list | tuple):
        return tuple(entry for entry in found) if all(isinstance(entry, int | float | None) for entry in found) else word
    return found if isinstance(found, int | float | str) else word


def collect(assignments: tuple[tuple[str, ScheduleValue], ...]) -> dict[str, ScheduleValue]:
    """As a mapping. A key that is given twice is a usage error."""
    values: dict[str, ScheduleValue] = {}
    for key, value in assignments:
        if key in values:
            raise click.UsageError(f"{key} is given twice")
        values[key] = value
    return values

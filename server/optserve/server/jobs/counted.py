"""What the last counted steps of a job's schedule were made with: every rank's k-th must bring the same."""

from __future__ import annotations

from dataclasses import dataclass, field

from optserve.server.records import Changes
from optserve.wire import errors
from optserve.wire.arguments import Factors
from optserve.wire.values import Value

_KEPT = 1024


@dataclass(frozen=True)
class Made:
    """A step as the first rank made it, under the setting of the schedule that it was made with."""

    setting: str
    metric: float | None
    factors: tuple[Factors, ...]
    changes: Changes = field(default_factory=dict)

    @property
    def epochs(self) -> list[int]:
        """At which epochs it called functions."""
        return [entry.epoch for entry in self.factors]


class CountedSteps:
    """By the k of the k-th step.

    A restart, a restore and a schedule that is set anew forget them: then a rank that is behind cannot be compared.
    """

    def __init__(self) -> None:
        self._made: dict[int, Made] = {}

    def note(self, count: int, made: Made) -> None:
        self._made[count] = made
        self._made.pop(count - _KEPT, None)

    def find(self, count: int) -> Made | None:
        return self._made.get(count)

    def check(self, count: int, mine: Made) -> None:
        """RanksDisagreeError, with both values, if another rank made this step with others.

        MissingFunctionError, with the epochs of that step, if the factors are of other ones, or of other functions.
        """
        made = self.find(count)
        if made is None:
            return
        if repr(made.metric) != repr(mine.metric):  # as text NaN is NaN
            raise errors.RanksDisagreeError(
                f"schedule step {count} was made with the metric {made.metric}, this rank has {mine.metric}"
            )
        _check_changes(count, made.changes, mine.changes)
        if made.epochs != mine.epochs or (made.factors and made.setting != mine.setting):
            raise errors.MissingFunctionError(
                f"schedule step {count} called lr_lambda at epoch {', '.join(str(at) for at in made.epochs if at >= 0)}, and "
                "this rank brings no factors for that; pass step_schedule(lr_lambda=f), as on the other ranks",
                awaited=",".join(map(str, made.epochs)),
                setting=made.setting,
            )
        for index, (theirs, ours) in enumerate(zip(made.factors, mine.factors, strict=True)):
            groups = max(len(theirs.values), len(ours.values))
            if theirs.of(groups) != ours.of(groups):
                raise errors.RanksDisagreeError(
                    f"schedule step {count} was made with {_shown(theirs)} of lr_lambda at epoch {theirs.epoch}, this rank has "
                    f"{_shown(ours)}" + (f" (schedule {index} of those with functions)" if len(made.factors) > 1 else "")
                )


def _check_changes(count: int, made: Changes, mine: Changes) -> None:
    theirs, ours = _flat(made), _flat(mine)
    for key in {**theirs, **ours}:
        if (key in theirs, theirs.get(key)) != (key in ours, ours.get(key)):
            group, name = key
            raise errors.RanksDisagreeError(
                f"schedule step {count} was made with {name} of group {group} {_said(theirs, key)}, this rank has it "
                f"{_said(ours, key)}; every rank changes the same before a step of the schedule",
                group=group,
                hyperparameter=name,
            )


def _flat(changes: Changes) -> dict[tuple[int, str], Value]:
    return {(group, name): value for group, entries in changes.items() for name, value in entries.items()}


def _said(changes: dict[tuple[int, str], Value], key: tuple[int, str]) -> str:
    return f"changed to {changes[key]!r}" if key in changes else "unchanged"


def _shown(factors: Factors) -> str:
    return ", ".join(map(repr, factors.values))

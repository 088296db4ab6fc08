"""What a worker's update_group() has changed, and none of its pushes and steps of the schedule has brought to the job yet."""

from __future__ import annotations

from optserve.client._connection import logger
from optserve.v1 import types_pb2 as pb
from optserve.wire.errors import (
    InvalidArgumentError,
    MissingFunctionError,
    NonfiniteGradientError,
    RoundError,
    StaleLayoutError,
)

_NOT_TO_BLAME = (InvalidArgumentError, MissingFunctionError, NonfiniteGradientError, RoundError, StaleLayoutError)
"""Nothing was applied, whatever was changed: the next call brings it again."""


class Edits:
    """Hyperparameters by group and name. Its owner's lock guards it."""

    def __init__(self) -> None:
        self._noted: dict[int, dict[str, pb.Hyperparameter]] = {}
        self._restores: frozenset[str] = frozenset()

    def __str__(self) -> str:
        return "; ".join(f"group {group}: {', '.join(entries)}" for group, entries in self._noted.items())

    def note(self, group: int, changes: list[pb.Hyperparameter], restores: frozenset[str]) -> None:
        """For the next call; of one hyperparameter the last value. `restores`: what the client itself had restored by then."""
        self.forget(restores)
        if changes:
            self._restores = restores
            self._noted.setdefault(group, {}).update({change.name: change for change in changes})

    def to_proto(self) -> list[pb.GroupChange]:
        return [pb.GroupChange(group=group, hyperparameters=entries.values()) for group, entries in self._noted.items()]

    def applied(self) -> None:
        """A call has brought it all."""
        self._noted.clear()

    def forget(self, restores: frozenset[str]) -> None:
        """Drops what was changed before a restore by this client: it is of the state that is gone."""
        if self._noted and restores != self._restores:
            logger.info("update_group(%s) is forgotten: a checkpoint was restored since", str(self))
            self._noted.clear()

    def left(self) -> None:
        """The worker leaves, and no call is to come: what it changed last is lost, and said."""
        if self._noted:
            logger.warning("update_group(%s) is lost: the worker left before its next push", str(self))
            self._noted.clear()

    def failed(self, error: BaseException) -> None:
        """A call was not applied, or it is not known whether it was: drops what it brought, and has the error say so."""
        if self._noted and not isinstance(error, _NOT_TO_BLAME):
            error.add_note(f"What update_group had changed ({self}) is dropped with this call; call it again if it is to hold.")
            self._noted.clear()

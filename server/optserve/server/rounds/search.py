"""A search: the optimizer asks the ranks for the loss and the gradient at points of its own, until it has made one step.

Nothing of the job changes before its outcome is one record. Whoever falls out, or comes anew, ends it: the ranks begin again.
"""

from __future__ import annotations

from dataclasses import dataclass

from optserve.server.records import Caller, Decision
from optserve.server.rounds.contributions import Push, Trial
from optserve.server.store import Search
from optserve.v1 import data_pb2
from optserve.wire import errors


@dataclass(frozen=True)
class CurrentSearch:
    """A search after one of its evaluations.

    `callers` are the pushes of those who take part: the same for all evaluations of a step. `version` is the job's, at which
    the search began: a record that was applied since may have changed what it began with.
    """

    search: Search
    first: Decision
    """Of the evaluation at the weights as they were: its norm, metrics and changes are those of the step."""
    callers: frozenset[Caller]
    version: int
    trial: Trial
    """What every rank is asked for now."""


class Searches:
    """The search that goes on, if one does, and who has yet to hear how the last one failed. Guarded by the host's lock."""

    def __init__(self) -> None:
        self.current: CurrentSearch | None = None
        self._untold: dict[str, tuple[Caller, errors.OptserveError]] = {}
        """By session, until that begins another step."""

    def takes_part(self, push: Push) -> bool:
        return self.current is not None and push.caller in self.current.callers

    def expects(self, push: Push) -> bool:
        """Whether it belongs to the evaluation of now. A rank that sits the step out has one push for all of them."""
        if self.current is None or not self.takes_part(push):
            return False
        return push.kind == data_pb2.CONTRIBUTION_SKIP or push.evaluation == self.current.trial.evaluation

    def unheard(self, push: Push) -> Trial | None:
        """What a push has to be told again: it was taken in, and its stream broke before it heard what is asked for next."""
        if self.current is None or not self.takes_part(push) or push.evaluation != self.current.trial.evaluation - 1:
            return None
        return self.current.trial

    def drop(self, error: errors.OptserveError | None = None) -> None:
        """Ends the search: with an error for all who take part, wherever they are; without one they begin again."""
        if self.current is not None and error is not None:
            self._untold |= {caller.session_id: (caller, error) for caller in self.current.callers}
        self.current = None

    def check_told(self, push: Push) -> None:
        """Raises what ended the search that the push is a later part of. Who begins a step has heard of it, or need not."""
        caller, error = self._untold.get(push.caller.session_id, (None, None))
        if error is not None and caller == push.caller and push.evaluation:
            raise error
        self._untold.pop(push.caller.session_id, None)

    def forget(self, living: frozenset[str]) -> None:
        """Of sessions that are no members any more nobody will ask."""
        self._untold = {session: entry for session, entry in self._untold.items() if session in living}

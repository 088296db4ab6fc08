"""A push on its way: where it waits, and what it is answered with."""

from __future__ import annotations

from dataclasses import dataclass

from optserve.server.jobs.sessions import Member
from optserve.server.records import Result
from optserve.server.rounds.contributions import Contribution, Push, Trial
from optserve.server.rounds.gather import Gather


@dataclass(frozen=True)
class Waiting:
    """The round is not complete: who is missing (rank, member, alive), and how long this push has waited."""

    round: int
    missing: list[tuple[int, Member | None, bool]]
    waited_seconds: float


@dataclass(frozen=True)
class Done:
    """The push's result. `waited_for`: the rank that came last, unless it was this one."""

    result: Result
    waited_for: int | None
    waited_seconds: float


@dataclass(frozen=True)
class Resend:
    """The round's sum was void: the push must be sent again, or (restart) the step with the closure begun again."""

    round: int
    restart: bool = False


@dataclass
class Ticket:
    """A push in progress, as its stream's handler holds it.

    `answer`: it was answered before, and its chunks are passed over. `attached`: so they are where the contribution came whole
    on an earlier stream.
    """

    push: Push
    began_at: float
    ended_at: float = 0.0
    answer: Done | Trial | Resend | None = None
    gather: Gather | None = None
    contribution: Contribution | None = None
    attached: bool = False

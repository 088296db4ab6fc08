"""Who may hold which rank, and who counts as alive. Plain functions and a table of leases; no waiting."""

from __future__ import annotations

from collections.abc import Mapping

from optserve.server.jobs.sessions import Member, Sessions
from optserve.server.records import Joined
from optserve.wire import errors

RECONNECT_GRACE_SECONDS = 5.0
"""After the end of a worker's stream: a killed one is missed that soon, a reconnecting one is not."""


class Leases:
    """Deadlines by session, in the clock's seconds. Guarded by the job's lock."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self._deadlines: dict[str, float] = {}

    def renew(self, session_id: str, now: float) -> None:
        self._deadlines[session_id] = now + self.seconds

    def extend(self, session_id: str, now: float) -> None:
        """Renews a lease that there is. The one call that needs no lock."""
        if session_id in self._deadlines:
            self._deadlines[session_id] = now + self.seconds

    def shorten(self, session_id: str, now: float) -> None:
        """The session's stream ended: unless it is heard of again it is dead soon."""
        deadline = self._deadlines.get(session_id)
        if deadline is not None:
            self._deadlines[session_id] = min(deadline, now + RECONNECT_GRACE_SECONDS)

    def alive(self, session_id: str, now: float) -> bool:
        return self._deadlines.get(session_id, now) > now

    def deadline(self, session_id: str) -> float | None:
        return self._deadlines.get(session_id)

    def keep_only(self, sessions: set[str]) -> None:
        self._deadlines = {session: deadline for session, deadline in self._deadlines.items() if session in sessions}


def admit(sessions: Sessions, workers: int, alive: Mapping[str, bool], name: str, rank: int | None, session_id: str) -> Joined:
    """The record by which a session becomes a member.

    `alive` tells of each member by name whether its lease runs and it has not left. TooManyWorkersError, RankHeldError,
    InvalidArgumentError.
    """
    named = sessions.members.get(name) if name else None
    if rank is None:
        rank = named.rank if named else 0 if workers == 1 else _lowest_free(sessions, workers, alive)
    if rank >= workers:
        raise errors.TooManyWorkersError(f"rank {rank} is not below the job's {workers} workers", rank=rank, workers=workers)
    name = name or f"rank{rank}"
    holder = sessions.member_at(rank)
    if holder is not None and holder.name != name and alive[holder.name]:
        raise errors.RankHeldError(
            f"rank {rank} is held by worker {holder.name!r}, which is alive", rank=rank, holder=holder.name
        )
    return Joined(name, rank, session_id, sessions.epochs.get(name, 0) + 1)


def _lowest_free(sessions: Sessions, workers: int, alive: Mapping[str, bool]) -> int:
    taken = {member.rank for member in sessions.members.values() if alive[member.name]}
    free = [rank for rank in range(workers) if rank not in taken]
    if not free:
        raise errors.TooManyWorkersError(f"all {workers} ranks of the job are taken by live workers", workers=workers)
    return free[0]


def describe(rank: int, member: Member | None, alive: bool) -> str:
    """ "rank 2 'w2'" for a message."""
    if member is None:
        return f"rank {rank} (never joined)"
    return f"rank {rank} {member.name!r}" + ("" if alive else " (silent)")

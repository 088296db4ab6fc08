"""Exactly once: the last applied call of every session with its result, and who may call."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from optserve.server.records import Caller, Result
from optserve.wire import errors

_KEPT = 4096


@dataclass(frozen=True)
class Member:
    """Who holds a rank. `left`: not waited for, may join again."""

    name: str
    rank: int
    session_id: str
    epoch: int
    left: bool = False


@dataclass
class Sessions:
    """Members by name, epochs by name, and the last result of each session."""

    members: dict[str, Member] = field(default_factory=dict)
    epochs: dict[str, int] = field(default_factory=dict)
    results: dict[str, tuple[Caller, Result]] = field(default_factory=dict)
    fenced: dict[str, str] = field(default_factory=dict)
    """Session to the reason why its calls no longer count."""

    def member_of(self, session_id: str) -> Member | None:
        return next((member for member in self.members.values() if member.session_id == session_id), None)

    def member_at(self, rank: int) -> Member | None:
        return next((member for member in self.members.values() if member.rank == rank), None)

    def is_worker(self, session_id: str) -> bool:
        """Whether the session is a member, or was one until it was fenced: its calls must carry its epoch."""
        return session_id in self.fenced or self.member_of(session_id) is not None

    def check_member(self, session_id: str, epoch: int) -> Member:
        """The member that a worker's call is from. FencedError or NotJoinedError."""
        member = self.member_of(session_id)
        if member is None or member.epoch != epoch:
            if session_id in self.fenced or member is not None:
                raise errors.FencedError(self.fenced.get(session_id, "another worker joined under this one's name"))
            raise errors.NotJoinedError(f"session {session_id} is not a worker of this job; join first")
        if member.left:
            raise errors.NotJoinedError(f"worker {member.name!r} has left the job; join again")
        return member

    def repeated(self, caller: Caller) -> Result | None:
        """The stored result if the call was applied before, None if it is the session's next one.

        SequenceConflictError, SequenceGapError otherwise.
        """
        last = self.results.get(caller.session_id)
        last_seq = last[0].seq if last else 0
        if last and caller.seq == last_seq:
            if last[0].fingerprint != caller.fingerprint:
                raise errors.SequenceConflictError(
                    f"call {caller.seq} of this session was applied with other content", seq=caller.seq
                )
            return last[1]
        if caller.seq != last_seq + 1:
            raise errors.SequenceGapError(
                f"call {caller.seq} of this session came after call {last_seq}; call {last_seq + 1} is next",
                seq=caller.seq,
                last_seq=last_seq,
            )
        return None

    def last_seq(self, session_id: str) -> int:
        last = self.results.get(session_id)
        return last[0].seq if last else 0

    def store(self, caller: Caller, result: Result) -> None:
        self.results.pop(caller.session_id, None)
        self.results[caller.session_id] = (caller, result)
        living = {member.session_id for member in self.members.values()}
        for session_id in [entry for entry in self.results if entry not in living][:-_KEPT]:
            del self.results[session_id]

    def join(self, name: str, rank: int, session_id: str, epoch: int) -> None:
        """Gives a session a name and a rank; the former holders of both are fenced."""
        held = [
            entry
            for entry in self.members.values()
            if session_id == entry.session_id or name == entry.name or rank == entry.rank
        ]
        for former in held:
            if former.session_id != session_id:
                self.fenced[former.session_id] = f"worker {former.name!r} (rank {former.rank}) was replaced by a newer one"
            del self.members[former.name]
        for session in list(self.fenced)[:-_KEPT]:
            del self.fenced[session]
        self.fenced.pop(session_id, None)
        self.epochs[name] = epoch
        self.members[name] = Member(name, rank, session_id, epoch)

    def leave(self, name: str) -> None:
        self.members[name] = replace(self.members[name], left=True)

    def to_document(self) -> dict[str, Any]:
        return {
            "members": [asdict(member) for member in self.members.values()],
            "epochs": self.epochs,
            "fenced": self.fenced,
            "results": [[asdict(caller), result.to_document()] for caller, result in self.results.values()],
        }

    @classmethod
    def from_document(cls, document: Mapping[str, Any]) -> Sessions:
        members = [Member(**entry) for entry in document["members"]]
        results = [(Caller(**caller), Result.from_document(result)) for caller, result in document["results"]]
        return cls(
            {member.name: member for member in members},
            dict(document["epochs"]),
            {caller.session_id: (caller, result) for caller, result in results},
            dict(document["fenced"]),
        )

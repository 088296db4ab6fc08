"""A job that runs: its lock, journal, events and leases, and the calls by which sessions come, live and go."""

from __future__ import annotations

import copy
import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from optserve.server.jobs import Job
from optserve.server.jobs import spec as specs
from optserve.server.jobs.rules import clipping
from optserve.server.jobs.sessions import Member
from optserve.server.records import Changes, Initialized, Joined, Left, Record, Result, Rules
from optserve.server.rounds.events import EventLog, Round
from optserve.server.rounds.membership import Leases, admit
from optserve.server.rounds.protocols import Journal
from optserve.server.store import Hold, StoreState
from optserve.v1 import jobs_pb2
from optserve.wire import errors
from optserve.wire.values import Value

logger = logging.getLogger("optserve.server")

POLL_SECONDS = 1.0
"""A waiter looks by itself that often whether its caller still lives."""

HEARTBEAT_SECONDS = 0.1
"""How long a heartbeat waits for a job that is busy."""

READERS_SECONDS = 30.0
"""How long an edit of arrays waits for workers that pull."""

Clock = Callable[[], float]
Alive = Callable[[], bool]


class JobHost:
    """Owns the job's lock (`changed`), which guards the job, the leases and the round that gathers.

    Waiters sleep on `changed` and are woken by every commit, join, leave and cancelled call.
    """

    def __init__(self, job: Job, journal: Journal, creator_session: str = "", clock: Clock = time.monotonic) -> None:
        self.job = job
        self.journal = journal
        self.events = EventLog()
        self.clock = clock
        self.changed = threading.Condition()
        self.leases = Leases(job.plan.spec.lease_seconds)
        self.creator_session = creator_session
        self.owner_session = "" if job.name else creator_session
        """Whose end is an unnamed job's end."""
        self.closed: errors.OptserveError | None = None
        self.on_membership: Callable[[], None] = lambda: None
        self.on_reset: Callable[[errors.OptserveError], None] = lambda _: None
        self.on_layout: Callable[[], None] = lambda: None
        """After parameters were renamed, replaced or removed: what gathers is of the ones before."""
        self._holds: dict[str, Hold] = {}
        self._streams: dict[str, object] = {}
        now = clock()
        for member in job.sessions.members.values():
            self.leases.renew(member.session_id, now)
        if creator_session:
            self.leases.renew(creator_session, now)

    @property
    def sync(self) -> bool:
        return self.job.plan.spec.consistency == jobs_pb2.CONSISTENCY_SYNC

    # With the lock held -------------------------------------------------------------------------------------------------------

    def commit(self, record: Record, kind: str, message: str, **fields: object) -> Result:
        """Logs and applies a record, publishes it and tells the waiters."""
        result = self.record(record)
        self.publish(kind, message, None, None, **fields)
        return result

    def record(self, record: Record) -> Result:
        """Logs and applies a record that is no event, and tells the waiters."""
        self.journal.append(record)
        result = self.job.apply(record)
        self.changed.notify_all()
        return result

    def publish(
        self,
        kind: str,
        message: str,
        metrics: Mapping[str, float] | None = None,
        numbers: Round | None = None,
        **fields: object,
    ) -> None:
        texts = {name: str(value) for name, value in fields.items()}
        self.events.publish(kind, self.job.position, message, texts, metrics or {}, numbers)
        level = logging.DEBUG if kind == "round" else logging.INFO
        logger.log(level, "job %s version %d: %s", self.job.name or self.job.job_id, self.job.position.version, message)

    def prepare(self, groups: Sequence[Mapping[str, Value]], rules: Rules | None = None) -> None:
        """Kernels and slots for steps with these groups, under these rules or else the job's. OutOfMemoryError."""
        rules = rules or self.job.rules
        self.job.store.prepare(clipping(groups, rules.clip_grad_value))
        if rules.accumulation > 1:
            self.job.store.window.prepare()

    def publish_edits(self, changes: Changes) -> None:
        for group, entries in changes.items():
            text = ", ".join(f"{name}={value!r}" for name, value in entries.items())
            self.publish("group", f"group {group}: {text}", group=group)

    def hold(self, session_id: str) -> Hold:
        """The weights for a member to read in place: the next update waits for it. Dropping the member ends it."""
        self.release(session_id)
        self._holds[session_id] = self.job.store.hold()
        return self._holds[session_id]

    def release(self, session_id: str, only: Hold | None = None) -> None:
        """Ends a member's hold, if it has one: whichever, or only this one."""
        with self.changed:
            hold = self._holds.get(session_id)
            if hold is not None and only in (None, hold):
                self._holds.pop(session_id).release()
                self.changed.notify_all()

    def claim(self, session_id: str) -> bool:
        """Whether this session is to upload the initial values: nobody else does, or it has died over it."""
        with self.changed:
            if self.job.initialized:
                return False
            if session_id != self.creator_session and self.leases.alive(self.creator_session, self.clock()):
                return False
            self.creator_session = session_id
            self.leases.renew(session_id, self.clock())
            return True

    @property
    def is_read(self) -> bool:
        """Whether a member reads the weights in place."""
        return bool(self._holds)

    def await_readers(self) -> None:
        """Before an edit that changes arrays: lets members that read in place finish, with the lock let go."""

        def unread() -> bool:
            for session_id in [entry for entry in self._holds if not self.leases.alive(entry, self.clock())]:
                self.release(session_id)
            return not self._holds

        late = errors.DeadlineExceededError(
            f"an edit of job {self.job.name!r} waited {READERS_SECONDS:.0f} s for workers that pull; try again"
        )
        self.wait_until(unread, READERS_SECONDS, lambda: True, late)

    def check_open(self) -> None:
        """Raises what ended the job: it was deleted, or the server stops."""
        if self.closed is not None:
            raise type(self.closed)(str(self.closed))

    def check_initialized(self) -> None:
        self.check_open()
        if not self.job.initialized:
            raise errors.JobNotInitializedError(f"job {self.job.name!r} waits for its creator's initial values")

    def alive(self, member: Member) -> bool:
        return not member.left and self.leases.alive(member.session_id, self.clock())

    def wait_until(self, ready: Callable[[], bool], timeout_seconds: float, alive: Alive, late: errors.OptserveError) -> None:
        """Waits for a change that makes `ready` true. Raises `late` after the timeout, or what ended the job."""
        deadline = self.clock() + timeout_seconds
        while not ready():
            self.check_open()
            left = deadline - self.clock()
            if left <= 0 or not alive():
                raise late
            self.changed.wait(min(left, POLL_SECONDS))
        self.check_open()

    # Calls --------------------------------------------------------------------------------------------------------------------

    def wake(self) -> None:
        """Lets waiters look again: a call was cancelled.

        gRPC calls it in the one thread that serves all calls, so it never waits for the lock: who holds that will notify, or
        the waiters look by themselves within POLL_SECONDS.
        """
        if self.changed.acquire(blocking=False):  # not `with`: that would wait
            try:
                self.changed.notify_all()
            finally:
                self.changed.release()
        self.events.wake()

    def close(self, reason: errors.OptserveError) -> None:
        """Ends every wait with an error; calls that are being applied finish first."""
        with self.changed:
            self.closed = reason
            self.on_reset(reason)
            self.changed.notify_all()
        self.events.close()

    def uploading(self, session_id: str) -> None:
        """A block of the initial values came: its sender lives. JobExistsError for anybody but the creator."""
        with self.changed:
            if session_id != self.creator_session:
                raise errors.JobExistsError(f"the initial values of job {self.job.name!r} are uploaded by another session")
            self.leases.renew(session_id, self.clock())

    def initialized(self) -> None:
        """The creator's values are complete: makes the kernels and lets everybody in."""
        with self.changed:
            self.check_open()
            if not self.job.initialized:
                self.prepare(self.job.groups)
                self.commit(Initialized(), "initialized", f"job {self.job.name!r} has its initial values")

    def wait_initialized(self, timeout_seconds: float, alive: Alive) -> None:
        """JobNotInitializedError after the timeout."""
        late = errors.JobNotInitializedError(
            f"job {self.job.name!r}: its creator has not uploaded the initial values within {timeout_seconds:.0f} s"
        )
        with self.changed:
            self.wait_until(lambda: self.job.initialized, timeout_seconds, alive, late)

    def wait_version(self, version: int, timeout_seconds: float, alive: Alive) -> None:
        """DeadlineExceededError after the timeout."""
        late = errors.DeadlineExceededError(
            f"job {self.job.name!r} did not reach version {version} within {timeout_seconds:g} s"
        )
        with self.changed:
            self.wait_until(lambda: self.job.position.version >= version, timeout_seconds, alive, late)

    def join(self, name: str, rank: int | None, session_id: str, seen: tuple[str, int]) -> Member:
        """Makes a session a member and fences who held its name; the same session again changes nothing."""
        with self.changed:
            self.check_initialized()
            self.job.check_seen(*seen)
            if name:
                specs.check_worker_name(name)
            held = self.job.sessions.member_of(session_id)
            if held is None or held.left or (name and held.name != name) or (rank is not None and held.rank != rank):
                self.prepare(self.job.groups)
                alive = {member.name: self.alive(member) for member in self.job.sessions.members.values()}
                record = admit(self.job.sessions, self.job.plan.spec.workers, alive, name, rank, session_id)
                self._join(record)
            self.leases.renew(session_id, self.clock())
            return self.job.sessions.members[self._name_of(session_id)]

    def _name_of(self, session_id: str) -> str:
        member = self.job.sessions.member_of(session_id)
        if member is None:
            raise errors.NotJoinedError(f"session {session_id} is not a worker of this job; join first")
        return member.name

    def _join(self, record: Joined) -> None:
        former = self.job.sessions.members.get(record.name)
        for member in list(self.job.sessions.members.values()):
            if member.name == record.name or member.rank == record.rank:
                self.release(member.session_id)
        message = f"worker {record.name!r} joined as rank {record.rank}"
        self.commit(record, "joined", message, name=record.name, rank=record.rank, epoch=record.epoch)
        if former is not None and former.session_id != record.session_id and not former.left:
            self.publish("fenced", f"worker {record.name!r} of epoch {former.epoch} was fenced", name=record.name)
        living = {member.session_id for member in self.job.sessions.members.values()} | {self.owner_session}
        self.leases.keep_only(living)
        self.on_membership()

    def heartbeat(self, session_id: str, epoch: int) -> None:
        """Renews a lease. FencedError or NotJoinedError, but of a job that is busy with the next heartbeat.

        The few threads that serve heartbeats serve all jobs: none waits for one job's long update or compilation.
        """
        self.leases.extend(session_id, self.clock())  # before the lock: a long update must not make the living look dead
        if not self.changed.acquire(timeout=HEARTBEAT_SECONDS):  # not `with`: that would wait
            return
        try:
            self.check_open()
            if session_id != self.owner_session:
                self.job.sessions.check_member(session_id, epoch)
            self.leases.renew(session_id, self.clock())
        finally:
            self.changed.release()

    def leave(self, session_id: str, epoch: int) -> None:
        """Ends a membership; again changes nothing."""
        with self.changed:
            member = self.job.sessions.member_of(session_id)
            if member is None or member.left:
                return
            self.job.sessions.check_member(session_id, epoch)
            self.release(session_id)
            self.commit(Left(member.name), "left", f"worker {member.name!r} left", name=member.name, rank=member.rank)
            self.on_membership()

    def stream_opened(self, session_id: str, stream: object) -> None:
        """A worker's stream: the newest one is what counts."""
        with self.changed:
            self._streams[session_id] = stream

    def stream_ended(self, session_id: str, stream: object) -> None:
        """A worker's newest stream broke off: begins its reconnect grace."""
        with self.changed:
            if self._streams.get(session_id) is stream:
                del self._streams[session_id]
                self.leases.shorten(session_id, self.clock())
                self.changed.notify_all()

    def announce(self, kind: str, message: str, **fields: object) -> None:
        """Publishes what happened beside the job's records."""
        with self.changed:
            self.publish(kind, message, None, None, **fields)

    def check_seen(self, seen: tuple[str, int]) -> None:
        """RolledBackError if a reader saw what the job no longer has."""
        with self.changed:
            self.check_initialized()
            self.job.check_seen(*seen)

    def capture(self) -> tuple[dict[str, Any], StoreState]:
        """Document and tensors of one version, copied, for a checkpoint. A stopping server may still do so."""
        with self.changed:
            if not self.job.initialized:
                raise errors.JobNotInitializedError(f"job {self.job.name!r} has no initial values yet")
            tensors = self.job.store.export()
            return copy.deepcopy(self.job.to_document(tensors.steps)), tensors  # it is written without the lock

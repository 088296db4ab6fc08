"""The jobs of a server by name and id. Owns its lock, which comes before every job's lock."""

from __future__ import annotations

import difflib
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from optserve.server.backends import Backend
from optserve.server.jobs import Job, parameters
from optserve.server.jobs import spec as specs
from optserve.server.records import new_id
from optserve.server.rounds.administration import Administration
from optserve.server.rounds.host import Clock, JobHost
from optserve.server.rounds.parameter_edits import ParameterEdits
from optserve.server.rounds.protocols import Journal
from optserve.server.rounds.pushes import Pushes
from optserve.v1 import jobs_pb2
from optserve.wire import errors

_NAMES_SHOWN = 8
"""Of the jobs that a message lists."""

_DELETED_KEPT = 4096
"""Ids by which a repeated DeleteJob is known for what it is."""


@dataclass
class Running:
    """A job with its host, its pushes and the edits of it."""

    host: JobHost
    pushes: Pushes = field(init=False)
    administration: Administration = field(init=False)
    parameter_edits: ParameterEdits = field(init=False)

    def __post_init__(self) -> None:
        self.pushes = Pushes(self.host)
        self.administration = Administration(self.host)
        self.parameter_edits = ParameterEdits(self.host, self.administration)

    @property
    def job(self) -> Job:
        return self.host.job


class Registry:
    """Creates, finds and deletes jobs. Its lock guards the two tables."""

    def __init__(
        self,
        backend: Backend,
        journal: Callable[[str], Journal],
        clock: Clock = time.monotonic,
        watch: Callable[[JobHost], None] = lambda _: None,
    ) -> None:
        """`watch` is given every job that comes, before anything happens to it."""
        self._watch = watch
        self.backend = backend
        self._journal = journal
        self._clock = clock
        self._lock = threading.Lock()
        self._by_id: dict[str, Running] = {}
        self._deleted: deque[str] = deque(maxlen=_DELETED_KEPT)
        self._closed: errors.OptserveError | None = None

    def create(self, job_id: str, spec: jobs_pb2.JobSpec, session_id: str, exist_ok: bool) -> tuple[Running, bool]:
        """A new job (True), or with `exist_ok` the one of that name (False) if its spec matches, as it was created or with the
        parameters of now.

        True means that the caller uploads the initial values; so does the first to find a job whose creator died before it had.
        The same job_id again is the same call again. JobExistsError, JobSpecMismatchError, and what the spec's check raises.
        """
        plan = specs.plan(spec)
        with self._lock:
            self._check_open()
            found = self._by_id.get(job_id) or (self._named(spec.name) if spec.name else None)
            if found is not None:
                return self._attach(found, job_id, session_id, plan, exist_ok)
            running = self._add(Job(job_id, plan, self.backend, new_id()), session_id)
            return running, True

    def _attach(self, found: Running, job_id: str, session_id: str, plan: specs.Plan, exist_ok: bool) -> tuple[Running, bool]:
        name = found.job.name
        if found.job.job_id != job_id and not exist_ok:
            raise errors.JobExistsError(
                f"job {name!r} exists (version {found.job.position.version}); attach with exist_ok=True, or delete it",
                name=name,
            )
        odd = specs.differences(found.job.plan, plan)
        if odd and specs.differences(parameters.as_now(found.job), plan):  # a parameter's name or shape may be another by now
            raise errors.JobSpecMismatchError(f"job {name!r} exists with another spec: {'; '.join(odd)}", name=name)
        same_call = found.job.job_id == job_id and not found.job.initialized
        return found, same_call or found.host.claim(session_id)

    def adopt(self, job: Job, session_id: str = "") -> Running:
        """Takes in a job that a checkpoint gave. JobExistsError if the name is taken."""
        with self._lock:
            self._check_open()
            if job.job_id in self._by_id:
                return self._by_id[job.job_id]
            if job.name and self._named(job.name) is not None:
                raise errors.JobExistsError(f"job {job.name!r} exists; choose another name, or delete it", name=job.name)
            return self._add(job, session_id)

    def _add(self, job: Job, session_id: str) -> Running:
        host = JobHost(job, self._journal(job.job_id), session_id, self._clock)
        self._watch(host)
        self._by_id[job.job_id] = Running(host)
        return self._by_id[job.job_id]

    def _named(self, name: str) -> Running | None:
        """None for an empty name, which unnamed jobs have."""
        return next((running for running in self._by_id.values() if name and running.job.name == name), None)

    def _check_open(self) -> None:
        if self._closed is not None:
            raise type(self._closed)(str(self._closed))

    def get(self, job_id: str) -> Running | None:
        """The job of that id, if there is one."""
        with self._lock:
            return self._by_id.get(job_id)

    def find(self, name_or_id: str) -> Running:
        """JobNotFoundError says which names are there."""
        with self._lock:
            self._check_open()
            found = self._by_id.get(name_or_id) or self._named(name_or_id)
            names = sorted(running.job.name for running in self._by_id.values() if running.job.name)
        if found is None:
            raise errors.JobNotFoundError(f"no job {name_or_id!r}; {_jobs_here(name_or_id, names)}", job=name_or_id)
        return found

    def all(self) -> list[Running]:
        """By name."""
        with self._lock:
            return sorted(self._by_id.values(), key=lambda running: (running.job.name, running.job.job_id))

    def delete(self, job_id: str) -> bool:
        """Ends a job and all waits on it; False if it was deleted before. JobNotFoundError if it never was."""
        with self._lock:
            running = self._by_id.pop(job_id, None)
            if running is None:
                if job_id in self._deleted:
                    return False
                raise errors.JobNotFoundError(f"no job {job_id!r}", job=job_id)
            self._deleted.append(job_id)
        running.host.close(errors.JobNotFoundError(f"job {running.job.name or job_id!r} was deleted", job=job_id))
        return True

    def expired(self) -> list[str]:
        """Ids of unnamed jobs whose creator's session has ended."""
        now = self._clock()
        return [
            running.job.job_id
            for running in self.all()
            if running.host.owner_session and not running.host.leases.alive(running.host.owner_session, now)
        ]

    def close(self, reason: errors.OptserveError) -> list[Running]:
        """Refuses every further call and ends every wait; the jobs as they stand."""
        with self._lock:
            self._closed = reason
            running = list(self._by_id.values())
        for entry in running:
            entry.host.close(reason)
        return running


def _jobs_here(wanted: str, names: list[str]) -> str:
    if not names:
        return "there is no job here"
    close = difflib.get_close_matches(wanted, names, n=1)
    hint = f"did you mean {close[0]!r}? " if close else ""
    more = f" and {len(names) - _NAMES_SHOWN} more" if len(names) > _NAMES_SHOWN else ""
    return f"{hint}jobs here: {', '.join(names[:_NAMES_SHOWN])}{more}"

"""A server: its jobs."""

from __future__ import annotations

import uuid
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Self

from optserve.client import _checkpoint_files, _packing, _spec
from optserve.client._bundles import END
from optserve.client._caller import Caller
from optserve.client._connection import BULK_SECONDS, Connection, logger
from optserve.client._heartbeat import Heartbeat
from optserve.client._info import JobInfo, ServerInfo
from optserve.client._job import Job
from optserve.client._session import Session
from optserve.client._spec import Group, JobOptions, ParamGroup, Params
from optserve.client._transport import Outgoing
from optserve.v1 import jobs_pb2, server_pb2, workers_pb2
from optserve.wire.errors import InvalidArgumentError, JobExistsError, JobNotFoundError, OptserveError
from optserve.wire.layout import Layout

_LEAVE_SECONDS = 10.0


class Server:
    """A connection to a server, made by connect(). A context manager; thread safe.

    Calls that find the server away are repeated for the retry time, and applied once.
    """

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._unnamed: list[_Creator] = []
        """Keeps the unnamed jobs until close()."""

    def __repr__(self) -> str:
        return f"<Server {self.address}>"

    @property
    def address(self) -> str:
        """host:port, or "this process" for an embedded server."""
        return self._connection.address

    def info(self) -> ServerInfo:
        """What the server is, asked of it."""
        return ServerInfo.from_proto(self._connection.call(server_pb2.GetServerRequest(), server_pb2.GetServerResponse))

    def create_job(
        self,
        name: str | None,
        params: Params | ParamGroup | Iterable[ParamGroup] | None = None,
        *,
        optimizer: str | None = None,
        workers: int = 1,
        consistency: str = "sync",
        exist_ok: bool = False,
        on_nonfinite: str = "reject",
        on_missing: str = "drop",
        quorum: int = 1,
        round_timeout_seconds: float = 1800.0,
        lease_seconds: float = 30.0,
        clip_grad_norm: float | None = None,
        clip_grad_value: float | None = None,
        accumulation: int = 1,
        from_checkpoint: str | Path | None = None,
        **hyperparameters: object,
    ) -> Job:
        """Creates a job and uploads its initial values.

        name: letters, digits, ".", "_" and "-", optionally "user/" before; None: an unnamed job that ends with this connection.
        params: arrays by name, or torch's list of groups, of float32, float64, float16, ml_dtypes.bfloat16, complex64
                or complex128; not kept.
        optimizer: torch's class name in any case. hyperparameters: its arguments, for every group that has no own.
        exist_ok: attach to a job of that name instead; its spec must match, and its weights count, not these.
        clip_grad_norm, clip_grad_value: what the averaged gradient is clipped to before a step, as by torch's functions of
                these names; at most one of them. accumulation: the optimizer steps with the mean of so many rounds.
        from_checkpoint: a folder that download_checkpoint wrote; everything but the name comes from there.

        JobExistsError, JobSpecMismatchError, UnknownOptimizerError, UnknownHyperparameterError, InvalidHyperparameterError,
        DtypeMismatchError, DuplicateParameterError, InvalidArgumentError, CheckpointCorruptError: nothing was created.
        """
        if from_checkpoint is not None:
            ruled = (clip_grad_norm, clip_grad_value, accumulation) != (None, None, 1)
            if params is not None or optimizer is not None or hyperparameters or ruled:
                raise InvalidArgumentError(
                    "from_checkpoint brings parameters, optimizer, hyperparameters and rules; give only the name"
                )
            return self._from_checkpoint(name, Path(from_checkpoint), exist_ok)
        if params is None or optimizer is None:
            raise InvalidArgumentError('create_job needs params and an optimizer, as in optimizer="adam"')
        options = JobOptions(
            workers=workers,
            consistency=consistency,
            on_nonfinite=on_nonfinite,
            on_missing=on_missing,
            quorum=quorum,
            round_timeout_seconds=round_timeout_seconds,
            lease_seconds=lease_seconds,
            clip_grad_norm=clip_grad_norm,
            clip_grad_value=clip_grad_value,
            accumulation=accumulation,
        )
        groups = _spec.groups(params)
        spec = _spec.job_spec(name, groups, optimizer, hyperparameters, options)
        caller = Caller(self._connection, str(uuid.uuid4()), name or "")
        request = jobs_pb2.CreateJobRequest(
            job_id=caller.session.job_id, session_id=caller.session.session_id, spec=spec, exist_ok=exist_ok
        )
        answer = self._connection.call(request, jobs_pb2.CreateJobResponse, BULK_SECONDS)
        if not answer.created:
            return self._joined(answer.job)
        taken_over = answer.job.job_id != caller.session.job_id
        caller.session.job_id = answer.job.job_id
        try:
            self._initialize(caller, Layout.from_proto(answer.job.layout), groups)
        except BaseException:
            if not taken_over:  # a job whose creator died waits for the next who brings values
                self._discard(caller)
            raise
        return self._made(caller, answer.job)

    def job(self, name: str) -> Job:
        """A job by its name or UUID. JobNotFoundError."""
        if not isinstance(name, str) or not name:
            raise JobNotFoundError(f"no job {name!r}; a job is found by its name or UUID, a str")
        answer = self._connection.call(jobs_pb2.GetJobRequest(job=name), jobs_pb2.GetJobResponse)
        return Job(self._connection, answer.job)

    def jobs(self) -> list[JobInfo]:
        """Every job of the server, by name."""
        answer = self._connection.call(jobs_pb2.ListJobsRequest(), jobs_pb2.ListJobsResponse)
        return [JobInfo.from_proto(entry) for entry in answer.jobs]

    def close(self) -> None:
        """Leaves with every worker, ends the unnamed jobs made here, and closes the connection. Idempotent."""
        self._connection.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def _initialize(self, caller: Caller, layout: Layout, groups: list[Group]) -> None:
        values = {name: array for group in groups for name, array in group.values.items()}
        session = caller.session

        def items() -> Iterator[Outgoing]:
            begin = jobs_pb2.InitializeBegin(job_id=session.job_id, session_id=session.session_id)
            yield jobs_pb2.InitializeJobRequest(begin=begin)
            yield from _packing.blocks(layout, values)
            yield jobs_pb2.InitializeJobRequest(end=END)

        self._connection.upload(jobs_pb2.InitializeJobRequest, items, jobs_pb2.InitializeJobResponse)

    def _discard(self, caller: Caller) -> None:
        """Deletes a job whose initial values could not be uploaded, so that its name is free."""
        try:
            request = jobs_pb2.DeleteJobRequest(job_id=caller.session.job_id)
            self._connection.once(request, jobs_pb2.DeleteJobResponse, _LEAVE_SECONDS)
        except OptserveError as error:
            logger.warning("job %s stays on the server without values: %s", caller.shown, error)

    def _joined(self, info: jobs_pb2.JobInfo) -> Job:
        # Whoever brought initial values shall know that these do not count.
        logger.warning("joined %r at version %d: the server's values count", info.spec.name, info.position.version)
        return Job(self._connection, info)

    def _made(self, caller: Caller, info: jobs_pb2.JobInfo) -> Job:
        if not info.spec.name:
            self._unnamed.append(_Creator(self._connection, caller, info.spec.lease_seconds))
        return Job(self._connection, info, caller)

    def _from_checkpoint(self, name: str | None, path: Path, exist_ok: bool) -> Job:
        files = _checkpoint_files.listed(path)
        caller = Caller(self._connection, str(uuid.uuid4()), name or "")
        begin = jobs_pb2.CreateJobFromCheckpointBegin(
            job_id=caller.session.job_id,
            session_id=caller.session.session_id,
            name=name or "",
            files=[jobs_pb2.CheckpointFile(name=entry.name, size=entry.stat().st_size) for entry in files],
        )

        def items() -> Iterator[Outgoing]:
            yield jobs_pb2.CreateJobFromCheckpointRequest(begin=begin)
            yield from _checkpoint_files.chunks(files)
            yield jobs_pb2.CreateJobFromCheckpointRequest(end=END)

        try:
            answer = self._connection.upload(
                jobs_pb2.CreateJobFromCheckpointRequest, items, jobs_pb2.CreateJobFromCheckpointResponse
            )
        except JobExistsError:
            if exist_ok and name:
                return self._joined(self._connection.call(jobs_pb2.GetJobRequest(job=name), jobs_pb2.GetJobResponse).job)
            raise
        return self._made(caller, answer.job)


class _Creator:
    """The session that an unnamed job lives as long as."""

    def __init__(self, connection: Connection, caller: Caller, lease_seconds: float) -> None:
        self._connection = connection
        self._session = Session(caller.session.job_id)
        self._session.session_id = caller.session.session_id  # the caller's own may be renewed
        self._shown = caller.shown
        self._heartbeat = Heartbeat(connection, self._session, lease_seconds or 30.0, f"job {caller.shown}")
        connection.attach(self)

    def leave(self) -> None:
        """Ends the job."""
        if self._heartbeat.stopped.is_set():
            return
        self._heartbeat.stop()
        session = self._session
        request = workers_pb2.LeaveRequest(job_id=session.job_id, session_id=session.session_id)
        try:
            self._connection.once(request, workers_pb2.LeaveResponse, _LEAVE_SECONDS)
        except OptserveError as error:
            logger.info("unnamed job %s could not be ended: %s", self._shown, error)

"""A worker: pushes gradients, pulls weights."""

from __future__ import annotations

import operator
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager
from functools import partial
from types import TracebackType
from typing import NoReturn, Self, TypeVar

from optserve.client import _functions, _gradients, _weights
from optserve.client._connection import logger
from optserve.client._edits import Edits
from optserve.client._functions import Functions, Given, LrLambdas
from optserve.client._gradients import Gradients, Push
from optserve.client._groups import ReadOnlyList, advice, read_only
from optserve.client._info import Schedule, StepInfo
from optserve.client._transport import Outgoing, Stream
from optserve.client._weights import Destination, Weights
from optserve.client._worker_session import SILENCE_SECONDS, WorkerSession
from optserve.v1 import data_pb2, optimizer_pb2
from optserve.v1 import types_pb2 as pb
from optserve.wire.chunks import INLINE_BYTES, to_inline
from optserve.wire.errors import (
    MissingFunctionError,
    OptserveError,
    ProtocolViolationError,
    ReadOnlyError,
    RolledBackError,
    UnknownParameterError,
)
from optserve.wire.values import to_hyperparameters

Metrics = Mapping[str, float]
Result = TypeVar("Result")


class Worker:
    """One rank of a job, made by Job.join(). A context manager: leaving the block leaves the job.

    Thread safe: calls go one at a time, each after a push_pull_async that was begun before it. The same script runs on every
    rank, so each calls the same methods in the same order.
    """

    def __init__(self, session: WorkerSession, functions: Functions | None = None) -> None:
        """`functions`: those of the job that it joined from."""
        self._session = session
        self._functions = functions or Functions()
        self._lock = threading.Lock()
        """Guards the session, its stream, the edits, last_step and which push is pending."""
        self._edits = Edits()
        self._last_step: StepInfo | None = None
        self._pending: Future[Weights] | None = None
        weakref.finalize(self, session.abandon)

    def __repr__(self) -> str:
        return f"<Worker {self.name!r} rank {self.rank} of job {self._session.job}>"

    @property
    def name(self) -> str:
        return self._session.name

    @property
    def rank(self) -> int:
        return self._session.rank or 0

    @property
    def last_step(self) -> StepInfo | None:
        """What came of this worker's last push; None before the first one."""
        return self._last_step

    @property
    def param_groups(self) -> ReadOnlyList:
        """torch's list of dicts as the last reply told it, without a call; see Job.param_groups.

        Replies to a join, a push, a pull and a step of the schedule tell what changed, whoever changed it.
        """
        return read_only(self._session.groups.entries, "worker")

    @param_groups.setter
    def param_groups(self, _: object) -> NoReturn:
        raise ReadOnlyError(advice("worker"))

    def pull(self, out: Weights | None = None) -> Weights:
        """The weights of one whole version, by name, in the caller's own arrays of the parameters' shapes and dtypes.

        `out`: filled and returned instead of new arrays; cheapest if it is a dict that pull or push_pull returned before.
        Its contents are undefined after an error.
        """
        with self._turn():
            return self._pull(out)

    def push(self, gradients: Gradients, weight: float = 1.0, metrics: Metrics | None = None) -> StepInfo:
        """Contributes to a step and waits until it is applied.

        gradients: arrays of their parameters' shapes and dtypes; a name that is missing or None has none. weight: of this rank
        in the mean over the ranks, such as the samples it saw. metrics: scalars, averaged over the ranks.

        UnknownParameterError, ShapeMismatchError, DtypeMismatchError, InvalidArgumentError before anything is sent;
        NonfiniteGradientError for NaN or Inf, by the job's policy; RoundTimeoutError naming the ranks that did not come.
        """
        restores = self._session.restores()
        with self._turn():
            return self._send(self._checked(gradients, weight, metrics), None, restores)

    def push_pull(
        self, gradients: Gradients, weight: float = 1.0, metrics: Metrics | None = None, out: Weights | None = None
    ) -> Weights:
        """push() and pull() in one exchange: the weights right after the step. What came of the push is in last_step."""
        restores = self._session.restores()
        with self._turn():
            return self._send_and_pull(self._checked(gradients, weight, metrics), out, restores)

    def push_pull_async(
        self, gradients: Gradients, weight: float = 1.0, metrics: Metrics | None = None, out: Weights | None = None
    ) -> Future[Weights]:
        """push_pull() in a thread. The gradients (and `out`) must stay untouched until the future is done.

        One is under way at a time: every other call first waits for it. What is wrong with the gradients is raised here.
        """
        restores = self._session.restores()
        future: Future[Weights] = Future()
        future.set_running_or_notify_cancel()

        def run() -> None:
            try:
                with self._lock:
                    weights = self._send_and_pull(push, out, restores)
            except BaseException as error:
                future.set_exception(error)
            else:
                future.set_result(weights)

        with self._turn():
            push = self._checked(gradients, weight, metrics)
            threading.Thread(target=run, name=f"optserve-push-{self.name}", daemon=True).start()
            self._pending = future
        return future

    def skip_round(self, metrics: Metrics | None = None, out: Weights | None = None) -> Weights:
        """Sits a round out: contributes nothing, waits for the others and returns the weights after their step."""
        restores = self._session.restores()
        with self._turn():
            self._session.check_open()
            return self._send_and_pull(_gradients.skipped(self._session.layout, metrics), out, restores)

    def update_group(self, index: int, /, **hyperparameters: object) -> None:
        """Edits hyperparameters of one group with this worker's next push or step_schedule(): they hold from there on.

        For scripts that every rank runs; Job.update_group edits at once. A push steps with the new values, a schedule from
        them. UnknownParameterError for the index and InvalidHyperparameterError for what cannot be sent are raised here, all
        else by the next call, which then applies nothing: UnknownHyperparameterError, InvalidHyperparameterError, and
        RanksDisagreeError on every rank of a round in which two give different values (one that changes nothing agrees). These
        drop the edit, as does an error that leaves open whether the call was applied; after NonfiniteGradientError,
        RoundFailedError and RoundTimeoutError the next one brings it. A round that is skipped brings it too.
        """
        index, changes = operator.index(index), to_hyperparameters(hyperparameters)
        restores = self._session.restores()
        with self._turn():
            self._session.check_open()
            self._session.check_group(index)
            self._edits.note(index, changes, restores)

    def step_schedule(self, metric: float | None = None, *, lr_lambda: LrLambdas | None = None) -> Schedule | None:
        """Steps the learning-rate schedule, counted: the k-th call of any rank is the job's k-th step, applied once.

        `metric` and `lr_lambda` as in Job.step_schedule; every rank brings the same, as it does what update_group() has
        changed since its last push or step. A rank that is behind calls its functions at the epochs of its own k-th step.
        Returns the schedule as it stands; None if another rank made this step and the schedule was removed since.

        InvalidArgumentError if there is none, or for a metric that it does not take or lacks; MissingFunctionError if it calls
        functions and none were given here; RanksDisagreeError, with both values, if another rank's step had others.
        """
        session, value = self._session, _functions.number(metric)

        def call(given: Given) -> optimizer_pb2.StepScheduleResponse:
            def step(_: Stream, identity: pb.CallIdentity) -> optimizer_pb2.StepScheduleResponse:
                request = optimizer_pb2.StepScheduleRequest(
                    call=identity,
                    count=session.schedule_steps + 1,
                    metric=value,
                    factors=given.factors,
                    setting=given.setting,
                    groups_version=session.groups.version(identity.seen),
                    changes=self._edits.to_proto(),
                )
                try:
                    answer = session.connection.once(request, optimizer_pb2.StepScheduleResponse)
                except MissingFunctionError:
                    session.settle()
                    raise
                session.settle()
                session.applied(identity.seq, answer.position)
                session.groups.told(answer.changed_groups)
                self._edits.applied()
                return answer

            return self._bring_edits(step, restores)

        restores = session.restores()
        with self._turn():
            answer = self._functions.step(lr_lambda, call, session.schedule)
            session.schedule_steps += 1
            self._functions.told(answer.schedule)
        return Schedule.from_proto(answer.schedule)

    def leave(self) -> None:
        """Ends the membership: rounds no longer wait for this worker. Waits for push_pull_async first. Idempotent."""
        try:
            if self._pending is not None:
                self._pending.exception()
        finally:
            self._edits.left()
            self._session.leave()

    def close(self) -> None:
        """The same as leave(), without waiting for push_pull_async."""
        self._session.leave()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if kind is None:
            self.leave()
        else:
            self.close()

    @contextmanager
    def _turn(self) -> Iterator[None]:
        """The lock, once no push_pull_async is under way. What came of that is its future's to tell.

        Whatever call learns of a roll back, the edits that none has brought are of the state that is gone.
        """
        while True:
            pending = self._pending
            if pending is not None:
                pending.exception()  # waits, and without the lock: the push takes it
            with self._lock:
                if self._pending is pending:
                    try:
                        yield
                    except RolledBackError as error:
                        self._edits.failed(error)
                        raise
                    return

    def _checked(self, gradients: Gradients, weight: float, metrics: Metrics | None) -> Push:
        self._session.check_open()
        try:
            return _gradients.checked(self._session.layout, gradients, weight, metrics)
        except UnknownParameterError:
            known = self._session.layout.version
            self._session.refresh_layout()  # somebody may have added a group
            if self._session.layout.version == known:
                raise
            return _gradients.checked(self._session.layout, gradients, weight, metrics)

    def _destination(self, out: Weights | None) -> Destination:
        self._session.check_open()
        return Destination(self._session.layout, None, out)

    def _pull(self, out: Weights | None) -> Weights:
        """The lock is held."""
        destination = self._destination(out)
        while True:
            self._session.call(partial(self._request_weights, destination))
            if destination.filled:
                return destination.finished()
            self._session.refresh_layout()
            destination = self._destination(out)

    def _request_weights(self, destination: Destination, stream: Stream, identity: pb.CallIdentity) -> None:
        pull = data_pb2.PullWeights(
            inline_weights_bytes=INLINE_BYTES,
            seen=identity.seen,
            groups_version=self._session.groups.version(identity.seen),
        )
        stream.send([data_pb2.StreamRequest(pull=pull)])
        self._read_weights(stream, destination)
        self._session.settle()

    def _read_weights(self, stream: Stream, destination: Destination) -> None:
        answer = self._session.answer(stream)
        if answer.WhichOneof("content") != "weights":
            raise ProtocolViolationError(f"{answer.WhichOneof('content')} came where weights were expected")
        self._take_weights(answer.weights, stream, destination)

    def _take_weights(self, begin: data_pb2.WeightsBegin, stream: Stream, destination: Destination) -> None:
        self._session.session.saw(begin.position)
        self._session.groups.told(begin.changed_groups)
        _weights.read(begin, lambda: stream.receive(SILENCE_SECONDS), destination)

    def _send_and_pull(self, push: Push, out: Weights | None, restores: frozenset[str]) -> Weights:
        """The lock is held."""
        destination = self._destination(out)
        self._send(push, destination, restores)
        if destination.filled:
            return destination.finished()
        self._session.refresh_layout()
        return self._pull(out)

    def _send(self, push: Push, destination: Destination | None, restores: frozenset[str]) -> StepInfo:
        """The push, until its result and the weights that may follow are read. The lock is held."""
        step: StepInfo | None = None

        def exchange(stream: Stream, identity: pb.CallIdentity) -> StepInfo:
            nonlocal step
            if step is not None and destination is not None:  # applied; the stream broke before the weights were here
                self._request_weights(destination, stream, identity)
                return step
            result = self._result(push, stream, identity, destination is not None)
            self._session.applied(result.seq, result.position)
            self._session.groups.told(result.changed_groups)
            self._edits.applied()
            step = self._last_step = StepInfo.from_proto(result)
            try:
                if destination is not None and result.HasField("weights"):
                    self._take_weights(result.weights, stream, destination)
                elif destination is not None:
                    self._read_weights(stream, destination)
            except OptserveError:
                self._session.drop()
                raise
            self._session.settle()
            return step

        return self._bring_edits(exchange, restores)

    def _bring_edits(self, action: Callable[[Stream, pb.CallIdentity], Result], restores: frozenset[str]) -> Result:
        """WorkerSession.call of an action that sends the edits and, once they are applied, says so. The lock is held."""
        self._edits.forget(restores)
        try:
            return self._session.call(action, restores)
        except BaseException as error:
            self._edits.failed(error)
            raise

    def _result(self, push: Push, stream: Stream, identity: pb.CallIdentity, want_weights: bool) -> data_pb2.PushResult:
        """Sends the push, as often as the server asks for it, and reads what came of it."""
        stream.send(self._requests(push, identity, want_weights))
        while True:
            answer = self._session.answer(stream)
            content = answer.WhichOneof("content")
            if content == "pushed":
                return answer.pushed
            if content == "waiting":
                _log_waiting(answer.waiting)
            elif content == "resend":
                stream.send(self._requests(push, identity, want_weights))
            else:
                raise ProtocolViolationError(f"a push was answered with {content}")

    def _requests(self, push: Push, identity: pb.CallIdentity, want_weights: bool) -> Iterator[Outgoing]:
        """Begin, chunks, end; made while they are sent."""
        begin = data_pb2.PushBegin(
            call=identity,
            contribution=push.contribution,
            weight=push.weight,
            parameter_count=len(push.layout.places),
            absent=push.absent,
            content_fingerprint=push.fingerprint,
            want_weights=want_weights,
            metrics=push.metrics,
            inline_weights_bytes=INLINE_BYTES,
            nonfinite=push.nonfinite,
            changes=self._edits.to_proto(),
            groups_version=self._session.groups.version(identity.seen),
        )
        if push.layout.nbytes <= INLINE_BYTES:
            begin.inline.CopyFrom(to_inline(pieces.assembled() for pieces in push.chunks()))
            yield data_pb2.StreamRequest(push=begin)
            return
        yield data_pb2.StreamRequest(push=begin)
        yield from push.chunks()
        yield data_pb2.StreamRequest(end=pb.StreamEnd())


def _log_waiting(waiting: data_pb2.RoundWaiting) -> None:
    missing = ", ".join(f"rank {member.rank}" + (f" {member.name!r}" if member.name else "") for member in waiting.missing)
    logger.warning("round %d: waiting %.0f s for %s", waiting.round, waiting.waited_seconds, missing)

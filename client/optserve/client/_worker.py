"""A worker: pushes gradients, pulls weights."""

from __future__ import annotations

import operator
import threading
import weakref
from collections.abc import Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager
from functools import partial
from types import TracebackType
from typing import NoReturn, Self, SupportsFloat

from optserve.client import _functions, _gradients
from optserve.client._closures import Closure, ClosureStep, KeptWeights
from optserve.client._edits import Edits
from optserve.client._exchange import Exchange, Making, Wanted
from optserve.client._functions import Functions, Given, LrLambdas
from optserve.client._gradients import Gradients
from optserve.client._groups import ReadOnlyList, advice, read_only
from optserve.client._info import Schedule, StepInfo
from optserve.client._options import PushOptions
from optserve.client._pulled_rows import RowIds
from optserve.client._transport import Stream
from optserve.client._weights import Destination, Weights
from optserve.client._worker_session import WorkerSession
from optserve.v1 import optimizer_pb2
from optserve.v1 import types_pb2 as pb
from optserve.wire.errors import InvalidArgumentError, MissingFunctionError, ReadOnlyError, RolledBackError
from optserve.wire.values import to_hyperparameters

Metrics = Mapping[str, float]


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
        """Guards the session, its stream, the edits, last_step, what closures are given and which push is pending."""
        self._edits = Edits()
        self._exchange = Exchange(session, self._edits)
        self._kept = KeptWeights()
        self._pending: Future[Weights] | None = None
        self._in_closure: int | None = None
        """The thread that runs a closure of step()."""
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
        return self._exchange.last_step

    @property
    def param_groups(self) -> ReadOnlyList:
        """torch's list of dicts as the last reply told it, without a call; see Job.param_groups.

        Replies to a join, a push, a pull and a step of the schedule tell what changed, whoever changed it.
        """
        return read_only(self._session.groups.entries, "worker")

    @param_groups.setter
    def param_groups(self, _: object) -> NoReturn:
        raise ReadOnlyError(advice("worker"))

    def pull(self, out: Weights | None = None, *, rows: RowIds | None = None) -> Weights:
        """The weights of one whole version, by name, in the caller's own arrays of the parameters' shapes and dtypes.

        `out`: filled and returned instead of new arrays; cheapest if it is a dict that pull or push_pull returned before.
        Its contents are undefined after an error.

        `rows`: of these parameters only these rows, such as {"emb": ids}: an array of shape (len(ids), *parameter.shape[1:])
        in the order of the ids, which may repeat. The others come whole. InvalidArgumentError for an id out of range.
        """
        with self._turn("pull"):
            return self._exchange.pull(_destination(out, rows))

    def push(
        self,
        gradients: Gradients | None,
        weight: float = 1.0,
        metrics: Metrics | None = None,
        *,
        loss_scale: float | None = None,
        clip_grad_norm: float | None = None,
        clip_grad_value: float | None = None,
        found_inf: bool = False,
    ) -> StepInfo:
        """Contributes to a step and waits until it is applied.

        gradients: arrays of their parameters' shapes, or SparseGradient; a name that is missing or None has none. Of another
        floating dtype than the parameter they are sent as they are, none wider than the optimizer's state. weight: of this
        rank in the mean over the ranks, such as the samples it saw. metrics: scalars, averaged over the ranks.

        loss_scale: the gradients are those of the loss times this. Then NaN or Inf on any rank skip the step for all, as does
        found_inf=True, with which gradients may be None. clip_grad_norm or clip_grad_value: as torch's functions of these names
        do it to the averaged gradient, instead of the job's own rule. RanksDisagreeError if ranks scale or clip differently.

        UnknownParameterError, ShapeMismatchError, DtypeMismatchError, InvalidArgumentError before anything is sent;
        UnsupportedGradientError for a sparse one that the optimizer does not take; NonfiniteGradientError for NaN or Inf, by
        the job's policy; RoundTimeoutError naming the ranks that did not come.
        """
        options = PushOptions(weight, metrics, loss_scale, clip_grad_norm, clip_grad_value, found_inf).checked()
        restores = self._session.restores()
        with self._turn("push"):
            return self._exchange.push(_push(gradients, options), restores)

    def push_pull(
        self,
        gradients: Gradients | None,
        weight: float = 1.0,
        metrics: Metrics | None = None,
        out: Weights | None = None,
        *,
        rows: RowIds | None = None,
        loss_scale: float | None = None,
        clip_grad_norm: float | None = None,
        clip_grad_value: float | None = None,
        found_inf: bool = False,
    ) -> Weights:
        """push() and pull() in one exchange: the weights right after the step. What came of the push is in last_step."""
        options = PushOptions(weight, metrics, loss_scale, clip_grad_norm, clip_grad_value, found_inf).checked()
        restores = self._session.restores()
        with self._turn("push_pull"):
            return self._exchange.push_pull(_push(gradients, options), _destination(out, rows), restores)

    def push_pull_async(
        self,
        gradients: Gradients | None,
        weight: float = 1.0,
        metrics: Metrics | None = None,
        out: Weights | None = None,
        *,
        rows: RowIds | None = None,
        loss_scale: float | None = None,
        clip_grad_norm: float | None = None,
        clip_grad_value: float | None = None,
        found_inf: bool = False,
    ) -> Future[Weights]:
        """push_pull() in a thread. The gradients (and `out`) must stay untouched until the future is done.

        One is under way at a time: every other call first waits for it. What is wrong with the gradients is raised here.
        """
        options = PushOptions(weight, metrics, loss_scale, clip_grad_norm, clip_grad_value, found_inf).checked()
        make, wanted = _push(gradients, options), _destination(out, rows)
        restores = self._session.restores()
        future: Future[Weights] = Future()
        future.set_running_or_notify_cancel()

        def run() -> None:
            try:
                with self._lock:
                    weights = self._exchange.push_pull(make, wanted, restores, push)
            except BaseException as error:
                future.set_exception(error)
            else:
                future.set_result(weights)

        with self._turn("push_pull_async"):
            push = self._exchange.fitted(make)
            threading.Thread(target=run, name=f"optserve-push-{self.name}", daemon=True).start()
            self._pending = future
        return future

    def skip_round(self, metrics: Metrics | None = None, out: Weights | None = None, *, rows: RowIds | None = None) -> Weights:
        """Sits a round out: contributes nothing, waits for the others and returns the weights after their step."""
        options = PushOptions(0.0, metrics).checked()
        restores = self._session.restores()
        with self._turn("skip_round"):
            return self._exchange.push_pull(partial(_gradients.skipped, options=options), _destination(out, rows), restores)

    def step(
        self,
        closure: Closure,
        weight: float = 1.0,
        *,
        metrics: Metrics | None = None,
        out: Weights | None = None,
        loss_scale: float | None = None,
        clip_grad_norm: float | None = None,
        clip_grad_value: float | None = None,
    ) -> float:
        """torch's step(closure): pulls, calls closure(weights) -> (loss, gradients), pushes. Returns this rank's first loss.

        An optimizer that searches (LBFGS) has the closure called again, at points of its own, on every rank; loss and gradient
        are averaged by weight, and the whole step is one version of the job. Others call it once. `weights` is a dict of
        arrays that the worker keeps and overwrites at the next evaluation. The loss is a number, or an array or tensor of one;
        it goes along as the metric "loss" unless there is one of that name, and is not scaled where there is a loss_scale.

        `out`: used for the closure's weights, and filled with those after the step; without it none are sent then.

        What the closure raises is raised here and nothing is applied: the other ranks get RoundFailedError if this was not the
        first evaluation, else they wait. InvalidArgumentError if it returns no loss, NaN, or calls a method of this worker that
        would wait for the step; else as push(). It may be called anew from the first evaluation if a rank comes or goes.
        """
        if not callable(closure):
            raise InvalidArgumentError(f"closure is of type {type(closure).__name__}; it must be a function of the weights")
        options = PushOptions(weight, metrics, loss_scale, clip_grad_norm, clip_grad_value).checked()
        restores = self._session.restores()
        with self._turn("step"):
            return ClosureStep(self._exchange, self._watched(closure), options, out, self._kept).run(restores)

    def update_group(self, index: int, /, **hyperparameters: object) -> None:
        """Edits hyperparameters of one group with this worker's next push, step() or step_schedule(): they hold from there on.

        For scripts that every rank runs; Job.update_group edits at once. A push steps with the new values, a schedule from
        them. UnknownParameterError for the index and InvalidHyperparameterError for what cannot be sent are raised here, all
        else by the next call, which then applies nothing: UnknownHyperparameterError, InvalidHyperparameterError, and
        RanksDisagreeError on every rank of a round in which two give different values (one that changes nothing agrees). These
        drop the edit, as does an error that leaves open whether the call was applied; after NonfiniteGradientError,
        RoundFailedError and RoundTimeoutError the next one brings it. A round that is skipped brings it too.
        """
        index, changes = operator.index(index), to_hyperparameters(hyperparameters)
        restores = self._session.restores()
        with self._turn("update_group"):
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

            return self._exchange.bring_edits(step, restores)

        restores = session.restores()
        with self._turn("step_schedule"):
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
    def _turn(self, method: str) -> Iterator[None]:
        """The lock, once no push_pull_async is under way. What came of that is its future's to tell.

        Whatever call learns of a roll back, the edits that none has brought are of the state that is gone. `method`: for the
        InvalidArgumentError of a closure that calls it, and would wait for itself.
        """
        if self._in_closure == threading.get_ident():
            raise InvalidArgumentError(
                f"the closure called worker.{method}(); it gets the weights as its argument and returns (loss, gradients)"
            )
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

    def _watched(self, closure: Closure) -> Closure:
        """The closure, known to be running while it does."""

        def run(weights: Weights) -> tuple[SupportsFloat, Gradients]:
            self._in_closure = threading.get_ident()
            try:
                return closure(weights)
            finally:
                self._in_closure = None

        return run


def _push(gradients: Gradients | None, options: PushOptions) -> Making:
    return lambda layout: _gradients.checked(layout, gradients, options)


def _destination(out: Weights | None, rows: RowIds | None) -> Wanted:
    return lambda layout: Destination(layout, None, out, rows)

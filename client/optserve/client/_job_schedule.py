"""A job's learning-rate schedule."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from optserve.client import _functions, _schedule_state
from optserve.client._functions import Given, LrLambdas
from optserve.client._info import Schedule
from optserve.client._job_calls import JobCalls
from optserve.v1 import optimizer_pb2
from optserve.wire.arguments import to_arguments
from optserve.wire.errors import UnknownScheduleError


class ScheduleCalls(JobCalls):
    """Reads, sets, steps and loads the schedule."""

    @property
    def lr_schedule(self) -> Schedule | None:
        """The schedule and where it stands, asked of the server; None if there is none."""
        return Schedule.from_proto(self._get_schedule())

    def set_lr_schedule(self, name: str | None, /, **arguments: object) -> Schedule | None:
        """Sets or replaces the schedule by torch's class name and arguments; None removes it.

        One number for all groups, or a list of one a group where torch takes that. `schedulers` of SequentialLR and
        ChainedScheduler is a list of (class name, arguments) pairs. The functions of LambdaLR and MultiplicativeLR stay in
        this process, for this Job and the workers that joined from it; only what they give is sent, step by step.

        UnknownScheduleError for the name or an argument's, InvalidHyperparameterError for a value, InvalidArgumentError for
        more than a message can tell of: nothing changed.
        """
        if name is not None and not (isinstance(name, str) and name):
            raise UnknownScheduleError(f"schedule {name!r} is not known; it must be torch's class name as text, or None")
        rest, functions = _functions.split(name or "", arguments)
        wired = to_arguments(rest)

        def call(given: Given) -> optimizer_pb2.SetScheduleResponse:
            request = optimizer_pb2.SetScheduleRequest(name=name or "", arguments=wired, factors=given.factors)
            return self._caller.mutate(lambda identity: self._identified(request, identity, optimizer_pb2.SetScheduleResponse))

        answer = self._functions.create(functions, call)
        self._functions.hold(answer.schedule.setting, functions)
        self._functions.told(answer.schedule)
        self._saw(answer.position)
        return Schedule.from_proto(answer.schedule)

    def step_schedule(self, metric: float | None = None, *, lr_lambda: LrLambdas | None = None) -> Schedule | None:
        """Steps the schedule once, now; a worker's step_schedule() is counted over the ranks instead.

        metric: what ReduceLROnPlateau steps on; NaN is no improvement, as in torch. lr_lambda: the function of a LambdaLR or
        MultiplicativeLR that another process has set, or a list of one a group; a list of those in depth-first order if
        several schedules in it call functions. It is kept for later steps.

        InvalidArgumentError if there is no schedule, or for a metric that it does not take or lacks; MissingFunctionError if it
        calls functions and none were given here.
        """

        value = _functions.number(metric)

        def call(given: Given) -> optimizer_pb2.StepScheduleResponse:
            request = optimizer_pb2.StepScheduleRequest(metric=value, factors=given.factors, setting=given.setting)
            return self._caller.mutate(lambda identity: self._identified(request, identity, optimizer_pb2.StepScheduleResponse))

        answer = self._functions.step(lr_lambda, call, self._get_schedule)
        self._functions.told(answer.schedule)
        self._saw(answer.position)
        return Schedule.from_proto(answer.schedule)

    def load_lr_schedule_state_dict(self, state_dict: Mapping[str, Any]) -> Schedule | None:
        """Puts the schedule where a state_dict of its class stands: torch's own, or Schedule.state_dict(). The groups stay.

        As in torch the schedule is set before, with the same arguments; those that the state_dict holds are taken from it.
        InvalidStateDictError if it does not fit: nothing changed.
        """
        request = optimizer_pb2.LoadScheduleStateRequest(state=_schedule_state.to_text(state_dict))
        held = self._functions.held(self._get_schedule().setting)
        _schedule_state.check_functions(state_dict, held)
        answer = self._caller.mutate(
            lambda identity: self._identified(request, identity, optimizer_pb2.LoadScheduleStateResponse)
        )
        _schedule_state.load_functions(state_dict, held)
        self._functions.told(answer.schedule)
        self._saw(answer.position)
        return Schedule.from_proto(answer.schedule)

    def _get_schedule(self) -> optimizer_pb2.Schedule:
        answer = self._caller.read(optimizer_pb2.GetScheduleRequest(job_id=self.job_id), optimizer_pb2.GetScheduleResponse)
        self._saw(answer.position)
        return answer.schedule

"""What a worker says on its stream and what comes back: pushes and their results, weights, points of a search."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TypeVar

from optserve.client import _weights
from optserve.client._connection import logger
from optserve.client._edits import Edits
from optserve.client._gradients import Push
from optserve.client._info import StepInfo
from optserve.client._transport import Stream
from optserve.client._weights import Destination, Weights
from optserve.client._worker_session import SILENCE_SECONDS, WorkerSession
from optserve.v1 import data_pb2
from optserve.v1 import types_pb2 as pb
from optserve.wire.chunks import INLINE_BYTES
from optserve.wire.errors import (
    InputError,
    OptserveError,
    ProtocolViolationError,
    RolledBackError,
    RoundError,
    StaleLayoutError,
)
from optserve.wire.layout import Layout

BEGIN_AGAIN = 0
"""The outcome of a push whose search was given up."""

_ABANDON_SECONDS = 10.0

Made = TypeVar("Made")
Result = TypeVar("Result")

Wanted = Callable[[Layout], Destination]
Making = Callable[[Layout], Push]


class Exchange:
    """The requests of one worker, one at a time: its owner's lock is held around every one of them.

    What goes out is made of the user's own arrays and the job's layout, and made again where another client has changed that.
    """

    def __init__(self, session: WorkerSession, edits: Edits) -> None:
        self.session = session
        self.last_step: StepInfo | None = None
        self._edits = edits

    def fitted(self, make: Callable[[Layout], Made]) -> Made:
        """What is made with the layout that is known, or with the newest one where that does not fit."""
        self.session.check_open()
        known = self.session.layout
        try:
            return make(known)
        except InputError:
            self.session.refresh_layout()  # somebody may have added, renamed, replaced or removed a parameter
            if self.session.layout == known:
                raise
            return make(self.session.layout)

    def refresh(self, refused: Layout, error: StaleLayoutError) -> None:
        """Asks for the layout that stands in the place of the one that was refused; raises the error if there is no other."""
        self.session.refresh_layout()
        if self.session.layout.version == refused.version:
            raise error

    def pull(self, wanted: Wanted, restores: frozenset[str] | None = None) -> Weights:
        """The weights. `restores`: see WorkerSession.call."""
        destination = self.fitted(wanted)
        while True:
            try:
                self.session.call(partial(self._request_weights, destination), restores)
            except StaleLayoutError as error:
                self.refresh(destination.layout, error)
            else:
                if destination.filled:
                    return destination.finished()
                self.session.refresh_layout()
            destination = wanted(self.session.layout)

    def push(self, make: Making, restores: frozenset[str], made: Push | None = None) -> StepInfo:
        """What came of a push. `made`: what `make` has made already, of the layout that is known."""
        push = self.fitted(make) if made is None else made
        while True:
            try:
                return _applied(self.send(push, restores))
            except StaleLayoutError as error:
                self.refresh(push.layout, error)
                push = make(self.session.layout)

    def push_pull(self, make: Making, wanted: Wanted, restores: frozenset[str], made: Push | None = None) -> Weights:
        """The weights after a push."""
        push, destination = self.fitted(make) if made is None else made, self.fitted(wanted)
        while True:
            try:
                _applied(self.send(push, restores, destination))
            except StaleLayoutError as error:
                self.refresh(push.layout, error)
                push, destination = make(self.session.layout), wanted(self.session.layout)
            else:
                return self.finished(destination, wanted)

    def finished(self, destination: Destination, wanted: Wanted) -> Weights:
        """The weights that came after a push, pulled if they are of a layout that was not known."""
        if destination.filled:
            return destination.finished()
        self.session.refresh_layout()
        return self.pull(wanted)

    def send(
        self, push: Push, restores: frozenset[str], after: Destination | None = None, point: Destination | None = None
    ) -> StepInfo | int:
        """Sends a push, as often as the server asks for it, until it is answered.

        The answer is its result, and then the weights are in `after`, if that was given; or the number of the evaluation that
        the optimizer asks for next, for which the weights are in `point`; or BEGIN_AGAIN. A destination of another layout than
        the job's stays unfilled. StaleLayoutError if the push was not applied since it is of a layout that is gone.
        """
        step: StepInfo | None = None
        overwritten = False

        def exchange(stream: Stream, identity: pb.CallIdentity) -> StepInfo | int:
            nonlocal step, overwritten
            if overwritten:
                self.session.settle()
                return BEGIN_AGAIN
            if step is None:
                answer = self._answer(push, after, stream, identity)
                if isinstance(answer, data_pb2.Evaluate):
                    # Gradients may be views of the weights. Of a later evaluation only the head would count if it came again.
                    overwritten = answer.evaluation == 1
                    return self._next_point(answer, stream, point)
                if isinstance(answer, data_pb2.RoundResend):
                    self.session.settle()
                    return BEGIN_AGAIN
                step = self._took(answer)
                if after is not None:
                    self._read_after(answer, stream, after)
            elif after is not None:  # applied; the stream broke before the weights were here
                self._request_again(after, stream, identity)
            self.session.settle()
            return step

        return self.bring_edits(exchange, restores)

    def abandon(self, push: Push, restores: frozenset[str]) -> None:
        """Says that the closure failed at a point of a search. What is in the way is logged: there is an error already."""

        def exchange(stream: Stream, identity: pb.CallIdentity) -> None:
            stream.send(push.requests(self._head(push, None, identity)))
            answer = self.session.answer(stream, _ABANDON_SECONDS)
            raise ProtocolViolationError(f"a search that was given up was answered with {answer.WhichOneof('content')}")

        try:
            self.session.call(exchange, restores, _ABANDON_SECONDS)
        except RoundError:
            return  # what the other ranks get as well
        except OptserveError as error:
            if isinstance(error, RolledBackError):
                self._edits.failed(error)
            logger.warning("%s could not say that its closure failed: %s", self.session.who, error)

    def bring_edits(self, action: Callable[[Stream, pb.CallIdentity], Result], restores: frozenset[str]) -> Result:
        """WorkerSession.call of an action that sends the edits and, once they are applied, says so."""
        self._edits.forget(restores)
        try:
            return self.session.call(action, restores)
        except BaseException as error:
            self._edits.failed(error)
            raise

    def _head(self, push: Push, after: Destination | None, identity: pb.CallIdentity) -> data_pb2.PushBegin:
        begin = push.head()
        begin.call.CopyFrom(identity)
        if not push.options.evaluation:  # those of the first evaluation are the step's
            begin.changes.extend(self._edits.to_proto())
        begin.groups_version = self.session.groups.version(identity.seen)
        begin.inline_weights_bytes = INLINE_BYTES
        if after is not None:
            begin.want_weights = True
            begin.want_rows.extend(after.asked)
        return begin

    def _answer(
        self, push: Push, after: Destination | None, stream: Stream, identity: pb.CallIdentity
    ) -> data_pb2.PushResult | data_pb2.Evaluate | data_pb2.RoundResend:
        """Sends the push, as often as the server asks for the same once more."""
        stream.send(push.requests(self._head(push, after, identity)))
        while True:
            answer = self.session.answer(stream)
            content = answer.WhichOneof("content")
            if content == "pushed":
                return answer.pushed
            if content == "evaluate":
                return answer.evaluate
            if content == "waiting":
                _log_waiting(answer.waiting)
            elif content != "resend":
                raise ProtocolViolationError(f"a push was answered with {content}")
            elif answer.resend.restart:
                return answer.resend
            else:
                stream.send(push.requests(self._head(push, after, identity)))

    def _took(self, result: data_pb2.PushResult) -> StepInfo:
        self.session.applied(result.seq, result.position)
        self.session.groups.told(result.changed_groups)
        self._edits.applied()
        self.last_step = StepInfo.from_proto(result)
        return self.last_step

    def _next_point(self, answer: data_pb2.Evaluate, stream: Stream, point: Destination | None) -> int:
        if answer.evaluation == BEGIN_AGAIN:
            raise ProtocolViolationError("an evaluation without a number was asked for")
        self._take_weights(answer.weights, stream, Destination(Layout()) if point is None else point)
        self.session.settle()
        return answer.evaluation

    def _read_after(self, result: data_pb2.PushResult, stream: Stream, after: Destination) -> None:
        try:
            if result.HasField("weights"):
                self._take_weights(result.weights, stream, after)
            else:
                self._read_weights(stream, after)
        except StaleLayoutError:
            return  # changed right after the step: `after` is not filled
        except OptserveError:
            self.session.drop()
            raise

    def _request_again(self, after: Destination, stream: Stream, identity: pb.CallIdentity) -> None:
        try:
            self._request_weights(after, stream, identity)
        except StaleLayoutError:
            return  # `after` is not filled

    def _request_weights(self, destination: Destination, stream: Stream, identity: pb.CallIdentity) -> None:
        pull = data_pb2.PullWeights(
            inline_weights_bytes=INLINE_BYTES,
            seen=identity.seen,
            groups_version=self.session.groups.version(identity.seen),
            rows=destination.asked,
            layout_version=destination.layout.version,
        )
        stream.send([data_pb2.StreamRequest(pull=pull)])
        self._read_weights(stream, destination)
        self.session.settle()

    def _read_weights(self, stream: Stream, destination: Destination) -> None:
        answer = self.session.answer(stream)
        if answer.WhichOneof("content") != "weights":
            raise ProtocolViolationError(f"{answer.WhichOneof('content')} came where weights were expected")
        self._take_weights(answer.weights, stream, destination)

    def _take_weights(self, begin: data_pb2.WeightsBegin, stream: Stream, destination: Destination) -> None:
        self.session.session.saw(begin.position)
        self.session.groups.told(begin.changed_groups)
        _weights.read(begin, lambda: stream.receive(SILENCE_SECONDS), destination)


def _applied(outcome: StepInfo | int) -> StepInfo:
    if not isinstance(outcome, StepInfo):
        raise ProtocolViolationError("a push without a closure was answered as if it had one")
    return outcome


def _log_waiting(waiting: data_pb2.RoundWaiting) -> None:
    missing = ", ".join(f"rank {member.rank}" + (f" {member.name!r}" if member.name else "") for member in waiting.missing)
    logger.warning("round %d: waiting %.0f s for %s", waiting.round, waiting.waited_seconds, missing)

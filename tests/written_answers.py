"""A server whose answers to a worker are written down, and which keeps what the worker sent."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
from google.protobuf.message import Message

from optserve.client._caller import Caller
from optserve.client._connection import Connection
from optserve.client._transport import Outgoing
from optserve.client._worker import Worker
from optserve.client._worker_session import WorkerSession
from optserve.v1 import data_pb2, jobs_pb2, workers_pb2
from optserve.v1 import types_pb2 as pb
from optserve.wire import errors, reasons
from optserve.wire.chunks import Chunk, from_inline, to_inline
from optserve.wire.layout import Layout
from optserve.wire.methods import Item

FLOAT32 = np.dtype(np.float32)
LAYOUT = Layout().extended(0, [("w", (3,), FLOAT32)])
GROWN = LAYOUT.extended(1, [("v", (2,), FLOAT32)])
TOUCHED = Layout(2, LAYOUT.places, LAYOUT.arrays, 2)
"""The parameter was replaced by one like it."""
RENAMED = Layout(2, Layout().extended(0, [("x", (3,), FLOAT32)]).places, LAYOUT.arrays, 2)
DESCRIBED: dict[str, Any] = {"layout": LAYOUT.to_proto(), "groups": [pb.Group()]}
GRADIENTS = {"w": np.ones(3, np.float32)}
Answer = data_pb2.StreamResponse

AWAY = errors.ServerUnavailableError("gone")


def position(version: int, lineage: str = "one") -> pb.Position:
    return pb.Position(lineage_id=lineage, version=version, step=version)


def opened(last_seq: int, version: int = 0) -> Answer:
    return Answer(opened=data_pb2.StreamOpened(position=position(version), last_seq=last_seq))


def pushed(seq: int, **fields: Any) -> Answer:
    return Answer(pushed=data_pb2.PushResult(seq=seq, position=position(seq), **fields))


def begin_of(version: int, layout: Layout = LAYOUT, value: float | None = None) -> data_pb2.WeightsBegin:
    """Weights of small arrays, which are all of one value: the version, unless another is given."""
    filled = version if value is None else value
    chunks = [
        Chunk(array.array_id, 0, memoryview(np.full(array.length, filled, array.dtype).tobytes())) for array in layout.arrays
    ]
    return data_pb2.WeightsBegin(position=position(version), layout_version=layout.version, inline=to_inline(chunks))


def weights(version: int, layout: Layout = LAYOUT) -> Answer:
    return Answer(weights=begin_of(version, layout))


def evaluate(number: int, value: float, layout: Layout = LAYOUT, version: int = 0) -> Answer:
    """The point where all weights have this value."""
    return Answer(evaluate=data_pb2.Evaluate(evaluation=number, weights=begin_of(version, layout, value)))


def chunked(number: int, value: float) -> list[Any]:
    """evaluate() in several messages."""
    whole = evaluate(number, value)
    begin = data_pb2.WeightsBegin()
    begin.CopyFrom(whole.evaluate.weights)
    begin.ClearField("inline")
    return [
        Answer(evaluate=data_pb2.Evaluate(evaluation=number, weights=begin)),
        *from_inline(whole.evaluate.weights.inline),
        Answer(end={}),
    ]


def resend(*, restart: bool = False) -> Answer:
    return Answer(resend=data_pb2.RoundResend(round=1, restart=restart))


def error(found: errors.OptserveError) -> Answer:
    return Answer(error=reasons.to_detail(found))


STALE = error(errors.StaleLayoutError("a parameter was replaced"))


def goodbye(found: errors.OptserveError) -> Answer:
    return Answer(goodbye=data_pb2.Goodbye(error=reasons.to_detail(found)))


class Written:
    """A transport and stream whose answers are written down. Keeps what was sent.

    An exception among the answers is raised; a function is called for the answer. `layouts`: what GetJob answers, one after
    the other, and at last always the same.
    """

    Answer = Item | BaseException | Callable[[], Item]

    address = "nowhere"

    def __init__(
        self,
        *streams: list[Written.Answer],
        joins: int = 1,
        unary: Iterable[Message | Exception] = (),
        layouts: Iterable[Layout] = (LAYOUT,),
    ) -> None:
        self.streams = list(streams)
        self.layouts = list(layouts)
        self.joins = [
            workers_pb2.JoinResponse(
                name="rank0", epoch=epoch, workers=1, lease_seconds=3000, schedule_steps=schedule_steps, **DESCRIBED
            )
            for epoch, schedule_steps in zip(range(1, joins + 1), (4, 3), strict=False)
        ]
        self.others = list(unary)
        self.begins: list[data_pb2.PushBegin] = []
        self.opens: list[data_pb2.StreamOpen] = []
        self.asked: list[data_pb2.PullWeights] = []
        self.calls: list[Message] = []
        self.said: list[str] = []
        """What came on streams, in order."""
        self.waits: list[float] = []
        """The deadline of each answer."""
        self._answers: list[Written.Answer] = []

    @property
    def pushes(self) -> list[pb.CallIdentity]:
        return [begin.call for begin in self.begins]

    @property
    def changes(self) -> list[list[pb.GroupChange]]:
        return [list(begin.changes) for begin in self.begins]

    @property
    def pulls(self) -> int:
        return len(self.asked)

    def unary(self, path: str, request: Message, timeout_seconds: float) -> Message:
        self.calls.append(request)
        if path.endswith("/Join"):
            return self.joins.pop(0)
        if path.endswith("/Leave"):
            return workers_pb2.LeaveResponse()
        if path.endswith("/GetJob"):
            layout = self.layouts.pop(0) if len(self.layouts) > 1 else self.layouts[0]
            return jobs_pb2.GetJobResponse(job={**DESCRIBED, "layout": layout.to_proto()})
        found = self.others.pop(0)
        if isinstance(found, Exception):
            raise found
        return found

    def upload(self, path: str, items: Callable[[], Iterator[Outgoing]], timeout_seconds: float) -> Message:
        raise NotImplementedError

    def download(self, path: str, request: Message, timeout_seconds: float) -> Iterator[Item]:
        raise NotImplementedError

    def stream(self) -> Written:
        self._answers = self.streams.pop(0)
        return self

    def send(self, items: Iterable[Outgoing]) -> None:
        for item in items:
            if not isinstance(item, data_pb2.StreamRequest):
                continue
            content = str(item.WhichOneof("content"))
            self.said.append(content)
            match content:
                case "push":
                    self.begins.append(item.push)
                case "open":
                    self.opens.append(item.open)
                case "pull":
                    self.asked.append(item.pull)

    def receive(self, timeout_seconds: float) -> Item:
        self.waits.append(timeout_seconds)
        found = self._answers.pop(0)
        if callable(found):
            found = found()
        if isinstance(found, BaseException):
            raise copy.copy(found)  # the traceback of a constant would keep the worker alive
        return found

    def close(self) -> None:
        pass


def joined(transport: Written, restored: set[str] | None = None, retry_seconds: float = 10) -> Worker:
    caller = Caller(Connection(transport, retry_seconds), "job-id", "job")
    session = WorkerSession(caller, "", None, set() if restored is None else restored)
    session.join(1)
    return Worker(session)


def sent(begin: data_pb2.PushBegin, layout: Layout = LAYOUT) -> dict[str, list[float]]:
    """The gradient of a small push."""
    flat = {chunk.array_id: np.frombuffer(chunk.data, layout.arrays[chunk.array_id].dtype) for chunk in begin.inline.chunks}
    return {name: array.tolist() for name, array in layout.views(flat).items()}


class Quadratic:
    """The loss |w|^2 / 2 where w is what the closure is given; keeps every w. Raises what is given at that evaluation."""

    def __init__(self, **raises: BaseException) -> None:
        self.seen: list[float] = []
        self.arrays: list[Any] = []
        self._raises = {int(number[1:]): failure for number, failure in raises.items()}

    def __call__(self, found: Any) -> Any:
        self.seen.append(float(found["w"][0]))
        self.arrays.append(found["w"])
        if len(self.seen) - 1 in self._raises:
            raise self._raises[len(self.seen) - 1]
        return float(found["w"][0]), {"w": found["w"]}


def evaluations(transport: Written) -> list[int]:
    return [begin.evaluation for begin in transport.begins]


def losses(transport: Written) -> list[float]:
    return [begin.loss for begin in transport.begins]


def one_call(transport: Written) -> bool:
    """Whether all that was pushed is one call: of one number and one token."""
    found = {(begin.call.seq, begin.closure) for begin in transport.begins}
    return len(found) == 1 and all(token for _, token in found)

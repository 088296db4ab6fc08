"""From messages to the server's own terms. Typed errors for what is missing."""

from __future__ import annotations

import hashlib
import json
import uuid
from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

from google.protobuf.message import Message

from optserve.server.records import Caller
from optserve.v1 import optimizer_pb2, types_pb2
from optserve.wire import bundle, errors
from optserve.wire.arguments import MOST_SCHEDULES, Factors
from optserve.wire.chunks import Chunk, parse
from optserve.wire.values import Value, from_hyperparameters

AnyMessage = TypeVar("AnyMessage", bound=Message)
Seen = tuple[str, int]


def seen(position: types_pb2.Position) -> Seen:
    return position.lineage_id, position.version


def session(session_id: str) -> str:
    """InvalidArgumentError if a request does not say who calls."""
    if not session_id or len(session_id) > 128:
        raise errors.InvalidArgumentError(f"session_id is {session_id!r}; it must be a UUID chosen by the client")
    return session_id


def new_job(job_id: str) -> str:
    """InvalidArgumentError unless a new job's id is a UUID: it also names the folder of its checkpoints."""
    try:
        return str(uuid.UUID(job_id))
    except ValueError:
        raise errors.InvalidArgumentError(f"job_id is {job_id!r}; it must be a UUID chosen by the client") from None


def caller(call: types_pb2.CallIdentity, fingerprint: str) -> tuple[Caller, Seen]:
    """Who calls, which call it is, and what the caller saw last."""
    if call.seq < 1:
        raise errors.InvalidArgumentError("a mutating call needs an identity: call.seq is 0, its first is 1")
    return Caller(session(call.session_id), call.epoch, call.seq, fingerprint), seen(call.seen)


def fingerprint(request: Message, *more: bytes) -> str:
    """Of a request's content, without the identity and what the caller was told."""
    content = type(request)()
    content.CopyFrom(request)
    for name in {"call", "groups_version"}.intersection(content.DESCRIPTOR.fields_by_name):
        content.ClearField(name)
    return digest(content.SerializeToString(deterministic=True), *more)


def digest(*parts: bytes) -> str:
    """Of a call's content, for its identity."""
    found = hashlib.blake2b(digest_size=16)
    for part in parts:
        found.update(part)
    return found.hexdigest()


def group_changes(entries: Iterable[types_pb2.GroupChange]) -> dict[int, dict[str, Value]]:
    """Hyperparameters by group and name. InvalidArgumentError, InvalidHyperparameterError if something comes twice."""
    changes: dict[int, dict[str, Value]] = {}
    for entry in entries:
        if entry.group in changes:
            raise errors.InvalidArgumentError(f"group {entry.group} is changed twice in one call")
        changes[entry.group] = from_hyperparameters(entry.hyperparameters)
    return changes


def factors(entries: Iterable[optimizer_pb2.Factors]) -> tuple[Factors, ...]:
    """What functions gave. InvalidArgumentError for more than schedules may have."""
    found = tuple(Factors.from_proto(entry) for entry in entries)
    if len(found) > MOST_SCHEDULES:
        raise errors.InvalidArgumentError(f"factors of {len(found)} schedules came; a schedule has at most {MOST_SCHEDULES}")
    return found


def schedule_state(text: str) -> dict[str, Any]:
    """A schedule's state_dict. InvalidStateDictError if it is no JSON object."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise errors.InvalidStateDictError(f"the schedule's state_dict is not JSON: {error}") from error
    if not isinstance(found, dict):
        raise errors.InvalidStateDictError(f"the schedule's state_dict is a JSON {type(found).__name__}; it must be an object")
    return found


def items(kind: type[AnyMessage], requests: Iterable[bytes | AnyMessage | Chunk]) -> Iterator[AnyMessage | Chunk]:
    """A stream's messages as they come."""
    for raw in requests:
        yield parse(kind, raw)


def first(kind: type[AnyMessage], found: Iterator[AnyMessage | Chunk], content: str) -> AnyMessage:
    """The message that must come first. ProtocolViolationError if another one does, IncompleteStreamError if none."""
    for item in found:
        if isinstance(item, Chunk) or item.WhichOneof("content") != content:
            raise errors.ProtocolViolationError(f"a stream of {kind.__name__} must start with {content!r}")
        return item
    raise errors.IncompleteStreamError(f"a stream of {kind.__name__} ended before {content!r}")


def chunks(found: Iterator[AnyMessage | Chunk]) -> Iterator[Chunk]:
    """Chunks until the end message. IncompleteStreamError without one, ProtocolViolationError for anything else."""
    for item in found:
        if isinstance(item, Chunk):
            yield item
        elif item.WhichOneof("content") == "end":
            return
        else:
            raise errors.ProtocolViolationError(f"{item.WhichOneof('content')!r} came among the chunks")
    raise errors.IncompleteStreamError("the stream ended before its end message: it was cut")


def received(entries: Iterable[types_pb2.BundleEntry], nbytes: int, limit: int, found: Iterator[Chunk]) -> list[bundle.Tensor]:
    """A bundle's tensors, once all chunks are there."""
    receiver = bundle.Receiver(list(entries), nbytes, limit)
    for chunk in found:
        receiver.add(chunk)
    return receiver.tensors()

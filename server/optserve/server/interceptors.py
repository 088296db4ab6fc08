"""The gRPC edge: each RPC's handler, its thread pool, and the translation of errors into statuses."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NoReturn, cast

import grpc
from google.protobuf import any_pb2
from google.rpc import code_pb2, error_details_pb2, status_pb2
from grpc_status import rpc_status

from optserve.v1 import types_pb2
from optserve.wire.errors import InternalError, OptserveError
from optserve.wire.methods import METHODS, Method, serialize
from optserve.wire.reasons import DOMAIN

logger = logging.getLogger("optserve.server")

Behaviour = Callable[[Any, Any], Any]
_PREFIX = "ERROR_REASON_"

_MESSAGE_BYTES = 2 << 10
_VALUE_BYTES = 256
_ENTRIES = 16
_METADATA_BYTES = 1536
"""Of an error. It comes in trailers, the message twice, the rest in base64; gRPC refuses trailers of more than 8 KiB."""


def _cut(text: str, limit: int) -> str:
    """The text, or its beginning, as long as gRPC percent-encodes it."""
    size = 0
    kept = text[:limit].encode(errors="replace").decode()
    for index, char in enumerate(kept):
        size += 1 if " " <= char <= "~" and char != "%" else 3 * len(char.encode())
        if size > limit:
            return kept[: max(0, index - 3)] + "..."
    return kept if len(text) <= limit else kept[:-3] + "..."


def _short(metadata: Mapping[str, str]) -> dict[str, str]:
    """As much of an error's metadata as trailers hold."""
    kept: dict[str, str] = {}
    left = _METADATA_BYTES
    for key, value in list(metadata.items())[:_ENTRIES]:
        cut = _cut(value, _VALUE_BYTES)
        left -= len(key) + len(cut.encode()) + 8
        if left < 0:
            break
        kept[key] = cut
    return kept


def abort(context: grpc.ServicerContext, error: OptserveError) -> NoReturn:
    """Ends a call with the error's status and a google.rpc.ErrorInfo."""
    reason = types_pb2.ErrorReason.Name(error.reason).removeprefix(_PREFIX)
    info = any_pb2.Any()
    info.Pack(error_details_pb2.ErrorInfo(reason=reason, domain=DOMAIN, metadata=_short(error.metadata)))
    message = _cut(str(error), _MESSAGE_BYTES)
    status = status_pb2.Status(code=code_pb2.Code.Value(error.status), message=message, details=[info])
    context.abort_with_status(rpc_status.to_status(status))
    raise AssertionError("unreachable: abort raises")


def _translated(path: str, error: Exception) -> OptserveError:
    if isinstance(error, OptserveError):
        return error
    logger.exception("a defect in %s", path)
    return InternalError(f"{type(error).__name__} in {path}; the server's log has the traceback")


def _guard(method: Method, behaviour: Behaviour, pool: ThreadPoolExecutor) -> Behaviour:
    """The behaviour with its errors translated. gRPC aborts by an exception of its own class, which passes."""

    def answer(request: Any, context: grpc.ServicerContext) -> Any:
        try:
            return behaviour(request, context)
        except Exception as error:
            abort(context, _translated(method.path, error))

    def answers(request: Any, context: grpc.ServicerContext) -> Iterator[Any]:
        try:
            yield from behaviour(request, context)
        except Exception as error:
            if context.is_active():
                abort(context, _translated(method.path, error))

    guarded: Any = answers if method.response_streams else answer
    guarded.experimental_thread_pool = pool
    return cast(Behaviour, guarded)


def _unchanged(raw: bytes) -> bytes:
    """A stream's messages are parsed in the handler's thread: gRPC would do it in the one that serves all calls."""
    return raw


def handlers(behaviours: Mapping[str, Behaviour], pool_of: Callable[[str], ThreadPoolExecutor]) -> list[grpc.GenericRpcHandler]:
    """One generic handler a service, for `grpc.Server.add_generic_rpc_handlers`."""
    services: dict[str, dict[str, grpc.RpcMethodHandler]] = {}
    for path, behaviour in behaviours.items():
        method = METHODS[path]
        make = {
            (False, False): grpc.unary_unary_rpc_method_handler,
            (False, True): grpc.unary_stream_rpc_method_handler,
            (True, False): grpc.stream_unary_rpc_method_handler,
            (True, True): grpc.stream_stream_rpc_method_handler,
        }[method.request_streams, method.response_streams]
        parser = _unchanged if method.request_streams else method.request.FromString
        guarded = _guard(method, behaviour, pool_of(path))
        services.setdefault(method.service, {})[method.name] = make(guarded, parser, serialize)
    return [grpc.method_handlers_generic_handler(service, entries) for service, entries in services.items()]

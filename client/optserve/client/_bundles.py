"""What add_param_group, state_dict and load_state_dict send and receive: tensors of any size as one bundle of chunks."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator

from optserve.client import _state_dict
from optserve.client._spec import Array, Group
from optserve.client._state_dict import Loading, StateDict
from optserve.client._transport import Outgoing
from optserve.v1 import optimizer_pb2, parameters_pb2, state_pb2
from optserve.v1 import types_pb2 as pb
from optserve.wire import bundle
from optserve.wire.chunks import Chunk
from optserve.wire.errors import IncompleteStreamError, ProtocolViolationError
from optserve.wire.methods import Item

Items = Callable[[], Iterator[Outgoing]]
"""Makes the stream anew for each attempt."""

END = pb.StreamEnd()


def group_items(call: pb.CallIdentity, group: Group) -> Items:
    """AddGroup's stream."""
    tensors = [(name, "", array) for name, array in group.values.items()]
    entries, nbytes = bundle.table(tensors)
    begin = optimizer_pb2.AddGroupBegin(call=call, group=group.to_proto(), entries=entries, bundle_bytes=nbytes)

    def items() -> Iterator[Outgoing]:
        yield optimizer_pb2.AddGroupRequest(begin=begin)
        yield from bundle.chunks(tensors)
        yield optimizer_pb2.AddGroupRequest(end=END)

    return items


def value_items(call: pb.CallIdentity, name: str, value: Array, keep_state: bool) -> Items:
    """ReplaceParameter's stream."""
    tensors = [(name, "", value)]
    entries, nbytes = bundle.table(tensors)
    begin = parameters_pb2.ReplaceParameterBegin(call=call, entry=entries[0], bundle_bytes=nbytes, keep_state=keep_state)

    def items() -> Iterator[Outgoing]:
        yield parameters_pb2.ReplaceParameterRequest(begin=begin)
        yield from bundle.chunks(tensors)
        yield parameters_pb2.ReplaceParameterRequest(end=END)

    return items


def state_items(call: pb.CallIdentity, loading: Loading) -> Items:
    """LoadState's stream."""
    entries, nbytes = bundle.table(loading.tensors)
    begin = state_pb2.LoadStateBegin(
        call=call,
        groups=loading.matched.groups,
        steps=loading.steps,
        entries=entries,
        bundle_bytes=nbytes,
        partial=loading.loaded is not None,
        loaded=loading.loaded or (),
    )

    def items() -> Iterator[Outgoing]:
        yield state_pb2.LoadStateRequest(begin=begin)
        yield from bundle.chunks(loading.tensors)
        yield state_pb2.LoadStateRequest(end=END)

    return items


def read_state(items: Iterator[Item]) -> tuple[pb.Position, StateDict]:
    """GetState's answer."""
    first = next(items, None)
    if not isinstance(first, state_pb2.GetStateResponse) or first.WhichOneof("content") != "begin":
        raise ProtocolViolationError("a state did not begin with its table of contents")
    begin = first.begin
    receiver = bundle.Receiver(begin.entries, begin.bundle_bytes, limit=sys.maxsize)
    for chunk in chunks(items):
        receiver.add(chunk)
    return begin.position, _state_dict.build(begin, receiver.tensors())


def chunks(items: Iterator[Item]) -> Iterator[Chunk]:
    """The chunks up to the end. IncompleteStreamError if the end does not come."""
    for item in items:
        if isinstance(item, Chunk):
            yield item
        elif (content := item.WhichOneof("content")) == "end":
            return
        else:
            raise ProtocolViolationError(f"{content} came among the chunks")
    raise IncompleteStreamError("the stream ended without its end")

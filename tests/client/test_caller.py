"""A job's administrative calls when what became of one is not known."""

from __future__ import annotations

import pytest

from optserve.client._caller import Caller
from optserve.client._connection import Connection
from optserve.v1 import types_pb2 as pb
from optserve.wire import errors


class Nowhere:
    """Stands for a transport; nothing is sent."""

    address = "nowhere"


@pytest.fixture
def caller() -> Caller:
    return Caller(Connection(Nowhere(), 10), "job-id", "job")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "error",
    [
        errors.SequenceGapError("call 2 came after call 0"),
        errors.SequenceConflictError("call 2 was applied with other content"),
    ],
)
def test_a_call_whose_number_is_not_the_servers_is_made_again_in_a_new_session(
    caller: Caller, error: errors.OptserveError
) -> None:
    caller.mutate(lambda call: call)
    sent: list[pb.CallIdentity] = []

    def send(call: pb.CallIdentity) -> int:
        sent.append(call)
        if len(sent) == 1:
            raise error
        return call.seq

    assert caller.mutate(send) == 1
    assert [call.seq for call in sent] == [2, 1]
    assert sent[0].session_id != sent[1].session_id
    assert caller.mutate(send) == 2


def test_a_conflict_in_a_new_session_is_raised(caller: Caller) -> None:
    def send(_: pb.CallIdentity) -> None:
        raise errors.SequenceConflictError("again")

    with pytest.raises(errors.SequenceConflictError):
        caller.mutate(send)

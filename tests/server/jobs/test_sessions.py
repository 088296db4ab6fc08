"""Exactly once, and who may call."""

from __future__ import annotations

import pytest

from optserve.server.jobs import sessions as room
from optserve.server.jobs.sessions import Sessions
from optserve.server.records import Caller, Position, Result
from optserve.wire import errors

RESULT = Result(Position("a", 1, 1), {"x": 1})


def caller(seq: int, session: str = "s", content: str = "c") -> Caller:
    return Caller(session, 0, seq, content)


def test_the_first_call_is_one() -> None:
    sessions = Sessions()
    assert sessions.repeated(caller(1)) is None
    with pytest.raises(errors.SequenceGapError):
        sessions.repeated(caller(2))


def test_a_repeat_gets_the_stored_result() -> None:
    sessions = Sessions()
    sessions.store(caller(1), RESULT)
    assert sessions.repeated(caller(1)) is RESULT
    with pytest.raises(errors.SequenceConflictError):
        sessions.repeated(caller(1, content="other"))
    assert sessions.repeated(caller(2)) is None


def test_results_of_administrative_sessions_are_bounded_but_members_keep_theirs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "_KEPT", 3)
    sessions = Sessions()
    sessions.join("w", 0, "member", 1)
    sessions.store(caller(1, "member"), RESULT)
    for index in range(10):
        sessions.store(caller(1, f"admin{index}"), RESULT)
    assert sessions.last_seq("member") == 1
    assert [session for session in sessions.results if session != "member"] == ["admin7", "admin8", "admin9"]


def test_a_session_that_goes_on_calling_is_not_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "_KEPT", 3)
    sessions = Sessions()
    for seq in range(1, 6):
        sessions.store(caller(seq, "busy"), RESULT)
        sessions.store(caller(1, f"once{seq}"), RESULT)
    assert sessions.last_seq("busy") == 5


def test_joining_fences_who_held_the_name_or_the_rank() -> None:
    sessions = Sessions()
    sessions.join("a", 0, "s1", 1)
    sessions.join("b", 1, "s2", 1)
    sessions.join("a", 1, "s3", 2)
    assert set(sessions.fenced) == {"s1", "s2"}
    for session in ("s1", "s2"):
        with pytest.raises(errors.FencedError):
            sessions.check_member(session, 1)
    assert sessions.check_member("s3", 2).rank == 1
    assert sessions.member_at(0) is None


def test_sessions_come_back_from_their_document() -> None:
    sessions = Sessions()
    sessions.join("a", 0, "s1", 1)
    sessions.join("a", 0, "s2", 2)
    sessions.join("b", 1, "s3", 1)
    sessions.leave("b")
    sessions.store(caller(4, "s2"), RESULT)
    import json

    assert Sessions.from_document(json.loads(json.dumps(sessions.to_document()))) == sessions

"""What a worker does when its stream breaks, against a server whose answers are written down."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from written_answers import AWAY, GRADIENTS, Answer, Written, error, goodbye, joined, opened, position, pushed, resend, weights

from optserve.v1 import data_pb2, optimizer_pb2, workers_pb2
from optserve.v1 import types_pb2 as pb
from optserve.wire import errors


class Late:
    """A lock that a push in a thread gets only after `release`."""

    def __init__(self, lock: Any, release: threading.Event) -> None:
        self._lock, self._release = lock, release

    def __enter__(self) -> None:
        if threading.current_thread().name.startswith("optserve-push"):
            self._release.wait(10)
        self._lock.acquire()

    def __exit__(self, *_: object) -> None:
        self._lock.release()


def seqs(transport: Written) -> list[int]:
    return [call.seq for call in transport.pushes]


def test_calls_are_numbered_one_by_one_from_where_the_session_stands() -> None:
    transport = Written([opened(7), pushed(8), pushed(9)])
    worker = joined(transport)
    worker.push(GRADIENTS)
    worker.push(GRADIENTS)
    assert seqs(transport) == [8, 9]
    assert {(call.epoch, call.job_id) for call in transport.pushes} == {(1, "job-id")}
    assert transport.pushes[1].seen == position(8)


@pytest.mark.parametrize("last_seq", [0, 1], ids=["not applied", "applied, answer lost"])
def test_a_push_whose_stream_broke_is_repeated_with_its_identity(last_seq: int) -> None:
    transport = Written([opened(0), AWAY], [opened(last_seq), pushed(1), pushed(2)])
    worker = joined(transport)
    worker.push(GRADIENTS)
    worker.push(GRADIENTS)
    assert seqs(transport) == [1, 1, 2]


def test_a_server_that_stops_is_waited_for() -> None:
    stopping = errors.ServerStoppingError("stopping")
    transport = Written(
        [opened(0), goodbye(stopping)], [goodbye(stopping)], [opened(0), error(stopping)], [opened(0), pushed(1)]
    )
    assert joined(transport).push(GRADIENTS).step == 1
    assert seqs(transport) == [1, 1, 1]


def test_a_void_round_is_sent_again_on_the_same_stream() -> None:
    transport = Written([opened(0), resend(), resend(), pushed(1)])
    joined(transport).push(GRADIENTS)
    assert seqs(transport) == [1, 1, 1]
    assert len(transport.opens) == 1


def test_an_edit_goes_with_every_repeat_of_its_push_and_with_no_other() -> None:
    transport = Written([opened(0), resend(), AWAY], [opened(1), pushed(1), pushed(2)])
    worker = joined(transport)
    worker.update_group(0, lr=0.5)
    worker.push(GRADIENTS)
    worker.push(GRADIENTS)
    (change,) = transport.changes[0]
    assert transport.changes == [[change], [change], [change], []]


def test_an_edit_is_dropped_and_said_to_be_if_it_is_not_known_what_became_of_its_push() -> None:
    transport = Written([opened(0), errors.InternalError("a defect")], [opened(0), pushed(1)])
    worker = joined(transport)
    worker.update_group(0, lr=0.5)
    with pytest.raises(errors.InternalError, match=r"a defect\n.*\(group 0: lr\) is dropped"):
        worker.push(GRADIENTS)
    worker.push(GRADIENTS)
    assert [len(changes) for changes in transport.changes] == [1, 0]


def test_a_waiting_round_is_logged_with_who_is_missing(caplog: pytest.LogCaptureFixture) -> None:
    missing = [pb.Member(rank=2, name="w2"), pb.Member(rank=3)]
    waiting = Answer(waiting=data_pb2.RoundWaiting(round=12, missing=missing, waited_seconds=30.1))
    with caplog.at_level(logging.WARNING, "optserve.client"):
        joined(Written([opened(0), waiting, pushed(1)])).push(GRADIENTS)
    assert "round 12: waiting 30 s for rank 2 'w2', rank 3" in caplog.text


def test_a_refused_push_leaves_the_stream_usable_and_its_number_free() -> None:
    transport = Written([opened(0), error(errors.NonfiniteGradientError("NaN")), pushed(1)])
    worker = joined(transport)
    with pytest.raises(errors.NonfiniteGradientError):
        worker.push(GRADIENTS)
    worker.push(GRADIENTS)
    assert seqs(transport) == [1, 1]
    assert len(transport.opens) == 1


def test_after_an_interrupt_the_server_says_whether_the_call_was_applied() -> None:
    transport = Written([opened(0), KeyboardInterrupt()], [opened(1), pushed(2)])
    worker = joined(transport)
    with pytest.raises(KeyboardInterrupt):
        worker.push(GRADIENTS)
    worker.push({"w": np.zeros(3, np.float32)})
    assert seqs(transport) == [1, 2]


@pytest.mark.parametrize(
    "failure",
    [error(errors.DeadlineExceededError("late")), opened(0), errors.DeadlineExceededError("stood still"), KeyboardInterrupt()],
    ids=["error", "no sense", "silence", "interrupt"],
)
def test_a_result_that_was_read_counts_whatever_becomes_of_the_weights(failure: Any) -> None:
    transport = Written([opened(0), pushed(1), failure], [opened(1), pushed(2), pushed(3)])
    worker = joined(transport)
    with pytest.raises((errors.OptserveError, KeyboardInterrupt)):
        worker.push_pull(GRADIENTS)
    assert worker.last_step is not None
    assert worker.last_step.step == 1
    assert worker._session.session.seq == 1
    worker.push(GRADIENTS)
    worker.push({"w": np.zeros(3, np.float32)})
    assert seqs(transport) == [1, 2, 3]
    assert len(transport.opens) == 2


@pytest.mark.parametrize("applied", [0, 1], ids=["not applied", "applied"])
def test_after_a_failure_of_the_server_it_is_asked_whether_the_call_was_applied(applied: int) -> None:
    failed = error(errors.OutOfMemoryError("no memory for the answer"))
    transport = Written([opened(0), failed], [opened(applied), pushed(applied + 1)])
    worker = joined(transport)
    with pytest.raises(errors.OutOfMemoryError):
        worker.push(GRADIENTS)
    worker.push(GRADIENTS)
    assert seqs(transport) == [1, applied + 1]


def test_a_push_that_was_applied_before_its_worker_had_to_join_again_is_not_applied_twice() -> None:
    transport = Written([opened(0), AWAY], [goodbye(errors.NotJoinedError("who?"))], [opened(1), pushed(1)], joins=2)
    transport.joins[1].last_seq = 1
    joined(transport).push(GRADIENTS)
    assert seqs(transport) == [1, 1]


def test_an_applied_push_whose_weights_were_lost_is_not_sent_again_but_pulled() -> None:
    transport = Written([opened(0), pushed(1), AWAY], [opened(1), weights(1), pushed(2)])
    worker = joined(transport)
    assert worker.push_pull(GRADIENTS)["w"].tolist() == [1, 1, 1]
    worker.push(GRADIENTS)
    assert seqs(transport) == [1, 2]
    assert transport.pulls == 1


def test_an_answer_that_makes_no_sense_is_a_typed_error_and_the_stream_is_given_up() -> None:
    transport = Written([opened(0), opened(0)], [opened(0), pushed(1)])
    worker = joined(transport)
    with pytest.raises(errors.ProtocolViolationError, match="a push was answered with opened"):
        worker.push(GRADIENTS)
    worker.push(GRADIENTS)
    assert len(transport.opens) == 2


@pytest.mark.parametrize("answer", [error, goodbye])
def test_a_worker_that_the_server_forgot_joins_again(answer: Any) -> None:
    transport = Written([opened(0), answer(errors.NotJoinedError("who?"))], [opened(0), pushed(1)], joins=2)
    worker = joined(transport)
    worker.push(GRADIENTS)
    assert [call.epoch for call in transport.pushes] == [1, 2]
    again = [call for call in transport.calls if isinstance(call, workers_pb2.JoinRequest)][1]
    assert (again.name, again.rank) == ("rank0", 0)
    assert worker._session.schedule_steps == 3


def test_joining_again_is_tried_once_a_call() -> None:
    forgot = errors.NotJoinedError("who?")
    transport = Written([opened(0), goodbye(forgot)], [goodbye(forgot)], joins=2)
    with pytest.raises(errors.NotJoinedError):
        joined(transport).push(GRADIENTS)


def test_a_fenced_worker_is_closed() -> None:
    worker = joined(Written([opened(0), goodbye(errors.FencedError("replaced"))]))
    with pytest.raises(errors.FencedError):
        worker.push(GRADIENTS)
    with pytest.raises(errors.ClosedError, match="replaced"):
        worker.push(GRADIENTS)


def rolled_back() -> errors.RolledBackError:
    facts = {"from": 9, "to": 5, "lineage_id": "two", "version": 5, "schedule_steps": 2}
    return errors.RolledBackError("back", **facts)


def test_a_roll_back_is_raised_once_and_its_position_taken_over() -> None:
    transport = Written([opened(8, 9), goodbye(rolled_back())], [opened(3, 5), pushed(4)])
    worker = joined(transport)
    with pytest.raises(errors.RolledBackError):
        worker.push(GRADIENTS)
    worker.push(GRADIENTS)
    assert seqs(transport) == [9, 4]
    assert transport.opens[1].seen.lineage_id == "two"
    assert worker._session.schedule_steps == 2


def test_going_back_to_what_this_client_restored_is_no_error() -> None:
    transport = Written([opened(8, 9), goodbye(rolled_back())], [opened(8, 5), pushed(9)])
    joined(transport, {"two"}).push(GRADIENTS)
    assert seqs(transport) == [9, 9]


def restoring(restored: set[str], answer: Answer) -> Callable[[], Answer]:
    """The answer, when this client has just restored a checkpoint."""

    def restore() -> Answer:
        restored.add("two")
        return answer

    return restore


@pytest.mark.parametrize("how", ["while it waits", "while its stream is away"])
def test_a_push_begun_before_this_clients_restore_is_not_sent_into_what_was_restored(how: str) -> None:
    restored: set[str] = set()
    refused = restoring(restored, goodbye(rolled_back()))
    first: list[Written.Answer] = [opened(8, 9), refused] if how == "while it waits" else [opened(8, 9), AWAY]
    between: list[list[Written.Answer]] = [] if how == "while it waits" else [[refused]]
    transport = Written(first, *between, [opened(8, 5), pushed(9)])
    worker = joined(transport, restored)
    with pytest.raises(errors.RolledBackError):
        worker.push(GRADIENTS)
    assert seqs(transport) == [9]
    worker.push(GRADIENTS)
    assert seqs(transport) == [9, 9]


def test_a_push_in_a_thread_is_begun_when_it_is_called() -> None:
    restored: set[str] = set()
    transport = Written([opened(8, 9), goodbye(rolled_back())], [opened(8, 5), pushed(9)])
    worker = joined(transport, restored)
    release = threading.Event()
    worker._lock = Late(worker._lock, release)
    future = worker.push_pull_async(GRADIENTS)
    restored.add("two")
    release.set()
    with pytest.raises(errors.RolledBackError):
        future.result(10)
    assert worker.push(GRADIENTS).step == 9


def test_a_pull_goes_on_through_this_clients_restore() -> None:
    restored: set[str] = set()
    transport = Written([opened(8, 9), restoring(restored, goodbye(rolled_back()))], [opened(8, 5), weights(5)])
    assert joined(transport, restored).pull()["w"].tolist() == [5, 5, 5]
    assert transport.pulls == 2


def test_a_counted_step_is_repeated_with_its_identity_count_and_edits() -> None:
    answer = optimizer_pb2.StepScheduleResponse(
        position=position(3), schedule=optimizer_pb2.Schedule(name="StepLR", learning_rates=[0.1])
    )
    transport = Written([opened(0)], [opened(1)], unary=[AWAY, answer])
    worker = joined(transport)
    worker.update_group(0, lr=0.5)
    assert worker.step_schedule().learning_rates == (0.1,)
    steps = [call for call in transport.calls if isinstance(call, optimizer_pb2.StepScheduleRequest)]
    assert [(call.call.seq, call.count, len(call.changes)) for call in steps] == [(1, 5, 1), (1, 5, 1)]
    assert not worker._edits.to_proto()
    assert worker._session.schedule_steps == 5

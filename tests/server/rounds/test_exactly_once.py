"""Repeated calls get the stored reply, and nothing is applied twice."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from optserve.server.records import Caller, GroupAdded, ScheduleSet, ScheduleStepped
from optserve.server.rounds.pushes import Done
from optserve.v1 import jobs_pb2
from optserve.wire import errors

Build = Callable[..., Any]
Until = Callable[..., Any]

W = {"w": np.zeros(4, np.float32)}
G = {"w": np.arange(4, dtype=np.float32)}
NEW = ("", 0)


def test_a_repeated_push_gets_the_stored_reply(house: Build) -> None:
    running = house(W)
    rank = running.join()
    first = rank.send(G)
    values = running.values()
    again = rank.finish(rank.begin(rank.push(G, seq=1)))
    assert again.result == first.result
    np.testing.assert_array_equal(running.values()["w"], values["w"])
    assert running.running.job.position == first.result.position


def test_a_repeat_is_answered_even_if_the_job_went_on(house: Build) -> None:
    running = house(W, workers=2)
    first, second = running.join(), running.join()
    waiting = first.in_thread(lambda: first.send(G))
    second.send(G)
    done = waiting.result(20)
    administration = running.running.administration
    administration.update_group(Caller("admin", 0, 1, "x"), NEW, 0, {"lr": 0.5})
    assert first.finish(first.begin(first.push(G, seq=1))).result == done.result


def test_the_same_number_with_other_content_is_a_conflict(house: Build) -> None:
    running = house(W)
    rank = running.join()
    rank.send(G, fingerprint="one")
    with pytest.raises(errors.SequenceConflictError, match="call 1"):
        rank.begin(rank.push(G, seq=1, fingerprint="two"))


@pytest.mark.parametrize("seq", [3, 100])
def test_a_number_left_out_is_a_gap(house: Build, seq: int) -> None:
    running = house(W)
    rank = running.join()
    rank.send(G)
    with pytest.raises(errors.SequenceGapError, match=f"call {seq} of this session came after call 1; call 2 is next"):
        rank.begin(rank.push(G, seq=seq))


def test_a_number_before_the_last_one_is_refused(house: Build) -> None:
    running = house(W)
    rank = running.join()
    for _ in range(3):
        rank.send(G)
    with pytest.raises(errors.WorkerError):
        rank.begin(rank.push(G, seq=2))


def test_an_old_epoch_is_refused(house: Build) -> None:
    running = house(W, workers=2)
    rank = running.join("a", session_id="s")
    running.running.host.leave("s", rank.member.epoch)
    back = running.join("a", session_id="s")
    assert back.member.epoch == rank.member.epoch + 1
    with pytest.raises(errors.FencedError):
        rank.begin(rank.push(G))


def test_a_failed_call_uses_no_number_up(house: Build) -> None:
    running = house(W)
    administration = running.running.administration
    with pytest.raises(errors.InvalidHyperparameterError):
        administration.update_group(Caller("admin", 0, 1, "x"), NEW, 0, {"lr": -1.0})
    administration.update_group(Caller("admin", 0, 1, "y"), NEW, 0, {"lr": 2.0})
    assert running.running.job.groups[0]["lr"] == 2.0


def test_a_push_whose_stream_broke_while_it_waited_is_taken_up_by_its_repeat(house: Build, until: Until) -> None:
    running = house(W, workers=2, lease_seconds=1000)
    first, second = running.join(), running.join()
    lost = first.in_thread(lambda: first.send(G))
    gather = running.running.pushes._round
    until(lambda: gather.gather and any(c.ended for c in gather.gather.contributions.values()), "the push waits")
    first.connected = False
    running.running.host.wake()
    with pytest.raises(errors.ServerUnavailableError):
        lost.result(20)
    first.connected = True
    ticket = first.begin(first.push(G))
    assert ticket.attached
    first.offer(ticket, *first.chunks(G))
    done = first.in_thread(lambda: first.finish(ticket))
    assert isinstance(second.send(G), Done)
    assert done.result(20).result.position.step == 1
    np.testing.assert_array_equal(running.values()["w"], -G["w"])


def test_a_push_whose_round_was_applied_while_its_stream_was_away_is_not_applied_twice(house: Build, until: Until) -> None:
    running = house(W, workers=2, lease_seconds=1000)
    first, second = running.join(), running.join()
    lost = first.in_thread(lambda: first.send(G))
    gather = running.running.pushes._round
    until(lambda: gather.gather and any(c.ended for c in gather.gather.contributions.values()), "the push waits")
    first.connected = False
    running.running.host.wake()
    with pytest.raises(errors.ServerUnavailableError):
        lost.result(20)
    applied = second.send(G)
    first.connected = True
    again = first.finish(first.begin(first.push(G)))
    assert again.result == applied.result
    assert running.running.job.position.step == 1


def _admin(running: Any) -> list[tuple[str, Callable[[Caller], Any]]]:
    administration = running.running.administration
    group = {**running.running.job.groups[0]}
    return [
        ("update_group", lambda caller: administration.update_group(caller, NEW, 0, {"lr": 0.25})),
        (
            "set_schedule",
            lambda caller: administration.set_schedule(caller, NEW, ScheduleSet(caller, "StepLR", {"step_size": 1})),
        ),
        ("step_schedule", lambda caller: administration.step_schedule(caller, NEW, ScheduleStepped(caller, 0, None))),
        (
            "add_group",
            lambda caller: administration.add_group(caller, NEW, GroupAdded(caller, group, [("v", np.ones(2, np.float32))])),
        ),
    ]


@pytest.mark.parametrize("index", range(4))
def test_every_administrative_call_is_applied_once(house: Build, index: int) -> None:
    running = house(W)
    administration = running.running.administration
    administration.set_schedule(
        Caller("admin", 0, 1, "s"), NEW, ScheduleSet(Caller("admin", 0, 1, "s"), "ExponentialLR", {"gamma": 0.5})
    )
    name, call = _admin(running)[index]
    first = call(Caller("admin", 0, 2, name))
    document = running.running.job.to_document({})
    assert call(Caller("admin", 0, 2, name)) == first
    assert running.running.job.to_document({}) == document
    with pytest.raises(errors.SequenceConflictError):
        call(Caller("admin", 0, 2, "something else"))


def test_a_schedule_step_counted_by_four_workers_is_applied_once(house: Build) -> None:
    running = house(W, workers=4)
    administration = running.running.administration
    setter = Caller("admin", 0, 1, "s")
    administration.set_schedule(setter, NEW, ScheduleSet(setter, "ExponentialLR", {"gamma": 0.5}))
    ranks = [running.join() for _ in range(4)]
    for count in (1, 2):
        for rank in ranks:
            caller = Caller(rank.member.session_id, rank.member.epoch, count, f"step{count}")
            administration.step_schedule(caller, NEW, ScheduleStepped(caller, count, None))
    assert running.running.job.groups[0]["lr"] == 0.25
    assert running.running.job.schedule_steps == 2


def test_a_counted_step_may_not_run_ahead(house: Build) -> None:
    running = house(W, workers=2)
    administration = running.running.administration
    setter = Caller("admin", 0, 1, "s")
    administration.set_schedule(setter, NEW, ScheduleSet(setter, "ExponentialLR", {"gamma": 0.5}))
    first, second = running.join(), running.join()
    ahead, behind = (
        Caller(first.member.session_id, first.member.epoch, 1, "a"),
        Caller(second.member.session_id, second.member.epoch, 1, "c"),
    )
    administration.step_schedule(ahead, NEW, ScheduleStepped(ahead, 1, None))
    with pytest.raises(errors.SequenceGapError, match="schedule step 3 came after step 1"):
        administration.step_schedule(behind, NEW, ScheduleStepped(behind, 3, None))
    assert running.running.job.groups[0]["lr"] == 0.5


def test_a_journal_that_fails_leaves_the_job_as_it_was(house: Build) -> None:
    """Log, then update: what could not be logged is not applied, and may be sent again."""

    class Broken:
        def append(self, record: Any) -> None:
            raise errors.StorageError("the disk is full")

    running = house(W)
    rank = running.join()
    host, administration = running.running.host, running.running.administration
    journal, host.journal = host.journal, Broken()
    with pytest.raises(errors.StorageError):
        rank.send(G)
    with pytest.raises(errors.StorageError):
        administration.update_group(Caller("admin", 0, 1, "x"), NEW, 0, {"lr": 0.25})
    host.journal = journal
    assert running.running.job.position.step == 0
    np.testing.assert_array_equal(running.values()["w"], W["w"])
    assert isinstance(rank.send(G), Done)


def test_what_a_checkpoint_captures_does_not_change_with_the_job(house: Build) -> None:
    running = house(W)
    rank = running.join()
    document, _ = running.running.host.capture()
    before = copy.deepcopy(document)
    rank.send(G)
    running.running.administration.update_group(Caller("admin", 0, 1, "x"), NEW, 0, {"lr": 0.5})
    running.join(rank.member.name, session_id="newer")
    assert document == before


def test_two_jobs_know_nothing_of_each_other(house: Build) -> None:
    running = house(W, consistency=jobs_pb2.CONSISTENCY_SYNC)
    other = house({"x": np.ones(3, np.float32)}, optimizer="adam", defaults={"lr": 0.1})
    running.join().send(G)
    assert other.running.job.position.step == 0
    np.testing.assert_array_equal(other.values()["x"], np.ones(3, np.float32))

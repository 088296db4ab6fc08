"""Defects that a reviewer found in the rounds: each failed before it was mended."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from optserve.server.records import Caller, GroupAdded, Record, ScheduleSet, ScheduleStepped, StateLoaded
from optserve.server.rounds.pushes import Done
from optserve.v1 import jobs_pb2
from optserve.wire import errors

Build = Callable[..., Any]
W = {"w": np.zeros(8, np.float32)}
G = {"w": np.ones(8, np.float32)}
ADMIN = Caller("admin", 0, 1, "")


class Recording:
    """A journal that remembers what it was given."""

    def __init__(self) -> None:
        self.kinds: list[str] = []

    def append(self, record: Record) -> None:
        self.kinds.append(type(record).__name__)


def group_added(house: Any) -> GroupAdded:
    group = {**house.running.job.plan.optimizer.defaults, "weight_decay": 0.1}
    return GroupAdded(ADMIN, group, [("new", np.full(4, 2.0, np.float32))])


def test_an_async_push_whose_stream_died_after_its_end_does_not_stop_the_others(house: Build) -> None:
    running = house(W, workers=2, consistency=jobs_pb2.CONSISTENCY_ASYNC)
    first, second = running.join(), running.join()
    ticket = first.begin(first.push(G))
    first.offer(ticket, *first.chunks(G))
    first.connected = False
    with pytest.raises(errors.ServerUnavailableError):
        first.running.pushes.finish(ticket, first.alive)
    assert isinstance(second.in_thread(lambda: second.send(G)).result(10), Done)
    assert running.running.job.position.step == 2, "the dead one's push was whole, so it counts"


def test_an_async_push_whose_stream_died_after_its_end_is_applied_once(house: Build) -> None:
    running = house(W, workers=2, consistency=jobs_pb2.CONSISTENCY_ASYNC)
    rank = running.join()
    ticket = rank.begin(rank.push(G, changes={0: {"lr": 0.5}}))
    rank.offer(ticket, *rank.chunks(G))
    rank.connected = False
    with pytest.raises(errors.ServerUnavailableError):
        rank.running.pushes.finish(ticket, rank.alive)
    rank.connected = True
    assert rank.send(G, changes={0: {"lr": 0.5}}).result.position.step == 1
    np.testing.assert_array_equal(running.values()["w"], -0.5 * G["w"])


def test_an_async_push_that_waits_for_its_turn_is_of_the_state_before_a_restore(
    house: Build, until: Callable[..., Any]
) -> None:
    running = house(W, workers=2, consistency=jobs_pb2.CONSISTENCY_ASYNC)
    first, second = running.join(), running.join()
    position = second.send(G).result.position
    ticket = first.begin(first.push(G))
    push = replace(second.push(G), seen=(position.lineage_id, position.version))
    waiting = second.in_thread(lambda: second.begin(push))
    until(lambda: len(running.running.pushes._queue) == 1, "the push waits for its turn")
    with running.running.host.changed:
        running.running.job.history.branch("another", position.version - 1)
    first.running.pushes.abandon(ticket)
    with pytest.raises(errors.RolledBackError, match=f"version {position.version} is gone"):
        waiting.result(20)
    assert running.running.job.position.step == 1


@pytest.mark.parametrize("left", [0, 1])
def test_half_a_push_of_a_worker_that_left_is_not_in_the_round(house: Build, left: int) -> None:
    values = {"w": np.zeros(600_000, np.float32)}
    ones = {"w": np.ones(600_000, np.float32)}
    running = house(values, workers=2)
    ranks = [running.join(), running.join()]
    gone, stays = ranks[left], ranks[1 - left]
    ticket = gone.begin(gone.push(ones, changes={0: {"lr": 0.5}}))
    gone.offer(ticket, gone.chunks(ones)[0])
    running.running.host.leave(gone.member.session_id, gone.member.epoch)
    result = stays.in_thread(lambda: stays.send(ones)).result(20).result
    assert (result.value["ranks"], result.value["learning_rates"]) == ([1 - left], [1.0])
    np.testing.assert_array_equal(running.values()["w"], -ones["w"])


@pytest.mark.parametrize("added", ["before the second push", "after both began"])
def test_a_group_added_in_mid_round_is_absent_from_it(house: Build, added: str) -> None:
    running = house(W, workers=2, optimizer="adam", defaults={"lr": 0.1})
    first, second = running.join(), running.join()
    ticket = first.begin(first.push(G))
    first.offer(ticket, *first.chunks(G))
    waiting = first.in_thread(lambda: first.finish(ticket))
    push, chunks = second.push(G), second.chunks(G)
    record = group_added(running)
    if added == "before the second push":
        running.running.administration.add_group(ADMIN, ("", 0), record)
    other = second.begin(push)
    if added == "after both began":
        running.running.administration.add_group(ADMIN, ("", 0), record)
    second.offer(other, *chunks)
    assert isinstance(second.finish(other), Done)
    assert isinstance(waiting.result(10), Done)
    np.testing.assert_array_equal(running.values()["new"], record.parameters[0][1])
    assert running.running.job.store.export().steps == {"w": 1}


def test_what_cannot_be_applied_is_not_journaled(house: Build) -> None:
    running = house(W)
    running.join()
    host, administration = running.running.host, running.running.administration
    host.journal = journal = Recording()
    with pytest.raises(errors.InvalidStateDictError):
        administration.load_state(ADMIN, ("", 0), StateLoaded(ADMIN, host.job.groups, {"nope": 1}, {}))
    with pytest.raises(errors.UnknownScheduleError):
        administration.set_schedule(ADMIN, ("", 0), ScheduleSet(ADMIN, "NoLR", {}))
    assert journal.kinds == []


def test_a_state_dict_that_was_read_before_a_group_was_added_is_refused(house: Build) -> None:
    running = house(W, optimizer="adam")
    rank = running.join()
    groups = [dict(group) for group in running.running.job.groups]
    running.running.administration.add_group(ADMIN, ("", 0), group_added(running))
    late = Caller("late", 0, 1, "")
    with pytest.raises(errors.InvalidStateDictError, match="1 groups were loaded; the job has 2"):
        running.running.administration.load_state(late, ("", 0), StateLoaded(late, groups, {}, {}))
    assert isinstance(rank.send(G), Done)


def test_a_wake_up_does_not_wait_for_the_jobs_lock(house: Build) -> None:
    """gRPC calls it in the one thread that serves every call of every job."""
    host = house(W).running.host
    done = threading.Event()
    with host.changed:
        caller = threading.Thread(target=lambda: (host.wake(), done.set()))
        caller.start()
        assert done.wait(10)
    caller.join(10)


def test_an_edit_waits_for_a_reader_without_the_jobs_lock(house: Build) -> None:
    running = house(W, workers=2, optimizer="adam")
    first, second = running.join(), running.join()
    host, administration = running.running.host, running.running.administration
    with host.changed:
        hold = host.hold(first.member.session_id)
    edit = second.in_thread(lambda: administration.add_group(ADMIN, ("", 0), group_added(running)))
    second.in_thread(lambda: host.heartbeat(second.member.session_id, second.member.epoch)).result(10)
    assert not edit.done()
    hold.release()
    host.release(first.member.session_id, hold)
    assert edit.result(10).position.version == host.job.position.version


def test_a_heartbeat_counts_although_the_job_is_busy(house: Build) -> None:
    running = house(W, workers=2)
    rank, _ = running.join(), running.join()
    host = running.running.host
    with host.changed:
        running.clock.now += 20
        beat = rank.in_thread(lambda: host.heartbeat(rank.member.session_id, rank.member.epoch))
        deadline = 1000.0 + 20 + host.leases.seconds
        assert _soon(lambda: host.leases.deadline(rank.member.session_id) == deadline)
        beat.result(10)


def _soon(ready: Callable[[], bool]) -> bool:
    waiting = threading.Event()
    return any(ready() or waiting.wait(0.01) for _ in range(500)) and ready()


def test_a_fenced_session_cannot_call_without_its_epoch(house: Build) -> None:
    running = house(W)
    former = running.join(session_id="former")
    running.join(session_id="newer")
    caller = Caller(former.member.session_id, 0, 1, "")
    with pytest.raises(errors.FencedError):
        running.running.administration.update_group(caller, ("", 0), 0, {"lr": 0.5})


def test_one_session_holds_one_rank(house: Build) -> None:
    running = house(W, workers=2)
    running.join("a", 0, "session")
    member = running.running.host.join("b", 1, "session", ("", 0))
    assert (member.name, member.rank) == ("b", 1)
    assert list(running.running.job.sessions.members) == ["b"]


def test_a_late_rank_repeats_a_counted_step_after_the_schedule_was_removed(house: Build) -> None:
    running = house(W, workers=2)
    first, second = running.join(), running.join()
    host, administration = running.running.host, running.running.administration
    administration.set_schedule(ADMIN, ("", 0), ScheduleSet(ADMIN, "ExponentialLR", {"gamma": 0.5}))
    early, late = (Caller(rank.member.session_id, rank.member.epoch, 1, "") for rank in (first, second))
    administration.step_schedule(early, ("", 0), ScheduleStepped(early, 1, None))
    removed = Caller("admin", 0, 2, "")
    administration.set_schedule(removed, ("", 0), ScheduleSet(removed, "", {}))
    rates = host.job.learning_rates
    administration.step_schedule(late, ("", 0), ScheduleStepped(late, 1, None))
    assert host.job.learning_rates == rates


def test_only_one_attacher_takes_over_from_a_creator_that_died(house: Build) -> None:
    running = house(W)
    host = running.running.host
    host.job.initialized = False
    running.clock.now += 1000
    assert [host.claim("b"), host.claim("c")] == [True, False]
    with pytest.raises(errors.JobExistsError, match="another session"):
        host.uploading("c")
    host.uploading("b")


def test_a_fold_that_breaks_ends_the_push_and_not_the_job(house: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    running = house(W)
    rank = running.join()
    backend = running.running.job.store.backend

    def broken(*_: Any) -> None:
        raise ZeroDivisionError("a defect")

    with monkeypatch.context() as patch:
        patch.setattr(backend, "fold", broken)
        with pytest.raises(errors.InternalError, match="a defect"):
            rank.send(G)
    assert isinstance(rank.send(G), Done)
    np.testing.assert_array_equal(running.values()["w"], -G["w"])


def test_an_update_that_breaks_ends_the_round_for_all(house: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    running = house(W, workers=2)
    first, second = running.join(), running.join()

    def broken(*_: Any) -> None:
        raise ZeroDivisionError("a defect")

    with monkeypatch.context() as patch:
        patch.setattr(running.running.job.store, "update", broken)
        other = first.in_thread(lambda: first.send(G))
        for push in (lambda: second.send(G), lambda: other.result(10)):
            with pytest.raises(errors.InternalError, match="a defect"):
                push()
    assert running.running.job.position.step == 0

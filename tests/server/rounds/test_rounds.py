"""When a round goes on, waits or ends: leases, on_missing, quorum, deadlines, notices, skips."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from optserve.server.rounds import pushes as pushes_room
from optserve.server.rounds.pushes import Done, Resend, Waiting
from optserve.v1 import data_pb2, jobs_pb2
from optserve.wire import errors

Build = Callable[..., Any]
Until = Callable[..., Any]

W = {"w": np.zeros(4, np.float32)}
G = {"w": np.ones(4, np.float32)}


def in_round(running: Any, count: int = 1) -> Callable[[], bool]:
    def ready() -> bool:
        gather = running.running.pushes._round.gather
        return gather is not None and sum(c.ended for c in gather.contributions.values()) == count

    return ready


def test_a_rank_that_never_came_is_waited_for_and_then_named(house: Build, until: Until) -> None:
    running = house(W, workers=3, round_timeout_seconds=60, lease_seconds=1000)
    first, _ = running.join(), running.join("w1", 1)
    waiting = first.in_thread(lambda: first.send(G))
    until(in_round(running), "the push waits")
    running.clock.advance(59)
    assert not waiting.done()
    running.clock.advance(2)
    with pytest.raises(errors.RoundTimeoutError) as caught:
        waiting.result(20)
    assert str(caught.value) == "round 1: rank 1 'w1', rank 2 (never joined) did not push within 60 s"
    assert running.running.job.position.step == 0


def test_after_a_round_timed_out_the_next_one_may_succeed(house: Build, until: Until) -> None:
    running = house(W, workers=2, round_timeout_seconds=60, lease_seconds=1000)
    first, second = running.join(), running.join()
    waiting = first.in_thread(lambda: first.send(G))
    until(in_round(running), "the push waits")
    running.clock.advance(61)
    with pytest.raises(errors.RoundTimeoutError):
        waiting.result(20)
    waiting = first.in_thread(lambda: first.send(G))
    assert isinstance(second.send(G), Done)
    assert waiting.result(20).result.position.step == 1


def test_drop_goes_on_without_a_rank_whose_lease_ended(house: Build, until: Until) -> None:
    running = house(W, workers=2, lease_seconds=10)
    first, second = running.join(), running.join()
    waiting = first.in_thread(lambda: first.send(G))
    until(in_round(running), "the push waits")
    running.clock.advance(8)
    running.running.host.heartbeat(first.member.session_id, first.member.epoch)
    running.clock.advance(3)
    outcome = waiting.result(20)
    assert outcome.result.value["ranks"] == [0]
    np.testing.assert_array_equal(running.values()["w"], -G["w"])
    kinds = [event.kind for event in running.running.host.events.after(0, 0, lambda: True)]
    assert "dropped" in kinds
    assert not running.running.host.alive(second.member)


def test_a_dropped_rank_that_speaks_again_is_waited_for_again(house: Build, until: Until) -> None:
    running = house(W, workers=2, lease_seconds=10)
    first, second = running.join(), running.join()
    waiting = first.in_thread(lambda: first.send(G))
    until(in_round(running), "the push waits")
    running.clock.advance(11)
    assert isinstance(waiting.result(20), Done)
    running.running.host.heartbeat(first.member.session_id, first.member.epoch)
    back = second.in_thread(lambda: second.send(G))
    until(in_round(running), "the dropped rank pushes again")
    assert isinstance(first.send(G), Done)
    assert back.result(20).result.value["ranks"] == [0, 1]
    waiting = first.in_thread(lambda: first.send(G))
    until(in_round(running), "the push waits")
    assert not waiting.done()
    second.send(G)
    waiting.result(20)


def test_wait_waits_for_a_replacement(house: Build, until: Until) -> None:
    running = house(W, workers=2, lease_seconds=10, on_missing=jobs_pb2.ON_MISSING_WAIT)
    first, _ = running.join(), running.join()
    waiting = first.in_thread(lambda: first.send(G))
    until(in_round(running), "the push waits")
    running.clock.advance(100)
    assert not waiting.done()
    replacement = running.join(rank=1)
    assert isinstance(replacement.send(G), Done)
    assert waiting.result(20).result.value["ranks"] == [0, 1]


def test_fail_ends_the_round_for_all_and_names_the_rank(house: Build, until: Until) -> None:
    running = house(W, workers=2, lease_seconds=10, on_missing=jobs_pb2.ON_MISSING_FAIL)
    first, _ = running.join(), running.join("lost", 1)
    waiting = first.in_thread(lambda: first.send(G))
    until(in_round(running), "the push waits")
    running.clock.advance(11)
    with pytest.raises(errors.RoundFailedError, match="round 1: rank 1 'lost'"):
        waiting.result(20)
    assert running.running.job.position.step == 0


def test_a_rank_that_never_came_is_not_dropped_but_waited_for(house: Build, until: Until) -> None:
    running = house(W, workers=2, lease_seconds=10)
    first = running.join()
    waiting = first.in_thread(lambda: first.send(G))
    until(in_round(running), "the push waits")
    for _ in range(100):
        running.clock.advance(9)
        running.running.host.heartbeat(first.member.session_id, first.member.epoch)
    assert not waiting.done()
    second = running.join()
    assert isinstance(second.send(G), Done)
    assert isinstance(waiting.result(20), Done)


def test_fewer_ranks_than_the_quorum_after_drops_is_an_error(house: Build, until: Until) -> None:
    running = house(W, workers=3, quorum=2, lease_seconds=10)
    ranks = [running.join() for _ in range(3)]
    waiting = ranks[0].in_thread(lambda: ranks[0].send(G))
    until(in_round(running), "the push waits")
    running.clock.advance(11)
    with pytest.raises(errors.RoundFailedError, match="1 ranks contributed; the quorum is 2"):
        waiting.result(20)
    assert running.running.job.position.step == 0
    for rank in ranks:
        running.running.host.heartbeat(rank.member.session_id, rank.member.epoch)
    sent = [rank.in_thread(lambda rank=rank: rank.send(G)) for rank in ranks]
    assert all(isinstance(future.result(20), Done) for future in sent)


def test_a_quorum_that_is_met_after_drops_applies(house: Build, until: Until) -> None:
    running = house(W, workers=3, quorum=2, lease_seconds=10)
    ranks = [running.join() for _ in range(3)]
    sent = [rank.in_thread(lambda rank=rank: rank.send(G)) for rank in ranks[:2]]
    until(in_round(running, 2), "the pushes wait")
    running.clock.advance(11)
    assert {tuple(future.result(20).result.value["ranks"]) for future in sent} == {(0, 1)}


def test_a_killed_worker_is_dropped_after_the_reconnect_grace(house: Build, until: Until) -> None:
    running = house(W, workers=2, lease_seconds=1000)
    first, second = running.join(), running.join()
    waiting = first.in_thread(lambda: first.send(G))
    until(in_round(running), "the push waits")
    second.lose()
    running.clock.advance(4)
    assert not waiting.done()
    running.clock.advance(1.5)
    assert waiting.result(20).result.value["ranks"] == [0]


def test_a_worker_that_reconnects_within_the_grace_is_not_dropped(house: Build, until: Until) -> None:
    running = house(W, workers=2, lease_seconds=1000)
    first, second = running.join(), running.join()
    waiting = first.in_thread(lambda: first.send(G))
    until(in_round(running), "the push waits")
    second.lose()
    running.clock.advance(4)
    second.connected = True
    again = second.in_thread(lambda: second.send(G))
    assert again.result(20).result.value["ranks"] == [0, 1]
    waiting.result(20)


def test_a_member_that_dies_half_way_makes_the_survivors_send_again(house: Build, until: Until) -> None:
    running = house({"w": np.zeros(600_000, np.float32)}, workers=2, lease_seconds=10)
    gradient = {"w": np.ones(600_000, np.float32)}
    first, second = running.join(), running.join()
    broken = first.begin(first.push(gradient))
    first.offer(broken, first.chunks(gradient)[0])
    waiting = second.in_thread(lambda: second.send(gradient))
    until(in_round(running), "the other push waits")
    running.clock.advance(8)
    running.running.host.heartbeat(second.member.session_id, second.member.epoch)
    running.clock.advance(3)
    outcome = waiting.result(20)
    assert isinstance(outcome, Resend)
    assert outcome.round == 1
    alone = second.send(gradient)
    assert alone.result.value["ranks"] == [1]
    np.testing.assert_array_equal(running.values()["w"], -gradient["w"])


def test_a_waiting_push_is_told_whom_it_waits_for(house: Build, until: Until, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pushes_room, "NOTICE_SECONDS", 30.0)
    running = house(W, workers=3, lease_seconds=1000)
    first, _ = running.join(), running.join("w1", 1)
    ticket = first.begin(first.push(G))
    first.offer(ticket, *first.chunks(G))
    pushes = running.running.pushes
    waiting = first.in_thread(lambda: pushes.finish(ticket, first.alive))
    until(in_round(running), "the push waits")
    running.clock.advance(30)
    notice = waiting.result(20)
    assert isinstance(notice, Waiting)
    assert notice.round == 1
    assert notice.waited_seconds == 30
    assert [(rank, member and member.name, alive) for rank, member, alive in notice.missing] == [
        (1, "w1", True),
        (2, None, False),
    ]


def test_skip_round_contributes_nothing_and_gets_the_result(house: Build) -> None:
    running = house(W, workers=2)
    first, second = running.join(), running.join()
    waiting = first.in_thread(lambda: first.send({}, kind=data_pb2.CONTRIBUTION_SKIP, weight=0.0))
    outcome = second.send(G)
    assert outcome.result == waiting.result(20).result
    assert outcome.result.value["ranks"] == [1]
    np.testing.assert_array_equal(running.values()["w"], -G["w"])


def test_a_clients_verdict_of_nan_is_refused_and_the_round_stays_open(house: Build, until: Until) -> None:
    running = house(W, workers=2)
    first, second = running.join(), running.join("w1", 1)
    waiting = first.in_thread(lambda: first.send(G))
    until(in_round(running), "the push waits")
    with pytest.raises(errors.NonfiniteGradientError, match="rank 1 'w1'"):
        second.begin(second.push(G, kind=data_pb2.CONTRIBUTION_NONFINITE, nonfinite=(0,)))
    assert not waiting.done()
    assert isinstance(second.send(G), Done)
    assert waiting.result(20).result.position.step == 1


def test_a_clients_verdict_of_nan_skips_the_step_for_all(house: Build) -> None:
    running = house(W, workers=2, on_nonfinite=jobs_pb2.ON_NONFINITE_SKIP)
    first, second = running.join(), running.join()
    waiting = first.in_thread(lambda: first.send(G))
    outcome = second.send({}, kind=data_pb2.CONTRIBUTION_NONFINITE)
    assert outcome.result.value["skip_reason"] == "nonfinite"
    assert outcome.result == waiting.result(20).result
    assert outcome.result.position.step == 0
    assert outcome.result.position.version == 4


def test_an_aggregate_that_overflows_fails_the_round_unless_it_may_be_skipped(house: Build) -> None:
    huge = {"w": np.full(4, 3e38, np.float32)}
    for policy, expected in ((jobs_pb2.ON_NONFINITE_REJECT, "error"), (jobs_pb2.ON_NONFINITE_SKIP, "skip")):
        running = house(W, workers=2, on_nonfinite=policy)
        first, second = running.join(), running.join()
        waiting = first.in_thread(lambda first=first: first.send(huge))
        if expected == "error":
            with pytest.raises(errors.RoundFailedError, match="overflowed"):
                second.send(huge)
            with pytest.raises(errors.RoundFailedError, match="overflowed"):
                waiting.result(20)
        else:
            assert second.send(huge).result.value["skip_reason"] == "nonfinite"
            waiting.result(20)
        np.testing.assert_array_equal(running.values()["w"], W["w"])
        assert running.running.job.position.step == 0


def test_the_rank_that_came_last_is_named_to_those_that_waited(house: Build, until: Until) -> None:
    running = house(W, workers=2)
    first, second = running.join(), running.join()
    waiting = first.in_thread(lambda: first.send(G))
    until(in_round(running), "the push waits")
    running.clock.advance(2)
    assert second.send(G).waited_for is None
    done = waiting.result(20)
    assert done.waited_for == 1
    assert done.waited_seconds == 2


def test_a_deleted_job_ends_every_wait(house: Build, until: Until) -> None:
    running = house(W, workers=2)
    first = running.join()
    waiting = first.in_thread(lambda: first.send(G))
    until(in_round(running), "the push waits")
    running.registry.delete(running.running.job.job_id)
    with pytest.raises(errors.JobNotFoundError, match="'j' was deleted"):
        waiting.result(20)


def test_a_stopping_server_ends_every_wait(house: Build, until: Until) -> None:
    running = house(W, workers=2)
    first = running.join()
    waiting = first.in_thread(lambda: first.send(G))
    until(in_round(running), "the push waits")
    running.registry.close(errors.ServerStoppingError("the server is stopping"))
    with pytest.raises(errors.ServerStoppingError):
        waiting.result(20)
    with pytest.raises(errors.ServerStoppingError):
        first.begin(first.push(G))


def test_a_hold_of_a_fenced_worker_does_not_stop_the_job(house: Build) -> None:
    """A reader that hangs keeps the weights as they are; neither its successor nor the next update must wait for it."""
    running = house(W)
    former = running.join()
    host = running.running.host
    with host.changed:
        hold = host.hold(former.member.session_id)
    try:
        newer = former.in_thread(running.join).result(5)
        assert isinstance(newer.in_thread(lambda: newer.send(G)).result(5), Done)
    finally:
        hold.release()


def test_a_hold_of_a_worker_that_left_does_not_stop_the_job(house: Build) -> None:
    running = house(W, workers=2)
    first, second = running.join(), running.join()
    host = running.running.host
    with host.changed:
        hold = host.hold(first.member.session_id)
    try:
        host.leave(first.member.session_id, first.member.epoch)
        assert isinstance(second.in_thread(lambda: second.send(G)).result(5), Done)
    finally:
        hold.release()


def test_a_worker_may_join_while_another_reads_the_weights(house: Build) -> None:
    running = house(W, workers=2)
    first = running.join()
    host = running.running.host
    with host.changed:
        hold = host.hold(first.member.session_id)
    try:
        assert first.in_thread(running.join).result(5).member.rank == 1
    finally:
        hold.release()

"""`async`: each push is a step of its own, staged one at a time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from optserve.server.rounds.pushes import Done
from optserve.v1 import data_pb2, jobs_pb2
from optserve.wire import errors

Build = Callable[..., Any]
Until = Callable[..., Any]

N = 600_000
W = {"w": np.zeros(N, np.float32)}
G = {"w": np.ones(N, np.float32)}
ASYNC = {"consistency": jobs_pb2.CONSISTENCY_ASYNC, "workers": 3, "lease_seconds": 1000}


def queued(running: Any, count: int) -> Callable[[], bool]:
    return lambda: len(running.running.pushes._queue) == count


def test_each_push_is_a_step(house: Build) -> None:
    running = house(W, **ASYNC)
    ranks = [running.join() for _ in range(3)]
    steps = [rank.send(G).result.position.step for rank in (ranks[2], ranks[0], ranks[2], ranks[1])]
    assert steps == [1, 2, 3, 4]
    np.testing.assert_array_equal(running.values()["w"], -4 * G["w"])


def test_the_weight_of_a_single_push_does_not_scale_it(house: Build) -> None:
    running = house(W, **ASYNC)
    running.join().send(G, weight=64.0)
    np.testing.assert_array_equal(running.values()["w"], -G["w"])


def test_the_next_push_is_not_read_before_the_one_under_way_is_applied(house: Build, until: Until) -> None:
    running = house(W, **ASYNC)
    first, second = running.join(), running.join()
    ticket = first.begin(first.push(G))
    first.offer(ticket, first.chunks(G)[0])
    waiting = second.in_thread(lambda: second.send(G))
    until(queued(running, 1), "the second push waits for its turn")
    first.offer(ticket, *first.chunks(G)[1:])
    assert first.finish(ticket).result.position.step == 1
    assert waiting.result(20).result.position.step == 2


def test_pushes_are_applied_in_the_order_in_which_they_began(house: Build, until: Until) -> None:
    running = house(W, **ASYNC)
    ranks = [running.join() for _ in range(3)]
    ticket = ranks[0].begin(ranks[0].push(G))
    second = ranks[2].in_thread(lambda: ranks[2].send(G))
    until(queued(running, 1), "rank 2 waits")
    third = ranks[1].in_thread(lambda: ranks[1].send(G))
    until(queued(running, 2), "rank 1 waits")
    ranks[0].offer(ticket, *ranks[0].chunks(G))
    assert ranks[0].finish(ticket).result.position.step == 1
    assert second.result(20).result.position.step == 2
    assert third.result(20).result.position.step == 3


def test_a_push_that_stalls_for_five_seconds_gives_way_and_may_be_sent_again(house: Build, until: Until) -> None:
    running = house(W, **ASYNC)
    first, second = running.join("slow"), running.join()
    ticket = first.begin(first.push(G))
    first.offer(ticket, first.chunks(G)[0])
    waiting = second.in_thread(lambda: second.send({"w": 2 * G["w"]}))
    until(queued(running, 1), "the second push waits for its turn")
    running.clock.advance(4.9)
    assert not waiting.done()
    running.clock.advance(0.2)
    assert isinstance(waiting.result(20), Done)
    with pytest.raises(errors.RoundTimeoutError, match=r"rank 0 'slow' brought nothing for 5 s and was dropped; send it again"):
        offer_and_finish(first, ticket)
    running.running.pushes.abandon(ticket)
    assert first.send(G).result.position.step == 2
    np.testing.assert_array_equal(running.values()["w"], -3 * G["w"])


def offer_and_finish(rank: Any, ticket: Any) -> Any:
    rank.offer(ticket, *rank.chunks(G)[1:])
    return rank.finish(ticket)


def test_a_push_that_moves_is_not_dropped_however_long_it_takes(house: Build, until: Until) -> None:
    running = house(W, **ASYNC)
    first, second = running.join(), running.join()
    ticket = first.begin(first.push(G))
    waiting = second.in_thread(lambda: second.send(G))
    until(queued(running, 1), "the second push waits for its turn")
    for chunk in first.chunks(G):
        running.clock.advance(4)
        first.offer(ticket, chunk)
    running.clock.advance(4)
    assert first.finish(ticket).result.position.step == 1
    assert waiting.result(20).result.position.step == 2


def test_a_push_whose_stream_broke_gives_way_at_once(house: Build, until: Until) -> None:
    running = house(W, **ASYNC)
    first, second = running.join(), running.join()
    ticket = first.begin(first.push(G))
    first.offer(ticket, first.chunks(G)[0])
    waiting = second.in_thread(lambda: second.send(G))
    until(queued(running, 1), "the second push waits for its turn")
    running.running.pushes.abandon(ticket)
    assert isinstance(waiting.result(20), Done)
    np.testing.assert_array_equal(running.values()["w"], -G["w"])


def test_a_push_that_waits_too_long_for_its_turn_is_an_error(house: Build, until: Until) -> None:
    running = house(W, **ASYNC, round_timeout_seconds=20)
    first, second = running.join(), running.join()
    ticket = first.begin(first.push(G))
    waiting = second.in_thread(lambda: second.send(G))
    until(queued(running, 1), "the second push waits for its turn")
    for chunk in [*first.chunks(G), None]:
        running.clock.advance(4)
        if chunk is not None:
            first.offer(ticket, chunk)
    ticket.contribution.progress_at = running.clock.now + 100
    running.clock.advance(10)
    with pytest.raises(errors.RoundTimeoutError, match="waited 2"):
        waiting.result(20)


def test_a_push_of_nan_is_refused_or_skipped(house: Build) -> None:
    running = house(W, **ASYNC)
    rank = running.join()
    with pytest.raises(errors.NonfiniteGradientError):
        rank.begin(rank.push({}, kind=data_pb2.CONTRIBUTION_NONFINITE, nonfinite=(0,)))
    running = house(W, **ASYNC, on_nonfinite=jobs_pb2.ON_NONFINITE_SKIP)
    rank = running.join()
    outcome = rank.send({}, kind=data_pb2.CONTRIBUTION_NONFINITE)
    assert outcome.result.value["skip_reason"] == "nonfinite"


def test_a_worker_that_is_not_there_is_not_waited_for(house: Build) -> None:
    running = house(W, **ASYNC)
    running.join()
    running.clock.advance(2000)
    assert isinstance(running.join().send(G), Done)


def test_a_dropped_stalled_push_does_not_spoil_the_next_sum(house: Build, until: Until) -> None:
    """The stalled one had folded a block of other values."""
    running = house(W, **ASYNC)
    first, second = running.join(), running.join()
    ticket = first.begin(first.push({"w": 1000 * G["w"]}))
    first.offer(ticket, *first.chunks({"w": 1000 * G["w"]})[1:])
    waiting = second.in_thread(lambda: second.send(G))
    until(queued(running, 1), "the second push waits for its turn")
    running.clock.advance(5.1)
    waiting.result(20)
    np.testing.assert_array_equal(running.values()["w"], -G["w"])

"""A push goes on over a newer stream while a thread still serves the older one: what that does late counts nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from searching_jobs import MEAN, searched

from optserve.server.rounds.tickets import Done
from optserve.v1 import data_pb2
from optserve.wire import errors

Build = Callable[..., Any]

G = {"w": np.arange(1, 5, dtype=np.float32)}


def test_a_chunk_that_an_older_stream_still_brings_is_not_added(house: Build) -> None:
    running = house({"w": np.zeros(4, np.float32)})
    rank = running.join()
    old = rank.begin(rank.push(G))
    new = rank.begin(rank.push(G))
    rank.offer(old, *rank.chunks(G))
    rank.offer(new, *rank.chunks(G))
    assert isinstance(rank.finish(new), Done)
    np.testing.assert_array_equal(running.values()["w"], -G["w"])


def test_what_an_older_stream_brings_is_not_held(house: Build) -> None:
    running = house({"w": np.zeros(4, np.float32)}, workers=2)
    first, second = running.join(), running.join()
    old = second.begin(second.push(G))
    new = second.begin(second.push(G))
    second.offer(old, *second.chunks(G))
    gather = new.gather
    assert gather is not None
    assert gather.staged_bytes == 0
    second.offer(new, *second.chunks(G))
    waiting = second.in_thread(lambda: second.finish(new))
    assert isinstance(first.send(G), Done)
    assert isinstance(waiting.result(20), Done)
    assert gather.staged_bytes == 0
    np.testing.assert_array_equal(running.values()["w"], -G["w"])


def test_a_rank_that_sat_out_does_not_sit_out_the_next_step_too(house: Build) -> None:
    job = searched(house, evaluations=2, workers=2)
    ranks = [job.house.join("w" + str(at), at) for at in range(2)]
    head = ranks[1].push(None, kind=data_pb2.CONTRIBUTION_SKIP, weight=0.0, fingerprint="skip")
    old = ranks[1].begin(head)
    answers = iter([False])
    with pytest.raises(errors.ServerUnavailableError):  # the stream broke; the thread that served it comes again late
        job.house.running.pushes.finish(old, lambda: next(answers))
    attached = ranks[1].begin(head)
    sits = ranks[1].in_thread(lambda: ranks[1].finish(attached))
    done = job.step(ranks[0], MEAN[0])
    assert sits.result(20).result == done.result
    late = ranks[1].in_thread(lambda: job.house.running.pushes.finish(old, ranks[1].alive))
    assert late.result(20).result == done.result
    assert not job.house.running.pushes._round.busy


def test_an_event_that_cannot_be_published_does_not_have_the_round_applied_again(house: Build) -> None:
    running = house({"w": np.zeros(4, np.float32)}, workers=2)
    ranks = [running.join("w" + str(at), at) for at in range(2)]
    waiting = ranks[0].in_thread(lambda: ranks[0].send(G))

    class Listener:
        def published(self, event: Any) -> None:
            if event.kind == "round":
                raise OSError("the disk is full")

        def closed(self) -> None:
            """Nothing to do."""

    running.running.host.events.listener = Listener()
    with pytest.raises(OSError, match="full"):
        ranks[1].send(G)
    result = waiting.result(20).result
    assert ranks[1].finish(ranks[1].begin(ranks[1].push(G))).result == result
    assert running.running.job.position == result.position
    np.testing.assert_array_equal(running.values()["w"], -G["w"])


def test_a_step_does_not_wait_for_a_pull_on_a_stream_that_broke_unnoticed(house: Build) -> None:
    running = house({"w": np.zeros(4, np.float32)})
    rank = running.join()
    hold = running.running.host.hold(rank.member.session_id)
    done = rank.in_thread(lambda: rank.send(G))
    assert isinstance(done.result(10), Done)
    assert hold.released

"""Who may join, who is fenced, who counts as alive."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from optserve.server.rounds.pushes import Done
from optserve.v1 import jobs_pb2
from optserve.wire import errors

Build = Callable[..., Any]

W = {"w": np.zeros(4, np.float32)}
G = {"w": np.ones(4, np.float32)}


def test_a_worker_without_a_name_is_called_by_its_rank(house: Build) -> None:
    running = house(W, workers=3)
    assert [running.join().member.rank for _ in range(2)] == [0, 1]
    assert running.join(rank=2).member.name == "rank2"


def test_in_a_job_of_one_worker_the_next_one_replaces_the_former(house: Build) -> None:
    """A notebook cell that is run again."""
    running = house(W)
    former = running.join()
    newer = running.join()
    assert newer.member.name == former.member.name == "rank0"
    assert newer.member.epoch == former.member.epoch + 1
    with pytest.raises(errors.FencedError, match=r"'rank0' \(rank 0\) was replaced"):
        former.begin(former.push(G))
    with pytest.raises(errors.FencedError):
        running.running.host.heartbeat(former.member.session_id, former.member.epoch)
    assert isinstance(newer.send(G), Done)


def test_the_same_session_that_joins_again_gets_the_same_membership(house: Build) -> None:
    running = house(W, workers=2)
    first = running.join("w", session_id="s")
    version = running.running.job.position.version
    assert running.join("w", session_id="s").member == first.member
    assert running.join(session_id="s").member == first.member
    assert running.running.job.position.version == version


def test_a_fenced_push_is_taken_out_of_its_round(house: Build, until: Callable[..., Any]) -> None:
    running = house(W, workers=2)
    former = running.join("a", 0)
    other = running.join("b", 1)
    waiting = former.in_thread(lambda: former.send({"w": 100 * G["w"]}))
    until(lambda: running.running.pushes._round.busy, "the push is in the round")
    newer = running.join("a", 0)
    with pytest.raises(errors.FencedError):
        waiting.result(20)
    both = other.in_thread(lambda: _until_done(other))
    assert isinstance(newer.send(G), Done)
    both.result(20)
    np.testing.assert_array_equal(running.values()["w"], -G["w"])


def _until_done(rank: Any) -> Any:
    while not isinstance(outcome := rank.send(G), Done):
        pass
    return outcome


def test_a_rank_held_by_another_live_name_is_refused(house: Build) -> None:
    running = house(W, workers=2)
    running.join("alice", 0)
    with pytest.raises(errors.RankHeldError, match="rank 0 is held by worker 'alice', which is alive"):
        running.join("bob", 0)
    assert [member.name for member in running.running.job.sessions.members.values()] == ["alice"]


def test_a_rank_whose_holder_is_dead_is_given_to_another_name(house: Build) -> None:
    running = house(W, workers=2, lease_seconds=10)
    dead = running.join("alice", 0)
    running.clock.advance(10.1)
    assert running.join("bob", 0).member.rank == 0
    with pytest.raises(errors.FencedError, match="'alice'"):
        dead.begin(dead.push(G))


def test_a_rank_beyond_the_workers_is_refused(house: Build) -> None:
    running = house(W, workers=2)
    with pytest.raises(errors.TooManyWorkersError, match="rank 2 is not below the job's 2 workers"):
        running.join("w", 2)


def test_more_workers_than_the_job_has_are_refused(house: Build) -> None:
    running = house(W, workers=2)
    running.join("a")
    running.join("b")
    before = dict(running.running.job.sessions.members)
    with pytest.raises(errors.TooManyWorkersError, match="all 2 ranks"):
        running.join("c")
    with pytest.raises(errors.TooManyWorkersError, match="all 2 ranks"):
        running.join()
    assert running.running.job.sessions.members == before


def test_the_lowest_rank_that_is_free_is_given(house: Build) -> None:
    running = house(W, workers=3)
    ranks = [running.join(f"w{index}") for index in range(3)]
    host = running.running.host
    host.leave(ranks[1].member.session_id, ranks[1].member.epoch)
    assert running.join("other").member.rank == 1


def test_a_name_keeps_its_rank_when_it_joins_again(house: Build) -> None:
    running = house(W, workers=3)
    running.join("a", 2)
    assert running.join("a").member.rank == 2


def test_a_worker_that_moves_to_another_rank_frees_its_own(house: Build) -> None:
    running = house(W, workers=3)
    running.join("a", 0)
    assert running.join("a", 2).member.rank == 2
    assert running.join("b").member.rank == 0


def test_a_name_comes_back_with_a_higher_epoch_even_after_another_took_its_rank(house: Build) -> None:
    running = house(W, workers=2, lease_seconds=10)
    first = running.join("a", 0)
    running.clock.advance(11)
    running.join("b", 0)
    running.clock.advance(11)
    again = running.join("a", 0)
    assert again.member.epoch > first.member.epoch
    with pytest.raises(errors.FencedError):
        first.begin(first.push(G))


def test_a_worker_that_left_is_not_waited_for_and_may_join_again(house: Build) -> None:
    running = house(W, workers=2)
    stays, goes = running.join("a", 0), running.join("b", 1)
    host = running.running.host
    host.leave(goes.member.session_id, goes.member.epoch)
    assert isinstance(stays.send(G), Done)
    with pytest.raises(errors.NotJoinedError, match="'b' has left"):
        goes.begin(goes.push(G))
    back = running.join("b", session_id=goes.member.session_id)
    assert back.member.rank == 1
    assert back.member.epoch > goes.member.epoch
    waiting = stays.in_thread(lambda: stays.send(G))
    assert isinstance(back.send(G), Done)
    assert waiting.result(20).result.position.step == 2


def test_leaving_twice_changes_nothing(house: Build) -> None:
    running = house(W)
    rank = running.join()
    host = running.running.host
    host.leave(rank.member.session_id, rank.member.epoch)
    version = running.running.job.position.version
    host.leave(rank.member.session_id, rank.member.epoch)
    assert running.running.job.position.version == version


def test_a_session_that_never_joined_may_not_push(house: Build) -> None:
    running = house(W)
    rank = running.join()
    rank.member = type(rank.member)("x", 0, "stranger", 1)
    with pytest.raises(errors.NotJoinedError, match="stranger"):
        rank.begin(rank.push(G))
    with pytest.raises(errors.NotJoinedError):
        running.running.host.heartbeat("stranger", 1)


@pytest.mark.parametrize("name", ["a b", "../x", ".hidden", "w" * 200, "a\nb", "é"])
def test_a_worker_name_is_checked_as_other_names_are(house: Build, name: str) -> None:
    running = house(W, workers=2)
    with pytest.raises(errors.InvalidNameError):
        running.join(name)
    assert not running.running.job.sessions.members


def test_a_lease_runs_as_long_as_heartbeats_come(house: Build) -> None:
    running = house(W, lease_seconds=10)
    rank = running.join()
    host = running.running.host
    for _ in range(3):
        running.clock.advance(9)
        assert host.alive(rank.member)
        host.heartbeat(rank.member.session_id, rank.member.epoch)
    running.clock.advance(10.1)
    assert not host.alive(rank.member)


def test_the_end_of_a_stream_begins_a_short_grace(house: Build) -> None:
    running = house(W, workers=2, lease_seconds=30)
    rank = running.join()
    rank.lose()
    running.clock.advance(4.9)
    assert running.running.host.alive(rank.member)
    running.clock.advance(0.2)
    assert not running.running.host.alive(rank.member)


def test_a_heartbeat_after_the_end_of_a_stream_renews_the_lease(house: Build) -> None:
    running = house(W, lease_seconds=30)
    rank = running.join()
    rank.lose()
    running.running.host.heartbeat(rank.member.session_id, rank.member.epoch)
    running.clock.advance(20)
    assert running.running.host.alive(rank.member)


def test_the_lease_of_an_unnamed_job_is_its_creators(house: Build) -> None:
    running = house(W, name="", lease_seconds=10)
    assert running.registry.expired() == []
    running.clock.advance(9)
    running.running.host.heartbeat("creator", 0)
    running.clock.advance(9)
    assert running.registry.expired() == []
    running.clock.advance(2)
    assert running.registry.expired() == [running.running.job.job_id]


def test_a_named_job_does_not_expire(house: Build) -> None:
    running = house(W, lease_seconds=10)
    running.clock.advance(1e6)
    assert running.registry.expired() == []


def test_join_before_the_initial_values_is_refused_by_the_host(house: Build) -> None:
    running = house(W)
    running.running.job.initialized = False
    with pytest.raises(errors.JobNotInitializedError, match="'j'"):
        running.join()


@pytest.mark.parametrize(
    ("field", "value"),
    [("workers", 2), ("quorum", 1), ("optimizer", "Adam"), ("on_missing", jobs_pb2.ON_MISSING_FAIL), ("lease_seconds", 3.0)],
)
def test_attaching_to_a_job_names_what_differs(house: Build, field: str, value: Any) -> None:
    running = house(W, workers=3, quorum=2)
    spec = jobs_pb2.JobSpec()
    spec.CopyFrom(running.running.job.plan.spec)
    del spec.defaults[:]
    spec.defaults.extend(running.running.job.plan.spec.defaults)
    setattr(spec, field, value)
    if field == "workers":
        spec.quorum = 2
    with pytest.raises(errors.JobSpecMismatchError, match=field):
        running.registry.create("another", spec, "s", True)
    with pytest.raises(errors.JobExistsError, match="'j' exists"):
        running.registry.create("another", spec, "s", False)


def test_the_same_job_id_again_is_the_same_call_again(house: Build) -> None:
    running = house(W)
    spec = running.running.job.plan.spec
    found, created = running.registry.create(running.running.job.job_id, spec, "creator", False)
    assert found is running.running
    assert not created

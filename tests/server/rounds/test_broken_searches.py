"""Whoever falls out of a search or comes anew, and whatever is edited meanwhile: the ranks begin again, or hear why not."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from searching_jobs import MEAN, START, TARGETS, Searched, at_second_evaluation, searched, steps, waits

from optserve.server.records import Caller
from optserve.server.rounds.contributions import Trial
from optserve.server.rounds.tickets import Done, Resend
from optserve.v1 import data_pb2, jobs_pb2
from optserve.wire import errors

Build = Callable[..., Any]
Until = Callable[..., Any]


# Members


def test_a_round_times_out_for_who_waits_and_for_who_evaluates(house: Build, until: Until) -> None:
    job = searched(house, workers=3, round_timeout_seconds=60, lease_seconds=1000)
    ranks = [job.house.join("w" + str(at), at) for at in range(3)]
    points = at_second_evaluation(job, ranks)
    waiting = ranks[0].in_thread(lambda: job.push(ranks[0], MEAN[0], points[0], 1, "step0"))
    until(waits(job), "one rank waits")
    job.house.clock.advance(61)
    for push in (lambda: waiting.result(20), lambda: job.push(ranks[1], MEAN[1], points[1], 1, "step1")):
        with pytest.raises(errors.RoundTimeoutError, match="rank 1 'w1', rank 2 'w2' did not push within 60 s"):
            push()
    job.house.join("w2", 2)  # it is dead, and replaced: nobody tells it of a search
    assert job.round._searches._untold.keys() == {rank.member.session_id for rank in ranks[:2]}
    steps(job, [*ranks[:2], job.house.ranks[-1]])


def test_the_deadline_counts_for_each_evaluation(house: Build) -> None:
    job = searched(house, evaluations=8, round_timeout_seconds=60, lease_seconds=10000)
    rank = job.house.join()

    def slow(weights: np.ndarray) -> tuple[float, np.ndarray]:
        job.house.clock.advance(59)
        return MEAN[0](weights)

    assert isinstance(job.step(rank, slow), Done)
    assert job.house.clock.now > 1000 + 8 * 58


@pytest.mark.parametrize("how", ["dropped", "left", "replaced", "replaced under its name"])
def test_the_survivors_begin_again_without_who_is_gone(house: Build, until: Until, how: str) -> None:
    job = searched(house, workers=3, lease_seconds=10)
    ranks = [job.house.join("w" + str(at), at) for at in range(3)]
    host = job.house.running.host
    points = at_second_evaluation(job, ranks)
    waiting = ranks[0].in_thread(lambda: job.push(ranks[0], MEAN[0], points[0], 1, "step0"))
    until(waits(job), "one rank waits")
    living = ranks[:2]
    if how == "dropped":
        job.house.clock.advance(8)
        for rank in living:
            host.heartbeat(rank.member.session_id, rank.member.epoch)
        job.house.clock.advance(3)
    elif how == "left":
        host.leave(ranks[2].member.session_id, ranks[2].member.epoch)
    elif how == "replaced":
        ranks[2].lose()
        job.house.clock.advance(6)
        living = [*living, job.house.join("other", 2)]
    else:
        living = [*living, job.house.join("w2", 2)]
    answer = waiting.result(20)
    assert isinstance(answer, Resend)
    assert answer.restart
    late = job.push(ranks[1], MEAN[1], points[1], 1, "step1")  # it evaluated meanwhile
    assert isinstance(late, Resend)
    assert late.restart
    steps(job, living)
    if how.startswith("replaced"):
        with pytest.raises(errors.FencedError):
            job.push(ranks[2], MEAN[2], points[2], 1, "step2")


def test_fail_ends_the_search_when_a_rank_is_lost(house: Build, until: Until) -> None:
    job = searched(house, workers=2, lease_seconds=10, on_missing=jobs_pb2.ON_MISSING_FAIL)
    ranks = [job.house.join("w" + str(at), at) for at in range(2)]
    points = at_second_evaluation(job, ranks)
    waiting = ranks[0].in_thread(lambda: job.push(ranks[0], MEAN[0], points[0], 1, "step0"))
    until(waits(job), "one rank waits")
    job.house.clock.advance(8)
    job.house.running.host.heartbeat(ranks[0].member.session_id, ranks[0].member.epoch)
    job.house.clock.advance(3)
    with pytest.raises(errors.RoundFailedError, match=r"rank 1 'w1' .*was lost"):
        waiting.result(20)
    with pytest.raises(errors.RoundFailedError, match=r"rank 1 'w1' .*was lost"):  # it was only slow
        job.push(ranks[1], MEAN[1], points[1], 1, "step1")
    steps(job, ranks)


def test_a_rank_that_comes_in_the_midst_takes_part_from_the_beginning(house: Build, until: Until) -> None:
    job = searched(house, workers=2, lease_seconds=10)
    first, second = job.house.join("w0", 0), job.house.join("w1", 1)
    job.house.running.host.leave(second.member.session_id, second.member.epoch)
    points = at_second_evaluation(job, [first])
    again = job.house.join("w1", 1)
    newcomer = again.in_thread(lambda: job.step(again, MEAN[1], "new"))
    until(waits(job), "the newcomer waits")
    answer = job.push(first, MEAN[0], points[0], 1, "step0")
    assert isinstance(answer, Resend)
    assert answer.restart
    assert isinstance(job.step(first, MEAN[0], "step0"), Done)
    assert newcomer.result(20).result.value["ranks"] == [0, 1]
    np.testing.assert_allclose(job.weights(), job.expected(START["w"], TARGETS[:2]), rtol=1e-14)


# Edits


@pytest.mark.parametrize("waiting", [False, True])
def test_an_edit_in_the_midst_makes_all_begin_again_with_it(house: Build, until: Until, waiting: bool) -> None:
    job = searched(house, workers=2)
    ranks = [job.house.join(), job.house.join()]
    points = at_second_evaluation(job, ranks)
    if waiting:
        early = ranks[0].in_thread(lambda: job.push(ranks[0], MEAN[0], points[0], 1, "step0"))
        until(waits(job), "one rank waits")
    job.house.running.administration.update_group(Caller("admin", 0, 1, "a"), ("", 0), 0, {"lr": 0.5})
    answer = job.push(ranks[1], MEAN[1], points[1], 1, "step1")
    assert isinstance(answer, Resend)
    assert answer.restart
    if waiting:
        assert early.result(20) == answer
    done = [rank.in_thread(lambda at=at, rank=rank: job.step(rank, MEAN[at])) for at, rank in enumerate(ranks)]
    assert all(isinstance(future.result(20), Done) for future in done)
    np.testing.assert_allclose(job.weights(), job.expected(START["w"], TARGETS[:2], 0.5), rtol=1e-14)


def test_an_edit_of_the_layout_makes_all_begin_again(house: Build, until: Until) -> None:
    job = searched(house, workers=2)
    ranks = [job.house.join(), job.house.join()]
    points = at_second_evaluation(job, ranks)
    early = ranks[0].in_thread(lambda: job.push(ranks[0], MEAN[0], points[0], 1, "step0"))
    until(waits(job), "one rank waits")
    host = job.house.running.host
    with host.changed:
        host.on_layout()
    for answer in (early.result(20), job.push(ranks[1], MEAN[1], points[1], 1, "step1")):
        assert isinstance(answer, Resend)
        assert answer.restart
    steps(job, ranks)


def test_a_restore_in_the_midst_ends_the_step_for_all(house: Build, until: Until) -> None:
    job = searched(house, workers=2)
    ranks = [job.house.join(), job.house.join()]
    points = at_second_evaluation(job, ranks)
    early = ranks[0].in_thread(lambda: job.push(ranks[0], MEAN[0], points[0], 1, "step0"))
    until(waits(job), "one rank waits")
    host = job.house.running.host
    with host.changed:
        host.on_reset(errors.RolledBackError("back to version 3"))
    with pytest.raises(errors.RolledBackError):
        early.result(20)
    with pytest.raises(errors.RolledBackError):
        job.push(ranks[1], MEAN[1], points[1], 1, "step1")
    steps(job, ranks)


@pytest.mark.parametrize("how", ["policy", "loss scale"])
def test_what_is_not_finite_at_a_trial_point_skips_the_step(house: Build, how: str) -> None:
    policy = jobs_pb2.ON_NONFINITE_SKIP if how == "policy" else jobs_pb2.ON_NONFINITE_REJECT
    job = searched(house, workers=2, on_nonfinite=policy)
    ranks = [job.house.join(), job.house.join()]
    more = {"loss_scale": 1.0} if how == "loss scale" else {}
    points = at_second_evaluation(job, ranks, metrics={"loss": 3.0}, **more)
    bad = ranks[0].in_thread(
        lambda: ranks[0].send(
            {}, kind=data_pb2.CONTRIBUTION_NONFINITE, nonfinite=(0,), evaluation=1, fingerprint="step0", **more
        )
    )
    outcome = job.push(ranks[1], MEAN[1], points[1], 1, "step1", **more)
    assert outcome.result == bad.result(20).result
    value = outcome.result.value
    assert (value["skip_reason"], value["evaluations"], value["metrics"]) == ("nonfinite", 2, {"loss": 3.0})
    assert outcome.result.position.step == 0
    np.testing.assert_array_equal(job.weights(), START["w"])
    steps(job, ranks)


# All at once


@pytest.mark.parametrize("seed", range(6))
def test_whatever_breaks_nothing_hangs_and_every_step_is_right(house: Build, seed: int) -> None:
    """Ranks abandon, lose streams half-way, step anew and leave while somebody edits: each record is a whole, right step."""
    job = searched(house, workers=3, evaluations=3)
    job.house.running.host.journal.append = _checking(job)
    stop = threading.Event()
    members = [job.house.join("w" + str(at), at) for at in range(3)]
    futures = [rank.in_thread(lambda at=at, rank=rank: _lives(job, rank, at, seed, stop)) for at, rank in enumerate(members)]
    for number in range(10):
        job.house.running.administration.update_group(Caller("admin", 0, number + 1, "a"), ("", 0), 0, {"lr": 0.25})
        stop.wait(0.005)
    for future in futures:
        future.result(60)
    assert job.job.position.step >= 12
    assert job.job.position.step == len(job.records)


def _checking(job: Searched) -> Callable[[Any], None]:
    append = job.house.running.host.journal.append

    def check(record: Any) -> None:
        append(record)
        outcome = getattr(record, "outcome", None)
        if outcome is not None:
            targets = [TARGETS[rank] for rank in record.decision.ranks]
            np.testing.assert_allclose(outcome["w"], job.expected(job.weights(), targets), rtol=1e-13)

    return check


def _lives(job: Searched, rank: Any, at: int, seed: int, stop: threading.Event) -> None:
    """One rank's life: until the job has made its steps, or it leaves at the end."""
    chance = np.random.default_rng([seed, at])
    pushes = job.house.running.pushes
    host = job.house.running.host
    number = 0
    while job.job.position.step < 12:
        number += 1
        token, weights, evaluation = f"{at}-{number}", job.weights(), 0
        while True:
            fate = chance.random()
            try:
                if evaluation and fate < 0.05:
                    rank.begin(rank.push(None, kind=data_pb2.CONTRIBUTION_ABANDON, evaluation=evaluation, fingerprint=token))
                if evaluation and fate < 0.1:
                    break  # its closure failed, and nobody says so
                loss, gradient = MEAN[at](weights)
                if fate < 0.2:
                    push = rank.push({"w": gradient}, loss=loss, evaluation=evaluation, fingerprint=token)
                    ticket = rank.begin(push)
                    rank.offer(ticket, *rank.chunks({"w": gradient}))
                    pushes.abandon(ticket)
                outcome = rank.send({"w": gradient}, loss=loss, evaluation=evaluation, fingerprint=token)
            except errors.RoundFailedError:
                break
            if isinstance(outcome, Done):
                break
            if isinstance(outcome, Trial):
                weights, evaluation = np.asarray(outcome.arrays[0])[:4], outcome.evaluation
            elif outcome.restart:
                weights, evaluation = job.weights(), 0
    host.leave(rank.member.session_id, rank.member.epoch)

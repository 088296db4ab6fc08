"""A step that searches: every evaluation is a round, and the outcome is one record."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from searching_jobs import MEAN, START, TARGETS, at_second_evaluation, searched, steps, waits

from optserve.server.rounds.contributions import Trial
from optserve.server.rounds.tickets import Done, Resend
from optserve.v1 import data_pb2, jobs_pb2
from optserve.wire import errors

Build = Callable[..., Any]
Until = Callable[..., Any]


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_a_step_is_one_record_of_the_mean_gradients(house: Build, workers: int) -> None:
    job = searched(house, workers=workers)
    ranks = [job.house.join() for _ in range(workers)]
    for number in range(3):
        steps(job, ranks, f"step{number}-")
    assert len(job.records) == 3
    assert [record.decision.evaluations for record in job.records] == [4] * 3
    assert all(not record.gradients.dense for record in job.records)
    losses = [np.mean([MEAN[at](START["w"])[0] for at in range(workers)])]
    assert job.searches[0].losses[0] == pytest.approx(losses[0])


def test_the_result_tells_the_first_evaluations_norm_and_metrics(house: Build) -> None:
    job = searched(house)
    rank = job.house.join()
    weights, evaluation = job.weights(), 0
    for number in range(4):
        outcome = job.push(rank, MEAN[0], weights, evaluation, metrics={"loss": 10.0 - number})
        if isinstance(outcome, Trial):
            weights, evaluation = np.asarray(outcome.arrays[0])[:4], outcome.evaluation
    value = outcome.result.value
    assert value["evaluations"] == 4
    assert value["metrics"] == {"loss": 10.0}
    assert value["grad_norm"] == pytest.approx(float(np.linalg.norm(START["w"] - TARGETS[0])))
    events = [event for event in job.house.running.host.events.after(0, 0, lambda: True) if event.kind == "round"]
    assert [event.fields["evaluations"] for event in events] == ["4"]


def test_a_push_without_a_loss_is_its_senders_error(house: Build, until: Until) -> None:
    job = searched(house, workers=2)
    first, second = job.house.join(), job.house.join()
    waiting = first.in_thread(lambda: job.step(first, MEAN[0]))
    until(waits(job), "the first rank waits")
    with pytest.raises(errors.InvalidArgumentError, match=r"Descent needs a closure: call worker\.step\(closure\)"):
        second.send({"w": START["w"]})
    assert isinstance(job.step(second, MEAN[1]), Done)
    assert isinstance(waiting.result(20), Done)


def test_a_plain_optimizer_takes_a_loss_and_is_done_after_one_evaluation(house: Build) -> None:
    running = house(START)
    rank = running.join()
    outcome = rank.send({"w": np.ones(4)}, loss=2.0, fingerprint="token")
    assert outcome.result.value["evaluations"] == 1
    assert rank.send({"w": np.ones(4)}).result.value["evaluations"] == 0
    stray = rank.send({"w": np.ones(4)}, loss=2.0, evaluation=3, fingerprint="other")
    assert isinstance(stray, Resend)
    assert stray.restart
    assert running.running.job.position.step == 2


def test_a_rank_that_sits_out_does_so_for_all_evaluations(house: Build) -> None:
    job = searched(house, workers=3)
    ranks = [job.house.join() for _ in range(3)]
    sitting = ranks[2].in_thread(lambda: ranks[2].send({}, kind=data_pb2.CONTRIBUTION_SKIP))
    steps(job, ranks[:2])
    done = sitting.result(20)
    assert done.result.value["ranks"] == [0, 1]
    assert done.result.value["evaluations"] == 4


def test_what_clips_clips_every_evaluation(house: Build) -> None:
    job = searched(house, rules=jobs_pb2.StepRules(clip_grad_norm=0.5))
    rank = job.house.join()
    outcome = job.step(rank, MEAN[0])
    point = START["w"].copy()
    for _ in range(4):
        gradient = point - TARGETS[0]
        point = point - 0.25 * gradient * min(1.0, 0.5 / (np.linalg.norm(gradient) + 1e-6))
    np.testing.assert_allclose(job.weights(), point, rtol=1e-13)
    assert outcome.result.value["clip_factor"] < 1.0


def test_changes_count_with_the_first_evaluation(house: Build) -> None:
    job = searched(house)
    rank = job.house.join()
    point = np.asarray(job.push(rank, MEAN[0], job.weights(), 0, changes={0: {"lr": 0.5}}).arrays[0])[:4]
    for evaluation in (1, 2, 3):
        outcome = job.push(rank, MEAN[0], point, evaluation, changes={0: {"lr": 7.0}})
        point = point if isinstance(outcome, Done) else np.asarray(outcome.arrays[0])[:4]
    assert isinstance(outcome, Done)
    assert outcome.result.value["learning_rates"] == [0.5]
    np.testing.assert_allclose(job.weights(), job.expected(START["w"], TARGETS[:1], 0.5), rtol=1e-14)


# What is repeated


@pytest.mark.parametrize("evaluation", [0, 1, 2])
def test_an_evaluation_whose_answer_was_not_heard_gets_it_again(house: Build, evaluation: int) -> None:
    job = searched(house)
    rank = job.house.join()
    point = job.weights()
    for number in range(evaluation + 1):
        outcome = job.push(rank, MEAN[0], point, number)
        before, point = point, np.asarray(outcome.arrays[0])[:4]
    again = job.push(rank, MEAN[0], before, evaluation)
    assert again.evaluation == evaluation + 1
    np.testing.assert_array_equal(np.asarray(again.arrays[0])[:4], point)
    assert len(job.searches) == 1
    while isinstance(again, Trial):
        again = job.push(rank, MEAN[0], np.asarray(again.arrays[0])[:4], again.evaluation)
    np.testing.assert_allclose(job.weights(), job.expected(START["w"], TARGETS[:1]), rtol=1e-14)


def test_an_evaluation_of_the_round_that_gathers_is_attached_to(house: Build, until: Until) -> None:
    """The first stream broke while the push waited; the same evaluation comes on another one, and counts once."""
    job = searched(house, workers=2)
    first, second = job.house.join(), job.house.join()
    points = at_second_evaluation(job, [first, second])
    loss, gradient = MEAN[0](points[0])
    one = first.in_thread(lambda: first.send({"w": gradient}, loss=loss, evaluation=1, fingerprint="step0"))
    until(waits(job), "the evaluation waits")
    two = first.in_thread(lambda: first.send({"w": gradient * 9}, loss=loss, evaluation=1, fingerprint="step0"))
    answer = job.push(second, MEAN[1], points[1], 1, "step1")
    expected = points[0] - 0.25 * np.mean([points[0] - TARGETS[0], points[0] - TARGETS[1]], axis=0)
    for outcome in (one.result(20), two.result(20), answer):
        assert outcome.evaluation == 2
        np.testing.assert_allclose(np.asarray(outcome.arrays[0])[:4], expected, rtol=1e-14)


def test_a_step_that_was_applied_but_not_heard_is_answered_with_its_result(house: Build) -> None:
    job = searched(house)
    rank = job.house.join()
    done = job.step(rank, MEAN[0])
    for evaluation in (0, 3):
        again = job.push(rank, MEAN[0], job.weights(), evaluation, seq=1)
        assert again.result == done.result
    assert job.job.position.step == 1


def test_a_broken_stream_makes_the_others_send_the_same_evaluation_again(house: Build, until: Until) -> None:
    job = searched(house, workers=2)
    first, second = job.house.join(), job.house.join()
    points = at_second_evaluation(job, [first, second])
    ticket = first.begin(first.push({"w": points[0]}, loss=1.0, evaluation=1, fingerprint="step0"))
    first.offer(ticket, *first.chunks({"w": points[0]}))  # folded, and never ended
    waiting = second.in_thread(lambda: job.push(second, MEAN[1], points[1], 1, "step1"))
    until(waits(job), "the second rank waits")
    job.house.running.pushes.abandon(ticket)
    answer = waiting.result(20)
    assert isinstance(answer, Resend)
    assert not answer.restart
    again = second.in_thread(lambda: job.push(second, MEAN[1], points[1], 1, "step1"))
    assert job.push(first, MEAN[0], points[0], 1, "step0").evaluation == 2
    assert again.result(20).evaluation == 2
    assert len(job.searches) == 1


# Closures that fail


def test_a_closure_that_fails_ends_the_step_for_all_and_changes_nothing(house: Build, until: Until) -> None:
    job = searched(house, workers=3)
    ranks = [job.house.join("w" + str(at), at) for at in range(3)]
    points = at_second_evaluation(job, ranks)
    before = job.job.position
    waiting = ranks[0].in_thread(lambda: job.push(ranks[0], MEAN[0], points[0], 1, "step0"))
    until(waits(job), "one rank waits")
    abandon = ranks[1].push(None, kind=data_pb2.CONTRIBUTION_ABANDON, evaluation=1, fingerprint="step1")
    with pytest.raises(errors.RoundFailedError, match="the closure of rank 1 'w1' failed; nothing was applied"):
        ranks[1].begin(abandon)
    with pytest.raises(errors.RoundFailedError, match="rank 1 'w1'"):
        waiting.result(20)
    for _ in range(2):  # it still evaluated; and its stream may break before it hears
        with pytest.raises(errors.RoundFailedError, match="rank 1 'w1'"):
            job.push(ranks[2], MEAN[2], points[2], 1, "step2")
    with pytest.raises(errors.RoundFailedError, match="rank 1 'w1'"):  # and who waited may not have heard either
        job.push(ranks[0], MEAN[0], points[0], 1, "step0")
    assert job.job.position == before
    np.testing.assert_array_equal(job.weights(), START["w"])
    steps(job, ranks)


@pytest.mark.parametrize("evaluation", [0, 1, 5])
def test_to_abandon_what_is_no_search_is_harmless(house: Build, until: Until, evaluation: int) -> None:
    job = searched(house, workers=2)
    first, second = job.house.join(), job.house.join()
    waiting = first.in_thread(lambda: job.step(first, MEAN[0]))
    until(waits(job), "the first rank waits")
    with pytest.raises(errors.RoundFailedError, match="rank 1"):
        second.begin(second.push(None, kind=data_pb2.CONTRIBUTION_ABANDON, evaluation=evaluation))
    assert not waiting.done()
    assert isinstance(job.step(second, MEAN[1]), Done)
    assert isinstance(waiting.result(20), Done)
    assert len(job.searches) == 1


def test_an_abandoned_step_of_another_token_ends_no_search(house: Build) -> None:
    """It comes late, from a stream that had broken: the rank takes part in a newer step by now."""
    job = searched(house)
    rank = job.house.join()
    points = at_second_evaluation(job, [rank])
    with pytest.raises(errors.RoundFailedError):
        rank.begin(rank.push(None, kind=data_pb2.CONTRIBUTION_ABANDON, evaluation=1, fingerprint="older"))
    assert job.push(rank, MEAN[0], points[0], 1, "step0").evaluation == 2


def test_a_rank_that_steps_anew_makes_the_others_begin_again(house: Build, until: Until) -> None:
    """Its closure raised and nobody told the server: the user has called step again."""
    job = searched(house, workers=2)
    first, second = job.house.join(), job.house.join()
    points = at_second_evaluation(job, [first, second])
    waiting = first.in_thread(lambda: job.push(first, MEAN[0], points[0], 1, "step0"))
    until(waits(job), "the first rank waits")
    anew = second.in_thread(lambda: job.step(second, MEAN[1], "anew"))
    answer = waiting.result(20)
    assert isinstance(answer, Resend)
    assert answer.restart
    assert isinstance(job.step(first, MEAN[0], "step0"), Done)
    assert isinstance(anew.result(20), Done)
    np.testing.assert_allclose(job.weights(), job.expected(START["w"], TARGETS[:2]), rtol=1e-14)


def test_a_defect_of_the_optimizer_ends_the_step_and_not_the_job(house: Build, caplog: pytest.LogCaptureFixture) -> None:
    job = searched(house, workers=2)
    ranks = [job.house.join(), job.house.join()]
    points = at_second_evaluation(job, ranks)

    def broken(*_: Any) -> bool:
        raise ZeroDivisionError("a defect")

    job.searches[-1].evaluated = broken  # type: ignore[method-assign]
    pushes = [
        rank.in_thread(lambda at=at, rank=rank: job.push(rank, MEAN[at], points[at], 1, f"step{at}"))
        for at, rank in enumerate(ranks)
    ]
    for push in pushes:
        with pytest.raises(errors.InternalError, match="a defect"):
            push.result(20)
    assert "a defect while round 1 was applied" in caplog.text
    steps(job, ranks)


def test_an_outcome_that_cannot_be_logged_changes_nothing(house: Build) -> None:
    job = searched(house, evaluations=2)
    rank = job.house.join()
    points = at_second_evaluation(job, [rank])
    journal = job.house.running.host.journal
    append = journal.append

    def full(_: Any) -> None:
        raise errors.StorageError("the disk is full")

    journal.append = full
    before = job.job.position
    with pytest.raises(errors.StorageError):
        job.push(rank, MEAN[0], points[0], 1, "step0")
    journal.append = append
    assert job.job.position == before
    np.testing.assert_array_equal(job.weights(), START["w"])
    steps(job, [rank])

"""Hyperparameters that travel with the pushes: agreed in the round, in force from its step on, applied exactly once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from optserve.server.records import Caller
from optserve.server.rounds.pushes import Done, Resend
from optserve.v1 import data_pb2, jobs_pb2
from optserve.wire import errors

Build = Callable[..., Any]
Until = Callable[..., Any]

W = {"w": np.zeros(4, np.float32)}
G = {"w": np.ones(4, np.float32)}
ADMIN = Caller("admin", 0, 1, "")
SEEN = ("", 0)


class Recording:
    """A journal that remembers what it was given."""

    def __init__(self) -> None:
        self.records: list[Any] = []

    def append(self, record: Any) -> None:
        self.records.append(record)


def weights(running: Any) -> float:
    """The one value that every element of "w" has."""
    (value,) = set(running.values()["w"].tolist())
    return float(value)


def lr(running: Any) -> float:
    return float(running.running.job.groups[0]["lr"])


def events(running: Any) -> list[tuple[str, str, int]]:
    found = running.running.host.events.after(0, 0, lambda: True)
    return [(event.kind, event.message, event.position.version) for event in found]


def together(running: Any, *changes: Any, **head: Any) -> list[Any]:
    """One round in which each rank pushes ones with its changes; what each gets, an error included."""
    futures = [
        rank.in_thread(lambda rank=rank, mine=mine: rank.send(G, changes=mine, **head))
        for rank, mine in zip(running.ranks, changes, strict=True)
    ]
    return [future.exception(20) or future.result() for future in futures]


def joined(house: Build, workers: int, **fields: Any) -> Any:
    running = house(W, **{"workers": workers, "lease_seconds": 1000, **fields})
    for _ in range(workers):
        running.join()
    return running


@pytest.mark.parametrize("workers", [1, 2, 4])
def test_a_change_that_every_rank_brings_holds_from_that_step_on(house: Build, workers: int) -> None:
    running = joined(house, workers)
    assert weights(running) == 0
    together(running, *[{}] * workers)
    assert weights(running) == -1
    outcomes = together(running, *[{0: {"lr": 0.5}}] * workers)
    assert weights(running) == -1.5
    assert [outcome.result.value["learning_rates"] for outcome in outcomes] == [[0.5]] * workers
    together(running, *[{}] * workers)
    assert weights(running) == -2


@pytest.mark.parametrize("who", range(4))
def test_a_rank_that_changes_nothing_agrees(house: Build, who: int) -> None:
    running = joined(house, 4)
    changes: list[Any] = [{}, {}, {0: {}}, {}]
    changes[who] = {0: {"lr": 0.25}}
    assert all(isinstance(outcome, Done) for outcome in together(running, *changes))
    assert (weights(running), lr(running)) == (-0.25, 0.25)


def test_ranks_may_change_different_things(house: Build) -> None:
    running = joined(house, 2)
    together(running, {0: {"lr": 0.5}}, {0: {"weight_decay": 0.5, "lr": 0.5}})
    group = running.running.job.groups[0]
    assert (group["lr"], group["weight_decay"]) == (0.5, 0.5)


@pytest.mark.parametrize("workers", [2, 4])
def test_ranks_that_disagree_are_all_told_both_values_and_nothing_is_applied(house: Build, workers: int) -> None:
    running = joined(house, workers)
    running.running.host.journal = journal = Recording()
    before = running.running.job.to_document({})
    changes: list[Any] = [{}] * workers
    changes[0], changes[-1] = {0: {"lr": 0.5}}, {0: {"lr": 0.25}}
    for outcome in together(running, *changes):
        assert isinstance(outcome, errors.RanksDisagreeError)
        assert f"lr of group 0 to different values: rank 0 to 0.5, rank {workers - 1} to 0.25" in str(outcome)
        assert outcome.metadata == {"group": "0", "hyperparameter": "lr"}
    assert journal.records == []
    assert running.running.job.to_document({}) == before
    assert weights(running) == 0
    outcomes = together(running, *[{0: {"lr": 0.5}}] * workers)
    assert [outcome.result.position.step for outcome in outcomes] == [1] * workers
    assert weights(running) == -0.5


@pytest.mark.parametrize("kind", [data_pb2.CONTRIBUTION_SKIP, data_pb2.CONTRIBUTION_NONFINITE])
def test_a_rank_that_contributes_nothing_still_has_its_say(house: Build, kind: Any) -> None:
    running = joined(house, 2, on_nonfinite=jobs_pb2.ON_NONFINITE_SKIP)
    first, second = running.ranks
    for value, agrees in ((0.25, False), (0.5, True)):
        waiting = first.in_thread(lambda: first.send(G, changes={0: {"lr": 0.5}}))
        ticket = second.begin(second.push({}, weight=0.0, kind=kind, changes={0: {"lr": value}}))
        if agrees:
            second.finish(ticket)
            waiting.result(20)
            continue
        for push in (lambda ticket=ticket: second.finish(ticket), lambda waiting=waiting: waiting.result(20)):
            with pytest.raises(errors.RanksDisagreeError, match=r"rank 1 to 0\.25"):
                push()
    assert lr(running) == 0.5


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({3: {"lr": 0.5}}, errors.UnknownParameterError, "1 param groups; there is no group 3"),
        ({0: {"lr": 0.5, "learning": 1}}, errors.UnknownHyperparameterError, "no hyperparameter 'learning'"),
        ({0: {"weight_decay": 0.1, "lr": -1.0}}, errors.InvalidHyperparameterError, r"Invalid learning rate: -1\.0"),
        ({0: {"nesterov": True}}, errors.InvalidHyperparameterError, "Nesterov momentum requires"),
    ],
)
def test_a_change_that_is_refused_is_its_senders_error_and_it_may_push_again_in_this_round(
    house: Build, until: Until, changes: Any, error: Any, message: str
) -> None:
    running = joined(house, 2)
    first, second = running.ranks
    waiting = first.in_thread(lambda: first.send(G))
    until(lambda: running.running.pushes._round.busy, "the first push waits")
    before = running.running.job.to_document({})
    with pytest.raises(error, match=message):
        second.begin(second.push(G, changes=changes))
    assert running.running.job.to_document({}) == before
    assert not waiting.done()
    assert second.send(G).result.position.step == 1
    assert waiting.result(20).result.position.step == 1


def test_changes_that_are_fine_one_by_one_but_not_together_end_the_round_for_all(house: Build) -> None:
    running = joined(house, 2, defaults={"lr": 1.0, "momentum": 0.9})
    before = running.running.job.to_document({})
    for outcome in together(running, {0: {"nesterov": True}}, {0: {"dampening": 0.5}}):
        assert isinstance(outcome, errors.InvalidHyperparameterError)
        assert str(outcome).startswith("round 1: what its ranks changed does not go together")
        assert "(Nesterov momentum requires a momentum and zero dampening); nothing was applied" in str(outcome)
    assert running.running.job.to_document({}) == before
    assert all(isinstance(outcome, Done) for outcome in together(running, {}, {0: {"dampening": 0.5}}))


def test_a_change_names_its_version_in_an_event(house: Build) -> None:
    running = joined(house, 2)
    outcomes = together(running, {0: {"lr": 0.5}}, {0: {"lr": 0.5, "momentum": 0.9}})
    version = outcomes[0].result.position.version
    assert events(running)[-2:] == [("group", "group 0: lr=0.5, momentum=0.9", version), ("round", "step 1", version)]


@pytest.mark.parametrize("why", ["nonfinite", "no weight"])
def test_a_skipped_round_still_changes_the_groups(house: Build, why: str) -> None:
    running = joined(house, 1, on_nonfinite=jobs_pb2.ON_NONFINITE_SKIP)
    (rank,) = running.ranks
    kind = data_pb2.CONTRIBUTION_NONFINITE if why == "nonfinite" else data_pb2.CONTRIBUTION_SKIP
    done = rank.finish(rank.begin(rank.push({}, weight=0.0, kind=kind, changes={0: {"lr": 0.5}})))
    assert (done.result.value["skip_reason"], done.result.position.step) == (why, 0)
    assert (weights(running), lr(running)) == (0, 0.5)
    assert ("group", "group 0: lr=0.5", done.result.position.version) in events(running)


def test_a_round_that_is_refused_changes_nothing(house: Build) -> None:
    running = joined(house, 2, quorum=2)
    first, second = running.ranks
    waiting = first.in_thread(lambda: first.send(G, changes={0: {"lr": 0.5}}))
    ticket = second.begin(second.push({}, weight=0.0, kind=data_pb2.CONTRIBUTION_SKIP))
    for push in (lambda: second.finish(ticket), lambda: waiting.result(20)):
        with pytest.raises(errors.RoundFailedError, match="the quorum is 2"):
            push()
    assert lr(running) == 1.0


def test_an_edit_of_somebody_else_is_not_undone_by_the_next_push(house: Build) -> None:
    running = joined(house, 2)
    together(running, *[{0: {"lr": 0.5}}] * 2)
    running.running.administration.update_group(ADMIN, SEEN, 0, {"lr": 0.125})
    together(running, {}, {})
    assert (weights(running), lr(running)) == (-0.625, 0.125)


def test_a_repeated_push_gets_the_stored_reply_and_changes_nothing_again(house: Build) -> None:
    running = joined(house, 1)
    (rank,) = running.ranks
    first = rank.send(G, changes={0: {"lr": 0.5}})
    running.running.administration.update_group(ADMIN, SEEN, 0, {"lr": 0.125})
    again = rank.finish(rank.begin(rank.push(G, seq=1, changes={0: {"lr": 0.5}})))
    assert again.result == first.result
    assert (weights(running), lr(running)) == (-0.5, 0.125)


def test_a_change_meets_the_groups_as_they_are_when_the_round_is_decided(house: Build, until: Until) -> None:
    running = joined(house, 2, defaults={"lr": 1.0, "momentum": 0.9})
    first, second = running.ranks
    waiting = first.in_thread(lambda: first.send(G, changes={0: {"nesterov": True}}))
    until(lambda: running.running.pushes._round.busy, "the first push waits")
    running.running.administration.update_group(ADMIN, SEEN, 0, {"dampening": 0.5})
    for push in (lambda: second.send(G), lambda: waiting.result(20)):
        with pytest.raises(errors.InvalidHyperparameterError, match="Nesterov momentum requires"):
            push()
    assert weights(running) == 0


def test_a_push_that_is_in_its_round_is_not_refused_to_its_repeat(house: Build, until: Until) -> None:
    """It may be applied yet: an error would say that it was not."""
    running = joined(house, 2, defaults={"lr": 1.0, "momentum": 0.9})
    first, second = running.ranks
    broken = first.in_thread(lambda: first.send(G, changes={0: {"nesterov": True}}))
    until(lambda: running.running.pushes._round.busy, "the first push waits")
    first.connected = False
    running.running.host.wake()
    with pytest.raises(errors.ServerUnavailableError):
        broken.result(20)
    first.connected = True
    running.running.administration.update_group(ADMIN, SEEN, 0, {"dampening": 0.5})
    repeat = first.begin(first.push(G, changes={0: {"nesterov": True}}))
    running.running.administration.update_group(replace(ADMIN, seq=2), SEEN, 0, {"dampening": 0})
    assert second.send(G).result == first.finish(repeat).result
    assert running.running.job.groups[0]["nesterov"] is True


def test_a_push_that_is_sent_again_because_the_sum_was_void_brings_its_change_once(house: Build) -> None:
    running = joined(house, 2)
    first, second = running.ranks
    broken = first.begin(first.push(G))
    first.offer(broken, *first.chunks(G))
    waiting = second.in_thread(lambda: second.send(G, changes={0: {"lr": 0.5}}))
    first.running.pushes.abandon(broken)
    assert isinstance(waiting.result(20), Resend)
    assert lr(running) == 1.0
    again = second.in_thread(lambda: second.send(G, changes={0: {"lr": 0.5}}))
    first.send(G)
    assert isinstance(again.result(20), Done)
    assert [kind for kind, *_ in events(running)].count("group") == 1
    assert (weights(running), lr(running)) == (-0.5, 0.5)


def test_the_change_of_a_fenced_worker_is_forgotten(house: Build, until: Until) -> None:
    running = joined(house, 2)
    first, second = running.ranks
    lost = first.in_thread(lambda: first.send(G, changes={0: {"lr": 0.5}}))
    until(lambda: running.running.pushes._round.busy, "the push waits")
    newer = running.join(first.member.name, 0)
    with pytest.raises(errors.FencedError):
        lost.result(20)
    waiting = second.in_thread(lambda: second.send(G))
    newer.send(G)
    waiting.result(20)
    assert (weights(running), lr(running)) == (-1, 1.0)


def test_a_restore_forgets_the_change_of_a_push_that_waits(house: Build, until: Until) -> None:
    running = joined(house, 2)
    first, _ = running.ranks
    host = running.running.host
    waiting = first.in_thread(lambda: first.send(G, changes={0: {"lr": 0.5}}))
    until(lambda: running.running.pushes._round.busy, "the push waits")
    with host.changed:
        host.on_reset(errors.RolledBackError("a checkpoint was restored"))
    with pytest.raises(errors.RolledBackError):
        waiting.result(20)
    together(running, {}, {})
    assert lr(running) == 1.0


def test_async_pushes_bring_their_changes_one_after_the_other(house: Build) -> None:
    running = joined(house, 3, consistency=jobs_pb2.CONSISTENCY_ASYNC)
    first, second, third = running.ranks
    first.send(G, changes={0: {"lr": 0.5}})
    second.send(G)
    third.send(G, changes={0: {"lr": 0.25}})
    assert (weights(running), lr(running)) == (-1.25, 0.25)
    with pytest.raises(errors.InvalidHyperparameterError):
        first.begin(first.push(G, changes={0: {"lr": -1.0}}))
    assert first.send(G).result.position.step == 4


def test_an_option_that_needs_more_state_is_made_ready_before_the_record(house: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    running = joined(house, 1, defaults={"lr": 0.5})
    (rank,) = running.ranks
    store = running.running.job.store
    running.running.host.journal = journal = Recording()

    def no_memory(*_: Any, **__: Any) -> None:
        raise errors.OutOfMemoryError("no room for momentum_buffer")

    with monkeypatch.context() as patched:
        patched.setattr(store, "prepare", no_memory)
        with pytest.raises(errors.OutOfMemoryError, match="momentum_buffer"):
            rank.send(G, changes={0: {"momentum": 0.5}})
    assert journal.records == []
    assert running.running.job.groups[0]["momentum"] == 0
    rank.send(G, changes={0: {"momentum": 0.5}})
    rank.send(G)
    assert weights(running) == -0.5 * (1 + 1.5)
    assert [dict(record.decision.changes) for record in journal.records] == [{0: {"momentum": 0.5}}, {}]


def test_an_update_that_breaks_leaves_the_groups_as_they_were(house: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    running = joined(house, 1)
    (rank,) = running.ranks

    def broken(*_: Any) -> None:
        raise ZeroDivisionError("a defect")

    with monkeypatch.context() as patched:
        patched.setattr(running.running.job.store, "update", broken)
        with pytest.raises(errors.InternalError, match="a defect"):
            rank.send(G, changes={0: {"lr": 0.5}})
    assert lr(running) == 1.0
    assert [kind for kind, *_ in events(running)].count("group") == 0

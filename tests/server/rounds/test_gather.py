"""Gather: bitwise the definition, whatever the order of arrival."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from optserve.server.rounds import gather as gather_room
from optserve.server.rounds.tickets import Done, Resend
from optserve.v1 import data_pb2
from optserve.wire import dtypes, errors
from optserve.wire.chunks import CHUNK_BYTES, Chunk

House = Any
Build = Callable[..., House]

SHAPES = {"big": (700, 1000), "bias": (33,), "scalar": (), "empty": (0, 3), "more": (300_000,)}
"""2.8 MB and 1.2 MB: four blocks of the grid, with small ones between."""


def gradients_of(seed: int, dtype: Any = np.float32, shapes: dict[str, tuple[int, ...]] | None = None) -> dict[str, Any]:
    random_bits = np.random.default_rng(seed)
    turn = 1 + 2j if np.dtype(dtype).kind == "c" else 1
    return {name: (random_bits.normal(size=shape) * turn).astype(dtype) for name, shape in (shapes or SHAPES).items()}


def zeros(dtype: Any = np.float32, shapes: dict[str, tuple[int, ...]] | None = None) -> dict[str, Any]:
    return {name: np.zeros(shape, dtype) for name, shape in (shapes or SHAPES).items()}


def defined(gradients: list[Any], weights: list[float], dtype: Any) -> Any:
    """Σ (wᵣ/w₀)·gᵣ in rank order in the state dtype."""
    state = dtypes.state_dtype(dtype)
    contributing = [(g, w) for g, w in zip(gradients, weights, strict=True) if w > 0]
    base = contributing[0][1]
    total = None
    for gradient, weight in contributing:
        ratio = weight / base
        term = gradient.astype(state)
        term = term if ratio == 1.0 else term * state.type(ratio)
        total = term if total is None else total + term
    return total


class Aggregates:
    """Records what rounds were decided, in place of a journal."""

    def __init__(self) -> None:
        self.records: list[Any] = []

    def append(self, record: Any) -> None:
        if hasattr(record, "gradients"):
            self.records.append((record.decision, {key: array.copy() for key, array in record.gradients.dense.items()}))


def shuffled_round(house: House, gradients: list[Any], weights: list[float], order: random.Random) -> list[Any]:
    """Every rank's chunks offered in a random order, interleaved at random, from one thread."""
    ranks = [house.join(rank=rank) for rank in range(len(gradients))]
    starts = list(range(len(ranks)))
    order.shuffle(starts)
    tickets: dict[int, Any] = {}
    queue = []
    for index in starts:
        tickets[index] = ranks[index].begin(ranks[index].push(gradients[index], weights[index]))
        chunks = ranks[index].chunks(gradients[index])
        order.shuffle(chunks)
        queue += [(index, chunk) for chunk in chunks]
    order.shuffle(queue)
    for index, chunk in queue:
        ranks[index].offer(tickets[index], chunk)
    waiting = [ranks[index].in_thread(lambda index=index: ranks[index].finish(tickets[index])) for index in starts]
    return [future.result(20) for future in waiting]


DTYPES = [np.float32, np.float64, np.float16, ml_dtypes.bfloat16, np.complex64, np.complex128]


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: np.dtype(dtype).name)
@pytest.mark.parametrize("weights", [[1.0, 1.0, 1.0], [0.0, 3.0, 7.0], [5.0, 0.0, 1.0]], ids=str)
def test_the_sum_is_the_definition_bit_for_bit_whatever_comes_first(house: Build, dtype: Any, weights: list[float]) -> None:
    gradients = [gradients_of(rank, dtype) for rank in range(3)]
    seen = set()
    for trial in range(3):
        running = house(zeros(dtype), workers=3)
        running.running.host.journal = journal = Aggregates()
        outcomes = shuffled_round(running, gradients, weights, random.Random(trial))
        assert all(isinstance(outcome, Done) for outcome in outcomes)
        [(decision, flats)] = journal.records
        views = running.running.job.store.layout.views(flats)
        for name in SHAPES:
            expected = defined([gradient[name] for gradient in gradients], weights, dtype)
            np.testing.assert_array_equal(views[name], expected)
        seen.add((decision.scale, decision.grad_norm, *(flats[key].tobytes() for key in sorted(flats))))
    assert len(seen) == 1


def test_the_applied_step_is_the_weighted_mean(house: Build) -> None:
    gradients = [gradients_of(rank) for rank in range(2)]
    running = house(zeros(), workers=2)
    shuffled_round(running, gradients, [1.0, 3.0], random.Random(0))
    for name, value in running.values().items():
        mean = (gradients[0][name].astype(np.float64) + 3 * gradients[1][name].astype(np.float64)) / 4
        np.testing.assert_allclose(value, -mean, rtol=1e-5, atol=1e-6)


def test_a_chunk_of_a_higher_rank_is_held_until_the_lower_ones_came(house: Build) -> None:
    running = house(zeros(), workers=2)
    first, second = running.join(rank=0), running.join(rank=1)
    gradients = gradients_of(1)
    late = second.begin(second.push(gradients))
    chunks = second.chunks(gradients)
    second.offer(late, *chunks)
    assert late.gather.staged_bytes == sum(chunk.data.nbytes for chunk in chunks)
    early = first.begin(first.push(gradients))
    first.offer(early, first.chunks(gradients)[0])
    assert late.gather.staged_bytes == sum(chunk.data.nbytes for chunk in chunks[1:])
    first.offer(early, *first.chunks(gradients)[1:])
    assert late.gather.staged_bytes == 0


def test_beyond_the_staging_budget_a_stream_is_not_read(
    house: Build, monkeypatch: pytest.MonkeyPatch, until: Callable[..., Any]
) -> None:
    monkeypatch.setattr(gather_room, "STAGING_BYTES", 2 * CHUNK_BYTES)
    running = house(zeros(), workers=2)
    first, second = running.join(rank=0), running.join(rank=1)
    gradients = [gradients_of(rank) for rank in range(2)]
    ticket = second.begin(second.push(gradients[1]))
    offered = second.in_thread(lambda: second.offer(ticket, *second.chunks(gradients[1])))
    until(lambda: ticket.gather._waiting, "the higher rank waits for room")
    assert ticket.gather.staged_bytes <= 2 * CHUNK_BYTES
    assert not offered.done()
    done = first.in_thread(lambda: first.send(gradients[0]))
    offered.result(20)
    assert isinstance(second.finish(ticket), Done)
    assert isinstance(done.result(20), Done)
    for name, value in running.values().items():
        expected = defined([gradient[name] for gradient in gradients], [1.0, 1.0], np.float32) * np.float32(0.5)
        np.testing.assert_array_equal(value, -expected)


def test_a_rank_that_waits_for_room_goes_on_when_the_lower_one_leaves(
    house: Build, monkeypatch: pytest.MonkeyPatch, until: Callable[..., Any]
) -> None:
    monkeypatch.setattr(gather_room, "STAGING_BYTES", CHUNK_BYTES)
    running = house(zeros(), workers=3)
    first, second, third = (running.join(rank=rank) for rank in range(3))
    gradients = gradients_of(1)
    sent = [rank.in_thread(lambda rank=rank: rank.send(gradients)) for rank in (second, third)]
    until(lambda: (g := running.running.pushes._round.gather) is not None and g._waiting == 2, "both wait for room")
    running.running.host.leave(first.member.session_id, first.member.epoch)
    assert all(isinstance(future.result(20), Done) for future in sent)


def test_a_rank_that_folded_and_falls_out_voids_the_round_and_the_others_send_again(house: Build) -> None:
    running = house(zeros(), workers=2)
    first, second = running.join(rank=0), running.join(rank=1)
    gradients = [gradients_of(rank) for rank in range(2)]
    broken = first.begin(first.push(gradients[0]))
    first.offer(broken, *first.chunks(gradients[0])[:2])
    whole = second.begin(second.push(gradients[1]))
    second.offer(whole, *second.chunks(gradients[1]))
    running.running.pushes.abandon(broken)
    assert isinstance(second.finish(whole), Resend)
    again = second.in_thread(lambda: second.send(gradients[1]))
    assert isinstance(first.send(gradients[0]), Done)
    assert isinstance(again.result(20), Done)
    for name, value in running.values().items():
        expected = defined([gradient[name] for gradient in gradients], [1.0, 1.0], np.float32) * np.float32(0.5)
        np.testing.assert_array_equal(value, -expected)


def test_a_rank_that_folded_nothing_falls_out_and_the_others_need_not_send_again(house: Build) -> None:
    running = house(zeros(), workers=2)
    first, second = running.join(rank=0), running.join(rank=1)
    gradients = gradients_of(0)
    broken = second.begin(second.push(gradients))
    second.offer(broken, *second.chunks(gradients)[:1])
    whole = first.begin(first.push(gradients))
    first.offer(whole, *first.chunks(gradients))
    before = whole.gather
    running.running.pushes.abandon(broken)  # its one chunk was folded after rank 0's
    assert before.void
    assert isinstance(first.finish(whole), Resend)

    whole = first.begin(first.push(gradients))
    first.offer(whole, *first.chunks(gradients))
    broken = second.begin(second.push(gradients))
    running.running.pushes.abandon(broken)
    assert not whole.gather.void
    done = first.in_thread(lambda: first.finish(whole))
    assert isinstance(second.send(gradients), Done)
    assert isinstance(done.result(20), Done)


def test_a_parameter_absent_in_all_pushes_is_left_alone_and_in_some_counts_as_zero(house: Build) -> None:
    shapes = {"a": (3,), "b": (300_000,), "c": (2, 2)}
    start = {name: np.ones(shape, np.float32) for name, shape in shapes.items()}
    running = house(start, workers=2, optimizer="adam", defaults={"lr": 0.1})
    first, second = running.join(rank=0), running.join(rank=1)
    gradient = {name: np.full(shape, 2.0, np.float32) for name, shape in shapes.items()}
    waiting = first.in_thread(lambda: first.send({"a": gradient["a"]}))
    second.send({"a": gradient["a"], "c": gradient["c"]})
    waiting.result(20)
    exported = running.running.job.store.export()
    assert exported.steps.get("b", 0) == 0
    np.testing.assert_array_equal(exported.values["b"], start["b"])
    assert exported.steps["a"] == exported.steps["c"] == 1
    np.testing.assert_allclose(exported.state["exp_avg/a"], np.full(3, 0.2), rtol=1e-6)
    np.testing.assert_allclose(exported.state["exp_avg/c"], np.full((2, 2), 0.1), rtol=1e-6)


def test_a_parameter_left_out_keeps_nothing_of_an_earlier_round(house: Build) -> None:
    """The accumulators are used again: what an earlier round left in them must not be applied."""
    shapes = {"a": (3,), "b": (300_000,)}
    running = house(zeros(shapes=shapes), workers=2)
    first, second = running.join(rank=0), running.join(rank=1)
    ones = {name: np.ones(shape, np.float32) for name, shape in shapes.items()}
    waiting = first.in_thread(lambda: first.send(ones))
    second.send(ones)
    waiting.result(20)
    waiting = first.in_thread(lambda: first.send({"a": ones["a"]}))
    second.send({"b": 3 * ones["b"]})
    waiting.result(20)
    values = running.values()
    np.testing.assert_array_equal(values["a"], np.full(3, -1.5, np.float32))
    np.testing.assert_array_equal(values["b"], np.full(300_000, -2.5, np.float32))


def _offered_and_finished(rank: Any, ticket: Any, *chunks: Chunk) -> Any:
    rank.offer(ticket, *chunks)
    return rank.finish(ticket)


def test_a_gradient_with_anything_in_the_padding_is_refused(house: Build) -> None:
    running = house({"w": np.zeros(3, np.float32)})
    rank = running.join()
    flat = np.full(32, 1e6, np.float32)
    flat[:3] = [3.0, 0.0, 4.0]
    ticket = rank.begin(rank.push({"w": flat}))
    with pytest.raises(errors.OptserveError):
        _offered_and_finished(rank, ticket, Chunk(0, 0, flat.view(np.uint8).data))
    running.running.pushes.abandon(ticket)
    assert running.running.job.position.step == 0
    assert not running.values()["w"].any()
    assert rank.send({"w": flat[:3]}).result.value["grad_norm"] == 5.0


@pytest.mark.parametrize(
    ("chunk", "message"),
    [
        (lambda data: Chunk(7, 0, data[0].data), "array 7"),
        (lambda data: Chunk(0, 5 * CHUNK_BYTES, data[0].data), "begins at byte 5242880"),
        (lambda data: Chunk(0, 16, data[0].data), "no multiple"),
        (lambda data: Chunk(0, 0, data[0].data[:100]), "has 100 bytes"),
        (lambda data: Chunk(0, data[-1].offset, data[0].data), "it must have"),
        (lambda data: data[0], "twice"),
    ],
    ids=["another array", "outside", "overlapping", "too short", "too large", "repeated"],
)
def test_a_chunk_that_does_not_belong_is_refused_and_changes_nothing(house: Build, chunk: Any, message: str) -> None:
    running = house(zeros())
    rank = running.join()
    gradients = gradients_of(0)
    before, position = running.values(), running.running.job.position
    ticket = rank.begin(rank.push(gradients))
    chunks = rank.chunks(gradients)
    rank.offer(ticket, chunks[0])
    with pytest.raises(errors.InvalidChunkError, match=message):
        rank.offer(ticket, chunk(chunks))
    running.running.pushes.abandon(ticket)
    assert running.running.job.position == position
    for name, value in running.values().items():
        np.testing.assert_array_equal(value, before[name])
    assert isinstance(rank.send(gradients), Done)


def test_a_push_that_ends_early_is_refused_and_may_be_sent_again(house: Build) -> None:
    running = house(zeros())
    rank = running.join()
    gradients = gradients_of(0)
    ticket = rank.begin(rank.push(gradients))
    rank.offer(ticket, *rank.chunks(gradients)[:-1])
    with pytest.raises(errors.IncompleteStreamError, match="1 of 4 chunks"):
        rank.finish(ticket)
    assert running.running.job.position.step == 0
    assert isinstance(rank.send(gradients), Done)


def test_the_sum_does_not_depend_on_a_lower_rank_that_comes_back_in_mid_round(house: Build) -> None:
    """Rank 0 had left; ranks 1 and 2 have begun. It joins again and pushes: in this round in its place, or in the next one."""
    shapes = {"w": (1000,)}
    gradients = [gradients_of(rank, shapes=shapes) for rank in range(3)]
    weights = [1.0, 3.0, 0.7]
    running = house(zeros(shapes=shapes), workers=3)
    running.running.host.journal = journal = Aggregates()
    first, second, third = (running.join(rank=rank) for rank in range(3))
    running.running.host.leave(first.member.session_id, first.member.epoch)
    ticket = second.begin(second.push(gradients[1], weights[1]))
    second.offer(ticket, *second.chunks(gradients[1]))
    back = running.join(rank=0, session_id="back")
    sent = [
        back.in_thread(lambda: resent(back, gradients[0], weights[0])),
        third.in_thread(lambda: resent(third, gradients[2], weights[2])),
    ]
    if isinstance(second.finish(ticket), Resend):
        resent(second, gradients[1], weights[1])
    decisions = [decision.ranks for decision, _ in journal.records]
    assert decisions, "the round was applied"
    if decisions[0] == (0, 1, 2):
        total = running.running.job.store.layout.views(journal.records[0][1])["w"]
        np.testing.assert_array_equal(total, defined([g["w"] for g in gradients], weights, np.float32))
        assert all(isinstance(future.result(20), Done) for future in sent)


def resent(rank: Any, gradients: Any, weight: float) -> Any:
    while isinstance(outcome := rank.send(gradients, weight=weight), Resend):
        pass
    return outcome


@pytest.mark.parametrize("policy", ["reject", "skip"])
def test_a_gradient_with_nan_that_arrives_in_chunks_follows_the_policy(house: Build, policy: str) -> None:
    """A client that does not look itself."""
    from optserve.v1 import jobs_pb2

    running = house(zeros(), workers=2, on_nonfinite=getattr(jobs_pb2, f"ON_NONFINITE_{policy.upper()}"))
    first, second = running.join(rank=0), running.join(rank=1)
    good, bad = gradients_of(0), gradients_of(1)
    bad["more"][-1] = np.nan
    waiting = first.in_thread(lambda: resent(first, good, 1.0))
    if policy == "reject":
        ticket = second.begin(second.push(bad))
        with pytest.raises(errors.NonfiniteGradientError, match=r"rank 1 'rank1' holds NaN or Inf in .*'more'"):
            _offered_and_finished(second, ticket, *second.chunks(bad))
        running.running.pushes.abandon(ticket)
        assert isinstance(resent(second, gradients_of(1), 1.0), Done)
        assert waiting.result(20).result.position.step == 1
    else:
        outcome = second.send(bad)
        assert outcome.result.value["skip_reason"] == "nonfinite"
        assert waiting.result(20).result.position.step == 0
        assert all(not value.any() for value in running.values().values())


def test_skip_rounds_of_every_rank_apply_nothing(house: Build) -> None:
    running = house(zeros(), workers=2)
    first, second = running.join(rank=0), running.join(rank=1)
    waiting = first.in_thread(lambda: first.send({}, kind=data_pb2.CONTRIBUTION_SKIP, weight=0.0))
    outcome = second.send({}, kind=data_pb2.CONTRIBUTION_SKIP, weight=0.0)
    assert outcome.result.value["skip_reason"] == waiting.result(20).result.value["skip_reason"] == "no weight"
    assert outcome.result.position.step == 0

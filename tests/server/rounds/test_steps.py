"""Clipping, loss scale and accumulation of rounds: what they apply, skip and refuse."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from every_backend import NUMBA

from optserve.server.records import Caller
from optserve.server.rounds.tickets import Done, Resend
from optserve.v1 import data_pb2, jobs_pb2
from optserve.wire import errors

Build = Callable[..., Any]
Until = Callable[..., Any]
Rules = jobs_pb2.StepRules

W = {"w": np.zeros(4, np.float32), "b": np.ones(3, np.float64)}
G = {"w": np.array([1.0, 2.0, 2.0, 4.0], np.float32), "b": np.array([0.0, -3.0, 4.0], np.float64)}
NORM = math.sqrt(25.0 + 25.0)


def rounds(running: Any, pushes: list[Callable[[], Any]]) -> list[Any]:
    """One round of all ranks: what each push comes to, an error too."""
    found = [rank.in_thread(push) for rank, push in zip(running.ranks, pushes, strict=True)]
    outcomes: list[Any] = []
    for future in found:
        try:
            outcomes.append(future.result(20))
        except errors.OptserveError as error:
            outcomes.append(error)
    return outcomes


def sends(running: Any, *heads: dict[str, Any], gradients: Any = None) -> list[Any]:
    """Every rank pushes the same gradients, each with its own head."""
    given = G if gradients is None else gradients
    return rounds(
        running,
        [lambda rank=rank, head=head: rank.send(given, **head) for rank, head in zip(running.ranks, heads, strict=True)],
    )


def joined(house: Build, workers: int, **fields: Any) -> Any:
    running = house(W, workers=workers, **fields)
    for _ in range(workers):
        running.join()
    return running


def events(running: Any, kind: str = "round") -> list[Any]:
    return [event for event in running.running.host.events.after(0, 0, lambda: True) if event.kind == kind]


def update(running: Any, seq: int = 1, **changes: Any) -> Any:
    return running.running.administration.update_rules(Caller("admin", 0, seq, "x"), ("", 0), changes)


# Clipping


@pytest.mark.parametrize("backend", ["numpy", NUMBA])
def test_the_norm_is_of_all_arrays_and_told_before_it_was_clipped(house: Build, backend: str) -> None:
    running = house(W, backend, workers=2, rules=Rules(clip_grad_norm=1.0))
    running.join(), running.join()
    value = sends(running, {}, {})[0].result.value
    assert value["grad_norm"] == pytest.approx(NORM, rel=1e-12)
    factor = 1.0 / (NORM + 1e-6)
    assert value["clip_factor"] == pytest.approx(factor, rel=1e-12)
    np.testing.assert_allclose(running.values()["w"], -factor * G["w"], rtol=1e-6)
    np.testing.assert_allclose(running.values()["b"], 1 - factor * G["b"], rtol=1e-12)
    event = events(running)[0]
    assert float(event.fields["clip_factor"]) == value["clip_factor"]
    assert float(event.fields["grad_norm"]) == value["grad_norm"]


@pytest.mark.parametrize("backend", ["numpy", NUMBA])
def test_clip_by_value_clips_the_mean(house: Build, backend: str) -> None:
    """And not each rank's own: 2 and -1 give 0.5."""
    running = house(W, backend, workers=2, rules=Rules(clip_grad_value=0.75))
    running.join(), running.join()
    first = {"w": np.array([2.0, 8.0, -8.0, 0.0], np.float32), "b": np.full(3, 0.25)}
    second = {"w": np.array([-1.0, 8.0, -8.0, 0.0], np.float32), "b": np.full(3, 0.25)}
    done = rounds(running, [lambda: running.ranks[0].send(first), lambda: running.ranks[1].send(second)])
    np.testing.assert_array_equal(running.values()["w"], [-0.5, -0.75, 0.75, 0.0])
    np.testing.assert_array_equal(running.values()["b"], np.full(3, 0.75))
    assert done[0].result.value["clip_factor"] == 1.0
    assert done[0].result.value["grad_norm"] == pytest.approx(math.sqrt(0.25 + 128.0 + 3 / 16))


def test_a_push_may_bring_its_own_for_one_round(house: Build) -> None:
    running = joined(house, 1, rules=Rules(clip_grad_norm=1.0))
    running.ranks[0].send(G, clip_grad_value=1.5)
    np.testing.assert_array_equal(running.values()["w"], [-1.0, -1.5, -1.5, -1.5])
    running.ranks[0].send(G, clip_grad_norm=math.inf)
    np.testing.assert_allclose(running.values()["w"], [-2.0, -3.5, -3.5, -5.5])
    assert running.ranks[0].send(G).result.value["clip_factor"] == pytest.approx(1 / NORM, rel=1e-5)


def test_complex_gradients_are_clipped_in_norm_and_not_by_value(house: Build) -> None:
    """As in torch; and other parameters of the job may be, in rounds without it."""
    running = house({"w": np.zeros(2, np.float32), "z": np.zeros(2, np.complex64)}, rules=Rules(clip_grad_value=1.0))
    rank = running.join()
    gradients = {"w": np.zeros(2, np.float32), "z": np.array([3.0 + 4.0j, 0.0], np.complex64)}
    with pytest.raises(errors.UnsupportedGradientError, match="gradient 'z': clamp is not supported for complex types"):
        rank.send(gradients)
    rank.send({"w": np.full(2, 4.0, np.float32)})
    np.testing.assert_array_equal(running.values()["w"], [-1.0, -1.0])
    assert rank.send(gradients, clip_grad_norm=1.0).result.value["grad_norm"] == 5.0
    np.testing.assert_allclose(running.values()["z"], [-0.6 - 0.8j, 0.0], rtol=1e-6)


@pytest.mark.parametrize(
    ("first", "second", "texts"),
    [
        ({"clip_grad_norm": 1.0}, {"clip_grad_norm": 2.0}, ("clip_grad_norm=1.0", "clip_grad_norm=2.0")),
        ({"clip_grad_value": 1.0}, {}, ("clip_grad_value=1.0", "no clipping")),
        ({"loss_scale": 1024.0}, {"loss_scale": 2048.0}, ("1024.0", "2048.0")),
        ({}, {"loss_scale": 2048.0}, ("1.0", "2048.0")),
    ],
)
def test_ranks_that_disagree_are_all_told_and_nothing_changed(house: Build, first: Any, second: Any, texts: Any) -> None:
    running = joined(house, 2)
    before = running.running.job.position
    for outcome in sends(running, first, second):
        assert isinstance(outcome, errors.RanksDisagreeError)
        assert f"rank 0 has {texts[0]}, rank 1 {texts[1]}" in str(outcome)
    assert running.running.job.position == before
    np.testing.assert_array_equal(running.values()["w"], W["w"])
    assert all(isinstance(outcome, Done) for outcome in sends(running, second, second))
    assert running.running.job.position.step == 1


# Loss scale


def test_the_mean_is_divided_by_the_scale_before_it_is_measured_and_clipped(house: Build) -> None:
    running = joined(house, 2, rules=Rules(clip_grad_norm=1.0))
    scaled = {name: value * 1024 for name, value in G.items()}
    value = sends(running, {"loss_scale": 1024.0}, {"loss_scale": 1024.0}, gradients=scaled)[0].result.value
    assert value["grad_norm"] == pytest.approx(NORM, rel=1e-12)
    np.testing.assert_allclose(running.values()["w"], -G["w"] / NORM, rtol=2e-6)


@pytest.mark.parametrize("how", ["server", "client", "user", "sum"])
@pytest.mark.parametrize("quorum", [1, 2])
def test_what_is_not_finite_skips_the_step_for_all(house: Build, how: str, quorum: int) -> None:
    """Under the policy reject, and though one of two ranks has nothing that counts."""
    running = joined(house, 2, quorum=quorum, rules=Rules(accumulation=2))
    assert isinstance(sends(running, {}, {})[0], Done)
    inf = {**G, "b": np.array([0.0, math.inf, 1.0])}
    huge = {**G, "w": np.full(4, 3e38, np.float32)}
    head = {"loss_scale": 65536.0}
    first, second = running.ranks
    bad: dict[str, Callable[[], Any]] = {
        "server": lambda: second.send(inf, **head),
        "client": lambda: second.send({}, kind=data_pb2.CONTRIBUTION_NONFINITE, nonfinite=(1,), **head),
        "user": lambda: second.send({}, kind=data_pb2.CONTRIBUTION_NONFINITE),
        "sum": lambda: second.send(huge, **head),
    }
    outcomes = rounds(running, [lambda: first.send(huge if how == "sum" else G, **head), bad[how]])
    for outcome in outcomes:
        assert outcome.result.value["skip_reason"] == "nonfinite"
        assert outcome.result.value["accumulated"] == 1
        assert outcome.result.position.step == 0
    event = events(running)[-1]
    assert event.message == "round skipped: nonfinite; the loss scale is 65536"
    assert event.fields["skip_reason"] == "nonfinite"
    np.testing.assert_array_equal(running.values()["w"], W["w"])
    assert sends(running, {}, {})[0].result.position.step == 1
    np.testing.assert_array_equal(running.values()["w"], -G["w"])


def test_found_inf_alone_skips_whatever_the_policy(house: Build) -> None:
    running = joined(house, 1)
    outcome = running.ranks[0].send({}, kind=data_pb2.CONTRIBUTION_NONFINITE)
    assert outcome.result.value["skip_reason"] == "nonfinite"
    assert events(running)[-1].message == "round skipped: nonfinite"


def test_without_a_scale_a_sum_that_overflows_is_an_error_for_all(house: Build) -> None:
    running = joined(house, 2, rules=Rules(accumulation=2))
    huge = {**G, "w": np.full(4, 3e38, np.float32)}
    for outcome in sends(running, {}, {}, gradients=huge):
        assert isinstance(outcome, errors.RoundFailedError)
        assert "overflowed" in str(outcome)
    assert running.running.job.store.window.rounds == 0


def test_a_running_sum_that_overflows_is_refused_and_stays_as_it_was(house: Build) -> None:
    running = joined(house, 1, rules=Rules(accumulation=3))
    half = {**G, "w": np.full(4, 2e38, np.float32)}
    small = {**G, "w": np.full(4, 1e30, np.float32)}
    rank = running.ranks[0]
    assert rank.send(half).result.value["accumulated"] == 1
    with pytest.raises(errors.RoundFailedError, match="overflowed"):
        rank.send(half)
    assert rank.send(half, loss_scale=1.0).result.value["skip_reason"] == "nonfinite"
    assert rank.send(small).result.value["accumulated"] == 2
    assert rank.send(small).result.value["accumulated"] == 0
    np.testing.assert_allclose(running.values()["w"], np.full(4, -(2e38 + 2e30) / 3), rtol=1e-6)


@pytest.mark.parametrize("scale", [1e-300, 5e-324])
def test_a_scale_that_cannot_be_divided_by_skips_and_makes_no_nan(house: Build, scale: float) -> None:
    running = joined(house, 1)
    outcome = running.ranks[0].send({**G, "w": np.zeros(4, np.float32)}, loss_scale=scale)
    assert outcome.result.value["skip_reason"] == "nonfinite"
    np.testing.assert_array_equal(running.values()["w"], W["w"])


def test_a_skipped_round_whose_changes_do_not_go_together_is_an_error_and_no_defect(house: Build) -> None:
    """SGD takes nesterov only with momentum: each rank's edit is allowed as it comes."""
    running = joined(house, 2, on_nonfinite=jobs_pb2.ON_NONFINITE_SKIP, defaults={"lr": 1.0, "momentum": 0.5})
    kind = data_pb2.CONTRIBUTION_NONFINITE
    first, second = running.ranks
    outcomes = rounds(
        running,
        [
            lambda: first.send({}, kind=kind, changes={0: {"nesterov": True}}),
            lambda: second.send({}, kind=kind, changes={0: {"momentum": 0.0}}),
        ],
    )
    for outcome in outcomes:
        assert isinstance(outcome, errors.InvalidHyperparameterError)
        assert "does not go together" in str(outcome)


# Accumulation


@pytest.mark.parametrize("backend", ["numpy", NUMBA])
@pytest.mark.parametrize("consistency", [jobs_pb2.CONSISTENCY_SYNC, jobs_pb2.CONSISTENCY_ASYNC])
def test_every_kth_round_steps_with_the_mean_of_all(house: Build, backend: str, consistency: Any) -> None:
    running = house(W, backend, consistency=consistency, rules=Rules(accumulation=4, clip_grad_norm=2.0))
    rank = running.join()
    bits = np.random.default_rng(0)
    total = {name: np.zeros(value.shape) for name, value in W.items()}
    expected = {name: value.astype(np.float64) for name, value in W.items()}
    for number in range(8):
        gradients = {name: bits.normal(size=value.shape).astype(value.dtype) for name, value in W.items()}
        total = {name: value + gradients[name] / 4 for name, value in total.items()}
        before = running.values()
        done = rank.send(gradients)
        position, value = done.result.position, done.result.value
        assert (position.step, value["accumulated"]) == ((number + 1) // 4, (number + 1) % 4)
        event = events(running)[-1]
        if position.step * 4 == number + 1:
            norm = math.sqrt(sum(float((entry**2).sum()) for entry in total.values()))
            assert value["grad_norm"] == pytest.approx(norm, rel=1e-6)
            factor = min(1.0, 2.0 / (norm + 1e-6))
            assert value["clip_factor"] == pytest.approx(factor, rel=1e-6)
            expected = {name: entry - factor * total[name] for name, entry in expected.items()}
            total = {name: np.zeros(entry.shape) for name, entry in W.items()}
            assert event.message == f"step {position.step}"
        else:
            np.testing.assert_array_equal(running.values()["w"], before["w"])
            assert event.message == f"step {position.step + 1}: {(number + 1) % 4} of 4 rounds are summed up"
            assert value["clip_factor"] == 1.0
        for name, found in running.values().items():
            np.testing.assert_allclose(found, expected[name], rtol=2e-6, atol=1e-6)


def test_a_parameter_is_absent_from_a_window_only_if_it_was_from_all_rounds(house: Build) -> None:
    running = joined(house, 1, rules=Rules(accumulation=2), optimizer="adam")
    rank = running.ranks[0]
    rank.send({"w": G["w"]})
    rank.send({"w": G["w"]})
    np.testing.assert_array_equal(running.values()["b"], W["b"])
    rank.send({"b": G["b"]})
    rank.send({"w": G["w"]})
    steps = running.running.job.store.export().steps
    assert (steps["w"], steps["b"]) == (2, 1)


@pytest.mark.parametrize("at", [0, 1, 2])
def test_a_round_that_cannot_be_logged_leaves_the_window_as_it_was(house: Build, at: int) -> None:
    running = joined(house, 1, rules=Rules(accumulation=3))
    rank, host = running.ranks[0], running.running.host
    other = {name: 7 * value for name, value in G.items()}
    append = host.journal.append

    def full(_: Any) -> None:
        raise errors.StorageError("the disk is full")

    for number in range(3):
        if number == at:
            before = running.running.job.position, running.running.job.store.window.rounds
            host.journal.append = full
            with pytest.raises(errors.StorageError):
                rank.send(other)
            host.journal.append = append
            assert (running.running.job.position, running.running.job.store.window.rounds) == before
        rank.send(G)
    np.testing.assert_allclose(running.values()["w"], -G["w"], rtol=1e-6)


def test_ranks_that_disagree_in_a_window_leave_it_as_it_was(house: Build) -> None:
    running = joined(house, 2, rules=Rules(accumulation=2))
    sends(running, {}, {})
    assert all(isinstance(entry, errors.RanksDisagreeError) for entry in sends(running, {}, {"loss_scale": 2.0}))
    assert sends(running, {}, {})[0].result.value["accumulated"] == 0
    np.testing.assert_allclose(running.values()["w"], -G["w"], rtol=1e-6)


# The job's rules


def test_the_rules_are_edited_live(house: Build) -> None:
    running = joined(house, 1)
    rank = running.ranks[0]
    result = update(running, clip_grad_norm=1.0, accumulation=2)
    assert result.value == {"clip_grad_norm": 1.0, "clip_grad_value": None, "accumulation": 2}
    assert update(running, clip_grad_norm=1.0, accumulation=2) == result  # a repeat
    assert [event.message for event in events(running, "rules")] == ["rules: clip_grad_norm=1.0, accumulation=2"]
    assert rank.send(G).result.value["accumulated"] == 1
    before = running.running.job.position
    with pytest.raises(
        errors.InvalidArgumentError, match="accumulation is changed to 3 in the middle of a window: 1 of 2 rounds"
    ):
        update(running, 2, accumulation=3)
    assert running.running.job.position == before
    update(running, 2, clip_grad_norm=None, clip_grad_value=1.5, accumulation=2)
    assert rank.send(G).result.position.step == 1
    np.testing.assert_array_equal(running.values()["w"], [-1.0, -1.5, -1.5, -1.5])
    update(running, 3, accumulation=1, clip_grad_value=None)
    assert rank.send(G).result.position.step == 2


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"clip_grad_norm": 0.0}, "clip_grad_norm is 0.0; it must be a number above 0"),
        ({"clip_grad_norm": -1.0}, "clip_grad_norm is -1.0"),
        ({"clip_grad_value": math.nan}, "clip_grad_value is nan"),
        ({"clip_grad_value": True}, "clip_grad_value is True"),
        ({"clip_grad_norm": 1.0, "clip_grad_value": 1.0}, "give one of them"),
        ({"accumulation": 0}, "accumulation is 0"),
        ({"accumulation": 1.5}, "accumulation is 1.5; it must be a whole number"),
        ({"accumulation": 1 << 21}, "accumulation is 2097152"),
        ({"clip_norm": 1.0}, "there is no rule 'clip_norm'; did you mean 'clip_grad_norm'?"),
    ],
)
def test_rules_that_are_not_allowed_change_nothing(house: Build, changes: Any, text: str) -> None:
    running = joined(house, 1)
    before = running.running.job.position
    with pytest.raises(errors.InvalidArgumentError) as caught:
        update(running, **changes)
    assert text in str(caught.value)
    assert running.running.job.position == before


# The layout


def test_an_edit_of_the_layout_voids_the_round_that_gathers(house: Build, until: Until) -> None:
    running = joined(house, 2)
    first, second = running.ranks
    waiting = first.in_thread(lambda: first.send(G))
    gathers = running.running.pushes._round
    until(lambda: gathers.gather is not None and any(c.ended for c in gathers.gather.contributions.values()), "it waits")
    old = gathers._accumulators
    host = running.running.host
    with host.changed:
        host.on_layout()
    outcome = waiting.result(20)
    assert isinstance(outcome, Resend)
    assert not outcome.restart
    waiting = first.in_thread(lambda: first.send(G))
    assert isinstance(second.send(G), Done)
    assert isinstance(waiting.result(20), Done)
    assert all(array is not old.get(array_id) for array_id, array in gathers._accumulators.items())

"""Decide, a pure function of the votes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import pytest

from optserve.server.records import Changes
from optserve.server.rounds.decide import Vote, decide
from optserve.wire import errors


def vote(
    rank: int,
    weight: float = 1.0,
    *,
    present: tuple[int, ...] = (),
    found_inf: bool = False,
    contributes: bool | None = None,
    metrics: Mapping[str, float] | None = None,
    changes: Changes | None = None,
) -> Vote:
    counts = weight > 0 and not found_inf if contributes is None else contributes
    return Vote(rank, weight, counts, found_inf, frozenset(present), metrics or {}, changes or {})


def test_equal_weights_give_the_plain_mean_exactly() -> None:
    decision = decide([vote(0, 32.0), vote(1, 32.0), vote(2, 32.0)], 32.0, 9.0, 1)
    assert decision.scale == 1.0 / 3.0
    assert decision.ranks == (0, 1, 2)
    assert decision.grad_norm == 3.0 * (1.0 / 3.0)
    assert not decision.skipped


def test_the_scale_is_one_over_the_sum_of_the_ratios_to_the_base_weight() -> None:
    decision = decide([vote(1, 2.0), vote(3, 6.0)], 2.0, 4.0, 1)
    assert decision.scale == 1.0 / (1.0 + 3.0)
    assert decision.grad_norm == 2.0 / 4.0


def test_a_rank_of_weight_zero_does_not_contribute() -> None:
    decision = decide([vote(0, 0.0), vote(1, 5.0)], 5.0, 1.0, 2)
    assert decision.ranks == (1,)
    assert decision.scale == 1.0


def test_absent_are_the_parameters_that_no_contributing_rank_sent() -> None:
    votes = [vote(0, present=(3,)), vote(1, present=(0,)), vote(2, 0.0, present=(0, 1, 2, 3))]
    assert decide(votes, 1.0, 1.0, 4).absent == {1, 2}


def test_a_job_whose_ranks_sent_everything_has_no_absent_parameter() -> None:
    votes = [vote(0, present=(0, 1, 2)), vote(1, present=(0, 1))]
    assert decide(votes, 1.0, 1.0, 3).absent == frozenset()


def test_a_parameter_that_was_added_after_a_push_began_is_absent_from_it() -> None:
    assert decide([vote(0, present=(0, 1)), vote(1, present=(0, 1))], 1.0, 1.0, 3).absent == {2}


@pytest.mark.parametrize("votes", [[vote(0, 0.0), vote(1, 0.0)], []])
def test_a_round_whose_weights_are_all_zero_applies_nothing(votes: list[Vote]) -> None:
    decision = decide(votes, 1.0, 0.0, 2)
    assert decision.skipped
    assert decision.skip_reason == "no weight"
    assert decision.ranks == ()
    assert decision.grad_norm == 0.0


def test_one_rank_that_found_inf_skips_the_step_for_all() -> None:
    decision = decide([vote(0), vote(1, found_inf=True), vote(2)], 1.0, 1.0, 2)
    assert decision.skip_reason == "nonfinite"
    assert decision.ranks == (0, 2)


@pytest.mark.parametrize("total", [math.inf, math.nan])
def test_an_aggregate_that_overflowed_is_skipped(total: float) -> None:
    assert decide([vote(0), vote(1)], 1.0, total, 1).skip_reason == "nonfinite"


def test_metrics_are_means_by_weight_over_the_ranks_that_sent_them() -> None:
    votes = [
        vote(0, 1.0, metrics={"loss": 4.0, "only": 7.0}),
        vote(1, 3.0, metrics={"loss": 8.0}),
        vote(2, 0.0, metrics={"loss": 1000.0, "idle": 2.0}),
        vote(3, 0.0, metrics={"idle": 4.0}),
    ]
    assert decide(votes, 1.0, 1.0, 1).metrics == {"idle": 3.0, "loss": 7.0, "only": 7.0}


@pytest.mark.parametrize("values", [(math.inf, -math.inf), (math.nan, 1.0), (1.7e308, 1.7e308), (math.inf, 1.0)])
def test_metrics_that_are_not_finite_are_no_defect(values: tuple[float, float]) -> None:
    """A diverged loss is infinite or NaN; the round goes on."""
    decision = decide([vote(rank, metrics={"loss": value}) for rank, value in enumerate(values)], 1.0, 1.0, 1)
    assert not decision.skipped
    assert "loss" in decision.metrics


def test_changes_are_put_together_in_rank_order_whatever_the_round_does() -> None:
    changes: list[Changes] = [{1: {"lr": 0.5, "eps": 1e-6}}, {}, {0: {"lr": 0.25}, 1: {"betas": (0.5, 0.9), "lr": 0.5}}]
    for found_inf, total in ((False, 1.0), (True, 1.0), (False, math.inf)):
        votes = [vote(rank, changes=entry, found_inf=found_inf) for rank, entry in enumerate(changes)]
        found = decide(votes, 1.0, total, 1).changes
        assert found == {1: {"lr": 0.5, "eps": 1e-6, "betas": (0.5, 0.9)}, 0: {"lr": 0.25}}
    assert decide([vote(0, 0.0, changes={0: {"lr": 2.0}})], 1.0, 0.0, 1).changes == {0: {"lr": 2.0}}


@pytest.mark.parametrize(
    ("one", "other"), [(0.1, 0.2), (None, 0.0), ((0.9, 0.99), (0.9, 0.999)), (True, False), ("original", None)]
)
def test_ranks_that_give_different_values_disagree(one: Any, other: Any) -> None:
    votes = [vote(1, changes={2: {"x": one}}), vote(2), vote(5, changes={2: {"x": other}})]
    with pytest.raises(errors.RanksDisagreeError) as caught:
        decide(votes, 1.0, 1.0, 1)
    assert f"x of group 2 to different values: rank 1 to {one!r}, rank 5 to {other!r}" in str(caught.value)


@pytest.mark.parametrize("value", [math.nan, (math.nan, 1.0), 0.0, None, (0.9, 0.99)])
def test_ranks_that_give_the_same_value_agree(value: Any) -> None:
    decision = decide([vote(0, changes={0: {"x": value}}), vote(1, changes={0: {"x": value}})], 1.0, 1.0, 1)
    assert decision.changes == {0: {"x": value}}


def test_weights_so_far_apart_that_their_sum_overflows_are_no_defect() -> None:
    """math.fsum raises where a float would be infinite."""
    decision = decide([vote(0), vote(1, 1.7e308), vote(2, 1.7e308)], 1.0, 1.0, 1)
    assert decision.skip_reason == "nonfinite" or math.isfinite(decision.scale)

"""Weigh and decide, pure functions of the votes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import pytest

from optserve.server.records import Changes, Decision, Rules
from optserve.server.rounds.decide import Vote, Weighed, decide, skipped, weigh
from optserve.wire import errors

PLAIN = Rules()


def vote(
    rank: int,
    weight: float = 1.0,
    *,
    present: tuple[int, ...] = (),
    found_inf: bool = False,
    metrics: Mapping[str, float] | None = None,
    changes: Changes | None = None,
    **more: Any,
) -> Vote:
    return Vote(rank, weight, weight > 0 and not found_inf, found_inf, frozenset(present), metrics or {}, changes or {}, **more)


def decided(weighed: Weighed, norm: float, rules: Rules = PLAIN, summed: int = 0) -> Decision:
    return decide(weighed, frozenset(), norm, rules, summed)


def test_equal_weights_give_the_plain_mean_exactly() -> None:
    weighed = weigh([vote(0, 32.0), vote(1, 32.0), vote(2, 32.0)], 32.0, PLAIN)
    assert weighed.scale == 1.0 / 3.0
    assert weighed.ranks == (0, 1, 2)
    assert not weighed.skip_reason
    decision = decided(weighed, 2.5)
    assert (decision.scale, decision.grad_norm, decision.clip_factor, decision.accumulated) == (1.0 / 3.0, 2.5, 1.0, 0)
    assert decision.steps
    assert not decision.skipped


def test_the_scale_is_one_over_the_sum_of_the_ratios_to_the_base_weight() -> None:
    assert weigh([vote(1, 2.0), vote(3, 6.0)], 2.0, PLAIN).scale == 1.0 / (1.0 + 3.0)


def test_a_rank_of_weight_zero_does_not_contribute() -> None:
    weighed = weigh([vote(0, 0.0, present=(0,)), vote(1, 5.0, present=(1,))], 5.0, PLAIN)
    assert weighed.ranks == (1,)
    assert weighed.scale == 1.0
    assert weighed.present == {1}


def test_present_is_what_any_contributing_rank_sent() -> None:
    votes = [vote(0, present=(3,)), vote(1, present=(0,)), vote(2, 0.0, present=(0, 1, 2, 3))]
    assert weigh(votes, 1.0, PLAIN).present == {0, 3}
    assert decide(weigh(votes, 1.0, PLAIN), frozenset({1, 2}), 1.0, PLAIN).absent == {1, 2}


@pytest.mark.parametrize("votes", [[vote(0, 0.0), vote(1, 0.0)], []])
def test_a_round_whose_weights_are_all_zero_applies_nothing(votes: list[Vote]) -> None:
    weighed = weigh(votes, 1.0, PLAIN)
    assert weighed.skip_reason == "no weight"
    decision = skipped(weighed, weighed.skip_reason)
    assert decision.skipped
    assert not decision.steps
    assert (decision.ranks, decision.grad_norm) == ((), 0.0)


def test_one_rank_that_found_inf_skips_the_step_for_all() -> None:
    weighed = weigh([vote(0), vote(1, found_inf=True), vote(2)], 1.0, PLAIN)
    assert weighed.skip_reason == "nonfinite"
    assert weighed.ranks == (0, 2)


def test_metrics_are_means_by_weight_over_the_ranks_that_sent_them() -> None:
    votes = [
        vote(0, 1.0, metrics={"loss": 4.0, "only": 7.0}),
        vote(1, 3.0, metrics={"loss": 8.0}),
        vote(2, 0.0, metrics={"loss": 1000.0, "idle": 2.0}),
        vote(3, 0.0, metrics={"idle": 4.0}),
    ]
    assert weigh(votes, 1.0, PLAIN).metrics == {"idle": 3.0, "loss": 7.0, "only": 7.0}


@pytest.mark.parametrize("values", [(math.inf, -math.inf), (math.nan, 1.0), (1.7e308, 1.7e308), (math.inf, 1.0)])
def test_metrics_that_are_not_finite_are_no_defect(values: tuple[float, float]) -> None:
    """A diverged loss is infinite or NaN; the round goes on."""
    weighed = weigh([vote(rank, metrics={"loss": value}) for rank, value in enumerate(values)], 1.0, PLAIN)
    assert not weighed.skip_reason
    assert "loss" in weighed.metrics


@pytest.mark.parametrize("odd", [math.nan, math.inf])
def test_what_a_rank_without_weight_says_does_not_spoil_the_mean(odd: float) -> None:
    votes = [vote(0, 0.0, metrics={"loss": odd}, loss=odd), vote(1, 2.0, metrics={"loss": 3.0}, loss=3.0)]
    found = weigh(votes, 2.0, PLAIN)
    assert (found.loss, found.metrics) == (3.0, {"loss": 3.0})


def test_means_of_ranks_whose_weights_add_up_to_more_than_a_float() -> None:
    votes = [vote(0, 1e308, loss=1.0), vote(1, 1e308, loss=3.0)]
    assert weigh(votes, 1e308, PLAIN).loss == 2.0


def test_the_loss_is_the_mean_by_weight() -> None:
    assert weigh([vote(0, 1.0, loss=4.0), vote(1, 3.0, loss=8.0), vote(2, 0.0, loss=99.0)], 1.0, PLAIN).loss == 7.0
    assert weigh([vote(0, 1.0, loss=4.0), vote(1, 3.0)], 1.0, PLAIN).loss == 4.0
    assert weigh([vote(0)], 1.0, PLAIN).loss is None


def test_changes_are_put_together_in_rank_order_whatever_the_round_does() -> None:
    changes: list[Changes] = [{1: {"lr": 0.5, "eps": 1e-6}}, {}, {0: {"lr": 0.25}, 1: {"betas": (0.5, 0.9), "lr": 0.5}}]
    expected = {1: {"lr": 0.5, "eps": 1e-6, "betas": (0.5, 0.9)}, 0: {"lr": 0.25}}
    for found_inf in (False, True):
        weighed = weigh([vote(rank, changes=entry, found_inf=found_inf) for rank, entry in enumerate(changes)], 1.0, PLAIN)
        assert decided(weighed, 1.0).changes == expected
        assert skipped(weighed, "nonfinite").changes == expected
    assert skipped(weigh([vote(0, 0.0, changes={0: {"lr": 2.0}})], 1.0, PLAIN), "no weight").changes == {0: {"lr": 2.0}}


@pytest.mark.parametrize(
    ("one", "other"), [(0.1, 0.2), (None, 0.0), ((0.9, 0.99), (0.9, 0.999)), (True, False), ("original", None)]
)
def test_ranks_that_give_different_values_disagree(one: Any, other: Any) -> None:
    votes = [vote(1, changes={2: {"x": one}}), vote(2), vote(5, changes={2: {"x": other}})]
    with pytest.raises(errors.RanksDisagreeError) as caught:
        weigh(votes, 1.0, PLAIN)
    assert f"x of group 2 to different values: rank 1 to {one!r}, rank 5 to {other!r}" in str(caught.value)


@pytest.mark.parametrize("value", [math.nan, (math.nan, 1.0), 0.0, None, (0.9, 0.99)])
def test_ranks_that_give_the_same_value_agree(value: Any) -> None:
    weighed = weigh([vote(0, changes={0: {"x": value}}), vote(1, changes={0: {"x": value}})], 1.0, PLAIN)
    assert weighed.changes == {0: {"x": value}}


def test_weights_so_far_apart_that_their_sum_overflows_are_no_defect() -> None:
    """math.fsum raises where a float would be infinite."""
    assert weigh([vote(0), vote(1, 1.7e308), vote(2, 1.7e308)], 1.0, PLAIN).scale == 0.0


# Clipping


@pytest.mark.parametrize(("norm", "limit"), [(10.0, 1.0), (1.0, 1.0), (0.5, 1.0), (0.0, 1e-9), (3.0, math.inf), (1e-5, 1e-5)])
def test_the_clip_factor_is_torchs(norm: float, limit: float) -> None:
    rules = Rules(clip_grad_norm=limit)
    decision = decided(weigh([vote(0, 2.0), vote(1, 2.0)], 2.0, rules), norm, rules)
    factor = min(1.0, limit / (norm + 1e-6))
    assert decision.clip_factor == factor
    assert decision.scale == 0.5 * factor
    assert decision.grad_norm == norm


def test_a_clip_value_is_the_steps_and_no_factor() -> None:
    rules = Rules(clip_grad_value=0.25)
    decision = decided(weigh([vote(0)], 1.0, rules), 100.0, rules)
    assert (decision.clip_value, decision.clip_factor, decision.scale) == (0.25, 1.0, 1.0)


def test_what_a_push_is_clipped_to_replaces_the_jobs_rule_whole() -> None:
    rules = Rules(clip_grad_norm=1.0)
    weighed = weigh([vote(0, clip_grad_value=0.5), vote(1, clip_grad_value=0.5)], 1.0, rules)
    assert (weighed.clip_grad_norm, weighed.clip_grad_value) == (None, 0.5)


def test_a_rank_that_says_what_the_job_says_anyway_agrees() -> None:
    weighed = weigh([vote(0, clip_grad_norm=2.0), vote(1)], 1.0, Rules(clip_grad_norm=2.0))
    assert weighed.clip_grad_norm == 2.0


@pytest.mark.parametrize(
    ("one", "other", "text"),
    [
        ({"clip_grad_norm": 1.0}, {"clip_grad_norm": 2.0}, "rank 0 has clip_grad_norm=1.0, rank 3 clip_grad_norm=2.0"),
        ({"clip_grad_norm": 1.0}, {"clip_grad_value": 1.0}, "rank 0 has clip_grad_norm=1.0, rank 3 clip_grad_value=1.0"),
        ({"clip_grad_norm": 1.0}, {}, "rank 0 has clip_grad_norm=1.0, rank 3 no clipping"),
        ({"loss_scale": 1024.0}, {"loss_scale": 512.0}, "loss_scale: rank 0 has 1024.0, rank 3 512.0"),
        ({}, {"loss_scale": 512.0}, "loss_scale: rank 0 has 1.0, rank 3 512.0"),
    ],
)
def test_ranks_that_clip_or_scale_differently_disagree(one: Any, other: Any, text: str) -> None:
    with pytest.raises(errors.RanksDisagreeError) as caught:
        weigh([vote(0, **one), vote(1, **one), vote(3, **other)], 1.0, PLAIN)
    assert text in str(caught.value)


def test_a_rank_without_a_gradient_need_not_say_how_it_is_scaled_and_clipped() -> None:
    own = {"loss_scale": 8.0, "clip_grad_norm": 1.0}
    weighed = weigh([vote(0, 0.0, has_gradient=False), vote(1, **own)], 1.0, PLAIN)
    assert (weighed.scale, weighed.clip_grad_norm) == (0.125, 1.0)
    assert weigh([vote(0, found_inf=True, has_gradient=False), vote(1, **own)], 1.0, PLAIN).skip_reason == "nonfinite"
    with pytest.raises(errors.RanksDisagreeError, match=r"16\.0"):
        weigh([vote(0, found_inf=True, has_gradient=False, loss_scale=16.0), vote(1, **own)], 1.0, PLAIN)


# Loss scale


def test_the_mean_is_divided_by_the_loss_scale() -> None:
    weighed = weigh([vote(0, loss_scale=256.0), vote(1, loss_scale=256.0)], 1.0, PLAIN)
    assert weighed.scale == 0.5 / 256.0
    assert weighed.skips_nonfinite


def test_only_a_loss_scale_makes_what_is_not_finite_a_skip() -> None:
    assert not weigh([vote(0)], 1.0, PLAIN).skips_nonfinite
    assert weigh([vote(0, loss_scale=1.0), vote(1)], 1.0, PLAIN).skips_nonfinite


# Accumulation


def test_rounds_are_summed_up_until_the_window_is_full() -> None:
    rules = Rules(clip_grad_norm=1.0, accumulation=3)
    weighed = weigh([vote(0), vote(1)], 1.0, rules)
    for summed in (0, 1):
        decision = decided(weighed, 5.0, rules, summed)
        assert not decision.steps
        assert (decision.accumulated, decision.scale, decision.clip_factor) == (summed + 1, 1.0, 1.0)
    decision = decided(weighed, 5.0, rules, 2)
    assert decision.steps
    assert (decision.accumulated, decision.clip_factor) == (0, 1.0 / (5.0 + 1e-6))
    assert decision.scale == 1.0 / 3.0 * decision.clip_factor


# Kinds of gradients


def test_a_gradient_that_is_sparse_on_one_rank_and_dense_on_another_is_refused() -> None:
    votes = [vote(0, present=(0, 1), sparse=frozenset({1})), vote(2, present=(1,))]
    with pytest.raises(errors.RanksDisagreeError, match="parameter 'b' is sparse on rank 0 and dense on rank 2"):
        weigh(votes, 1.0, PLAIN, lambda index: "ab"[index])
    votes = [vote(0, present=(0, 1), sparse=frozenset({1})), vote(2, present=(0,))]
    assert weigh(votes, 1.0, PLAIN).sparse == {1}

"""Decide: from what the ranks contributed to what the round does. A pure function."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from optserve.server.records import Decision


@dataclass(frozen=True)
class Vote:
    """One rank's part in a round. `contributes`: it sent a gradient with a weight above 0."""

    rank: int
    weight: float
    contributes: bool
    found_inf: bool
    present: frozenset[int]
    metrics: Mapping[str, float]


def decide(votes: Sequence[Vote], base_weight: float, sum_of_squares: float, parameters: int) -> Decision:
    """The decision over votes in rank order.

    `sum_of_squares` is that of the aggregate Σ (w/w₀)·g, w₀ = `base_weight`; it is not finite if the aggregate is not.
    """
    contributors = [vote for vote in votes if vote.contributes]
    metrics = _means(votes)
    ranks = tuple(vote.rank for vote in contributors)
    if any(vote.found_inf for vote in votes):
        return Decision(ranks, 1.0, frozenset(), 0.0, "nonfinite", metrics)
    if not contributors:
        return Decision((), 1.0, frozenset(), 0.0, "no weight", metrics)
    scale = 1.0 / sum(vote.weight / base_weight for vote in contributors)
    absent = frozenset(range(parameters)).difference(*(vote.present for vote in contributors))
    if not math.isfinite(sum_of_squares):
        return Decision(ranks, scale, absent, 0.0, "nonfinite", metrics)
    return Decision(ranks, scale, absent, math.sqrt(sum_of_squares) * scale, "", metrics)


def _means(votes: Sequence[Vote]) -> dict[str, float]:
    """Each metric's mean by weight over the ranks that sent it (equal weights where all of those are 0)."""
    means: dict[str, float] = {}
    for name in sorted({name for vote in votes for name in vote.metrics}):
        pairs = [(vote.weight, vote.metrics[name]) for vote in votes if name in vote.metrics]
        total = sum(weight for weight, _ in pairs)
        means[name] = sum((weight / total if total else 1 / len(pairs)) * value for weight, value in pairs)
    return means

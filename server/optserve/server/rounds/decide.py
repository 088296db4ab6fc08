"""Decide: from what the ranks contributed to what the round does. A pure function."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from optserve.server.records import Changes, Decision
from optserve.wire import errors
from optserve.wire.values import Value


@dataclass(frozen=True)
class Vote:
    """One rank's part in a round. `contributes`: it sent a gradient with a weight above 0."""

    rank: int
    weight: float
    contributes: bool
    found_inf: bool
    present: frozenset[int]
    metrics: Mapping[str, float]
    changes: Changes = field(default_factory=dict)


def decide(votes: Sequence[Vote], base_weight: float, sum_of_squares: float, parameters: int) -> Decision:
    """The decision over votes in rank order.

    `sum_of_squares` is that of the aggregate Σ (w/w₀)·g, w₀ = `base_weight`; it is not finite if the aggregate is not.
    RanksDisagreeError if two ranks change a hyperparameter to different values.
    """
    changes = _agreed(votes)
    contributors = [vote for vote in votes if vote.contributes]
    metrics = _means(votes)
    ranks = tuple(vote.rank for vote in contributors)
    if any(vote.found_inf for vote in votes):
        return Decision(ranks, 1.0, frozenset(), 0.0, "nonfinite", metrics, changes)
    if not contributors:
        return Decision((), 1.0, frozenset(), 0.0, "no weight", metrics, changes)
    scale = 1.0 / sum(vote.weight / base_weight for vote in contributors)
    absent = frozenset(range(parameters)).difference(*(vote.present for vote in contributors))
    if not math.isfinite(sum_of_squares):
        return Decision(ranks, scale, absent, 0.0, "nonfinite", metrics, changes)
    return Decision(ranks, scale, absent, math.sqrt(sum_of_squares) * scale, "", metrics, changes)


def _agreed(votes: Sequence[Vote]) -> dict[int, dict[str, Value]]:
    """What the ranks change together; one that changes nothing agrees."""
    agreed: dict[int, dict[str, Value]] = {}
    first: dict[tuple[int, str], int] = {}
    for vote in votes:
        for group, entries in vote.changes.items():
            for name, value in entries.items():
                rank = first.setdefault((group, name), vote.rank)
                found = agreed.setdefault(group, {}).setdefault(name, value)
                if value != found and repr(value) != repr(found):  # NaN differs from itself
                    raise errors.RanksDisagreeError(
                        f"the ranks changed {name} of group {group} to different values: rank {rank} to {found!r}, rank "
                        f"{vote.rank} to {value!r}; nothing was applied, push again without these changes or with equal ones",
                        group=group,
                        hyperparameter=name,
                    )
    return agreed


def _means(votes: Sequence[Vote]) -> dict[str, float]:
    """Each metric's mean by weight over the ranks that sent it (equal weights where all of those are 0)."""
    means: dict[str, float] = {}
    for name in sorted({name for vote in votes for name in vote.metrics}):
        pairs = [(vote.weight, vote.metrics[name]) for vote in votes if name in vote.metrics]
        total = sum(weight for weight, _ in pairs)
        means[name] = sum((weight / total if total else 1 / len(pairs)) * value for weight, value in pairs)
    return means

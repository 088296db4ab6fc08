"""Decide: from what the ranks contributed to what the round does. Pure functions.

`weigh` says who takes part, and what makes the mean of the sum; then the sum is measured, and `decide` says what becomes of it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from optserve.server.records import Changes, Decision, Rules
from optserve.wire import errors
from optserve.wire.values import Value

Agreed = TypeVar("Agreed")

NO_WEIGHT = "no weight"
"""Why a round is skipped to which no rank has sent a gradient."""

_EPSILON = 1e-6
"""torch's, in clip_grad_norm_."""


@dataclass(frozen=True)
class Vote:
    """One rank's part in a round. `contributes`: it sent a gradient that counts, with a weight above 0."""

    rank: int
    weight: float
    contributes: bool
    found_inf: bool
    present: frozenset[int]
    metrics: Mapping[str, float]
    changes: Changes = field(default_factory=dict)
    sparse: frozenset[int] = frozenset()
    """Those of `present` whose gradient has rows only."""
    loss_scale: float | None = None
    clip_grad_norm: float | None = None
    clip_grad_value: float | None = None
    loss: float | None = None
    has_gradient: bool = True
    """False: it sent none, and what it does not say of one is no other value than the others'."""


@dataclass(frozen=True)
class Weighed:
    """Who takes part in a round that is not refused. The aggregate times `scale` is the weighted mean, unscaled.

    `loss` is the mean by weight, None if no rank sent one.
    """

    ranks: tuple[int, ...]
    scale: float
    present: frozenset[int]
    sparse: frozenset[int]
    skip_reason: str
    metrics: Mapping[str, float]
    changes: Changes
    clip_grad_norm: float | None
    clip_grad_value: float | None
    loss: float | None
    skips_nonfinite: bool
    """Whether a rank has scaled its loss: then what is not finite skips the step, whatever the job's policy."""


def weigh(votes: Sequence[Vote], base_weight: float, rules: Rules, name: Callable[[int], str] = str) -> Weighed:
    """The votes, in rank order, put together; `base_weight` is w₀ of the aggregate Σ (w/w₀)·g, `name` a parameter's.

    RanksDisagreeError if two ranks change a hyperparameter to different values, if they scale or clip differently, or if the
    gradient of one parameter is sparse on one rank and dense on another.
    """
    contributors = [vote for vote in votes if vote.contributes]
    loss_scale, clip = _agreed_rules(votes, rules)
    found_inf = any(vote.found_inf for vote in votes)
    scale = 1.0
    if contributors and not found_inf:
        scale = 1.0 / sum(vote.weight / base_weight for vote in contributors) / loss_scale
    return Weighed(
        ranks=tuple(vote.rank for vote in contributors),
        scale=scale,
        present=frozenset[int]().union(*(vote.present for vote in contributors)),
        sparse=_agreed_kinds(contributors, name),
        skip_reason="nonfinite" if found_inf else "" if contributors else NO_WEIGHT,
        metrics=_means([(vote.weight, vote.metrics) for vote in votes]),
        changes=_agreed_changes(votes),
        clip_grad_norm=clip[0],
        clip_grad_value=clip[1],
        loss=_means([(vote.weight, {"": vote.loss}) for vote in votes if vote.loss is not None]).get(""),
        skips_nonfinite=any(vote.loss_scale is not None for vote in votes),
    )


def skipped(weighed: Weighed, reason: str, evaluations: int = 0) -> Decision:
    """The decision that applies nothing."""
    return Decision(weighed.ranks, 1.0, frozenset(), 0.0, reason, weighed.metrics, weighed.changes, evaluations=evaluations)


def decide(weighed: Weighed, absent: frozenset[int], norm: float, rules: Rules, summed: int = 0) -> Decision:
    """What becomes of a sum of finite elements. `norm` is that of the mean of all rounds in it, `summed` of them earlier.

    With accumulation the gradients of the record are the sum of the rounds' means; else they are the aggregate of this one.
    """
    rounds = summed + 1
    if rounds < rules.accumulation:
        return Decision(weighed.ranks, 1.0, absent, norm, "", weighed.metrics, weighed.changes, accumulated=rounds)
    limit = weighed.clip_grad_norm
    factor = 1.0 if limit is None else min(1.0, limit / (norm + _EPSILON))
    return Decision(
        weighed.ranks,
        (weighed.scale if rules.accumulation == 1 else 1.0 / rounds) * factor,
        absent,
        norm,
        "",
        weighed.metrics,
        weighed.changes,
        clip_factor=factor,
        clip_value=weighed.clip_grad_value,
    )


def _agreed_rules(votes: Sequence[Vote], rules: Rules) -> tuple[float, tuple[float | None, float | None]]:
    """The loss scale, and what the gradient is clipped to: by the push where that says it, else by the job's rules."""

    def clip(vote: Vote) -> tuple[float | None, float | None]:
        own = (vote.clip_grad_norm, vote.clip_grad_value)
        return (rules.clip_grad_norm, rules.clip_grad_value) if own == (None, None) else own

    scaled = [vote for vote in votes if vote.has_gradient or vote.loss_scale is not None]
    clipped = [vote for vote in votes if vote.has_gradient or (vote.clip_grad_norm, vote.clip_grad_value) != (None, None)]
    scale = _same(scaled, lambda vote: 1.0 if vote.loss_scale is None else vote.loss_scale, "loss_scale", repr)
    return scale or 1.0, _same(clipped, clip, "what the gradient is clipped to", _clip_text) or (None, None)


def _same(votes: Sequence[Vote], value: Callable[[Vote], Agreed], what: str, text: Callable[[Agreed], str]) -> Agreed | None:
    """What all of them have; None if there is none."""
    for vote in votes:
        if value(vote) != value(votes[0]):
            raise errors.RanksDisagreeError(
                f"the ranks disagree on {what}: rank {votes[0].rank} has {text(value(votes[0]))}, rank {vote.rank} "
                f"{text(value(vote))}; nothing was applied, push again with equal values"
            )
    return value(votes[0]) if votes else None


def _clip_text(clip: tuple[float | None, float | None]) -> str:
    names = ("clip_grad_norm", "clip_grad_value")
    return ", ".join(f"{name}={value!r}" for name, value in zip(names, clip, strict=True) if value is not None) or "no clipping"


def _agreed_kinds(votes: Sequence[Vote], name: Callable[[int], str]) -> frozenset[int]:
    """The parameters whose gradient is sparse."""
    sparse = {index: vote.rank for vote in votes for index in vote.sparse}
    for vote in votes:
        for index in sorted((vote.present - vote.sparse) & sparse.keys()):
            raise errors.RanksDisagreeError(
                f"the gradient of parameter {name(index)!r} is sparse on rank {sparse[index]} and dense on rank {vote.rank}; "
                "nothing was applied, push again with the same kind on every rank",
                parameter=name(index),
            )
    return frozenset(sparse)


def _agreed_changes(votes: Sequence[Vote]) -> dict[int, dict[str, Value]]:
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


def _means(weighted: Sequence[tuple[float, Mapping[str, float]]]) -> dict[str, float]:
    """Each number's mean by weight over the ranks that sent it (equal weights where all of those are 0).

    NaN or Inf of a rank without weight, where others have one, does not count.
    """
    means: dict[str, float] = {}
    for name in sorted({name for _, numbers in weighted for name in numbers}):
        pairs = [(weight, numbers[name]) for weight, numbers in weighted if name in numbers]
        largest = max(weight for weight, _ in pairs)
        shares = [(weight / largest, value) for weight, value in pairs if weight] or [(1.0, value) for _, value in pairs]
        total = sum(share for share, _ in shares)
        means[name] = sum(share / total * value for share, value in shares)
    return means

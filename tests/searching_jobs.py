"""A job whose optimizer searches: so many steps of gradient descent, each at a point that the ranks evaluate."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from optserve.server.formulas import OPTIMIZERS
from optserve.server.records import RoundApplied
from optserve.server.rounds.contributions import Trial
from optserve.server.rounds.tickets import Done, Resend
from optserve.wire.rows import Sums

START = {"w": np.array([4.0, -2.0, 1.0, 0.0], np.float64)}

Closure = Callable[[np.ndarray], tuple[float, np.ndarray]]


def _no_search(*_: Any) -> Any:
    raise AssertionError("the store's search is the test's own")


PLAIN = OPTIMIZERS["sgd"]

DESCENT = replace(
    OPTIMIZERS["lbfgs"],
    name="Descent",
    defaults=PLAIN.defaults,
    complete=PLAIN.complete,
    check=lambda _: None,
    search=_no_search,
)


class Descent:
    """Stands for the store's Search."""

    def __init__(self, start: np.ndarray, rate: float, evaluations: int) -> None:
        self._point, self._rate, self._left = start.copy(), rate, evaluations
        self.losses: list[float] = []
        self.trial: Mapping[int, np.ndarray] = {}
        self.outcome: Mapping[str, np.ndarray] = {}

    def evaluated(self, loss: float, sums: Sums, scale: float, absent: frozenset[int], clip_value: float | None) -> bool:
        gradient = np.asarray(sums.dense[0])[: self._point.size] * scale
        if clip_value is not None:
            gradient = np.clip(gradient, -clip_value, clip_value)
        self.losses.append(loss)
        self._point = self._point - self._rate * gradient
        self._left -= 1
        padded = np.zeros(np.asarray(sums.dense[0]).size)
        padded[: self._point.size] = self._point
        self.trial = {0: padded}
        self.outcome = {"w": self._point}
        return self._left == 0


@dataclass
class Searched:
    """A house whose job searches, and what its searches were."""

    house: Any
    evaluations: int
    searches: list[Descent] = field(default_factory=list)
    records: list[RoundApplied] = field(default_factory=list)

    @property
    def job(self) -> Any:
        return self.house.running.job

    @property
    def round(self) -> Any:
        return self.house.running.pushes._round

    def weights(self) -> np.ndarray:
        return self.house.values()["w"]

    def push(self, rank: Any, closure: Closure, weights: np.ndarray, evaluation: int, token: str = "step", **more: Any) -> Any:
        """One evaluation, sent."""
        loss, gradient = closure(weights)
        return rank.send({"w": gradient}, loss=loss, evaluation=evaluation, fingerprint=token, **more)

    def step(self, rank: Any, closure: Closure, token: str = "step", **more: Any) -> Done:
        """What worker.step(closure) does."""
        weights, evaluation = self.weights(), 0
        for _ in range(200):
            outcome = self.push(rank, closure, weights, evaluation, token, **more)
            if isinstance(outcome, Done):
                return outcome
            if isinstance(outcome, Trial):
                weights, evaluation = np.asarray(outcome.arrays[0])[: weights.size], outcome.evaluation
            elif isinstance(outcome, Resend) and outcome.restart:
                weights, evaluation = self.weights(), 0
        raise AssertionError("the step begins again and again")

    def expected(self, start: np.ndarray, targets: list[np.ndarray], rate: float = 0.25) -> np.ndarray:
        """What one process comes to, with the ranks' mean."""
        point = start.copy()
        for _ in range(self.evaluations):
            point = point - rate * (point - np.mean(targets, axis=0))
        return point


def toward(target: np.ndarray) -> Closure:
    """½·|w - target|²."""
    return lambda w: (0.5 * float(((w - target) ** 2).sum()), w - target)


def searched(house: Any, evaluations: int = 4, **fields: Any) -> Searched:
    """Of START, with lr 0.25."""
    built = Searched(house(START, defaults={"lr": 0.25}, **fields), evaluations)
    job = built.job
    job.plan = replace(job.plan, optimizer=DESCENT)

    def search(groups: Any) -> Descent:
        built.searches.append(Descent(built.weights(), groups[0]["lr"], built.evaluations))
        return built.searches[-1]

    job.store.search = search
    job.store.adopt = lambda outcome: job.store.set_values(outcome)
    append = built.house.running.host.journal.append

    def noted(record: Any) -> None:
        append(record)
        if isinstance(record, RoundApplied):
            built.records.append(record)

    built.house.running.host.journal.append = noted
    return built


TARGETS = [np.array([1.0, 1.0, 0.0, 2.0]), np.array([-3.0, 0.5, 4.0, 0.25]), np.array([0.0, 8.0, -1.0, 1.0])]

MEAN = [toward(target) for target in TARGETS]


def waits(job: Searched, count: int = 1) -> Callable[[], bool]:
    """So many whole pushes are in the round that gathers."""

    def ready() -> bool:
        gather = job.round.gather
        return gather is not None and sum(entry.ended for entry in gather.contributions.values()) == count

    return ready


def at_second_evaluation(job: Searched, ranks: list[Any], **more: Any) -> list[np.ndarray]:
    """All ranks have pushed evaluation 0 and were asked for the next one: the points at which they are to evaluate."""
    pushes = [
        rank.in_thread(lambda at=at, rank=rank: job.push(rank, MEAN[at], job.weights(), 0, f"step{at}", **more))
        for at, rank in enumerate(ranks)
    ]
    found = [push.result(20) for push in pushes]
    assert [outcome.evaluation for outcome in found] == [1] * len(ranks)
    return [np.asarray(outcome.arrays[0])[:4] for outcome in found]


def steps(job: Searched, ranks: list[Any], token: str = "after") -> None:
    """A whole step of all these ranks is right."""
    start, before = job.weights(), job.job.position
    done = [rank.in_thread(lambda rank=rank, at=at: job.step(rank, MEAN[at], f"{token}{at}")) for at, rank in enumerate(ranks)]
    results = [future.result(20).result for future in done]
    assert all(result == results[0] for result in results)
    assert results[0].position.version == before.version + 1
    assert results[0].position.step == before.step + 1
    np.testing.assert_allclose(job.weights(), job.expected(start, TARGETS[: len(ranks)]), rtol=1e-14)

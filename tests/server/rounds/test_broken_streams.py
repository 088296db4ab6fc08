"""Ranks that step with a closure, sit out, lose their streams and start anew, all at once: each step is made exactly once."""

from __future__ import annotations

import random
from collections.abc import Callable
from concurrent.futures import FIRST_EXCEPTION, wait
from contextlib import suppress
from typing import Any

import numpy as np
import pytest
from searching_jobs import START, Searched, searched, toward

from optserve.server.records import RoundApplied
from optserve.server.rounds import pushes
from optserve.server.rounds.contributions import Trial
from optserve.server.rounds.tickets import Done, Resend
from optserve.v1 import data_pb2, types_pb2
from optserve.wire import errors, rows
from optserve.wire.rows import Rows

Build = Callable[..., Any]

WORKERS, STEPS = 4, 6
TARGETS = [np.array([1.0, 1.0, 0.0, 2.0]) * (at + 1) for at in range(WORKERS)]


class Unsteady:
    """A worker of the job. Its streams break, before its push is whole and after; it may start anew in the midst of a step."""

    def __init__(self, job: Searched, at: int, seed: int) -> None:
        self.job, self.at, self.random = job, at, random.Random(f"{seed}/{at}")
        self.rank = job.house.join(f"w{at}", at)

    def chance(self, of: float) -> bool:
        return self.random.random() < of

    def send(self, gradients: Any, **head: Any) -> Any:
        """One push, on as many streams as it takes."""
        push, running = self.rank.push(gradients, **head), self.job.house.running
        chunks = self.rank.chunks(gradients) if gradients else []
        while True:
            ticket = self.rank.begin(push)
            if self.chance(0.2):
                running.pushes.abandon(ticket)
                continue
            self.rank.offer(ticket, *chunks)
            if self.chance(0.2):
                with suppress(errors.ServerUnavailableError):
                    running.pushes.finish(ticket, lambda: False)  # even where there was an answer, it is not heard
                continue
            outcome = self.rank.finish(ticket)
            if not isinstance(outcome, Resend) or outcome.restart:
                return outcome

    def step(self, number: int) -> Any:
        evaluation, weights, token = 0, self.job.weights(), f"step {number}"
        for _ in range(500):
            loss, gradient = toward(TARGETS[self.at])(weights)
            outcome = self.send({"w": gradient}, loss=loss, evaluation=evaluation, fingerprint=token)
            if isinstance(outcome, Done):
                return outcome.result
            if isinstance(outcome, Trial) and self.chance(0.1):
                self.rank = self.job.house.join(f"w{self.at}", self.at)
                outcome = None
            evaluation, weights = 0, self.job.weights()
            if isinstance(outcome, Trial):
                evaluation, weights = outcome.evaluation, np.asarray(outcome.arrays[0])[:4].copy()
        raise AssertionError("the step begins again and again")

    def sit_out(self, number: int) -> Any:
        head = {"kind": data_pb2.CONTRIBUTION_SKIP, "weight": 0.0, "fingerprint": f"step {number}"}
        while True:
            outcome = self.send(None, **head)
            if isinstance(outcome, Done):
                return outcome.result


def participants(seed: int, number: int) -> list[int]:
    """Who steps; the others sit out."""
    chosen = random.Random(f"{seed}:{number}")
    return sorted(chosen.sample(range(WORKERS), chosen.randint(1, WORKERS)))


@pytest.mark.parametrize("seed", range(8))
def test_each_step_is_made_once_with_those_who_take_part(house: Build, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pushes, "POLL_SECONDS", 1000.0)  # whoever waits is woken
    job = searched(house, workers=WORKERS)
    workers = [Unsteady(job, at, seed) for at in range(WORKERS)]

    def work(worker: Unsteady) -> list[Any]:
        plan = [worker.at in participants(seed, number) for number in range(STEPS)]
        return [worker.step(number) if steps else worker.sit_out(number) for number, steps in enumerate(plan)]

    results = [worker.rank.in_thread(lambda worker=worker: work(worker)) for worker in workers]
    found = [result.result(20) for result in results]
    assert all(entry == found[0] for entry in found)
    assert [result.position.step for result in found[0]] == list(range(1, STEPS + 1))
    assert sum(isinstance(record, RoundApplied) for record in job.records) == STEPS
    weights = START["w"]
    for number in range(STEPS):
        taking = participants(seed, number)
        assert found[0][number].value["ranks"] == taking
        weights = job.expected(weights, [TARGETS[at] for at in taking])
    np.testing.assert_allclose(job.weights(), weights, rtol=1e-12)


# Rounds without a search

SHAPES = {"w": (300_000,), "table": (40_000, 8)}
"""Three blocks of the grid each."""


def part(rank: int, number: int) -> dict[str, np.ndarray]:
    """Dense, and what a rank is to send of the table's rows."""
    noise = np.random.default_rng((rank, number))
    dense = noise.normal(size=SHAPES["w"])
    ids = noise.integers(0, SHAPES["table"][0], 20_000)
    return {"w": dense, "ids": ids, "rows": noise.normal(size=(ids.size, 8))}


class Scattered:
    """A worker whose streams break anywhere, and whose older streams still bring chunks while newer ones do."""

    def __init__(self, house: Any, at: int, seed: int, breaks: float) -> None:
        self.house, self.at, self.random, self.breaks = house, at, random.Random(f"{seed}/{at}"), breaks
        self.rank = house.join(f"w{at}", at)

    def chance(self) -> bool:
        return self.random.random() < self.breaks

    def round(self, number: int) -> Any:
        if self.at not in participants(7, number):
            head = self.rank.push(None, kind=data_pb2.CONTRIBUTION_SKIP, weight=0.0)
            return self.send(head, [])
        given = part(self.at, number)
        entry = types_pb2.RowsEntry(parameter=1, count=given["ids"].size, dtype=types_pb2.DATA_TYPE_FLOAT64)
        head = self.rank.push({"w": given["w"], "table": 0}, weight=1.0 + self.at, sparse=(entry,))
        return self.send(head, [*self.rank.chunks({"w": given["w"]}), *rows.chunks([Rows(given["ids"], given["rows"])])])

    def send(self, head: Any, chunks: list[Any]) -> Any:
        running, late = self.house.running, []
        while True:
            ticket = self.rank.begin(head)
            self.random.shuffle(chunks)
            for older, chunk in late:
                self.rank.offer(older, chunk)
            late = []
            cut = self.random.randrange(len(chunks) + 1) if self.chance() else len(chunks)
            self.rank.offer(ticket, *chunks[:cut])
            if cut < len(chunks):
                if self.chance():
                    running.pushes.abandon(ticket)  # else nobody has noticed
                late = [(ticket, chunk) for chunk in chunks[cut : cut + 2]]
                continue
            if self.chance():
                with suppress(errors.ServerUnavailableError):
                    running.pushes.finish(ticket, lambda: False)
                continue
            outcome = self.rank.finish(ticket)
            if isinstance(outcome, Done):
                return outcome.result


def trained(house: Build, seed: int, breaks: float, **spec: Any) -> tuple[dict[str, np.ndarray], list[Any]]:
    start = {name: np.zeros(shape) for name, shape in SHAPES.items()}
    built = house(start, workers=WORKERS, optimizer="adagrad", **spec)
    workers = [Scattered(built, at, seed, breaks) for at in range(WORKERS)]
    runs = [worker.rank.in_thread(lambda worker=worker: [worker.round(at) for at in range(STEPS)]) for worker in workers]
    wait(runs, 40, FIRST_EXCEPTION)
    found = [run.result(1) for run in sorted(runs, key=lambda run: not (run.done() and run.exception()))]
    assert all(entry == found[0] for entry in found)
    return built.values(), [(result.position.version, result.value) for result in found[0]]


@pytest.mark.parametrize("seed", range(4))
def test_rounds_over_streams_that_break_anywhere_are_those_over_whole_ones(
    house: Build, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pushes, "POLL_SECONDS", 1000.0)
    rules = {"accumulation": 1 + seed % 3, "clip_grad_norm": 50.0}
    expected, numbers = trained(house, seed, 0.0, rules=rules)
    found, others = trained(house, seed, 0.3, rules=rules)
    assert [entry[1] for entry in others] == [entry[1] for entry in numbers]
    assert [entry[0] for entry in others] == [entry[0] for entry in numbers]
    for name, value in expected.items():
        np.testing.assert_array_equal(found[name], value)

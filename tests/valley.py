"""A loss for steps with closures, in which something can happen at any evaluation."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from optserve.client import Job, Server

Array = np.ndarray[Any, np.dtype[Any]]

LBFGS: dict[str, Any] = {"optimizer": "lbfgs", "lr": 1.0, "max_iter": 4, "line_search_fn": "strong_wolfe"}
SIZE = 40_000
"""Elements that are too many to travel inside of other messages."""


class Valley:
    """The loss sum(scale * (w - target)^2) / 2 + (1 - cos b): not so simple that one step ends it. Counts its calls.

    `at`: what to do at an evaluation, counted from 0 since the last begin().
    """

    def __init__(self, seed: int, size: int = 30, dtype: Any = np.float64) -> None:
        bits = np.random.default_rng(seed)
        self.target = bits.normal(size=size).astype(dtype)
        self.scale = np.linspace(0.5, 5, size).astype(dtype)
        self.dtype = dtype
        self.calls = 0
        self.at: dict[int, Callable[[], object]] = {}

    def zeros(self) -> dict[str, Array]:
        return {"w": np.zeros(self.target.size, self.dtype), "b": np.full((2, 1), 2, self.dtype)}

    def begin(self, **at: Callable[[], object]) -> Valley:
        self.calls, self.at = 0, {int(number[1:]): act for number, act in at.items()}
        return self

    def __call__(self, weights: Mapping[str, Array]) -> tuple[float, dict[str, Array]]:
        number, self.calls = self.calls, self.calls + 1
        if number in self.at:
            self.at[number]()
        apart, b = weights["w"] - self.target, weights["b"]
        loss = float((self.scale * apart**2).sum() / 2 + (1 - np.cos(b)).sum())
        return loss, {"w": self.scale * apart, "b": np.sin(b)}


def raises(error: BaseException) -> Callable[[], object]:
    def act() -> None:
        raise error

    return act


def round_events(job: Job) -> list[Any]:
    return [event for event in job.events() if event.kind == "round"]


def stepped(server: Server, steps: int, *valleys: Valley, **arguments: Any) -> tuple[list[Any], dict[str, Array]]:
    """What every step was, and the weights at last, of workers side by side of which nothing happens to any."""
    job = server.create_job(None, valleys[0].zeros(), **{**LBFGS, **arguments}, workers=len(valleys))
    workers = [job.join(rank=rank) for rank in range(len(valleys))]
    told = []
    for _ in range(steps):
        all_of(
            [lambda worker=worker, valley=valley: worker.step(valley) for worker, valley in zip(workers, valleys, strict=True)]
        )
        told.append(workers[0].last_step)
    weights = workers[0].pull()
    for worker in workers:
        worker.leave()
    return told, weights


def all_of(works: list[Callable[[], Any]], seconds: float = 60.0) -> list[Any]:
    """Their results, or errors, each in a thread."""
    found: list[Any] = [None] * len(works)

    def one(index: int) -> None:
        try:
            found[index] = works[index]()
        except BaseException as error:
            found[index] = error

    threads = [threading.Thread(target=one, args=(index,), daemon=True) for index in range(len(works))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(seconds)
    assert not any(thread.is_alive() for thread in threads), "a worker still waits"
    return found

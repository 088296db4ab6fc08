"""Whole steps of several workers, and the same in one process with torch: same seeds, the weighted mean as its gradient.

In float32 gradients and weights are such that means are exact: where a mean is near 0 by chance, Adam makes an update of
size lr of its rounding error, in torch as here. In float64 they are anything.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import numpy as np
import torch

from optserve.client import Job, StepInfo

Arrays = dict[str, np.ndarray]

SHAPES: Mapping[str, tuple[int, ...]] = {"table": (260, 64), "w": (33, 7), "b": (7,), "s": ()}
"""The first is larger than a kernel's block."""

WEIGHTS = {"float32": (1.0, 3.0, 0.5, 3.5), "float64": (1.0, 3.0, 0.7, 2.5)}
"""Of four ranks. Those of float32, of one, two or four ranks, have sums that are powers of 2."""

GRID = 4096.0
"""In float32, gradients are multiples of one part in so many."""

# Adam has no weight decay: with it an element of gradient plus decay may be near 0 by chance, too.
OPTIMIZERS: Mapping[str, tuple[Callable[..., torch.optim.Optimizer], dict[str, Any]]] = {
    "adam": (torch.optim.Adam, {"lr": 0.01, "betas": (0.8, 0.95)}),
    "sgd": (torch.optim.SGD, {"lr": 0.05, "momentum": 0.9}),
}

TOLERANCES = {"float64": {"rtol": 1e-7, "atol": 1e-9}, "float32": {"rtol": 1.3e-6, "atol": 1e-5}}


@cache
def _drawn(dtype: str, *seed: int) -> Arrays:
    bits = np.random.default_rng(seed)
    drawn = {name: np.asarray(bits.normal(size=shape)) for name, shape in SHAPES.items()}
    if dtype == "float32":
        drawn = {name: np.rint(value * GRID) / GRID for name, value in drawn.items()}
    return {name: np.asarray(value).astype(dtype) for name, value in drawn.items()}


def start(dtype: str) -> Arrays:
    return {name: value.copy() for name, value in _drawn(dtype, 0).items()}


def gradient(dtype: str, rank: int, number: int) -> Arrays:
    """Of one rank in one round; not to be changed."""
    return _drawn(dtype, 1 + rank, number)


def weight(dtype: str, rank: int, number: int) -> float:
    return WEIGHTS[dtype][rank if dtype == "float32" else (rank + number) % 4]


def mean(dtype: str, workers: int, number: int) -> dict[str, torch.Tensor]:
    """The gradient that one process would have."""
    weights = [weight(dtype, rank, number) for rank in range(workers)]
    total = {
        name: np.asarray(
            sum(w * gradient(dtype, rank, number)[name].astype(np.float64) for rank, w in enumerate(weights)) / sum(weights)
        )
        for name in SHAPES
    }
    return {name: torch.from_numpy(np.asarray(value).astype(dtype)) for name, value in total.items()}


@dataclass
class Oracle:
    """torch, alone."""

    dtype: str
    optimizer: str
    parameters: dict[str, torch.nn.Parameter] = field(init=False)
    torch: torch.optim.Optimizer = field(init=False)

    def __post_init__(self) -> None:
        self.parameters = {name: torch.nn.Parameter(torch.from_numpy(value)) for name, value in start(self.dtype).items()}
        kind, options = OPTIMIZERS[self.optimizer]
        self.torch = kind(self.parameters.values(), foreach=False, **options)

    def give(self, gradients: Mapping[str, torch.Tensor]) -> None:
        for name, parameter in self.parameters.items():
            parameter.grad = gradients[name].clone()

    def compare(self, found: Arrays) -> None:
        for name, parameter in self.parameters.items():
            np.testing.assert_allclose(found[name], parameter.detach().numpy(), **TOLERANCES[self.dtype], err_msg=name)


@dataclass
class Run:
    """What the workers came to: rank 0's weights after each round, and what was said of it; the state at the end."""

    weights: list[Arrays]
    steps: list[StepInfo]
    state: Any


Options = Callable[[int, int, StepInfo | None], tuple[Mapping[str, np.ndarray] | None, dict[str, Any]]]
"""(rank, round, what came of the round before) -> gradients and push's options."""


def train(job: Job, workers: int, rounds: int, options: Options, side_by_side: Any, first: int = 0) -> Run:
    """All ranks push for so many rounds."""
    dtype = next(iter(job.pull(names=["w"]).values())).dtype.name
    weights: list[Arrays] = []
    steps: list[StepInfo] = []
    ready = threading.Barrier(workers)

    def works(rank: int) -> Callable[[], None]:
        def work() -> None:
            last: StepInfo | None = None
            with job.join(rank=rank) as worker:
                ready.wait(30)
                for number in range(first, first + rounds):
                    gradients, given = options(rank, number, last)
                    found = worker.push_pull(gradients, weight=weight(dtype, rank, number), **given)
                    last = worker.last_step
                    assert last is not None
                    if rank == 0:
                        weights.append({name: value.copy() for name, value in found.items()})
                        steps.append(last)
                ready.wait(30)

        return work

    side_by_side([works(rank) for rank in range(workers)], 120.0)
    return Run(weights, steps, job.state_dict())


def plain(dtype: str, **options: Any) -> Options:
    """Every rank's gradients as they are."""
    return lambda rank, number, _: (gradient(dtype, rank, number), options)

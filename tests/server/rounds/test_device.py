"""Rounds whose accumulators and state lie on a device: the same bits, norms and verdicts as on a CPU."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from every_backend import GPU
from host_device import cupy_on_host
from host_kernels import needs_compiler

from optserve.server.rounds.pushes import Done
from optserve.v1 import jobs_pb2

House = Any
Build = Callable[..., House]

BACKENDS = [pytest.param("cupy-on-host", marks=needs_compiler), GPU]
SHAPES = {"big": (700, 1000), "bias": (33,), "scalar": (), "empty": (0, 3), "more": (300_000,)}
"""Several blocks of the grid, with small parameters between."""


def tensors(seed: int, dtype: Any) -> dict[str, np.ndarray]:
    random = np.random.default_rng(seed)
    return {name: np.asarray(random.normal(size=shape)).astype(dtype) for name, shape in SHAPES.items()}


class Decisions:
    """Takes the place of a journal."""

    def __init__(self) -> None:
        self.found: list[Any] = []

    def append(self, record: Any) -> None:
        if hasattr(record, "decision"):
            self.found.append(record.decision)


def train(build: Build, backend: str, dtype: Any, **fields: Any) -> tuple[House, list[Any]]:
    """Three rounds of two ranks, one of them without a gradient for some parameters."""
    job = build(tensors(0, dtype), backend, optimizer="adam", workers=2, defaults={"lr": 0.01, "eps": 0.0}, **fields)
    job.running.host.journal = decisions = Decisions()
    ranks = [job.join(), job.join()]
    for number in range(3):
        pushes = []
        for index, rank in enumerate(ranks):
            gradients = tensors(10 * number + index + 1, dtype)
            if number == 1:
                del gradients["bias"], gradients["big"]  # whole blocks, where the last round's sum still lies
            pushes.append(rank.in_thread(lambda rank=rank, g=gradients, w=1.0 + index: rank.send(g, weight=w)))
        assert all(isinstance(push.result(20), Done) for push in pushes)
    return job, decisions.found


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("backend", BACKENDS)
def test_rounds_have_the_bits_and_norms_of_the_cpu(backend: str, dtype: Any, house: Build) -> None:
    (ours, our_decisions), (theirs, their_decisions) = (train(house, name, dtype) for name in (backend, "numpy"))
    assert [decision.grad_norm for decision in our_decisions] == [decision.grad_norm for decision in their_decisions]
    assert len(our_decisions) == 3
    expected = theirs.values()
    for name, value in ours.values().items():
        assert value.tobytes() == expected[name].tobytes(), name
    ours, theirs = (job.running.job.store.export() for job in (ours, theirs))
    assert ours.steps == theirs.steps
    assert {name: array.tobytes() for name, array in ours.state.items()} == {
        name: array.tobytes() for name, array in theirs.state.items()
    }


@needs_compiler
def test_rounds_take_no_more_memory_than_the_job_did_when_it_was_made(house: Build) -> None:
    device: Any = cupy_on_host()._device
    job = house(tensors(0, np.float32), "cupy-on-host", optimizer="adam")
    rank = job.join()
    gc.collect()  # what tests before this one left
    used = device.used
    for number in range(2):
        assert isinstance(rank.send(tensors(number, np.float32)), Done)
        assert device.used <= used


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_sum_that_overflows_is_found_at_the_end(backend: str, house: Build) -> None:
    job = house({"w": np.ones(100_000, np.float32)}, backend, workers=2, on_nonfinite=jobs_pb2.ON_NONFINITE_SKIP)
    job.running.host.journal = decisions = Decisions()
    huge = {"w": np.full(100_000, 3e38, np.float32)}
    ranks = [job.join(), job.join()]
    pushes = [rank.in_thread(lambda rank=rank: rank.send(huge)) for rank in ranks]
    assert all(isinstance(push.result(20), Done) for push in pushes)
    assert decisions.found[0].skip_reason == "nonfinite"
    assert np.array_equal(job.values()["w"], np.ones(100_000, np.float32))

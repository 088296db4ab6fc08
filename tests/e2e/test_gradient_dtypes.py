"""Gradients in another dtype than their parameter, beside torch on the mean of the gradients in the dtype of the state."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch

from optserve.client import Job, Server, SparseGradient, errors
from optserve.wire import dtypes

REALS = [np.float32, np.float64, np.float16, ml_dtypes.bfloat16]
COMPLEX = [np.complex64, np.complex128]
PAIRS = [*itertools.product(REALS, REALS), *itertools.product(COMPLEX, COMPLEX)]
SHAPES = {"w": (3, 100_001), "b": (7,), "s": (), "none": (0, 3)}
STEPS = 3

Arrays = dict[str, Any]


def name_of(dtype: Any) -> str:
    return np.dtype(dtype).name


def draw(dtype: Any, *seed: int) -> Arrays:
    bits = np.random.default_rng(seed)

    def one(shape: tuple[int, ...]) -> Any:
        real = bits.normal(size=shape)
        return (real + 1j * bits.normal(size=shape) if dtypes.is_complex(dtype) else real).astype(dtype)

    return {name: one(shape) for name, shape in SHAPES.items()}


def state_dtype(dtype: Any) -> Any:
    return np.dtype(dtype) if dtypes.is_complex(dtype) else dtypes.state_dtype(dtype)


def train(job: Job, side_by_side: Any, given: list[Any]) -> Arrays:
    """Ranks side by side, each with gradients of its own dtype; the weights after STEPS."""

    def rank_of(rank: int) -> Callable[[], Arrays]:
        def work() -> Arrays:
            with job.join(rank=rank) as worker:
                for step in range(STEPS):
                    weights = worker.push_pull(draw(given[rank], 1 + rank, step))
            return weights

        return work

    found: list[Arrays] = side_by_side([rank_of(rank) for rank in range(len(given))])
    return found[0]


def of_torch(values: Arrays, given: list[Any]) -> Arrays:
    """Adam in the dtype of the state on the mean of the widened (or narrowed) gradients."""
    parameters = {name: torch.nn.Parameter(torch.from_numpy(np.array(value))) for name, value in values.items()}
    optimizer = torch.optim.Adam(parameters.values(), lr=0.01, foreach=False)
    for step in range(STEPS):
        ranks = [draw(dtype, 1 + rank, step) for rank, dtype in enumerate(given)]
        for name, value in values.items():
            summed = sum(gradients[name].astype(value.dtype) for gradients in ranks)
            parameters[name].grad = torch.from_numpy(np.asarray(summed / value.dtype.type(len(given)), value.dtype))
        optimizer.step()
    return {name: parameter.detach().numpy() for name, parameter in parameters.items()}


def assert_close(found: Arrays, expected: Arrays, dtype: Any) -> None:
    half = 2 * float(ml_dtypes.finfo(dtype).eps) if np.dtype(dtype).itemsize == 2 else 0.0
    wide = np.dtype(dtype) in (np.dtype(np.float64), np.dtype(np.complex128))
    for name, value in expected.items():
        assert found[name].dtype == np.dtype(dtype)
        got = found[name].astype(value.dtype)
        np.testing.assert_allclose(got, value, rtol=half or (1e-7 if wide else 1.3e-6), atol=1e-9 if wide else 1e-5)


@pytest.mark.parametrize(("own", "given"), PAIRS, ids=lambda dtype: name_of(dtype))
def test_ranks_whose_gradients_have_other_dtypes_step_with_the_mean_in_the_states(
    client: Server, side_by_side: Any, own: Any, given: Any
) -> None:
    others = COMPLEX if dtypes.is_complex(own) else REALS
    ranks = [given, others[(others.index(given) + 1) % len(others)]]
    start = draw(own, 0)
    job = client.create_job("dtypes", start, optimizer="adam", lr=0.01, workers=2)
    found = train(job, side_by_side, ranks)
    masters = {name: value.astype(state_dtype(own)) for name, value in start.items()}
    assert_close(found, of_torch(masters, ranks), own)


def test_the_same_gradients_in_a_dtype_that_holds_them_give_the_same_bits(
    server: Server, side_by_side: Any, same: Callable[[Any, Any], None]
) -> None:
    start = draw(np.float32, 0)
    found = []
    for index, (first, second) in enumerate([(np.float32, np.float32), (np.float16, np.float64), (np.float64, np.float16)]):
        job = server.create_job(f"job{index}", start, optimizer="adam", lr=0.01, workers=2)

        def exact(rank: int, dtype: Any, job: Job = job) -> Arrays:
            with job.join(rank=rank) as worker:
                for step in range(STEPS):
                    gradients = {name: value.astype(dtype) for name, value in draw(np.float16, rank, step).items()}
                    weights = worker.push_pull(gradients)
            return weights

        found.append(side_by_side([lambda e=exact, f=first: e(0, f), lambda e=exact, s=second: e(1, s)])[0])
    same(found[1], found[0])
    same(found[2], found[0])


def test_dtypes_may_be_mixed_within_a_push(server: Server) -> None:
    values = {
        "a": np.zeros(40, np.float32),
        "b": np.zeros(40, np.float32),
        "d": np.zeros(3),
        "h": np.zeros(3, ml_dtypes.bfloat16),
    }
    job = server.create_job("mixed", values, optimizer="sgd", lr=1.0)
    ones: Mapping[str, Any] = {
        "a": np.ones(40, np.float16),
        "b": np.full(40, 1.5, ml_dtypes.bfloat16),
        "d": np.full(3, 2.5, np.float32),
        "h": [3.5, 3.5, 3.5],
    }
    with job.join() as worker:
        weights = worker.push_pull(ones)
        assert {name: {-float(element) for element in value} for name, value in weights.items()} == {
            "a": {1.0},
            "b": {1.5},
            "d": {2.5},
            "h": {3.5},
        }
        weights = worker.push_pull({"d": np.full(3, 2.5, np.float16)})
        assert weights["d"].tolist() == [-5.0] * 3


@pytest.mark.parametrize("given", [*REALS, np.complex64])
def test_sparse_gradients_may_have_other_dtypes_too(client: Server, side_by_side: Any, given: Any) -> None:
    own = np.complex64 if dtypes.is_complex(given) else np.float32
    start = np.ones((50, 3), own)
    job = client.create_job("sparse", {"emb": start}, optimizer="sgd", lr=0.5, workers=2)
    values = np.array([[1, 2, 3], [4, 5, 6], [0.5, 0, 0]])
    rows = [[3, 40, 3], [40, 7, 7]]

    def rank_of(rank: int) -> Callable[[], Arrays]:
        def work() -> Arrays:
            with job.join(rank=rank) as worker:
                return worker.push_pull({"emb": SparseGradient(rows[rank], values.astype(own if rank else given))})

        return work

    mean = np.zeros((50, 3))
    for ids in rows:
        np.add.at(mean, ids, values / 2)
    np.testing.assert_array_equal(side_by_side([rank_of(0), rank_of(1)])[0]["emb"], start - (0.5 * mean).astype(own))


@pytest.mark.parametrize(
    ("gradient", "message"),
    [
        (np.ones((3, 4), np.int64), "gradient 'w' has dtype int64; the parameter has dtype float32 and takes float32, float64"),
        (np.ones((3, 4), bool), "gradient 'w' has dtype bool"),
        (np.ones((3, 4), np.complex64), "gradient 'w' has dtype complex64"),
        ([[1] * 4] * 3, "gradient 'w' has dtype int64"),
        (SparseGradient([0], np.ones((1, 4), int)), "gradient 'w' has dtype int64"),
    ],
)
def test_a_gradient_of_no_floating_dtype_is_refused(worker: Any, refused: Any, gradient: Any, message: str) -> None:
    with refused(errors.DtypeMismatchError, message):
        worker.push({"w": gradient})


def test_a_real_gradient_of_a_complex_parameter_is_refused(server: Server) -> None:
    job = server.create_job("complex", {"z": np.ones(3, np.complex64)}, optimizer="sgd", lr=0.1)
    with job.join() as worker, pytest.raises(errors.DtypeMismatchError, match="gradient 'z' has dtype float32"):
        worker.push({"z": np.ones(3, np.float32)})
    assert job.position().step == 0


def test_a_double_that_no_float32_holds_is_not_finite(worker: Any, refused: Any) -> None:
    with refused(errors.NonfiniteGradientError, "holds NaN or Inf in 'w'"):
        worker.push({"w": np.full((3, 4), 1e39)})
    assert not worker.push({"w": np.full((3, 4), 1e38)}).skipped

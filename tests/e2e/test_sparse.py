"""Sparse gradients of several workers equal torch's in one process, with the weighted mean as its sparse gradient."""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
import whole_steps as whole  # noqa: E402

from optserve.client import Job, Server, SparseGradient, errors  # noqa: E402

STEPS = 50
SHAPES = {"emb": (400, 16), "deep": (30, 3, 2), "out": (16, 4)}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "SparseAdam": ("SparseAdam", {"lr": 0.02, "betas": (0.8, 0.95)}),
    "SGD": ("SGD", {"lr": 0.1}),
    "SGD with momentum": ("SGD", {"lr": 0.05, "momentum": 0.9}),
    "Adagrad": ("Adagrad", {"lr": 0.1, "lr_decay": 0.01, "initial_accumulator_value": 0.1}),
}
DENSE = {"SGD", "Adagrad"}
"""Beside the rows of two parameters these take a third one's dense gradient; SparseAdam has the two only."""

Given = tuple[np.ndarray, np.ndarray]


def names(optimizer: str) -> list[str]:
    return list(SHAPES) if optimizer in DENSE else ["emb", "deep"]


def start(optimizer: str, dtype: str) -> dict[str, np.ndarray]:
    random = np.random.default_rng(0)
    return {name: random.normal(size=SHAPES[name]).astype(dtype) for name in names(optimizer)}


@cache
def rows(dtype: str, name: str, rank: int, number: int) -> Given:
    """Some rows in any order, of which a few come repeatedly; other ranks have others, and one has none now and then.

    In float32 their values are multiples of 1/64, so that the mean is exact.
    """
    random = np.random.default_rng([*name.encode(), rank, number])
    count = 0 if (rank + number) % 7 == 3 else int(random.integers(1, SHAPES[name][0] // 4))
    ids = random.integers(0, SHAPES[name][0], count)
    values = random.normal(size=(count, *SHAPES[name][1:]))
    return ids, (np.rint(values * 64) / 64 if dtype == "float32" else values).astype(dtype)


@cache
def dense(dtype: str, rank: int, number: int) -> np.ndarray:
    values = np.random.default_rng([rank, number, 9]).normal(size=SHAPES["out"])
    return (np.rint(values * 64) / 64 if dtype == "float32" else values).astype(dtype)


def pushed(optimizer: str, dtype: str, rank: int, number: int) -> dict[str, Any]:
    found: dict[str, Any] = {name: SparseGradient(*rows(dtype, name, rank, number)) for name in ("emb", "deep")}
    if optimizer in DENSE:
        found["out"] = dense(dtype, rank, number)
    return found


def train(job: Job, optimizer: str, dtype: str, workers: int, side_by_side: Any) -> list[dict[str, np.ndarray]]:
    """Rank 0's weights after each step."""
    found: list[dict[str, np.ndarray]] = []
    ready = threading.Barrier(workers)

    def works(rank: int) -> Callable[[], None]:
        def work() -> None:
            with job.join(rank=rank) as worker:
                ready.wait(30)
                for number in range(STEPS):
                    given = pushed(optimizer, dtype, rank, number)
                    values = worker.push_pull(given, weight=whole.weight(dtype, rank, number))
                    if rank == 0:
                        found.append({name: value.copy() for name, value in values.items()})
                ready.wait(30)

        return work

    side_by_side([works(rank) for rank in range(workers)], 120.0)
    return found


def mean_of_rows(name: str, dtype: str, workers: int, number: int) -> Any:
    """Of all ranks, coalesced by torch in float64."""
    weights = [whole.weight(dtype, rank, number) for rank in range(workers)]
    found = [rows(dtype, name, rank, number) for rank in range(workers)]
    ids = np.concatenate([entry[0] for entry in found])
    values = np.concatenate([w / sum(weights) * entry[1].astype(np.float64) for w, entry in zip(weights, found, strict=True)])
    total = torch.sparse_coo_tensor(torch.from_numpy(ids)[None], torch.from_numpy(values), SHAPES[name], check_invariants=True)
    return total.coalesce().to(getattr(torch, dtype))


def torchs(case: str, dtype: str, workers: int) -> list[dict[str, np.ndarray]]:
    """The weights after each step."""
    optimizer, options = CASES[case]
    parameters = {name: torch.nn.Parameter(torch.from_numpy(value)) for name, value in start(optimizer, dtype).items()}
    switches = {"foreach": False} if optimizer in DENSE else {}
    stock = getattr(torch.optim, optimizer)(parameters.values(), **options, **switches)
    found = []
    for number in range(STEPS):
        for name, parameter in parameters.items():
            if name == "out":
                weights = [whole.weight(dtype, rank, number) for rank in range(workers)]
                total = sum(w * dense(dtype, rank, number).astype(np.float64) for rank, w in enumerate(weights)) / sum(weights)
                parameter.grad = torch.from_numpy(np.asarray(total).astype(dtype))
            else:
                parameter.grad = mean_of_rows(name, dtype, workers, number)
        with torch.sparse.check_sparse_tensor_invariants(enable=True):
            stock.step()
        found.append({name: parameter.detach().numpy().copy() for name, parameter in parameters.items()})
    return found


@pytest.mark.parametrize("workers", [1, 2, 4])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("case", CASES)
def test_fifty_steps_equal_torch(client: Server, side_by_side: Any, case: str, dtype: str, workers: int) -> None:
    optimizer, options = CASES[case]
    job = client.create_job("j", start(optimizer, dtype), optimizer=optimizer, workers=workers, **options)
    found = train(job, optimizer, dtype, workers, side_by_side)
    for number, expected in enumerate(torchs(case, dtype, workers)):
        for name, value in expected.items():
            np.testing.assert_allclose(found[number][name], value, **whole.TOLERANCES[dtype], err_msg=f"{name}, step {number}")


@pytest.mark.parametrize("case", CASES)
def test_two_runs_give_the_same_bits(server: Server, side_by_side: Any, same: Callable[..., None], case: str) -> None:
    """Whatever rank comes first, and by whatever transport."""
    optimizer, options = CASES[case]
    found = []
    for name in ("one", "two"):
        job = server.create_job(name, start(optimizer, "float32"), optimizer=optimizer, workers=4, **options)
        found.append((train(job, optimizer, "float32", 4, side_by_side)[-1], job.state_dict()["state"]))
    same(found[0][0], found[1][0])
    for key, entry in found[0][1].items():
        same(entry, found[1][1][key])


@pytest.mark.parametrize("case", [case for case in CASES if case != "SGD with momentum"])
def test_rows_that_no_rank_touched_keep_every_bit(server: Server, side_by_side: Any, case: str) -> None:
    optimizer, options = CASES[case]
    first = start(optimizer, "float32")
    job = server.create_job("j", first, optimizer=optimizer, workers=2, **options)
    touched = {(2, 5), (5, 9)}
    ready = threading.Barrier(2)

    def works(rank: int) -> Callable[[], None]:
        def work() -> None:
            with job.join(rank=rank) as worker:
                ready.wait(30)
                ids = np.array(sorted(touched)[rank])
                worker.push({"emb": SparseGradient(ids, np.ones((2, 16), np.float32))})
                ready.wait(30)

        return work

    side_by_side([works(rank) for rank in range(2)], 30.0)
    after = job.pull()
    moved = sorted({row for rows in touched for row in rows})
    kept = np.setdiff1d(np.arange(400), moved)
    assert after["emb"][kept].tobytes() == first["emb"][kept].tobytes()
    assert after["deep"].tobytes() == first["deep"].tobytes()
    assert (after["emb"][moved] != first["emb"][moved]).all()
    pulled = job.pull(names=[], rows={"emb": [5, 2, 5]})["emb"]
    np.testing.assert_array_equal(pulled, after["emb"][[5, 2, 5]])


@pytest.mark.parametrize(
    ("optimizer", "options", "text"),
    [
        ("adamw", {}, "Adam does not support sparse gradients, please consider SparseAdam instead"),
        ("lion", {}, "Lion does not support sparse gradients"),
        ("sgd", {"weight_decay": 0.1}, r"add\(sparse, dense\) .* instead\. \(weight_decay is 0\.1; it must be 0\)"),
        ("adagrad", {"weight_decay": 0.1}, "weight_decay option is not compatible with sparse gradients"),
        ("adagrad", {"l1": 0.1}, "l1 option is not compatible with sparse gradients"),
    ],
)
def test_an_optimizer_without_rows_says_what_torch_says(
    server: Server, optimizer: str, options: dict[str, Any], text: str
) -> None:
    first = {"emb": np.ones((5, 2), np.float32)}
    job = server.create_job("j", first, optimizer=optimizer, **options)
    with job.join() as worker:
        with pytest.raises(errors.UnsupportedGradientError, match=text):
            worker.push({"emb": SparseGradient([1], np.ones((1, 2)))})
        assert job.pull()["emb"].tobytes() == first["emb"].tobytes()
        worker.push({"emb": np.ones((5, 2), np.float32)})
        assert job.info().position.step == 1


def test_sparse_adam_says_what_torch_says_of_a_dense_gradient(server: Server) -> None:
    job = server.create_job("j", {"emb": np.ones((5, 2), np.float32)}, optimizer="SparseAdam")
    with job.join() as worker:
        with pytest.raises(errors.UnsupportedGradientError, match="SparseAdam does not support dense gradients, please"):
            worker.push({"emb": np.ones((5, 2), np.float32)})
        worker.push({"emb": SparseGradient([1], np.ones((1, 2)))})
        assert job.info().position.step == 1


@pytest.mark.parametrize("rule", [{"clip_grad_norm": 0.5}, {"clip_grad_value": 0.25}])
@pytest.mark.parametrize("case", CASES)
def test_rows_are_clipped_as_torch_clips_them(server: Server, case: str, rule: dict[str, float]) -> None:
    """torch's own clip functions take no sparse gradients of every kind: here they clip the coalesced values."""
    optimizer, options = CASES[case]
    first = {"emb": start(optimizer, "float64")["emb"]}
    job = server.create_job("j", first, optimizer=optimizer, **options, **rule)
    parameter = torch.nn.Parameter(torch.from_numpy(first["emb"].copy()))
    stock = getattr(torch.optim, optimizer)([parameter], **options)
    with job.join() as worker:
        for number in range(10):
            ids, values = rows("float64", "emb", 0, number)
            found = worker.push_pull({"emb": SparseGradient(ids, values)})
            given = mean_of_rows("emb", "float64", 1, number)
            carrier = torch.nn.Parameter(torch.zeros_like(given.values()))
            carrier.grad = given.values().clone()
            if "clip_grad_norm" in rule:
                norm = torch.nn.utils.clip_grad_norm_([carrier], rule["clip_grad_norm"])
                assert worker.last_step is not None
                assert worker.last_step.grad_norm == pytest.approx(float(norm), rel=1e-12)
            else:
                torch.nn.utils.clip_grad_value_([carrier], rule["clip_grad_value"])
            parameter.grad = torch.sparse_coo_tensor(
                given.indices(), carrier.grad, given.shape, is_coalesced=True, check_invariants=True
            )
            with torch.sparse.check_sparse_tensor_invariants(enable=True):
                stock.step()
            np.testing.assert_allclose(found["emb"], parameter.detach().numpy(), rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("case", CASES)
def test_rows_are_accumulated_as_torch_accumulates_them(server: Server, case: str) -> None:
    """The union of the rounds' rows, in one step; rounds in which a parameter has none count as zeros."""
    optimizer, options = CASES[case]
    first = {"emb": start(optimizer, "float64")["emb"]}
    job = server.create_job("j", first, optimizer=optimizer, accumulation=3, **options)
    parameter = torch.nn.Parameter(torch.from_numpy(first["emb"].copy()))
    stock = getattr(torch.optim, optimizer)([parameter], **options)
    with job.join() as worker:
        for number in range(15):
            given = {} if number % 3 == 1 else {"emb": SparseGradient(*rows("float64", "emb", 0, number))}
            found = worker.push_pull(given)
            if given:
                add = mean_of_rows("emb", "float64", 1, number) / 3
                parameter.grad = add if parameter.grad is None else parameter.grad + add
            if number % 3 == 2:
                with torch.sparse.check_sparse_tensor_invariants(enable=True):
                    stock.step()
                stock.zero_grad()
            np.testing.assert_allclose(found["emb"], parameter.detach().numpy(), rtol=1e-7, atol=1e-9)


def test_a_window_of_rows_takes_no_dense_gradient(server: Server) -> None:
    first = {"emb": np.ones((5, 2), np.float32)}
    job = server.create_job("j", first, optimizer="sgd", accumulation=2)
    with job.join() as worker:
        worker.push({"emb": SparseGradient([1], np.ones((1, 2)))})
        with pytest.raises(errors.RanksDisagreeError, match="'emb' is dense in this round and sparse in the 1 before"):
            worker.push({"emb": np.ones((5, 2), np.float32)})
        assert job.pull()["emb"].tobytes() == first["emb"].tobytes()
        worker.push({"emb": SparseGradient([2], np.ones((1, 2)))})
        assert job.info().position.step == 1
    np.testing.assert_allclose(job.pull()["emb"][:, 0], [1, 0.9995, 0.9995, 1, 1], rtol=1e-6)


def test_sparse_adam_continues_from_torch_and_torch_from_it(server: Server) -> None:
    """torch counts its steps in an int: a tensor in its place would give the correction of its bias float32's precision."""
    optimizer, options = CASES["SparseAdam"]
    first = start(optimizer, "float64")

    def stock(values: dict[str, np.ndarray]) -> Any:
        parameters = {name: torch.nn.Parameter(torch.from_numpy(value.copy())) for name, value in values.items()}
        return parameters, torch.optim.SparseAdam(parameters.values(), **options)

    def go_on(parameters: Any, adam: Any, numbers: range) -> None:
        for number in numbers:
            for name, parameter in parameters.items():
                parameter.grad = mean_of_rows(name, "float64", 1, number)
            with torch.sparse.check_sparse_tensor_invariants(enable=True):
                adam.step()

    parameters, adam = stock(first)
    go_on(parameters, adam, range(5))
    values = {name: parameter.detach().numpy() for name, parameter in parameters.items()}
    job = server.create_job("j", values, optimizer=optimizer, **options)
    job.load_state_dict(adam.state_dict())
    with job.join() as worker:
        for number in range(5, 10):
            worker.push(pushed(optimizer, "float64", 0, number))
    go_on(parameters, adam, range(5, 10))
    found = job.pull()
    for name, parameter in parameters.items():
        np.testing.assert_allclose(found[name], parameter.detach().numpy(), rtol=1e-7, atol=1e-9)
    ours, theirs = job.state_dict()["state"], adam.state_dict()["state"]
    assert [list(entry) for entry in ours.values()] == [list(entry) for entry in theirs.values()]
    assert [(type(entry["step"]), entry["step"]) for entry in ours.values()] == [(int, 10), (int, 10)]
    again, other = stock(found)
    other.load_state_dict(
        {
            "state": {
                key: {slot: value if slot == "step" else torch.as_tensor(value) for slot, value in entry.items()}
                for key, entry in ours.items()
            },
            "param_groups": job.state_dict()["param_groups"],
        }
    )
    go_on(again, other, range(10, 15))
    go_on(parameters, adam, range(10, 15))
    for name, parameter in parameters.items():
        np.testing.assert_allclose(again[name].detach().numpy(), parameter.detach().numpy(), rtol=1e-13, atol=1e-13)

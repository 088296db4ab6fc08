"""All between backward and step in one job: rows, clipping, accumulation, a loss scale, skipped rounds, edits, dtypes."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
import pytest

torch = pytest.importorskip("torch")
import whole_steps as whole  # noqa: E402

from optserve.client import Job, Server, SparseGradient  # noqa: E402

K, ROUNDS = 3, 156
BOUND, SCALE = 3.0, 256.0
SKIPPED = {5: 0, 40: 1, 41: 0}
"""In these rounds this rank, modulo the workers, has found Inf."""
EDITED = {7: 0.05, 61: 0.2}
"""Before these rounds the ranks change lr: in the middle of a window."""
TABLE = (300, 5)

Arrays = dict[str, np.ndarray]


def start(dtype: str) -> Arrays:
    """A table of rows, a dense matrix, complex numbers, and 16 bits."""
    random = np.random.default_rng(3)
    pair = random.normal(size=(4, 3)) + 1j * random.normal(size=(4, 3))
    return {
        "emb": random.normal(size=TABLE).astype(dtype),
        "w": random.normal(size=(9, 7)).astype(dtype),
        "z": pair.astype("complex64" if dtype == "float32" else "complex128"),
        "h": random.normal(size=(6,)).astype(ml_dtypes.bfloat16),
    }


def rows(dtype: str, rank: int, number: int) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng([rank, number])
    count = int(random.integers(0, 40))
    return random.integers(0, TABLE[0], count), random.normal(size=(count, TABLE[1])).astype(dtype)


def gradients(dtype: str, rank: int, number: int) -> Arrays:
    """Of the dense ones; `w` has none now and then, and `h` comes in another dtype than the parameter has."""
    random = np.random.default_rng([rank, number, 5])
    found: Arrays = {"z": (random.normal(size=(4, 3)) + 1j * random.normal(size=(4, 3))).astype(start(dtype)["z"].dtype)}
    found["h"] = random.normal(size=6).astype(np.float32)
    if (rank + number) % 5:
        found["w"] = random.normal(size=(9, 7)).astype(dtype)
    return found


def train(job: Job, dtype: str, workers: int, side_by_side: Any) -> tuple[list[Arrays], list[Any]]:
    """Rank 0's weights and steps."""
    found: list[Arrays] = []
    steps: list[Any] = []
    ready = threading.Barrier(workers)

    def works(rank: int) -> Callable[[], None]:
        def work() -> None:
            with job.join(rank=rank) as worker:
                ready.wait(30)
                for number in range(ROUNDS):
                    if number in EDITED:
                        worker.update_group(0, lr=EDITED[number])
                    given: Any = {
                        name: value * value.dtype.type(SCALE) for name, value in gradients(dtype, rank, number).items()
                    }
                    ids, values = rows(dtype, rank, number)
                    given["emb"] = SparseGradient(ids, values * values.dtype.type(SCALE))
                    inf = number in SKIPPED and SKIPPED[number] % workers == rank
                    weights = worker.push_pull(
                        None if inf else given, weight=whole.weight(dtype, rank, number), loss_scale=SCALE, found_inf=inf
                    )
                    if rank == 0:
                        found.append({name: value.copy() for name, value in weights.items()})
                        steps.append(worker.last_step)
                ready.wait(30)

        return work

    side_by_side([works(rank) for rank in range(workers)], 120.0)
    return found, steps


class Oracle:
    """torch, alone; sparse gradients are added up and clipped by their coalesced values. The 16 bits are float32 here."""

    def __init__(self, dtype: str, workers: int, optimizer: str, options: dict[str, Any]) -> None:
        self.dtype, self.workers = dtype, workers
        values = {name: value.astype(np.float32) if name == "h" else value for name, value in start(dtype).items()}
        self.parameters = {name: torch.nn.Parameter(torch.from_numpy(value)) for name, value in values.items()}
        self.torch = getattr(torch.optim, optimizer)(self.parameters.values(), foreach=False, **options)
        self.sums: dict[str, Any] = {}

    def add(self, number: int) -> None:
        """One round's weighted mean, as loss / K."""
        weights = [whole.weight(self.dtype, rank, number) for rank in range(self.workers)]
        for rank, weight in enumerate(weights):
            share = weight / sum(weights) / K
            ids, values = rows(self.dtype, rank, number)
            found: dict[str, Any] = {name: share * value for name, value in gradients(self.dtype, rank, number).items()}
            found["emb"] = torch.sparse_coo_tensor(
                torch.from_numpy(ids)[None], torch.from_numpy(share * values), TABLE, check_invariants=True
            )
            for name, value in found.items():
                term = torch.as_tensor(value).to(self.parameters[name].dtype)
                self.sums[name] = self.sums[name] + term if name in self.sums else term

    def step(self) -> float:
        """The norm."""
        self.sums["emb"] = self.sums["emb"].coalesce()
        parts = [value.values() if value.is_sparse else value for value in self.sums.values()]
        norm = float(sum((part.abs().to(torch.float64) ** 2).sum() for part in parts)) ** 0.5
        factor = min(1.0, BOUND / (norm + 1e-6))
        for name, parameter in self.parameters.items():
            parameter.grad = self.sums[name] * factor if name in self.sums else None
        with torch.sparse.check_sparse_tensor_invariants(enable=True):
            self.torch.step()
        self.sums = {}
        return norm


@pytest.mark.parametrize("workers", [1, 2, 4])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize(("optimizer", "options"), [("SGD", {"lr": 0.1}), ("Adagrad", {"lr": 0.1, "lr_decay": 0.01})])
def test_fifty_steps_of_all_together_equal_torch(
    client: Server, side_by_side: Any, optimizer: str, options: dict[str, Any], dtype: str, workers: int
) -> None:
    job = client.create_job(
        "j", start(dtype), optimizer=optimizer, workers=workers, clip_grad_norm=BOUND, accumulation=K, **options
    )
    found, steps = train(job, dtype, workers, side_by_side)
    oracle, clipped, taken = Oracle(dtype, workers, optimizer, options), set(), 0
    for number in range(ROUNDS):
        if number in EDITED:
            oracle.torch.param_groups[0]["lr"] = EDITED[number]
        assert steps[number].skipped == (number in SKIPPED)
        if number in SKIPPED:
            continue
        oracle.add(number)
        taken += 1
        assert (steps[number].step, steps[number].accumulated) == (taken // K, taken % K)
        if taken % K:
            continue
        norm = oracle.step()
        assert steps[number].grad_norm == pytest.approx(norm, rel=1e-5 if dtype == "float32" else 1e-7)
        clipped.add(norm > BOUND)
        for name, parameter in oracle.parameters.items():
            expected, value = parameter.detach().numpy(), found[number][name]
            if name == "h":
                half = float(ml_dtypes.finfo(ml_dtypes.bfloat16).eps)
                np.testing.assert_allclose(value.astype(np.float32), expected, rtol=half, atol=1e-5, err_msg=name)
            else:
                np.testing.assert_allclose(value, expected, **whole.TOLERANCES[dtype], err_msg=f"{name}, round {number}")
    assert job.position().step == 51
    assert True in clipped


def test_two_runs_of_all_together_give_the_same_bits(client: Server, side_by_side: Any, same: Callable[..., None]) -> None:
    found = []
    for name in ("one", "two"):
        job = client.create_job(
            name, start("float32"), optimizer="adagrad", lr=0.1, workers=4, clip_grad_norm=BOUND, accumulation=K
        )
        found.append((train(job, "float32", 4, side_by_side)[0][-1], job.state_dict()["state"]))
    same(found[0][0], found[1][0])
    for key, entry in found[0][1].items():
        same(entry, found[1][1][key])

"""What the end-to-end tests share: models, gradients, and a whole comparison of a job."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from optserve.client import Job, Server, Worker, errors

SHAPES: Mapping[str, tuple[int, ...]] = {"embedding": (700, 1000), "w": (33, 7), "b": (7,), "s": (), "none": (0, 3)}


class Model:
    """Deterministic parameters and gradients of the shapes that matter: several chunks, a scalar, nothing, several dtypes."""

    def __init__(self, dtypes: Mapping[str, Any] | None = None, shapes: Mapping[str, tuple[int, ...]] = SHAPES) -> None:
        self.dtypes = {name: np.dtype((dtypes or {}).get(name, np.float32)) for name in shapes}
        self.shapes = dict(shapes)

    def draw(self, *seed: int) -> dict[str, Any]:
        bits = np.random.default_rng(seed)

        def one(name: str, shape: tuple[int, ...]) -> Any:
            real = bits.normal(size=shape)
            turned = real + 1j * bits.normal(size=shape) if self.dtypes[name].kind == "c" else real
            return turned.astype(self.dtypes[name])

        return {name: one(name, shape) for name, shape in self.shapes.items()}

    def groups(self, **second: Any) -> list[dict[str, Any]]:
        """Two groups: the first half of the parameters, and the others with hyperparameters of their own."""
        values, names = self.draw(0), list(self.shapes)
        half = len(names) // 2
        return [
            {"params": {name: values[name] for name in names[:half]}},
            {"params": {name: values[name] for name in names[half:]}, **second},
        ]


@pytest.fixture
def model() -> Model:
    """float32, of three megabytes."""
    return Model()


@pytest.fixture
def small() -> Model:
    """One small group."""
    return Model(shapes={"w": (3, 4), "b": (4,)})


@pytest.fixture
def mixed() -> Model:
    """All six dtypes."""
    real = {"w": ml_dtypes.bfloat16, "b": np.float64, "s": np.float16, "embedding": ml_dtypes.bfloat16}
    return Model(real | {"z": np.complex64, "zz": np.complex128}, {**SHAPES, "z": (300, 500), "zz": (2, 3)})


def _plain(entry: Any) -> Any:
    if isinstance(entry, np.ndarray):
        return entry.dtype.name, entry.shape, entry.tobytes()
    if isinstance(entry, Mapping):
        return {key: _plain(item) for key, item in entry.items()}
    if isinstance(entry, list | tuple):
        return [_plain(item) for item in entry]
    return entry


@pytest.fixture(scope="session")
def snapshot() -> Callable[[Job], dict[str, Any]]:
    """Everything of a job that a user can see, comparable by ==."""

    def take(job: Job) -> dict[str, Any]:
        info = job.info()
        return {
            "position": info.position,
            "groups": [dict(group) for group in job.param_groups],
            "schedule": job.lr_schedule,
            "weights": _plain(job.pull()),
            "state": _plain(job.state_dict()),
            "members": [(member.name, member.rank, member.epoch) for member in info.members],
            "checkpoints": job.checkpoints(),
        }

    return take


@pytest.fixture
def side_by_side() -> Callable[..., list[Any]]:
    """side_by_side([work, ...]) -> their results, each in a thread; the first error is raised."""

    def run(works: Sequence[Callable[[], Any]], seconds: float = 60.0) -> list[Any]:
        results: list[Any] = [None] * len(works)
        failures: list[BaseException] = []

        def one(index: int) -> None:
            try:
                results[index] = works[index]()
            except BaseException as error:
                failures.append(error)

        threads = [threading.Thread(target=one, args=(index,), daemon=True) for index in range(len(works))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(seconds)
        if failures:
            raise failures[0]
        assert not any(thread.is_alive() for thread in threads), "a worker still waits"
        return results

    return run


SMALL = {"w": np.arange(12, dtype=np.float32).reshape(3, 4), "b": np.zeros(4, np.float32)}
"""The parameters of the job that bad input must not change."""


@pytest.fixture
def job(server: Server) -> Job:
    return server.create_job("digits", SMALL, optimizer="adam", lr=0.1)


@pytest.fixture
def worker(job: Job) -> Iterator[Worker]:
    with job.join() as found:
        found.push({name: np.ones_like(value) for name, value in SMALL.items()})
        yield found


@pytest.fixture
def refused(job: Job, snapshot: Callable[[Job], Any]) -> Any:
    """refused(error class, pattern): what happens inside is refused so, and the job is as it was."""

    @contextmanager
    def check(kind: type[Exception], pattern: str) -> Iterator[None]:
        before = snapshot(job)
        with pytest.raises(kind, match=pattern) as caught:
            yield
        assert isinstance(caught.value, errors.OptserveError)
        assert snapshot(job) == before

    return check

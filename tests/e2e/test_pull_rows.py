"""Rows of a parameter pulled without the rest of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from optserve.client import Job, Server, SparseGradient, Worker, errors
from optserve.client import _weights as weights_module
from optserve.server.store import Store
from optserve.wire.chunks import CHUNK_BYTES
from optserve.wire.rows import ROWS_ARRAY_ID

COUNT = 100_000
BITS = np.random.default_rng(0)
SHAPES = {"b": (7,), "emb": (COUNT, 16), "v": (COUNT,), "s": ()}
START = {name: np.asarray(BITS.integers(-999, 999, shape), np.float32) for name, shape in SHAPES.items()}
"""They share one flat array: "emb" begins and ends in the midst of blocks."""

SMALL = np.array([COUNT - 1, 3, 3, 0])
LARGE = BITS.integers(0, COUNT, 30_000)
"""More than a chunk of rows, in any order and with repeats."""

Arrays = dict[str, Any]


@pytest.fixture(params=["sync", "async"])
def job(request: pytest.FixtureRequest, server: Server) -> Job:
    return server.create_job("rows", START, optimizer="sgd", lr=0.5, consistency=request.param)


@pytest.fixture
def received(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """(array, bytes) of every chunk of weights that comes."""
    found: list[tuple[int, int]] = []

    def counted(inner: Callable[..., Iterator[Any]]) -> Callable[..., Iterator[Any]]:
        def chunks(*arguments: Any) -> Iterator[Any]:
            for chunk in inner(*arguments):
                found.append((chunk.array_id, chunk.data.nbytes))
                yield chunk

        return chunks

    monkeypatch.setattr(weights_module, "_followers", counted(weights_module._followers))
    monkeypatch.setattr(weights_module, "from_inline", counted(weights_module.from_inline))
    return found


@pytest.fixture
def no_snapshot(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever copies all parameters of a job fails."""

    def refuse(*_: object) -> None:
        raise AssertionError("a whole snapshot was taken")

    monkeypatch.setattr(Store, "snapshot", refuse)


def rows_of(values: Arrays, rows: dict[str, Any]) -> Arrays:
    return {name: value[rows[name]] if name in rows else value for name, value in values.items()}


def updated(values: Arrays, ids: Any) -> Arrays:
    """After an SGD step of 0.5 with ones for these rows of "emb" and every element of "b"."""
    found = {name: value.copy() for name, value in values.items()}
    np.subtract.at(found["emb"], ids, np.float32(0.5))
    found["b"] -= np.float32(0.5)
    return found


def gradients_of(ids: Any) -> Arrays:
    return {"emb": SparseGradient(ids, np.ones((len(ids), 16), np.float32)), "b": np.ones(7, np.float32)}


@pytest.mark.parametrize("ids", [SMALL, LARGE, [], [5]], ids=["small", "large", "none", "one"])
def test_a_worker_pulls_rows_and_the_others_whole(job: Job, same: Any, ids: Any) -> None:
    rows = {"emb": np.asarray(ids, np.int64), "v": np.asarray(ids, np.int64)[::-1]}
    with job.join() as worker:
        same(worker.pull(rows=rows), rows_of(START, rows))


@pytest.mark.parametrize("ids", [SMALL, LARGE], ids=["small", "large"])
def test_push_pull_brings_the_rows_after_the_step(job: Job, same: Any, ids: Any) -> None:
    touched = np.unique(ids)
    after = updated(START, touched)
    rows = {"emb": ids}
    with job.join() as worker:
        same(worker.push_pull(gradients_of(touched), rows=rows), rows_of(after, rows))
        out = {"emb": np.zeros((len(ids), 16), np.float32)}
        found = worker.push_pull_async(gradients_of(touched), out=out, rows=rows).result(60)
        assert found is out
        same({name: out[name] for name in START}, rows_of(updated(after, touched), rows))
    same(job.pull(), updated(after, touched))


@pytest.mark.parametrize("ids", [SMALL, LARGE], ids=["small", "large"])
def test_a_job_pulls_rows_with_everything_some_names_or_nothing_else(job: Job, same: Any, ids: Any) -> None:
    rows = {"emb": ids}
    expected = rows_of(START, rows)
    same(job.pull(rows=rows), expected)
    same(job.pull(["s", "b"], rows=rows), {name: expected[name] for name in ("s", "b", "emb")})
    same(job.pull([], rows=rows), {"emb": expected["emb"]})
    same(job.pull(["emb"], rows=rows), {"emb": expected["emb"]})


def test_rows_go_into_the_callers_arrays(job: Job, same: Any) -> None:
    emb = np.zeros((len(SMALL), 16), np.float32)
    out = {"emb": emb}
    with job.join() as worker:
        assert worker.pull(out=out, rows={"emb": SMALL}) is out
        assert out["emb"] is emb
        same({name: out[name] for name in START}, rows_of(START, {"emb": SMALL}))
    assert job.pull([], out={"emb": emb}, rows={"emb": SMALL[::-1]})["emb"] is emb
    np.testing.assert_array_equal(emb, START["emb"][SMALL[::-1]])


@pytest.mark.parametrize("ids", [SMALL, LARGE], ids=["small", "large"])
def test_only_the_rows_and_the_blocks_of_other_parameters_cross_the_wire(
    job: Job, received: list[tuple[int, int]], no_snapshot: None, ids: Any
) -> None:
    nbytes = -(-8 * len(np.unique(ids)) // 64) * 64 + 64 * len(np.unique(ids))
    with job.join() as worker:
        received.clear()
        worker.push_pull({"b": np.ones(7, np.float32)}, rows={"emb": ids, "v": []})
        assert sum(size for array_id, size in received if array_id == ROWS_ARRAY_ID) == nbytes
        assert sum(size for array_id, size in received if array_id == 0) <= 2 * CHUNK_BYTES  # of "b" and "s"
        received.clear()
        job.pull([], rows={"emb": ids})
        assert [array_id for array_id, _ in received] == [ROWS_ARRAY_ID] * len(received)
        assert sum(size for _, size in received) == nbytes


def test_an_embedding_that_is_never_copied_whole_is_stepped_and_pulled_by_rows(
    client: Server, received: list[tuple[int, int]], no_snapshot: None
) -> None:
    start = np.zeros((2_000_000, 8), np.float32)
    job = client.create_job("table", {"emb": start}, optimizer="sparseadam", lr=0.1)
    ids = np.array([1_999_999, 0, 7])
    with job.join() as worker:
        for _ in range(3):
            gradient = SparseGradient(ids, np.ones((3, 8), np.float32))
            found = worker.push_pull({"emb": gradient}, rows={"emb": [7, 8]})["emb"]
    np.testing.assert_allclose(found, np.repeat([[-0.3], [0.0]], 8, axis=1), rtol=1e-6)
    assert sum(size for _, size in received) == 3 * (64 + 64)


@pytest.mark.parametrize(
    ("rows", "error", "message"),
    [
        (
            {"emb": [COUNT]},
            errors.InvalidArgumentError,
            "row 100000 of 'emb' is out of range; the parameter has",
        ),
        ({"emb": [-1]}, errors.InvalidArgumentError, "row -1 of 'emb' is out of range"),
        ({"emb": [0.0]}, errors.InvalidArgumentError, "the rows of 'emb' have dtype float64; they must be integers"),
        ({"emb": [[0]]}, errors.InvalidArgumentError, "they must be one-dimensional"),
        ({"s": [0]}, errors.ShapeMismatchError, "'s' is a scalar and has no rows"),
        ({"nobody": [0]}, errors.UnknownParameterError, "'nobody' is not in the job"),
        ([0], errors.InvalidArgumentError, "rows must be a dict"),
    ],
)
def test_rows_that_there_are_not_are_refused_and_nothing_is_applied(
    job: Job, rows: Any, error: type[Exception], message: str
) -> None:
    with job.join() as worker:
        version = job.position().version
        for call in (
            lambda: worker.pull(rows=rows),
            lambda: worker.push_pull({"b": np.ones(7, np.float32)}, rows=rows),
            lambda: job.pull(rows=rows),
            lambda: job.pull(["b"], rows=rows),
        ):
            with pytest.raises(error, match=message):
                call()
        assert job.position().version == version
        worker.push({"b": np.ones(7, np.float32)})


def ranks(job: Job, count: int) -> list[Worker]:
    return [job.join(rank=rank) for rank in range(count)]


def test_each_rank_pulls_rows_of_its_own(client: Server, side_by_side: Any, same: Any) -> None:
    job = client.create_job("two", START, optimizer="sgd", lr=1.0, workers=2)
    ids = [np.array([1, 5, 9]), LARGE]
    workers = ranks(job, 2)
    after = {name: value.copy() for name, value in START.items()}
    for pushed in ids:
        np.subtract.at(after["emb"], np.unique(pushed), np.float32(0.5))
    after["b"] -= np.float32(1)
    found = side_by_side(
        [
            lambda: workers[0].push_pull(gradients_of(ids[0]), rows={"emb": ids[0]}),
            lambda: workers[1].push_pull(gradients_of(np.unique(ids[1])), rows={"v": ids[1], "emb": ids[1]}),
        ]
    )
    same(found[0], rows_of(after, {"emb": ids[0]}))
    same(found[1], rows_of(after, {"emb": ids[1], "v": ids[1]}))
    for worker in workers:
        worker.leave()


def test_complex_and_16_bit_rows_come_in_their_own_dtype(server: Server, same: Any) -> None:
    start = {
        "z": (BITS.normal(size=(40, 3)) + 1j * BITS.normal(size=(40, 3))).astype(np.complex64),
        "h": BITS.normal(size=(40, 3)).astype(ml_dtypes.bfloat16),
        "d": BITS.normal(size=(40, 3)),
    }
    job = server.create_job("dtypes", start, optimizer="sgd", lr=0.5)
    rows = {"z": [39, 1, 39], "h": [2, 0], "d": [7]}
    with job.join() as worker:
        same(worker.pull(rows=rows), rows_of(start, rows))
    same(job.pull([], rows=rows), rows_of(start, rows))


def test_a_layout_that_grew_is_learnt_and_the_rows_come(client: Server, same: Any) -> None:
    job = client.create_job("grows", START, optimizer="sgd", lr=0.5)
    other = client.job("grows")
    with job.join() as worker:
        job.add_param_group({"params": {"late": np.ones((9, 2), np.float32)}})
        rows = {"emb": SMALL, "late": [8]}
        expected = rows_of({**START, "late": np.ones((9, 2), np.float32)}, rows)
        same(worker.pull(rows=rows), expected)
        same(other.pull(rows=rows), expected)


def test_rows_are_those_of_the_names_though_another_client_moved_the_parameters(server: Server, same: Any) -> None:
    job = server.create_job("edited", START, optimizer="sgd", lr=0.5)
    other = server.job("edited")
    rows = {"emb": SMALL, "v": SMALL}
    with job.join() as worker:
        same(worker.pull(rows=rows), rows_of(START, rows))
        other.remove_parameter("b")  # "emb" and "v" have other indices now
        left = {name: START[name] for name in ("emb", "v", "s")}
        same(worker.pull(rows=rows), rows_of(left, rows))
        same(job.pull([], rows=rows), rows_of({name: START[name] for name in rows}, rows))
        other.rename_parameter("v", "w")
        with pytest.raises(errors.UnknownParameterError, match="'v'"):
            worker.pull(rows=rows)
        with pytest.raises(errors.UnknownParameterError, match="'v'"):
            job.pull(rows=rows)
        renamed = {"w" if name == "v" else name: value for name, value in left.items()}
        moved = {"w": SMALL, "emb": SMALL}
        same(job.pull(rows=moved), rows_of(renamed, moved))
        pushed = {"w": np.zeros(COUNT, np.float32)}
        same(worker.push_pull(pushed, rows=moved), rows_of(renamed, moved))


def test_rows_of_a_table_that_another_client_made_larger_or_smaller(server: Server) -> None:
    job = server.create_job("grown", {"emb": np.zeros((4, 2), np.float32)}, optimizer="sgd", lr=1.0)
    other = server.job("grown")
    with job.join() as worker:
        other.replace_parameter("emb", np.ones((6, 2), np.float32))
        gradient = SparseGradient([5], np.ones((1, 2), np.float32))
        assert worker.push_pull({"emb": gradient}, rows={"emb": [5, 0]})["emb"].tolist() == [[0, 0], [1, 1]]
        assert job.pull(rows={"emb": [5]})["emb"].tolist() == [[0, 0]]
        other.replace_parameter("emb", np.ones((2, 2), np.float32))
        for call in (
            lambda: worker.pull(rows={"emb": [3]}),
            lambda: job.pull(rows={"emb": [3]}),
            lambda: worker.push({"emb": SparseGradient([3], np.ones((1, 2), np.float32))}),
        ):
            with pytest.raises(errors.InvalidArgumentError, match="row 3 of 'emb' is out of range; the parameter has 2 rows"):
                call()
        assert worker.pull(rows={"emb": [1]})["emb"].tolist() == [[1, 1]]

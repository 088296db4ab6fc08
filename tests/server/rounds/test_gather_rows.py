"""Sparse gradients from the push's head to the round's sum."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from every_backend import NUMBA

from optserve.server.rounds.tickets import Done, Resend
from optserve.v1 import data_pb2, jobs_pb2, types_pb2
from optserve.wire import dtypes, errors, rows
from optserve.wire.chunks import Chunk
from optserve.wire.rows import Rows

House = Any
Build = Callable[..., House]
Sparse = Mapping[str, tuple[Any, Any]]
"""Row numbers and values by name."""

F16, BF16, F32, F64 = (np.dtype(kind) for kind in (np.float16, ml_dtypes.bfloat16, np.float32, np.float64))
SHAPES = {"emb": (40_000, 16), "head": (33,), "tail": (20, 3)}
MIB = 1 << 20


def zeros(dtype: Any = F32) -> dict[str, Any]:
    return {name: np.zeros(shape, dtype) for name, shape in SHAPES.items()}


class Kept:
    """Records the aggregates of decided rounds, in place of a journal."""

    def __init__(self) -> None:
        self.records: list[Any] = []

    def append(self, record: Any) -> None:
        if hasattr(record, "gradients"):
            dense = {key: flat.copy() for key, flat in record.gradients.dense.items()}
            self.records.append((record.decision, dense, dict(record.gradients.sparse)))


def part(name: str, count: int, seed: int, dtype: Any = F32, among: int | None = None) -> tuple[Any, Any]:
    noise = np.random.default_rng(seed)
    shape = SHAPES[name]
    ids = noise.integers(0, among or shape[0], count)
    return ids, noise.normal(size=(count, *shape[1:])).astype(dtype)


def head(rank: Any, sparse: Sparse) -> tuple[types_pb2.RowsEntry, ...]:
    layout = rank.running.job.store.layout
    return tuple(
        types_pb2.RowsEntry(parameter=layout.place(name).index, count=len(ids), dtype=dtypes.to_wire(values.dtype))
        for name, (ids, values) in sparse.items()
    )


def bundle(sparse: Sparse) -> list[Chunk]:
    return list(rows.chunks([Rows(np.asarray(ids), values) for ids, values in sparse.values()]))


def begun(rank: Any, dense: Mapping[str, Any], sparse: Sparse, **more: Any) -> Any:
    return rank.begin(rank.push({**dense, **sparse}, sparse=head(rank, sparse), **more))


def sent(rank: Any, dense: Mapping[str, Any], sparse: Sparse, **more: Any) -> Any:
    """A whole push, sent again for as long as it must be."""
    while True:
        ticket = begun(rank, dense, sparse, **more)
        rank.offer(ticket, *rank.chunks(dense), *bundle(sparse))
        if not isinstance(outcome := rank.finish(ticket), Resend):
            return outcome


def offered(rank: Any, push: Any, *chunks: Chunk) -> None:
    """A push as a stream's handler takes it: what is raised drops it."""
    ticket = rank.begin(push)
    try:
        rank.offer(ticket, *chunks)
        rank.finish(ticket)
    except BaseException:
        rank.running.pushes.abandon(ticket)
        raise


def expected(parts: list[tuple[Any, Any]], weights: list[float], dtype: Any) -> dict[int, Any]:
    """Σ (w/w₀)·rows in rank order, row by row in plain loops; repeats are summed within a rank first."""
    state = dtypes.state_dtype(dtype)
    base = next(weight for weight in weights if weight)
    total: dict[int, Any] = {}
    for (ids, values), weight in zip(parts, weights, strict=True):
        own: dict[int, Any] = {}
        for row, value in zip(np.asarray(ids).tolist(), values.astype(state), strict=True):
            own[row] = own[row] + value if row in own else value
        if weight:
            for row, value in own.items():
                term = value if weight == base else value * state.type(weight / base)
                total[row] = total[row] + term if row in total else term
    return total


def shuffled_round(ranks: list[Any], contents: list[Any], order: random.Random) -> None:
    """Dense gradients, rows and weight of each rank; the chunks of all of them come in a random order."""
    tickets, queue = {}, []
    for at in order.sample(range(len(ranks)), len(ranks)):
        dense, sparse, weight = contents[at]
        tickets[at] = begun(ranks[at], dense, sparse, weight=weight)
        queue += [(at, chunk) for chunk in (*ranks[at].chunks(dense), *bundle(sparse))]
    order.shuffle(queue)
    for at, chunk in queue:
        ranks[at].offer(tickets[at], chunk)
    waiting = [ranks[at].in_thread(lambda at=at: ranks[at].finish(tickets[at])) for at in tickets]
    assert all(isinstance(future.result(20), Done) for future in waiting)


@pytest.mark.parametrize("backend", ["numpy", NUMBA])
@pytest.mark.parametrize("weights", [[1.0, 1.0, 1.0], [0.0, 3.0, 7.0], [5.0, 0.0, 1.0]], ids=str)
@pytest.mark.parametrize(("parameters", "kinds"), [(F32, [F32] * 3), (F64, [F32, F64, F16]), (BF16, [F32, BF16, F16])], ids=str)
def test_the_rows_are_the_definition_whatever_comes_first(
    house: Build, backend: str, parameters: Any, kinds: list[Any], weights: list[float]
) -> None:
    """Repeats, other rows and another dtype on each rank; with a dense gradient beside them in the same flat array."""
    parts = [part("emb", 3000, rank, kind, among=4000) for rank, kind in enumerate(kinds)]
    dense = [{"head": np.full(33, rank + 0.5, parameters)} for rank in range(3)]
    seen = set()
    for trial in range(3):
        order = random.Random(trial)
        running = house(zeros(parameters), backend, workers=3)
        running.running.host.journal = journal = Kept()
        ranks = [running.join(rank=rank) for rank in range(3)]
        shuffled_round(ranks, [(dense[at], {"emb": parts[at]}, weights[at]) for at in range(3)], order)
        [(decision, flats, sparse)] = journal.records
        definition = expected(parts, weights, parameters)
        [(index, found)] = sparse.items()
        assert (index, found.values.dtype) == (0, dtypes.state_dtype(parameters))
        assert found.ids.tolist() == sorted(definition)
        np.testing.assert_array_equal(found.values, np.array([definition[row] for row in found.ids.tolist()]))
        total = sum(float((value.astype(np.float64) ** 2).sum()) for value in definition.values())
        total += float((running.running.job.store.layout.views(flats, ["head"])["head"].astype(np.float64) ** 2).sum())
        assert decision.grad_norm == pytest.approx(np.sqrt(total) * decision.scale, rel=1e-12)
        assert decision.absent == frozenset([2])
        seen.add((decision.scale, decision.grad_norm, found.values.tobytes()))
    assert len(seen) == 1


def test_the_applied_step_is_the_weighted_mean_of_the_rows(house: Build) -> None:
    running = house(zeros(), workers=2)
    first, second = running.join(rank=0), running.join(rank=1)
    waiting = first.in_thread(lambda: sent(first, {}, {"tail": ([3, 3], np.ones((2, 3), F32))}, weight=1.0))
    outcome = sent(second, {}, {"tail": ([5, 3], np.full((2, 3), 4.0, F32))}, weight=3.0)
    assert isinstance(waiting.result(20), Done)
    assert outcome.result.value["grad_norm"] == pytest.approx(np.sqrt(3 * (3.5**2 + 3.0**2)))
    changed = running.values()["tail"]
    np.testing.assert_array_equal(changed[[3, 5]], [[-3.5] * 3, [-3.0] * 3])
    assert not np.delete(changed, [3, 5], axis=0).any()


def test_no_dense_array_is_made_for_a_job_whose_gradients_are_sparse(house: Build) -> None:
    running = house({"emb": np.zeros((50, 4), F32)})
    store = running.running.job.store
    rank = running.join()
    for _ in range(2):
        assert isinstance(sent(rank, {}, {"emb": ([7], np.ones((1, 4), F32))}), Done)
    assert not running.running.pushes._round._accumulators
    np.testing.assert_array_equal(store.snapshot()[0].reshape(-1)[28:32], [-2.0] * 4)


def test_rows_of_no_rank_count_as_a_gradient_that_is_zero(house: Build) -> None:
    running = house(zeros())
    running.running.host.journal = journal = Kept()
    rank = running.join()
    outcome = sent(rank, {}, {"tail": (np.zeros(0, np.int64), np.zeros((0, 3), F32))})
    assert outcome.result.position.step == 1
    [(decision, dense, sparse)] = journal.records
    assert (decision.absent, decision.grad_norm, dense) == (frozenset([0, 1]), 0.0, {})
    assert sparse[2].values.shape == (0, 3)


def test_a_rank_that_has_sent_rows_alone_falls_out_without_a_trace(house: Build) -> None:
    running = house(zeros(), workers=2)
    first, second = running.join(rank=0), running.join(rank=1)
    broken = begun(first, {}, {"tail": part("tail", 5, 0)}, weight=7.0)
    first.offer(broken, *bundle({"tail": part("tail", 5, 0)}))
    whole = begun(second, {}, {"tail": ([2], np.ones((1, 3), F32))})
    second.offer(whole, *bundle({"tail": ([2], np.ones((1, 3), F32))}))
    running.running.pushes.abandon(broken)
    done = second.in_thread(lambda: second.finish(whole))
    assert isinstance(sent(first, {}, {"tail": ([2], np.ones((1, 3), F32))}, weight=3.0), Done)
    assert isinstance(done.result(20), Done)
    np.testing.assert_array_equal(running.values()["tail"][2], [-1.0] * 3)


@pytest.mark.parametrize("rank0", ["sparse", "dense"])
def test_sparse_on_one_rank_and_dense_on_another_is_refused_for_both(house: Build, rank0: str) -> None:
    running = house(zeros(), workers=2)
    ranks = [running.join(rank=0), running.join(rank=1)]
    kinds: list[Any] = [({}, {"tail": part("tail", 5, 0)}), ({"tail": np.ones((20, 3), F32)}, {})]
    if rank0 == "dense":
        kinds.reverse()
    waiting = ranks[0].in_thread(lambda: sent(ranks[0], *kinds[0]))
    with pytest.raises(errors.RanksDisagreeError, match=r"sparse on rank . and dense on rank ."):
        sent(ranks[1], *kinds[1])
    with pytest.raises(errors.RanksDisagreeError):
        waiting.result(20)
    assert not running.values()["tail"].any()


GOOD = ([3, 1], np.ones((2, 3), F32))
BAD: dict[str, tuple[Sparse, dict[str, Any], type[errors.OptserveError], str]] = {
    "out of range": ({"tail": ([0, 20], np.ones((2, 3), F32))}, {}, errors.InvalidArgumentError, "row 20 of 'tail'"),
    "negative": ({"tail": ([-1], np.ones((1, 3), F32))}, {}, errors.InvalidArgumentError, "row -1 of 'tail' is out of range"),
    "NaN": ({"tail": ([1], np.full((1, 3), np.nan, F32))}, {}, errors.NonfiniteGradientError, "rank 0 .* in 'tail'"),
    "Inf of 16 bits": ({"tail": ([1], np.full((1, 3), np.inf, F16))}, {}, errors.NonfiniteGradientError, "in 'tail'"),
    "too wide": ({"tail": ([1], np.ones((1, 3), F64))}, {}, errors.DtypeMismatchError, "float64; .* real, of 4 bytes at most"),
    "complex": ({"tail": ([1], np.ones((1, 3), np.complex64))}, {}, errors.DtypeMismatchError, "complex64; .* must be real"),
    "absent too": (
        {"tail": GOOD},
        {"absent": frozenset([2])},
        errors.InvalidArgumentError,
        "'tail' is announced as absent and",
    ),
    "not announced": ({"tail": GOOD}, {"parameter_count": 2}, errors.UnknownParameterError, "only 2 are announced"),
}


@pytest.mark.parametrize("case", BAD, ids=str)
def test_bad_rows_are_refused_and_change_nothing(house: Build, case: str) -> None:
    sparse, more, error, message = BAD[case]
    running = house(zeros())
    rank = running.join()
    push = replace(rank.push({"tail": 0}, sparse=head(rank, sparse)), **more)
    with pytest.raises(error, match=message):
        offered(rank, push, *bundle(sparse))
    assert running.running.job.position.step == 0
    assert not running.values()["tail"].any()
    assert isinstance(sent(rank, {}, {"tail": GOOD}), Done)


def test_a_parameter_that_is_listed_twice_and_one_without_rows_are_refused(house: Build) -> None:
    running = house({"w": np.zeros((4, 2), F32), "s": np.zeros((), F32)})
    rank = running.join()
    twice = (types_pb2.RowsEntry(parameter=0, count=1, dtype=types_pb2.DATA_TYPE_FLOAT32),) * 2
    with pytest.raises(errors.InvalidArgumentError, match="'w' came twice"):
        rank.begin(rank.push({"w": 0}, sparse=twice))
    scalar = (types_pb2.RowsEntry(parameter=1, count=1, dtype=types_pb2.DATA_TYPE_FLOAT32),)
    with pytest.raises(errors.ShapeMismatchError, match="'s' is a scalar"):
        rank.begin(rank.push({"s": 0}, sparse=scalar))
    with pytest.raises(errors.DtypeMismatchError, match="unknown data type"):
        rank.begin(rank.push({"w": 0}, sparse=(types_pb2.RowsEntry(parameter=0, count=1),)))


@pytest.mark.parametrize("count", [30_000_000, 1 << 60], ids=str)
def test_a_bundle_far_larger_than_its_parameter_is_refused_before_there_is_memory_for_it(house: Build, count: int) -> None:
    running = house(zeros())
    rank = running.join()
    huge = (types_pb2.RowsEntry(parameter=2, count=count, dtype=types_pb2.DATA_TYPE_FLOAT32),)
    with pytest.raises(errors.InvalidArgumentError, match=r"'tail' are announced with \d+ bytes; at most 1050176 are taken"):
        rank.begin(rank.push({"tail": 0}, sparse=huge))


CHUNKS: dict[str, tuple[Callable[[list[Chunk]], list[Chunk]], type[Exception], str]] = {
    "truncated": (lambda found: found[:1], errors.IncompleteStreamError, "1 of 2 chunks missing"),
    "none": (lambda _: [], errors.IncompleteStreamError, "2 of 2 chunks missing"),
    "repeated": (lambda found: [found[0], found[0]], errors.InvalidChunkError, "came twice"),
    "after the last": (lambda found: [*found, found[0]], errors.InvalidChunkError, "all rows have come"),
    "between": (lambda found: [found[0]._replace(offset=64)], errors.InvalidChunkError, "no block of the bundle"),
    "short": (lambda found: [found[0]._replace(data=found[0].data[:-64])], errors.InvalidChunkError, "no block of the bundle"),
    "dense": (lambda found: [found[0]._replace(array_id=0)], errors.InvalidChunkError, "array 0, which the push does not ann"),
    "another array": (lambda found: [found[0]._replace(array_id=9)], errors.InvalidChunkError, "array 9"),
}


@pytest.mark.parametrize("case", CHUNKS, ids=str)
def test_chunks_that_are_not_the_bundle_are_refused(house: Build, case: str) -> None:
    spoil, error, message = CHUNKS[case]
    running = house(zeros())
    rank = running.join()
    sparse = {"emb": part("emb", 20_000, 0)}
    with pytest.raises(error, match=message):
        offered(rank, rank.push(sparse, sparse=head(rank, sparse)), *spoil(bundle(sparse)))
    assert running.running.job.position.step == 0
    assert isinstance(sent(rank, {}, sparse), Done)


def test_a_chunk_of_rows_in_a_push_without_any_is_refused(house: Build) -> None:
    running = house(zeros())
    rank = running.join()
    with pytest.raises(errors.InvalidChunkError, match=f"array {rows.ROWS_ARRAY_ID}, which the push does not announce"):
        offered(rank, rank.push({"head": np.ones(33, F32)}), *bundle({"tail": GOOD}))


@pytest.mark.parametrize(("policy", "scale"), [("SKIP", None), ("REJECT", 8.0), ("SKIP", 8.0)])
def test_nonfinite_rows_skip_the_step_by_policy_or_with_a_loss_scale(house: Build, policy: str, scale: float | None) -> None:
    running = house(zeros(), workers=2, on_nonfinite=getattr(jobs_pb2, f"ON_NONFINITE_{policy}"))
    first, second = running.join(rank=0), running.join(rank=1)
    waiting = first.in_thread(lambda: sent(first, {"head": np.ones(33, F32)}, {"tail": GOOD}, loss_scale=scale))
    bad = {"tail": ([0], np.array([[1.0, np.nan, 1.0]], F32))}
    outcome = sent(second, {"head": np.ones(33, F32)}, bad, loss_scale=scale)
    assert outcome.result.value["skip_reason"] == waiting.result(20).result.value["skip_reason"] == "nonfinite"
    assert outcome.result.position.step == 0
    assert not any(value.any() for value in running.values().values())


def test_a_push_of_weight_zero_brings_rows_that_do_not_count(house: Build) -> None:
    running = house(zeros(), workers=2)
    first, second = running.join(rank=0), running.join(rank=1)
    bad = {"tail": ([4], np.full((1, 3), np.nan, F32))}
    waiting = first.in_thread(lambda: sent(first, {}, bad, weight=0.0))
    assert sent(second, {}, {"tail": GOOD}, weight=2.0).result.value["ranks"] == [1]
    assert isinstance(waiting.result(20), Done)
    np.testing.assert_array_equal(np.flatnonzero(running.values()["tail"].any(axis=1)), [1, 3])


TORCH: dict[str, tuple[str, dict[str, Any], bool, str]] = {
    "adam": (
        "adam",
        {},
        True,
        "gradient 'tail': Adam does not support sparse gradients, please consider SparseAdam instead",
    ),
    "sgd decays": (
        "sgd",
        {"weight_decay": 0.1},
        True,
        r"gradient 'tail': add\(sparse, dense\) is not supported. Use add\(dense, sparse\) instead.",
    ),
    "adagrad decays": (
        "adagrad",
        {"weight_decay": 0.1},
        True,
        "gradient 'tail': weight_decay option is not compatible with sparse gradients",
    ),
    "sparse adam": ("sparseadam", {}, False, "gradient 'head': SparseAdam does not support dense gradients"),
}


@pytest.mark.parametrize("case", TORCH, ids=str)
def test_a_kind_of_gradient_that_the_optimizer_does_not_take_is_refused_at_the_begin(house: Build, case: str) -> None:
    optimizer, settings, is_sparse, message = TORCH[case]
    running = house(zeros(), optimizer=optimizer, defaults={"lr": 0.1, **settings})
    rank = running.join()
    dense = {} if is_sparse else {"head": np.ones(33, F32)}
    with pytest.raises(errors.UnsupportedGradientError, match=message):
        begun(rank, dense, {"tail": GOOD})
    assert running.running.pushes._round.gather is None
    assert running.running.job.position.step == 0


def test_the_changes_of_the_push_decide_whether_sparse_gradients_go(house: Build) -> None:
    running = house(zeros(), optimizer="sgd", defaults={"lr": 1.0})
    rank = running.join()
    with pytest.raises(errors.UnsupportedGradientError, match="'tail'"):
        begun(rank, {}, {"tail": GOOD}, changes={0: {"weight_decay": 0.5}})
    assert isinstance(sent(rank, {}, {"tail": GOOD}), Done)


def test_what_a_push_without_a_gradient_says_of_rows_is_not_looked_at(house: Build) -> None:
    running = house(zeros(), workers=2)
    first, second = running.join(rank=0), running.join(rank=1)
    waiting = first.in_thread(lambda: first.send({}, kind=data_pb2.CONTRIBUTION_SKIP, weight=0.0))
    assert isinstance(sent(second, {}, {"tail": GOOD}), Done)
    assert isinstance(waiting.result(20), Done)

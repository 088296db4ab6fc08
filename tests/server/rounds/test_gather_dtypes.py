"""Gradients of another dtype than their parameter: the sum is that of the widened ones, bit for bit."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from every_backend import GPU, NUMBA
from host_kernels import needs_compiler

from optserve.server.backends.numpy import NumpyBackend
from optserve.server.rounds.tickets import Done
from optserve.v1 import jobs_pb2
from optserve.wire import dtypes, errors
from optserve.wire.chunks import CHUNK_BYTES, Chunk

House = Any
Build = Callable[..., House]

F16, BF16, F32, F64 = (np.dtype(kind) for kind in (np.float16, ml_dtypes.bfloat16, np.float32, np.float64))
SHAPES = {"big": (700, 1000), "bias": (33,), "scalar": (), "empty": (0, 3), "more": (600_000,)}
"""Five units of 262144 elements, in chunks of 16 bits two and a half."""


class Kept:
    """Records what rounds were decided, in place of a journal."""

    def __init__(self) -> None:
        self.records: list[Any] = []

    def append(self, record: Any) -> None:
        if hasattr(record, "gradients"):
            self.records.append((record.decision, dict(record.gradients.dense)))


def narrow(seed: int, kind: Any, names: Any = SHAPES) -> dict[str, Any]:
    """Gradients of a dtype, with zeros of both signs."""
    noise = np.random.default_rng(seed)
    found = {}
    for name in names:
        values = noise.normal(size=SHAPES[name]) * (noise.random(SHAPES[name]) < 0.7)
        found[name] = np.asarray(np.negative(values) if seed % 2 else values).astype(kind)
    return found


def pushed(
    house: Build, parameters: Any, ranks: list[tuple[Any, dict[str, Any]]], order: random.Random, backend: str = "numpy"
) -> Any:
    """One round, its chunks in a random order; `ranks` are each rank's dtype on the wire and gradients. -> decision, flats."""
    running = house({name: np.zeros(shape, parameters) for name, shape in SHAPES.items()}, backend, workers=len(ranks))
    running.running.host.journal = journal = Kept()
    joined = [running.join(rank=rank) for rank in range(len(ranks))]
    queue, tickets = [], {}
    for at in order.sample(range(len(ranks)), len(ranks)):
        kind, gradients = ranks[at]
        tickets[at] = joined[at].begin(joined[at].push(gradients, weight=1.0 + at, dtypes={0: np.dtype(kind)}))
        queue += [(at, chunk) for chunk in joined[at].chunks(gradients, {0: np.dtype(kind)})]
    order.shuffle(queue)
    for at, chunk in queue:
        joined[at].offer(tickets[at], chunk)
    waiting = [joined[at].in_thread(lambda at=at: joined[at].finish(tickets[at])) for at in tickets]
    assert all(isinstance(future.result(20), Done) for future in waiting)
    [(decision, flats)] = journal.records
    flats = {key: running.running.job.store.backend.to_host(flat) for key, flat in flats.items()}
    return decision, running.running.job.store.layout.views(flats, [name for name in SHAPES if name in ranks[0][1]])


@pytest.mark.parametrize(
    ("parameters", "kinds"),
    [
        (F32, [F16, F32, BF16]),
        (F32, [BF16, BF16, BF16]),
        (BF16, [BF16, F32, F16]),
        (BF16, [F32, F32, F32]),
        (F16, [F16, BF16, F32]),
        (F64, [F32, F64, BF16]),
        (F64, [F16, F16, F32]),
    ],
    ids=str,
)
@pytest.mark.parametrize("names", [list(SHAPES), ["big", "bias"], ["more"]], ids=" ".join)
def test_the_sum_is_that_of_the_widened_gradients(house: Build, parameters: Any, kinds: list[Any], names: list[str]) -> None:
    gradients = [narrow(rank, kind, names) for rank, kind in enumerate(kinds)]
    state = dtypes.state_dtype(parameters)
    widened = [(state, {name: array.astype(state) for name, array in own.items()}) for own in gradients]
    reference, expected = pushed(house, parameters, widened, random.Random(0))
    for trial in range(2):
        decision, found = pushed(house, parameters, list(zip(kinds, gradients, strict=True)), random.Random(trial))
        assert (decision.scale, decision.grad_norm, decision.absent) == (reference.scale, reference.grad_norm, reference.absent)
        for name in names:
            assert found[name].tobytes() == expected[name].tobytes(), name


@pytest.mark.parametrize("backend", [pytest.param("cupy-on-host", marks=needs_compiler), NUMBA, GPU])
@pytest.mark.parametrize(("parameters", "kinds"), [(F32, [F16, BF16]), (F64, [F32, BF16]), (BF16, [F32, F16])], ids=str)
def test_every_backend_sums_them_to_the_same_bits(house: Build, backend: str, parameters: Any, kinds: list[Any]) -> None:
    ranks = [(kind, narrow(rank, kind)) for rank, kind in enumerate(kinds)]
    reference, expected = pushed(house, parameters, ranks, random.Random(0))
    decision, found = pushed(house, parameters, ranks, random.Random(1), backend)
    assert decision.grad_norm == reference.grad_norm
    for name in SHAPES:
        assert found[name].tobytes() == expected[name].tobytes(), name


def offered_and_finished(rank: Any, ticket: Any, *chunks: Chunk) -> Any:
    rank.offer(ticket, *chunks)
    return rank.finish(ticket)


def test_complex_parameters_take_narrower_parts(house: Build) -> None:
    values = (np.arange(600_000) % 7 - 3 + 1j).astype(np.complex64)
    running = house({"c": np.zeros(600_000, np.complex128)})
    rank = running.join()
    ticket = rank.begin(rank.push({"c": values}, dtypes={0: F32}))
    rank.offer(ticket, *rank.chunks({"c": values}, {0: F32}))
    assert isinstance(rank.finish(ticket), Done)
    np.testing.assert_array_equal(running.values()["c"], -values.astype(np.complex128))


@pytest.mark.parametrize("scaled", [False, True])
def test_nan_in_one_unit_of_a_chunk_names_its_parameter_or_skips(house: Build, scaled: bool) -> None:
    """With a loss scale it skips even where the policy is to refuse."""
    running = house(
        {name: np.zeros(shape, np.float32) for name, shape in SHAPES.items()}, on_nonfinite=jobs_pb2.ON_NONFINITE_REJECT
    )
    rank = running.join()
    gradients = narrow(0, F16)
    gradients["more"][-1] = np.inf
    ticket = rank.begin(rank.push(gradients, dtypes={0: F16}, loss_scale=2.0 if scaled else None))
    chunks = rank.chunks(gradients, {0: F16})
    if scaled:
        rank.offer(ticket, *chunks)
        outcome = rank.finish(ticket)
        assert outcome.result.value["skip_reason"] == "nonfinite"
    else:
        with pytest.raises(errors.NonfiniteGradientError, match="holds NaN or Inf in 'more'"):
            offered_and_finished(rank, ticket, *chunks)
        running.running.pushes.abandon(ticket)
    assert running.running.job.position.step == 0
    assert not any(value.any() for value in running.values().values())
    assert isinstance(rank.send(narrow(0, F32)), Done)


def test_padding_in_the_second_unit_of_a_chunk_is_looked_at(house: Build) -> None:
    running = house({"a": np.zeros(CHUNK_BYTES // 4, np.float32), "b": np.zeros(3, np.float32)})
    rank = running.join()
    flat = np.zeros(CHUNK_BYTES // 4 + 32, F16)
    flat[-1] = 1.0
    ticket = rank.begin(rank.push({"a": flat, "b": flat}, dtypes={0: F16}))
    with pytest.raises(errors.InvalidChunkError, match="not zero between the parameters in unit 1 of array 0"):
        offered_and_finished(rank, ticket, Chunk(0, 0, flat.view(np.uint8).data))


@pytest.mark.parametrize(
    ("parameters", "head", "error", "message"),
    [
        (F32, {0: F64}, errors.DtypeMismatchError, "array 0 has dtype float64; it must be real, and no wider than float32"),
        (BF16, {0: F64}, errors.DtypeMismatchError, "no wider than float32"),
        (F32, {7: F16}, errors.UnknownParameterError, "array 7; the job has 1 arrays"),
    ],
    ids=["wider", "wider than the state of 16 bits", "another array"],
)
def test_dtypes_that_do_not_fit_are_refused_at_the_begin(
    house: Build, parameters: Any, head: dict[int, Any], error: type[Exception], message: str
) -> None:
    running = house({"w": np.zeros(3, parameters)})
    rank = running.join()
    with pytest.raises(error, match=message):
        rank.begin(rank.push({"w": np.zeros(3)}, dtypes=head))
    assert running.running.pushes._round.gather is None or not running.running.pushes._round.gather.contributions
    assert isinstance(rank.send({"w": np.ones(3)}), Done)


def test_a_chunk_of_the_arrays_own_size_is_refused_where_another_dtype_was_announced(house: Build) -> None:
    running = house({"w": np.zeros(1000, np.float32)})
    rank = running.join()
    ticket = rank.begin(rank.push({"w": np.ones(1000)}, dtypes={0: F16}))
    with pytest.raises(errors.InvalidChunkError, match=r"has 4096 bytes; it must have 2048"):
        rank.offer(ticket, *rank.chunks({"w": np.ones(1000)}))


def test_a_held_chunk_counts_as_much_as_it_holds(house: Build) -> None:
    running = house({"w": np.zeros(600_000, np.float32)}, workers=2)
    first, second = running.join(rank=0), running.join(rank=1)
    gradient = {"w": np.ones(600_000, F16)}
    late = second.begin(second.push(gradient, dtypes={0: F16}))
    second.offer(late, *second.chunks(gradient, {0: F16}))
    assert late.gather.staged_bytes == 2 * (600_000)
    early = first.begin(first.push(gradient))
    first.offer(early, first.chunks(gradient)[1])  # one unit of the three
    assert late.gather.staged_bytes == 2 * 600_000 - CHUNK_BYTES // 2
    first.offer(early, first.chunks(gradient)[0], first.chunks(gradient)[2])
    assert late.gather.staged_bytes == 0


@pytest.mark.parametrize("names", [["bias"], ["big", "more"], ["more"], list(SHAPES)], ids=" ".join)
def test_norms_at_the_end_are_of_the_units_that_came_alone_and_the_same(
    house: Build, monkeypatch: pytest.MonkeyPatch, names: list[str]
) -> None:
    """As a backend has it that measures whole arrays: one that shares its array with a large one costs what it is."""
    gradients = [(F32, narrow(rank, F32, names)) for rank in range(2)]
    reference, _ = pushed(house, F32, gradients, random.Random(0))
    measured = []
    whole = NumpyBackend.sums_of_squares

    def noted(self: NumpyBackend, values: Any, length: int) -> list[float]:
        measured.append(len(values))
        return whole(self, values, length)

    monkeypatch.setattr(NumpyBackend, "squares_at_end", True)
    monkeypatch.setattr(NumpyBackend, "sums_of_squares", noted)
    decision, _ = pushed(house, F32, gradients, random.Random(1))
    assert decision.grad_norm == reference.grad_norm
    length = 700_000 + 64 + 32 + 600_000  # of the flat array, padding included; bias lies in its third unit, more from there on
    assert measured == [{"bias": 262_144, "more": length - 2 * 262_144}.get(" ".join(names), length)]

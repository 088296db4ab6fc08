"""Rows over the wire, through the generated stubs alone: sparse gradients in, some rows of the weights out."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from optserve.server.app import App
from optserve.server.store import Store
from optserve.v1 import data_pb2, jobs_pb2, types_pb2

MIB = 1 << 20
BUNDLE = 4294967295
END = types_pb2.StreamEnd()
FLOAT32 = types_pb2.DATA_TYPE_FLOAT32
NOISE = np.random.default_rng(5)
ARRAYS = {
    "bias": NOISE.normal(size=7).astype(np.float32),
    "emb": NOISE.normal(size=(200_000, 4)).astype(np.float32),
    "tail": NOISE.normal(size=40).astype(np.float32),
    "half": NOISE.normal(size=(9, 5)).astype(ml_dtypes.bfloat16),
    "turn": NOISE.normal(size=(6, 2, 2)).astype(np.float32).view(np.complex64)[..., 0],
    "none": np.zeros((0, 3), np.float32),
}
"""emb shares its flat array of four blocks with bias in the first and tail in the last one."""
INDEX = {name: index for index, name in enumerate(ARRAYS)}
Rows = Mapping[str, tuple[list[int], Any]]


def packed(sparse: Rows) -> bytes:
    """Row numbers and values, each at a multiple of 64 bytes."""
    found = bytearray()
    for ids, values in sparse.values():
        for piece in (np.array(ids, np.int64).tobytes(), values.tobytes()):
            found += bytes(-len(found) % 64) + piece
    return bytes(found)


def entries(sparse: Rows) -> list[types_pb2.RowsEntry]:
    kinds = {"float32": FLOAT32, "bfloat16": types_pb2.DATA_TYPE_BFLOAT16, "complex64": types_pb2.DATA_TYPE_COMPLEX64}
    return [
        types_pb2.RowsEntry(parameter=INDEX[name], count=len(ids), dtype=kinds[values.dtype.name])
        for name, (ids, values) in sparse.items()
    ]


def bundle(sparse: Rows) -> Iterator[types_pb2.TensorChunk]:
    data = packed(sparse)
    for offset in range(0, len(data), MIB):
        yield types_pb2.TensorChunk(array_id=BUNDLE, offset=offset, data=data[offset : offset + MIB])


def absent(*present: str) -> list[int]:
    return [index for name, index in INDEX.items() if name not in present]


def asked(**rows: list[int]) -> list[types_pb2.Rows]:
    return [
        types_pb2.Rows(parameter=INDEX[name], deltas=[now - before for before, now in zip([0, *ids], ids, strict=False)])
        for name, ids in rows.items()
    ]


def cut(begin: data_pb2.WeightsBegin, chunks: list[types_pb2.TensorChunk]) -> dict[str, tuple[list[int], Any]]:
    """The rows of an answer."""
    data = bytearray()
    for chunk in chunks:
        if chunk.array_id == BUNDLE:
            assert chunk.offset == len(data)
            data += chunk.data
    found, at = {}, 0
    for entry in begin.rows:
        name = list(ARRAYS)[entry.parameter]
        shape, dtype = ARRAYS[name].shape[1:], ARRAYS[name].dtype
        at += -at % 64
        ids = np.frombuffer(data[at : at + 8 * entry.count], np.int64)
        at += ids.nbytes + -(at + ids.nbytes) % 64
        size = entry.count * int(np.prod(shape)) * dtype.itemsize
        found[name] = (ids.tolist(), np.frombuffer(data[at : at + size], dtype).reshape(entry.count, *shape))
        at += size
    assert at == len(data)
    return found


def blocks(chunks: list[types_pb2.TensorChunk]) -> set[tuple[int, int]]:
    return {(chunk.array_id, chunk.offset // MIB) for chunk in chunks if chunk.array_id != BUNDLE}


def pulled(foreign: Any, **fields: Any) -> tuple[data_pb2.WeightsBegin, list[types_pb2.TensorChunk]]:
    answers = list(foreign.data.Pull(data_pb2.PullRequest(job_id=foreign.job.job_id, **fields), timeout=20))
    assert answers[-1].WhichOneof("content") == "end"
    return answers[0].begin, [answer.chunk for answer in answers[1:-1]]


@pytest.fixture(params=["sync", "async"])
def job(request: pytest.FixtureRequest, foreign: Any) -> Any:
    consistency = jobs_pb2.CONSISTENCY_ASYNC if request.param == "async" else jobs_pb2.CONSISTENCY_SYNC
    return foreign.ready(ARRAYS, consistency=consistency)


def test_rows_that_were_pushed_are_stepped_and_the_others_stay(job: Any) -> None:
    ids = NOISE.integers(0, 200_000, 60_000).tolist()
    sparse = {
        "emb": (ids, np.ones((60_000, 4), np.float32)),
        "half": ([8, 0, 8], np.ones((3, 5), np.float32)),
        "turn": ([2], np.full((1, 2), 1 + 2j, np.complex64)),
    }

    def items() -> Iterator[data_pb2.PushRequest]:
        head = job.begin({}, absent=absent("bias", *sparse), sparse=entries(sparse))
        yield data_pb2.PushRequest(begin=head)
        chunks = list(bundle(sparse))
        yield data_pb2.PushRequest(chunk=chunks[1])
        flat = np.zeros(MIB // 4, np.float32)
        flat[:7] = 2.0
        yield data_pb2.PushRequest(chunk=types_pb2.TensorChunk(array_id=0, data=flat.tobytes()))
        for chunk in (chunks[0], *chunks[2:]):
            yield data_pb2.PushRequest(chunk=chunk)
        yield data_pb2.PushRequest(end=END)

    job.data.Push(items(), timeout=20)
    weights = job.weights()
    counts = np.bincount(ids, minlength=200_000).astype(np.float32)
    np.testing.assert_allclose(weights["emb"], ARRAYS["emb"] - counts[:, None], rtol=1e-6, atol=1e-6)
    np.testing.assert_array_equal(weights["emb"][counts == 0], ARRAYS["emb"][counts == 0])
    np.testing.assert_array_equal(weights["bias"], ARRAYS["bias"] - np.float32(2))
    np.testing.assert_array_equal(weights["tail"], ARRAYS["tail"])
    steps = np.zeros((9, 5), np.float32)
    steps[8], steps[0] = 2, 1
    np.testing.assert_array_equal(weights["half"], (ARRAYS["half"].astype(np.float32) - steps).astype(ml_dtypes.bfloat16))
    np.testing.assert_array_equal(weights["turn"][2], ARRAYS["turn"][2] - np.complex64(1 + 2j))
    np.testing.assert_array_equal(np.delete(weights["turn"], 2, axis=0), np.delete(ARRAYS["turn"], 2, axis=0))


def test_a_small_sparse_push_and_its_rows_are_one_message_each(job: Any, open_stream: Callable[..., Any]) -> None:
    stream = open_stream(job)
    stream.receive("opened")
    sparse = {"emb": ([7, 199_999], np.ones((2, 4), np.float32))}
    inline = types_pb2.InlineChunks(chunks=bundle(sparse))
    stream.send(
        push=job.begin(
            {},
            absent=absent("emb"),
            sparse=entries(sparse),
            inline=inline,
            want_weights=True,
            want_rows=asked(emb=[7, 8, 199_999], half=[], turn=[0], none=[]),
            inline_weights_bytes=64 << 10,
        )
    )
    # bias and tail lie in blocks of a MiB each: they follow, with the rows, as chunks
    pushed = stream.receive("pushed")
    assert not pushed.HasField("weights")
    begin = stream.receive("weights")
    chunks = []
    while (answer := next(stream._call)).WhichOneof("content") == "chunk":
        chunks.append(answer.chunk)
    assert begin.position == pushed.position
    assert blocks(chunks) == {(0, 0), (0, 3)}
    found = cut(begin, chunks)
    expected = ARRAYS["emb"][[7, 8, 199_999]] - np.array([[1], [0], [1]], np.float32)
    assert found["emb"][0] == [7, 8, 199_999]
    np.testing.assert_array_equal(found["emb"][1], expected)
    np.testing.assert_array_equal(found["turn"][1], ARRAYS["turn"][:1])
    assert found["half"][0] == found["none"][0] == []


def test_a_few_rows_of_a_large_model_come_inline(foreign: Any, open_stream: Callable[..., Any]) -> None:
    foreign.ready({"emb": ARRAYS["emb"]})
    stream = open_stream(foreign)
    stream.receive("opened")
    rows = [types_pb2.Rows(parameter=0, deltas=[5, 1])]
    stream.send(pull=data_pb2.PullWeights(inline_weights_bytes=64 << 10, rows=rows, layout_version=1))
    begin = stream.receive("weights")
    [chunk] = begin.inline.chunks
    assert (chunk.array_id, chunk.offset, [entry.count for entry in begin.rows]) == (BUNDLE, 0, [2])
    assert chunk.data[:16] == np.array([5, 6]).tobytes()
    assert chunk.data[64:] == ARRAYS["emb"][5:7].tobytes()


def test_a_pull_brings_names_whole_and_of_others_rows(job: Any) -> None:
    begin, chunks = pulled(job, parameters=["bias", "emb"], rows=asked(emb=[0, 100_000], half=[8]))
    assert blocks(chunks) == {(0, 0)}
    found = cut(begin, chunks)
    np.testing.assert_array_equal(found["emb"][1], ARRAYS["emb"][[0, 100_000]])
    np.testing.assert_array_equal(found["half"][1], ARRAYS["half"][[8]])
    begin, chunks = pulled(job, parameters=["emb"], rows=asked(emb=[3]))
    assert (blocks(chunks), cut(begin, chunks)["emb"][0]) == (set(), [3])
    begin, chunks = pulled(job, rows=asked(emb=[3]))
    turn = job.layout.parameters[INDEX["turn"]].array_id
    assert blocks(chunks) == {(0, 0), (0, 3), (turn, 3), (job.layout.parameters[INDEX["half"]].array_id, 0)}


def test_rows_cost_what_is_asked_for(job: Any, app: App, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither the parameter nor the flat array that it shares with small ones is copied."""

    def refuse(*_: Any) -> Any:
        raise AssertionError("the whole weights were copied")

    monkeypatch.setattr(Store, "snapshot", refuse)
    from optserve.server.services.weights import Selection, copied

    store = app.registry.find("j").job.store
    selection = Selection.of(store.layout, asked(emb=[1, 2, 3]), 0, ["bias", "emb"])
    tracemalloc.start()
    try:
        kept = list(copied(store, selection))
        _, most = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(kept) == 2
    assert most < 1.3 * MIB
    pulled(job, rows=asked(emb=[1, 2, 3]))


BAD_ROWS: dict[str, tuple[list[types_pb2.Rows], str, str]] = {
    "no such parameter": ([types_pb2.Rows(parameter=6, deltas=[0])], "UNKNOWN_PARAMETER", "rows of parameter 6"),
    "twice": (asked(emb=[1]) + asked(emb=[2]), "INVALID_ARGUMENT", "'emb' are asked for twice"),
    "descending": ([types_pb2.Rows(parameter=1, deltas=[4, 0])], "INVALID_ARGUMENT", "do not ascend"),
    "out of range": ([types_pb2.Rows(parameter=1, deltas=[199_999, 1])], "INVALID_ARGUMENT", "row 200000 of 'emb'"),
    "wrapped": ([types_pb2.Rows(parameter=1, deltas=[(1 << 64) - 1])], "INVALID_ARGUMENT", "out of range"),
    "of none": ([types_pb2.Rows(parameter=5, deltas=[0])], "INVALID_ARGUMENT", "it has 0"),
}


@pytest.mark.parametrize("case", BAD_ROWS, ids=str)
def test_rows_that_there_are_not_are_refused_and_the_stream_goes_on(
    foreign: Any, failed: Any, open_stream: Callable[..., Any], case: str
) -> None:
    rows, reason, message = BAD_ROWS[case]
    foreign.ready(ARRAYS)
    found = failed(lambda: pulled(foreign, rows=rows))
    assert (found.reason, message in found.message) == (reason, True)
    stream = open_stream(foreign)
    stream.receive("opened")
    stream.send(pull=data_pb2.PullWeights(rows=rows))
    assert message in stream.receive("error").message
    stream.push(foreign, ARRAYS, want_weights=True, want_rows=rows)
    assert message in stream.receive("error").message
    assert foreign.position().step == 0
    stream.push(foreign, ARRAYS)
    assert stream.receive("pushed").position.step == 1


def test_what_is_of_an_old_layout_is_said_to_be(foreign: Any, failed: Any, open_stream: Callable[..., Any], app: App) -> None:
    foreign.ready(ARRAYS)
    found = failed(lambda: pulled(foreign, rows=asked(emb=[1]), layout_version=99))
    assert found.reason == "STALE_LAYOUT"
    assert "the pull of rows is of layout 99; the job has layout 1" in found.message
    pulled(foreign, layout_version=99)  # not looked at without rows
    stream = open_stream(foreign)
    stream.receive("opened")
    stream.push(foreign, ARRAYS, layout_version=99, want_weights=True, want_rows=asked(emb=[1]))
    assert stream.receive("error").reason == types_pb2.ERROR_REASON_STALE_LAYOUT
    stream.send(pull=data_pb2.PullWeights(rows=asked(emb=[1]), layout_version=99))
    assert stream.receive("error").reason == types_pb2.ERROR_REASON_STALE_LAYOUT
    assert foreign.position().step == 0
    stream.push(foreign, ARRAYS, layout_version=1)
    assert stream.receive("pushed").position.step == 1


def test_a_push_that_was_applied_is_answered_though_the_rows_it_asks_for_are_of_an_old_layout(
    foreign: Any, open_stream: Callable[..., Any]
) -> None:
    foreign.ready(ARRAYS)
    stream = open_stream(foreign)
    stream.receive("opened")
    stream.push(foreign, ARRAYS)
    assert stream.receive("pushed").position.step == 1
    stream.push(foreign, ARRAYS, layout_version=99, want_weights=True, want_rows=asked(emb=[1]))
    assert stream.receive("pushed").position.step == 1
    assert stream.receive("error").reason == types_pb2.ERROR_REASON_STALE_LAYOUT


BAD_PUSHES: dict[str, tuple[dict[str, Any], list[types_pb2.TensorChunk], str, str]] = {
    "truncated": ({}, [], "INCOMPLETE_STREAM", "1 of 1 chunks missing"),
    "short": ({}, [types_pb2.TensorChunk(array_id=BUNDLE, data=bytes(64))], "INVALID_CHUNK", "no block of the bundle of 80"),
    "negative": (
        {},
        [types_pb2.TensorChunk(array_id=BUNDLE, data=np.array([-1]).tobytes() + bytes(72))],
        "INVALID_ARGUMENT",
        "row -1 of 'emb'",
    ),
    "absent and sparse": ({"absent": list(range(6))}, [], "INVALID_ARGUMENT", "'emb' is announced as absent"),
    "float64": (
        {"sparse": [types_pb2.RowsEntry(parameter=1, count=1, dtype=types_pb2.DATA_TYPE_FLOAT64)]},
        [],
        "DTYPE_MISMATCH",
        "of 4 bytes at most",
    ),
    "no dtype": ({"sparse": [types_pb2.RowsEntry(parameter=1, count=1)]}, [], "DTYPE_MISMATCH", "unknown data type"),
    "endless": (
        {"sparse": [types_pb2.RowsEntry(parameter=1, count=(1 << 64) - 1, dtype=FLOAT32)]},
        [],
        "INVALID_ARGUMENT",
        "sum rows that repeat",
    ),
}


@pytest.mark.parametrize("case", BAD_PUSHES, ids=str)
def test_a_bad_sparse_push_is_refused_and_changes_nothing(foreign: Any, failed: Any, case: str) -> None:
    more, chunks, reason, message = BAD_PUSHES[case]
    foreign.ready(ARRAYS)
    sparse = {"emb": ([3], np.ones((1, 4), np.float32))}

    def items(own: list[types_pb2.TensorChunk], **fields: Any) -> Iterator[data_pb2.PushRequest]:
        given = {"absent": absent("emb"), "sparse": entries(sparse), **fields}
        yield data_pb2.PushRequest(begin=foreign.begin({}, **given))
        for chunk in own:
            yield data_pb2.PushRequest(chunk=chunk)
        yield data_pb2.PushRequest(end=END)

    found = failed(lambda: foreign.data.Push(items(chunks, **more), timeout=20))
    assert (found.reason, message in found.message) == (reason, True), found
    assert foreign.position().step == 0
    np.testing.assert_array_equal(foreign.weights()["emb"], ARRAYS["emb"])
    assert foreign.data.Push(items(list(bundle(sparse))), timeout=20).result.position.step == 1


def test_both_ways_to_a_server_bring_the_same_rows(server: Any) -> None:
    job = server.create_job("rows", ARRAYS, optimizer="sgd", lr=1.0)
    ids = [5, 3, 5, 199_999]
    found = job.pull(rows={"emb": ids})
    np.testing.assert_array_equal(found["emb"], ARRAYS["emb"][ids])
    np.testing.assert_array_equal(found["tail"], ARRAYS["tail"])
    with job.join() as worker:
        again = worker.pull(rows={"emb": ids, "turn": [1]})
    np.testing.assert_array_equal(again["emb"], ARRAYS["emb"][ids])
    np.testing.assert_array_equal(again["turn"], ARRAYS["turn"][[1]])
    np.testing.assert_array_equal(again["half"], ARRAYS["half"])

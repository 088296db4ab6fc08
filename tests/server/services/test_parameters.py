"""ParameterService as another language sees it: answers, repeats, malformed streams."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator
from typing import Any

import grpc
import numpy as np
import pytest

from optserve.v1 import parameters_pb2, parameters_pb2_grpc, types_pb2

ARRAYS = {"w": np.arange(12, dtype=np.float32), "b": np.ones(3, np.float32)}
END = types_pb2.StreamEnd()
FLOAT32 = types_pb2.DATA_TYPE_FLOAT32

Rename, Replace, Remove = (
    parameters_pb2.RenameParameterRequest,
    parameters_pb2.ReplaceParameterRequest,
    parameters_pb2.RemoveParameterRequest,
)


@pytest.fixture
def job(foreign: Any) -> Any:
    return foreign.ready(ARRAYS)


@pytest.fixture
def service(channel: grpc.Channel) -> parameters_pb2_grpc.ParameterServiceStub:
    return parameters_pb2_grpc.ParameterServiceStub(channel)


def replacement(
    call: types_pb2.CallIdentity, value: np.ndarray, **fields: Any
) -> Iterator[parameters_pb2.ReplaceParameterRequest]:
    entry = {"parameter": "b", "shape": value.shape, "dtype": FLOAT32, **fields.pop("entry", {})}
    raw = value.tobytes()
    given = {"entry": types_pb2.BundleEntry(**entry), "bundle_bytes": -(-len(raw) // 64) * 64, **fields}
    yield Replace(begin=parameters_pb2.ReplaceParameterBegin(call=call, **given))
    yield Replace(chunk=types_pb2.TensorChunk(data=raw + bytes(-len(raw) % 64)))
    yield Replace(end=END)


def test_each_edit_answers_with_the_layout_and_its_repeat_with_the_same(job: Any, service: Any) -> None:
    admin = job.another()
    calls: list[Callable[[], Any]] = [
        lambda: service.RenameParameter(Rename(call=admin.identity(), parameter="w", new_name="v"), timeout=20),
        lambda: service.ReplaceParameter(replacement(admin.identity(), np.zeros((5, 2), np.float32)), timeout=20),
        lambda: service.RemoveParameter(Remove(call=admin.identity(), parameter="v"), timeout=20),
    ]
    wanted = [[("v", [12]), ("b", [3])], [("v", [12]), ("b", [5, 2])], [("b", [5, 2])]]
    before = job.position().version
    for count, (call, parameters) in enumerate(zip(calls, wanted, strict=True), 1):
        answer = call()
        assert [(entry.name, list(entry.shape)) for entry in answer.layout.parameters] == parameters
        assert answer.layout.base_version == answer.layout.layout_version == 1 + count
        assert answer.position.version == before + count
        assert call() == answer
        assert job.position().version == before + count
        admin.seq += 1


def test_another_content_under_the_same_identity_is_refused(job: Any, service: Any, failed: Any) -> None:
    admin = job.another()
    service.ReplaceParameter(replacement(admin.identity(), np.zeros(3, np.float32)), timeout=20)
    for value, fields in ((np.ones(3, np.float32), {}), (np.zeros(3, np.float32), {"keep_state": True})):
        items = replacement(admin.identity(), value, **fields)
        assert failed(lambda items=items: service.ReplaceParameter(items, timeout=20)).reason == "SEQUENCE_CONFLICT"


def test_a_worker_of_an_old_epoch_may_not_edit(job: Any, service: Any, failed: Any) -> None:
    request = Remove(call=job.identity(epoch=job.epoch + 1), parameter="w")
    assert failed(lambda: service.RemoveParameter(request, timeout=20)).reason == "FENCED"
    assert [entry.name for entry in service.RemoveParameter(Remove(call=job.identity(), parameter="w")).layout.parameters] == [
        "b"
    ]


BUNDLES: dict[str, tuple[dict[str, Any], str]] = {
    "outside": ({"entry": {"offset": 64}}, "INVALID_ARGUMENT"),
    "unaligned": ({"entry": {"offset": 4}}, "INVALID_ARGUMENT"),
    "another shape": ({"entry": {"shape": [300]}}, "INVALID_ARGUMENT"),
    "no dtype": ({"entry": {"dtype": 0}}, "DTYPE_MISMATCH"),
    "negative shape": ({"entry": {"shape": [-3]}}, "INVALID_ARGUMENT"),
    "beyond any memory": ({"entry": {"shape": [1 << 40, 1 << 40]}}, "INVALID_ARGUMENT"),
    "beyond this memory": ({"entry": {"shape": [1 << 50]}, "bundle_bytes": 1 << 52}, "OUT_OF_MEMORY"),
    "a slot": ({"entry": {"slot": "exp_avg"}}, "INVALID_ARGUMENT"),
    "no such parameter": ({"entry": {"parameter": "x"}}, "UNKNOWN_PARAMETER"),
    "too many bytes": ({"bundle_bytes": 1 << 20}, "INVALID_ARGUMENT"),
    "too few chunks": ({"entry": {"shape": [300]}, "bundle_bytes": 1216}, "INVALID_CHUNK"),
}


@pytest.mark.parametrize("case", BUNDLES, ids=str)
def test_a_value_that_does_not_fit_its_bundle(job: Any, service: Any, failed: Any, case: str) -> None:
    fields, reason = BUNDLES[case]
    before, weights = job.position(), job.pull()
    items = replacement(job.another().identity(), np.zeros(3, np.float32), **fields)
    assert failed(lambda: service.ReplaceParameter(items, timeout=20)).reason == reason
    assert job.position() == before
    assert job.pull() == weights


def test_streams_that_are_cut_or_begin_otherwise(job: Any, service: Any, failed: Any) -> None:
    admin = job.another()
    begin, chunk, end = replacement(admin.identity(), np.zeros(3, np.float32))
    for items, reason in (
        ([], "INCOMPLETE_STREAM"),
        ([chunk, end], "PROTOCOL_VIOLATION"),
        ([begin], "INCOMPLETE_STREAM"),
        ([begin, end], "INCOMPLETE_STREAM"),
        ([begin, begin], "PROTOCOL_VIOLATION"),
        ([begin, chunk], "INCOMPLETE_STREAM"),
    ):
        assert failed(lambda items=items: service.ReplaceParameter(iter(items), timeout=20)).reason == reason


def test_a_job_that_is_not_there(job: Any, service: Any, failed: Any) -> None:
    call = types_pb2.CallIdentity(job_id=str(uuid.uuid4()), session_id="s", seq=1)
    attempts: list[Callable[[], Any]] = [
        lambda: service.RenameParameter(Rename(call=call, parameter="w", new_name="v"), timeout=20),
        lambda: service.ReplaceParameter(replacement(call, np.zeros(3, np.float32)), timeout=20),
        lambda: service.RemoveParameter(Remove(call=call, parameter="w"), timeout=20),
    ]
    for attempt in attempts:
        assert failed(attempt).reason == "JOB_NOT_FOUND"


def test_an_edit_without_an_identity(job: Any, service: Any, failed: Any) -> None:
    request = Remove(call=job.identity(seq=0), parameter="w")
    assert failed(lambda: service.RemoveParameter(request, timeout=20)).reason == "INVALID_ARGUMENT"

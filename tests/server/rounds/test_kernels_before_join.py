"""Kernels compile before the first join returns, and before new options count: no worker's push waits for a compiler."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from optserve.server.durability.journal import NullJournal
from optserve.server.records import Caller, Restored, StateLoaded
from optserve.server.rounds.pushes import Done, Push
from optserve.server.rounds.registry import Registry
from optserve.v1 import data_pb2, jobs_pb2, types_pb2
from optserve.wire import dtypes, errors
from optserve.wire.chunks import array_chunks
from optserve.wire.values import to_hyperparameters

VALUES: Mapping[str, Any] = {"w": np.ones(8, np.float32), "h": np.ones(4, ml_dtypes.bfloat16)}


def test_the_first_push_compiles_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    numba = pytest.importorskip("numba")
    from optserve.server.backends.numba import NumbaBackend

    registry = Registry(NumbaBackend(), lambda _: NullJournal())  # a backend of its own has compiled nothing yet
    parameters = [
        types_pb2.Parameter(name=name, shape=value.shape, dtype=dtypes.to_wire(value.dtype)) for name, value in VALUES.items()
    ]
    spec = jobs_pb2.JobSpec(name="j", optimizer="adam", workers=1, defaults=to_hyperparameters({"lr": 0.1}))
    spec.groups.append(jobs_pb2.GroupSpec(parameters=parameters))
    running, _ = registry.create("00000000-0000-0000-0000-000000000000", spec, "creator", False)
    running.job.store.set_values(VALUES)
    running.host.initialized()
    member = running.host.join("", None, "session", ("", 0))

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("something was compiled after the join")

    monkeypatch.setattr(numba, "njit", refuse)
    with pytest.raises(AssertionError, match="after the join"):
        NumbaBackend().finite(VALUES["w"])  # what is not prepared would be noticed
    head = Push(Caller("session", member.epoch, 1, ""), ("", 0), data_pb2.CONTRIBUTION_GRADIENT, 1.0, 2, frozenset(), {})
    ticket = running.pushes.begin(head, lambda: True)
    for array in running.job.store.layout.arrays:
        gradient = np.zeros(array.length, array.dtype)
        for chunk in array_chunks(array.array_id, gradient.view(np.uint8).data):
            running.pushes.offer(ticket, chunk, lambda: True)
    assert isinstance(running.pushes.finish(ticket, lambda: True), Done)


@pytest.fixture(params=["state_dict", "checkpoint"])
def load(house: Callable[..., Any], request: pytest.FixtureRequest) -> tuple[Any, Callable[[], Any]]:
    """A job of plain SGD, and a call that loads a state_dict or restores a checkpoint of SGD with momentum."""
    running = house({"w": np.ones(8, np.float32)}).running
    job, caller = running.job, Caller("admin", 0, 1, "content")
    groups = [{**job.groups[0], "momentum": 0.9}]
    if request.param == "state_dict":
        loaded = StateLoaded(caller, groups, {}, {})
        return job, lambda: running.administration.load_state(caller, ("", 0), loaded)
    content = job.store.export()
    restored = Restored(caller, "later", {**job.to_document({}), "groups": groups}, content.values, content.state)
    return job, lambda: running.administration.restore(caller, ("", 0), "it", lambda: restored)


def test_what_loaded_options_need_is_there_before_the_next_push(load: Any) -> None:
    job, call = load
    call()
    assert job.groups[0]["momentum"] == 0.9
    assert not job.store.lacks_state(job.groups)


def test_a_load_whose_options_need_more_memory_than_there_is_changes_nothing(
    load: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise MemoryError

    job, call = load
    before = job.position
    monkeypatch.setattr(type(job.store.backend), "zeros", refuse)
    with pytest.raises(errors.OutOfMemoryError, match="optimizer state"):
        call()
    assert (job.groups[0]["momentum"], job.position) == (0, before)

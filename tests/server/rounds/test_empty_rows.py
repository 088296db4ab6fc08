"""A sparse gradient of no rows is a gradient all the same."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from recorded_jobs import contents

from optserve.server.jobs import Job
from optserve.server.rounds.contributions import Trial
from optserve.server.rounds.tickets import Done
from optserve.v1 import types_pb2
from optserve.wire import dtypes

Build = Callable[..., Any]

W = {"w": np.linspace(-1, 1, 12, dtype=np.float32).reshape(3, 4)}
EMPTY = (types_pb2.RowsEntry(parameter=0, count=0, dtype=dtypes.to_wire(np.dtype(np.float32))),)


@pytest.mark.parametrize("workers", [1, 2])
def test_a_search_takes_it(house: Build, workers: int) -> None:
    running = house(W, optimizer="lbfgs", workers=workers)
    ranks = [running.join() for _ in range(workers)]

    def send(rank: Any) -> Any:
        return rank.finish(rank.begin(rank.push(W, sparse=EMPTY, loss=1.0)))

    others = [rank.in_thread(lambda rank=rank: send(rank)) for rank in ranks[1:]]
    assert isinstance(send(ranks[0]), Done | Trial)
    assert all(isinstance(other.result(20), Done | Trial) for other in others)
    np.testing.assert_array_equal(running.values()["w"], W["w"])


def test_a_window_that_holds_it_comes_back(house: Build) -> None:
    running = house(W, rules={"accumulation": 3})
    rank = running.join()
    rank.finish(rank.begin(rank.push(W, sparse=EMPTY)))
    document, exported = running.running.host.capture()
    assert document["window_rounds"] == 1
    job = running.running.job
    raw = json.loads(json.dumps(document))
    back = Job.from_document("id", None, raw, exported.values, exported.tensors, job.store.backend, job.position.lineage_id)
    assert {key: value for key, value in contents(back).items() if key != "document"} == {
        key: value for key, value in contents(job).items() if key != "document"
    }

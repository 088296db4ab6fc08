"""A job of two groups, its rounds as records, and all that it holds, comparable."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np

from optserve.server.backends import select
from optserve.server.jobs import Job
from optserve.server.jobs import spec as specs
from optserve.server.records import (
    Caller,
    Decision,
    RoundApplied,
)
from optserve.v1 import jobs_pb2, types_pb2
from optserve.wire import dtypes
from optserve.wire.rows import Sums
from optserve.wire.values import to_hyperparameters

PARAMETERS: list[dict[str, Any]] = [
    {"w": np.linspace(-1, 1, 12, dtype=np.float32).reshape(3, 4), "h": np.ones(5, ml_dtypes.bfloat16)},
    {"d": np.full((2, 2), 0.5), "s": np.array(3.0, np.float32)},
]


def new_job(optimizer: str = "adam", **defaults: Any) -> Job:
    groups = [
        jobs_pb2.GroupSpec(
            parameters=[
                types_pb2.Parameter(name=name, shape=value.shape, dtype=dtypes.to_wire(value.dtype))
                for name, value in entry.items()
            ]
        )
        for entry in PARAMETERS
    ]
    settings = {"lr": 0.1, **({"amsgrad": True} if optimizer == "adam" else {}), **defaults}
    spec = jobs_pb2.JobSpec(name="j", optimizer=optimizer, groups=groups, workers=2, defaults=to_hyperparameters(settings))
    job = Job("id", specs.plan(spec), select("numpy"), "first")
    for entry in PARAMETERS:
        job.store.set_values(entry)
    return job


def caller(seq: int, session: str = "s", epoch: int = 1) -> Caller:
    return Caller(session, epoch, seq, f"content{seq}")


def round_of(job: Job, seed: int, seq: int, absent: frozenset[int] = frozenset(), skip: str = "") -> RoundApplied:
    bits = np.random.default_rng(seed)
    flats = job.store.accumulators()
    for place in job.store.layout.places:
        flat = flats[place.array_id]
        flat[place.offset : place.offset + place.size] = bits.normal(size=place.size)
    decision = Decision((0, 1), 0.5, absent, 1.5, skip, {"loss": float(seed)})
    return RoundApplied((caller(seq, "s"), caller(seq, "t")), decision, Sums(flats, {}))


def contents(job: Job) -> dict[str, Any]:
    """Everything of a job, tensors as bytes."""
    exported = job.store.export()
    tensors = {
        f"{kind}:{key}": array.tobytes() for kind in ("values", "tensors") for key, array in getattr(exported, kind).items()
    }
    return {"document": job.to_document(exported.steps), **tensors}


def same(one: Job, other: Job) -> None:
    left, right = contents(one), contents(other)
    assert left["document"] == right["document"]
    assert left == right

"""Every optimizer's state through a checkpoint's files and back: scalars, row vectors, complex numbers, state at step 0."""

from __future__ import annotations

import json
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from optserve.server.backends import select
from optserve.server.durability.checkpoints import Checkpoints, Content
from optserve.server.formulas import OPTIMIZERS, Searching, find
from optserve.server.jobs import Job, spec
from optserve.server.records import Caller, Decision, GroupAdded, Initialized, Restored, RoundApplied
from optserve.server.storage import MemoryStorage
from optserve.v1 import jobs_pb2, types_pb2
from optserve.wire import dtypes, errors
from optserve.wire.layout import Place
from optserve.wire.rows import Rows, Sums, row_size
from optserve.wire.values import to_hyperparameters

CALLER = Caller("s", 1, 1, "content")
random = np.random.default_rng(4)
CANDIDATES: dict[str, np.ndarray] = {
    "matrix": random.normal(size=(3, 4)).astype(np.float32),
    "late": random.normal(size=(2, 3)).astype(np.float32),
    "narrow/16": random.normal(size=(5, 2)).astype(ml_dtypes.bfloat16),
    "wide": random.normal(size=(2, 2)),
    "line": random.normal(size=7).astype(np.float32),
    "scalar": np.asarray(1.5, np.float32),
    "nothing": np.zeros((2, 0), np.float32),
    "complex": (random.normal(size=(2, 3)) + 1j).astype(np.complex64),
    "complex128": (random.normal(size=(2, 3)) + 1j).astype(np.complex128),
}


def allowed(name: str) -> dict[str, np.ndarray]:
    """Muon takes matrices only, some no complex numbers."""
    found = {}
    for key, value in CANDIDATES.items():
        try:
            find(name).check_parameter(key, value.shape, np.iscomplexobj(value))
        except (ValueError, RuntimeError):
            continue
        found[key] = value
    return found


def new_job(name: str, parameters: dict[str, np.ndarray]) -> Job:
    declared = [
        types_pb2.Parameter(name=key, shape=value.shape, dtype=dtypes.to_wire(value.dtype)) for key, value in parameters.items()
    ]
    wanted = jobs_pb2.JobSpec(
        name="j",
        optimizer=name,
        workers=1,
        defaults=to_hyperparameters({"lr": 0.1}),
        groups=[jobs_pb2.GroupSpec(parameters=declared)],
    )
    job = Job("id", spec.plan(wanted), select("numpy"), "first")
    job.store.set_values(parameters)
    job.apply(Initialized())
    return job


def round_of(job: Job, seed: int) -> RoundApplied:
    """Without the parameter `late`, whose state does not begin."""
    layout, sums = job.store.layout, sums_of(job, seed)
    absent = {layout.by_name["late"].index}
    if job.plan.optimizer.no_dense:
        absent = {place.index for place in layout.places} - sums.sparse.keys()
    decision = Decision((0,), 1.0, frozenset(absent), 1.0, "", {})
    if not isinstance(job.plan.optimizer, Searching):
        return RoundApplied((CALLER,), decision, sums)
    search = job.store.search(job.groups)
    for loss in (3.0, 2.0, 1.0):
        if search.evaluated(loss, sums, 1.0, decision.absent, None):
            break
    else:
        while not search.evaluated(
            0.5, Sums({key: np.zeros_like(flat) for key, flat in sums.dense.items()}, {}), 1.0, frozenset(), None
        ):
            pass
    return RoundApplied((CALLER,), decision, Sums({}, {}), search.outcome)


def sums_of(job: Job, seed: int) -> Sums:
    """Dense, or of two rows each where the optimizer takes no other gradients."""
    noise, flats, layout = np.random.default_rng(seed), job.store.accumulators(), job.store.layout
    for place in layout.places:
        flats[place.array_id][place.offset : place.offset + place.size] = noise.normal(size=place.size)
    if not job.plan.optimizer.no_dense:
        return Sums(flats, {})
    ids = np.array([0, 1], np.int64)
    with_rows = [place for place in layout.places if place.shape and place.shape[0] > 1 and place.name != "late"]
    return Sums({}, {place.index: rows_of(place, ids, noise) for place in with_rows})


def rows_of(place: Place, ids: np.ndarray, noise: np.random.Generator) -> Rows:
    return Rows(ids, noise.normal(size=(2, row_size(place))).astype(dtypes.storage_dtype(dtypes.state_dtype(place.dtype))))


def contents(job: Job) -> dict[str, Any]:
    exported = job.store.export()
    arrays = {f"{kind}:{key}": value for kind in ("values", "tensors") for key, value in getattr(exported, kind).items()}
    tensors = {key: (value.shape, value.dtype.name, value.tobytes()) for key, value in arrays.items()}
    return {"groups": job.groups, "steps": exported.steps, **tensors}


def through_files(job: Job) -> Content:
    checkpoints, exported = Checkpoints(MemoryStorage()), job.store.export()
    document = json.loads(json.dumps(job.to_document(exported.steps)))
    checkpoints.save("f", "c", Content(document, exported.values, exported.tensors), 1.0)
    checkpoints.verify("f", "c")
    return checkpoints.read("f", "c")


@pytest.mark.parametrize("name", sorted(OPTIMIZERS))
def test_a_job_comes_back_from_a_checkpoint_and_goes_on_the_same(name: str) -> None:
    job = new_job(name, allowed(name))
    if not isinstance(job.plan.optimizer, Searching):
        job.apply(GroupAdded(CALLER, {**job.groups[0], "lr": 0.5}, [("added", np.ones((2, 2), np.float32))]))
    for seed in range(3):
        job.apply(round_of(job, seed))
    before, saved = contents(job), through_files(job)
    made = Job.from_document("id", None, saved.document, saved.parameters, saved.state, select(), "next")
    assert contents(made) == before
    for found in (job, made):
        found.apply(round_of(found, 7))
    assert contents(made) == contents(job) != before
    record = Restored(CALLER, "restored", saved.document, saved.parameters, saved.state)
    job.checked_restore(record)
    job.apply(record)
    assert contents(job) == before


def test_state_that_exists_from_creation_is_made_by_the_records_alone() -> None:
    """A replay prepares nothing, and edits may come before the first step."""
    job = new_job("adagrad", {"a": np.ones(3, np.float32)})
    assert job.store.export().steps == {"a": 0}
    group = {**job.groups[0], "initial_accumulator_value": 0.5}
    job.apply(GroupAdded(CALLER, group, [("b", np.ones(2, np.float32))]))
    exported = job.store.export()
    assert exported.steps == {"a": 0, "b": 0}
    assert exported.state["sum/a"].tolist() == [0.0] * 3
    assert exported.state["sum/b"].tolist() == [0.5] * 2
    saved = through_files(job)
    made = Job.from_document("id", None, saved.document, saved.parameters, saved.state, select("numpy"), "next")
    assert contents(made) == contents(job)


@pytest.mark.parametrize(("name", "key"), [("nadam", "mu_product/matrix"), ("adafactor", "row_var/matrix")])
def test_a_checkpoint_whose_state_has_another_shape_is_refused(name: str, key: str) -> None:
    job = new_job(name, allowed(name))
    job.apply(round_of(job, 0))
    saved, before = through_files(job), contents(job)
    state = {**saved.state, key: np.ones(5, np.float32)}
    with pytest.raises(errors.CheckpointMismatchError, match=r"has shape \(5,\); it must have \("):
        Job.from_document("id", None, saved.document, saved.parameters, state, select("numpy"), "next")
    with pytest.raises(errors.CheckpointMismatchError, match=r"has shape \(5,\); it must have \("):
        job.checked_restore(Restored(CALLER, "restored", saved.document, saved.parameters, state))
    assert contents(job) == before

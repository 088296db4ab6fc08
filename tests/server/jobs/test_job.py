"""`Job.apply`: each record, replay, and the round trip through a document."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from optserve.server.backends import select
from optserve.server.jobs import Job
from optserve.server.jobs import spec as specs
from optserve.server.records import (
    Caller,
    CheckpointDeleted,
    Decision,
    GroupAdded,
    GroupUpdated,
    Initialized,
    Joined,
    Left,
    Record,
    Restored,
    RoundApplied,
    ScheduleSet,
    ScheduleStepped,
    StateLoaded,
)
from optserve.v1 import jobs_pb2, types_pb2
from optserve.wire import dtypes, errors
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
    return RoundApplied((caller(seq, "s"), caller(seq, "t")), decision, flats)


def contents(job: Job) -> dict[str, Any]:
    """Everything of a job, tensors as bytes."""
    exported = job.store.export()
    tensors = {
        f"{kind}:{key}": array.tobytes() for kind in ("values", "state") for key, array in getattr(exported, kind).items()
    }
    return {"document": job.to_document(exported.steps), **tensors}


def same(one: Job, other: Job) -> None:
    left, right = contents(one), contents(other)
    assert left["document"] == right["document"]
    assert left == right


def test_initialized_lets_the_job_begin() -> None:
    job = new_job()
    assert not job.initialized
    job.apply(Initialized())
    assert job.initialized
    assert (job.position.version, job.position.step) == (1, 0)


def test_joined_and_left_change_the_members() -> None:
    job = new_job()
    job.apply(Joined("a", 0, "s", 1))
    assert job.sessions.member_at(0).name == "a"
    job.apply(Joined("a", 0, "t", 2))
    assert job.sessions.member_of("s") is None
    assert "'a' (rank 0)" in job.sessions.fenced["s"]
    job.apply(Left("a"))
    assert job.sessions.members["a"].left
    assert job.position.version == 3


def test_group_updated_and_added() -> None:
    job = new_job()
    job.apply(GroupUpdated(caller(1), 1, job.checked_update(1, {"lr": 0.25})))
    assert job.learning_rates == [0.1, 0.25]
    added = GroupAdded(caller(2), {**job.groups[0], "lr": 3.0}, [("x", np.full(3, 7.0, np.float32))])
    job.apply(added)
    assert job.learning_rates == [0.1, 0.25, 3.0]
    assert job.group_names(2) == ["x"]
    np.testing.assert_array_equal(job.store.export().values["x"], np.full(3, 7.0, np.float32))
    assert job.sessions.last_seq("s") == 2


def test_schedule_set_stepped_and_removed() -> None:
    job = new_job()
    result = job.apply(ScheduleSet(caller(1), "StepLR", {"step_size": 1, "gamma": 0.5}))
    assert result.value["learning_rates"] == [0.1, 0.1]
    assert job.apply(ScheduleStepped(caller(2), 0, None)).value["learning_rates"] == [0.05, 0.05]
    assert job.schedule_steps == 0
    job.apply(ScheduleStepped(caller(3), 1, None))
    assert (job.schedule_steps, job.learning_rates) == (1, [0.025, 0.025])
    again = job.apply(ScheduleStepped(caller(1, "t"), 1, None))
    assert (job.schedule_steps, job.learning_rates) == (1, [0.025, 0.025])
    assert again.value["learning_rates"] == [0.025, 0.025]
    job.apply(ScheduleSet(caller(4), "", {}))
    assert job.schedule is None
    assert job.learning_rates == [0.025, 0.025]


def test_a_group_added_under_a_schedule_takes_part_in_it() -> None:
    job = new_job()
    job.apply(ScheduleSet(caller(1), "ExponentialLR", {"gamma": 0.5}))
    job.apply(ScheduleStepped(caller(2), 0, None))
    job.apply(GroupAdded(caller(3), {**dict(job.plan.optimizer.defaults), "lr": 8.0}, [("x", np.zeros(3, np.float32))]))
    job.apply(ScheduleStepped(caller(4), 0, None))
    assert job.learning_rates == [0.025, 0.025, 4.0]


def test_a_round_is_a_step_and_a_skipped_one_is_not() -> None:
    job = new_job()
    job.apply(Initialized())
    before = contents(job)
    result = job.apply(round_of(job, 1, 1, skip="nonfinite"))
    assert (result.position.version, result.position.step) == (2, 0)
    assert result.value["skip_reason"] == "nonfinite"
    after = contents(job)
    assert {key: value for key, value in after.items() if key != "document"} == {
        key: value for key, value in before.items() if key != "document"
    }
    result = job.apply(round_of(job, 1, 2))
    assert (result.position.version, result.position.step) == (3, 1)
    assert result.value == {"learning_rates": [0.1, 0.1], "grad_norm": 1.5, "skip_reason": "", "ranks": [0, 1]}
    assert job.metrics == {"loss": 1.0}
    assert job.sessions.results["s"][1] == job.sessions.results["t"][1] == result


def test_absent_parameters_are_left_alone() -> None:
    job = new_job()
    job.apply(Initialized())
    job.apply(round_of(job, 1, 1, absent=frozenset({0, 3})))
    exported = job.store.export()
    np.testing.assert_array_equal(exported.values["w"], PARAMETERS[0]["w"])
    np.testing.assert_array_equal(exported.values["s"], PARAMETERS[1]["s"])
    assert exported.steps.get("w", 0) == exported.steps.get("s", 0) == 0
    assert exported.steps["h"] == exported.steps["d"] == 1


def test_state_loaded_replaces_state_and_groups_but_not_parameters() -> None:
    job = new_job()
    job.apply(Initialized())
    job.apply(round_of(job, 1, 1))
    saved = job.store.export()
    groups = [dict(group, lr=0.75) for group in job.groups]
    job.apply(round_of(job, 2, 2))
    values = job.store.export().values
    job.apply(StateLoaded(caller(3), groups, saved.steps, saved.state))
    now = job.store.export()
    assert now.steps == saved.steps
    assert job.learning_rates == [0.75, 0.75]
    for name, value in values.items():
        np.testing.assert_array_equal(now.values[name], value)
    for key, array in saved.state.items():
        if not key.startswith("master/"):
            np.testing.assert_array_equal(now.state[key], array)


def test_restored_puts_everything_back_in_a_new_lineage() -> None:
    job = new_job()
    for record in (Initialized(), Joined("a", 0, "s", 1), ScheduleSet(caller(1, "admin", 0), "ExponentialLR", {"gamma": 0.5})):
        job.apply(record)
    job.apply(round_of(job, 1, 1))
    saved = job.store.export()
    document = json.loads(json.dumps(job.to_document(saved.steps)))
    before = contents(job)
    for seq in (2, 3):
        job.apply(round_of(job, seq, seq))
        job.apply(ScheduleStepped(caller(seq, "admin", 0), seq - 1, None))
    result = job.apply(Restored(caller(4, "admin", 0), "second", document, saved.values, saved.state))
    assert (result.position.lineage_id, result.position.version, result.position.step) == ("second", 4, 1)
    after = contents(job)
    for key, value in before.items():
        if key != "document":
            assert after[key] == value, key
    assert job.learning_rates == [0.1, 0.1]
    assert job.sessions.last_seq("admin") == 4
    assert job.sessions.last_seq("s") == 3
    with pytest.raises(errors.RolledBackError):
        job.check_seen("first", 5)
    job.check_seen("first", 4)


def test_checkpoint_deleted_stores_the_result() -> None:
    job = new_job()
    result = job.apply(CheckpointDeleted(caller(1), "c"))
    assert job.sessions.repeated(caller(1)) == result


ARGUMENTS: dict[str, dict[str, Any]] = {
    "StepLR": {"step_size": 2, "gamma": 0.5},
    "CosineAnnealingLR": {"T_max": 5},
    "SequentialLR": {"schedulers": [("LinearLR", {"total_iters": 3}), ("ExponentialLR", {"gamma": 0.9})], "milestones": [2]},
    "CyclicLR": {"base_lr": 0.01, "max_lr": 0.1, "step_size_up": 2, "mode": "triangular2"},
    "ReduceLROnPlateau": {"patience": 0, "min_lr": 1e-3},
    "": {},
}
EDITS = st.one_of(
    st.tuples(st.just("round"), st.integers(0, 99), st.sets(st.integers(0, 3), max_size=4), st.booleans()),
    st.tuples(st.just("lr"), st.integers(0, 1), st.floats(0.001, 1)),
    st.tuples(st.just("schedule"), st.sampled_from(list(ARGUMENTS))),
    st.tuples(st.just("step")),
    st.tuples(st.just("join"), st.sampled_from(["a", "b"]), st.integers(0, 1)),
    st.tuples(st.just("leave"), st.sampled_from(["a", "b"])),
    st.tuples(st.just("add")),
    st.tuples(st.just("save")),
    st.tuples(st.just("restore")),
    st.tuples(st.just("load")),
)


class History:
    """Turns drawn edits into the records that the job allows, applying each."""

    def __init__(self, job: Job) -> None:
        self.job, self.seq, self.records, self.saved = job, 0, [Initialized()], None
        job.apply(self.records[0])

    def edit(self, edit: tuple[Any, ...]) -> None:
        self.seq += 1
        record = self.record(*edit)
        if record is not None:
            self.records.append(copy.deepcopy(record))
            self.job.apply(record)

    def record(self, kind: str, *given_: Any) -> Record | None:
        job, who = self.job, caller(self.seq)
        exported = job.store.export()
        match kind:
            case "round":
                seed, absent, skip = given_
                return round_of(job, seed, self.seq, frozenset(absent), "nonfinite" if skip else "")
            case "lr":
                return GroupUpdated(who, given_[0], job.checked_update(given_[0], {"lr": given_[1]}))
            case "schedule":
                return ScheduleSet(who, given_[0], ARGUMENTS[given_[0]])
            case "step" if job.schedule is not None:
                return ScheduleStepped(who, job.schedule_steps + 1, 0.5 if job.schedule.schedule.takes_metric else None)
            case "join":
                epoch = job.sessions.epochs.get(given_[0], 0) + 1
                return Joined(given_[0], given_[1], f"session{self.seq}", epoch)
            case "leave" if given_[0] in job.sessions.members:
                return Left(given_[0])
            case "add" if len(job.groups) < 4:
                name = f"added{len(job.groups)}"
                return GroupAdded(who, dict(job.plan.optimizer.defaults), [(name, np.full(3, 0.5, np.float32))])
            case "save":
                self.saved = json.loads(json.dumps(job.to_document(exported.steps))), exported
            case "restore" if self.saved is not None:
                document, tensors = self.saved
                if len(document["groups"]) == len(job.groups):
                    return Restored(who, f"lineage{self.seq}", document, tensors.values, tensors.state)
            case "load":
                state = {key: array for key, array in exported.state.items() if not key.startswith("master/")}
                return StateLoaded(who, [dict(group) for group in job.groups], exported.steps, state)
        return None


@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
@given(edits=st.lists(EDITS, max_size=14))
def test_any_history_replayed_on_a_second_job_gives_the_same_job(optimizer: str, edits: list[tuple[Any, ...]]) -> None:
    defaults = {"momentum": 0.9} if optimizer == "sgd" else {}
    first = new_job(optimizer, **defaults)
    history = History(first)
    for edit in edits:
        history.edit(edit)
    second = new_job(optimizer, **defaults)
    for record in history.records:
        second.apply(record)
    same(first, second)


@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
@given(edits=st.lists(EDITS, max_size=14))
def test_any_job_comes_back_from_its_document(optimizer: str, edits: list[tuple[Any, ...]]) -> None:
    first = new_job(optimizer, **({"momentum": 0.9} if optimizer == "sgd" else {}))
    history = History(first)
    for edit in edits:
        history.edit(edit)
    exported = first.store.export()
    document = json.loads(json.dumps(first.to_document(exported.steps)))
    second = Job.from_document("id", None, document, exported.values, exported.state, select("numpy"), "next")
    assert (second.position.version, second.position.step) == (first.position.version, first.position.step)
    assert second.groups == first.groups
    assert second.sessions == first.sessions
    assert second.schedule == first.schedule
    assert second.schedule_steps == first.schedule_steps
    assert second.metrics == first.metrics or first.metrics == {}
    record = round_of(first, 5, history.seq + 1)
    again = round_of(second, 5, history.seq + 1)
    first.apply(record)
    second.apply(again)
    left, right = contents(first), contents(second)
    for key, value in left.items():
        if key != "document":
            assert right[key] == value, key


def test_a_new_job_of_a_document_has_no_members_and_no_past() -> None:
    job = new_job()
    for record in (Initialized(), Joined("a", 0, "s", 1)):
        job.apply(record)
    job.apply(round_of(job, 1, 1))
    exported = job.store.export()
    document = job.to_document(exported.steps)
    made = Job.from_document("other", "k", document, exported.values, exported.state, select("numpy"), "next")
    assert made.name == "k"
    assert not made.sessions.members
    assert made.sessions.last_seq("s") == 0
    assert made.position.step == 1
    made.check_seen("first", 0)


@pytest.mark.parametrize(
    "damage",
    [
        lambda d: d.pop("spec"),
        lambda d: d.pop("groups"),
        lambda d: d.pop("position"),
        lambda d: d.pop("sessions"),
        lambda d: d["spec"].update(optimizer="SGD"),
        lambda d: d["spec"].update(nonsense=1),
        lambda d: d["group_parameters"][0].append("other"),
        lambda d: d["groups"].pop(),
        lambda d: d["groups"][0].update(lr="fast"),
        lambda d: (d.update(schedule=None), d["groups"][0].pop("initial_lr"), d["groups"][0].update(lr=-1.0)),
        lambda d: d["position"].update(version="x"),
        lambda d: d["position"].update(version=None),
        lambda d: d.update(groups=3),
        lambda d: d.update(schedule={"name": "NoLR"}),
        lambda d: d.update(schedule=[1]),
        lambda d: d["schedule"]["state"].update(base_lrs=[0.1]),
        lambda d: d["groups"][0].update(max_lr="high"),
        lambda d: d.update(metrics=None),
        lambda d: d.update(metrics={"loss": "high"}),
        lambda d: d["sessions"].update(members=[{"name": "a"}]),
        lambda d: d["history"].update(ended={"first": "x"}),
    ],
    ids=range(21),
)
def test_a_document_that_does_not_fit_is_a_typed_error(damage: Callable[[dict[str, Any]], None]) -> None:
    job = new_job()
    for record in (Initialized(), ScheduleSet(caller(1, "admin", 0), "ExponentialLR", {"gamma": 0.5})):
        job.apply(record)
    exported = job.store.export()
    document = json.loads(json.dumps(job.to_document(exported.steps)))
    damage(document)
    with pytest.raises(errors.CheckpointMismatchError):
        Job.from_document("id", None, document, exported.values, exported.state, select("numpy"), "next")


def test_a_document_of_another_jobs_parameters_is_refused() -> None:
    job = new_job()
    job.apply(Initialized())
    document = job.to_document({})
    document["group_parameters"] = [["w", "h"], ["d", "other"]]
    with pytest.raises(errors.CheckpointMismatchError, match="other, s"):
        job.checked_document(document)
    document = job.to_document({})
    document["spec"]["optimizer"] = "SGD"
    with pytest.raises(errors.CheckpointMismatchError, match="the checkpoint is of SGD, the job of Adam"):
        job.checked_document(document)

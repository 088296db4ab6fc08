"""Any history of records: replayed it gives the same job, and the job comes back from its document."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from recorded_jobs import caller, contents, new_job, round_of, same

from optserve.server.backends import select
from optserve.server.jobs import Job, parameters
from optserve.server.records import (
    Caller,
    GroupAdded,
    GroupUpdated,
    Initialized,
    Joined,
    Left,
    ParameterRemoved,
    ParameterRenamed,
    ParameterReplaced,
    Record,
    Restored,
    RoundApplied,
    Rules,
    RulesUpdated,
    ScheduleSet,
    ScheduleStepped,
    StateLoaded,
)
from optserve.wire import errors

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
    st.tuples(st.just("load some"), st.sets(st.integers(0, 3))),
    st.tuples(st.just("rules"), st.integers(1, 3)),
    st.tuples(st.just("accumulate"), st.integers(0, 9), st.sets(st.integers(0, 3))),
    st.tuples(st.just("rename"), st.integers(0, 3)),
    st.tuples(st.just("replace"), st.integers(0, 3), st.sampled_from([(3, 4), (2,), ()]), st.booleans()),
    st.tuples(st.just("remove"), st.integers(0, 3)),
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
                record = Restored(who, f"lineage{self.seq}", document, tensors.values, tensors.tensors)
                return self.allowed(record, job.checked_restore, errors.CheckpointMismatchError)
            case "load":
                state = {key: array for key, array in exported.state.items() if not key.startswith("master/")}
                return StateLoaded(who, [dict(group) for group in job.groups], exported.steps, state)
            case "load some":
                names = {place.name for place in job.store.layout.places if place.index in given_[0]}
                state = {key: array for key, array in exported.state.items() if key.partition("/")[2] in names}
                steps = {name: count + 1 for name, count in exported.steps.items() if name in names}
                return StateLoaded(who, [dict(group) for group in job.groups], steps, state, frozenset(names))
            case "rules" if not job.store.window.rounds:
                return RulesUpdated(who, Rules(clip_grad_norm=1.0, accumulation=given_[0]))
            case "accumulate" if job.store.window.rounds + 1 < job.rules.accumulation:
                return self.accumulated(*given_)
            case "rename" | "replace" | "remove":
                return self.edited(who, kind, *given_)
        return None

    def accumulated(self, seed: int, absent: set[int]) -> RoundApplied:
        """A round that waits for the step."""
        made, window = round_of(self.job, seed, self.seq), self.job.store.window
        sums, present = window.added(made.gradients, frozenset(range(len(self.job.store.layout.places))) - absent, 0.5)
        decision = replace(made.decision, absent=made.decision.absent | absent - present, accumulated=window.rounds + 1)
        return replace(made, decision=decision, gradients=sums)

    def edited(self, who: Caller, kind: str, at: int, shape: tuple[int, ...] = (), keeps: bool = False) -> Record | None:
        """An edit of a parameter."""
        places = self.job.store.layout.places
        name, value = places[at % len(places)].name, np.full(shape, 0.25, np.float32)
        records: dict[str, parameters.Edit] = {
            "rename": ParameterRenamed(who, name, f"renamed{self.seq}"),
            "replace": ParameterReplaced(who, name, value, keeps),
            "remove": ParameterRemoved(who, name),
        }
        return self.allowed(records[kind], lambda record: parameters.checked(self.job, record), errors.InputError)

    @staticmethod
    def allowed(record: Any, check: Callable[[Any], object], refusal: type[errors.OptserveError]) -> Record | None:
        try:
            check(record)
        except refusal:
            return None
        found: Record = record
        return found


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
    second = Job.from_document("id", None, document, exported.values, exported.tensors, select("numpy"), "next")
    assert (second.position.version, second.position.step) == (first.position.version, first.position.step)
    assert second.groups == first.groups
    assert second.rules == first.rules
    assert second.store.layout == first.store.layout
    assert second.store.window.rounds == first.store.window.rounds
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

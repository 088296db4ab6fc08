"""What rounds are logged as is all that they did: replayed on a new job, and if the log fails nothing has happened."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
from recorded_jobs import contents

from optserve.server.jobs import Job
from optserve.server.records import Caller, Initialized, ParameterRenamed, ParameterReplaced, Record, RoundApplied
from optserve.server.rounds.contributions import Trial
from optserve.server.rounds.tickets import Done, Resend
from optserve.v1 import data_pb2, jobs_pb2, types_pb2
from optserve.wire import dtypes, errors, rows
from optserve.wire.rows import Rows

Build = Callable[..., Any]

START = {
    "table": np.linspace(-1, 1, 40, dtype=np.float32).reshape(10, 4),
    "w": np.linspace(1, 2, 37, dtype=np.float32),
    "none": np.zeros((0, 3), np.float16),
    "d": np.full((2, 2), 0.5),
}
OPTIMIZERS: Mapping[str, tuple[str, dict[str, Any], frozenset[str]]] = {
    "adam": ("adam", {"lr": 0.01, "amsgrad": True}, frozenset()),
    "sgd": ("sgd", {"lr": 0.1}, frozenset({"table"})),
    "momentum": ("sgd", {"lr": 0.1, "momentum": 0.9}, frozenset({"table"})),
    "adagrad": ("adagrad", {"lr": 0.1}, frozenset({"table"})),
    "sparseadam": ("sparseadam", {"lr": 0.1}, frozenset({"table", "w", "d"})),
}
NEW = ("", 0)


@dataclass
class Log:
    """Keeps every record as it was when it was logged; `failing`: refuses the next one."""

    records: list[Record] = field(default_factory=list)
    failing: bool = False

    def append(self, record: Record) -> None:
        if self.failing:
            self.failing = False
            raise errors.StorageError("the disk is full")
        self.records.append(copy.deepcopy(record))


@dataclass
class Part:
    """What one rank pushes."""

    dense: dict[str, np.ndarray]
    sparse: dict[str, tuple[np.ndarray, np.ndarray]]
    head: dict[str, Any]


class History:
    """Random rounds and edits of a job of two ranks."""

    def __init__(self, house: Build, optimizer: str, seed: int, **spec: Any) -> None:
        name, defaults, self.sparse = OPTIMIZERS[optimizer]
        self.random, self.noise = random.Random(seed), np.random.default_rng(seed)
        self.log, self.start = Log(), START
        if optimizer == "sparseadam":
            self.start = {name: value for name, value in START.items() if name != "none"}
        self.house = house(self.start, optimizer=name, defaults=defaults, workers=2, **spec)
        self.host = self.house.running.host
        self.first = Job("job-0", self.host.job.plan, self.host.job.store.backend, self.host.job.position.lineage_id)
        self.host.journal = self.log
        self.ranks = [self.house.join(rank=at) for at in range(2)]
        self.calls = 0

    @property
    def job(self) -> Job:
        found: Job = self.host.job
        return found

    def replayed(self) -> Job:
        """The records on a job that has the initial values."""
        self.first.store.set_values(self.start)
        for record in [Initialized(), *self.log.records]:
            self.first.apply(record)
        return self.first

    def caller(self) -> Caller:
        self.calls += 1
        return Caller("admin", 0, self.calls, f"call {self.calls}")

    # Rounds

    def part(self, kinds: Mapping[str, str], head: dict[str, Any]) -> Part:
        dense: dict[str, np.ndarray] = {}
        sparse: dict[str, tuple[np.ndarray, np.ndarray]] = {}
        for place in self.job.store.layout.places:
            kind = kinds[place.name]
            if self.random.random() < 0.15:
                continue
            if kind == "sparse":
                ids = self.noise.integers(0, place.shape[0], self.random.randint(0, 12))
                sparse[place.name] = ids, self.noise.normal(size=(ids.size, *place.shape[1:])).astype(place.dtype)
            else:
                dense[place.name] = np.asarray(self.noise.normal(size=place.shape)).astype(place.dtype)
        return Part(dense, sparse, {"weight": self.random.choice([1.0, 0.5, 3.0, 0.7]), **head})

    def drawn(self) -> list[Part]:
        """A round: what each rank pushes."""
        kinds = {
            place.name: "sparse" if place.name.rstrip("0123456789") in self.sparse else "dense"
            for place in self.job.store.layout.places
        }
        head: dict[str, Any] = {}
        chance = self.random.random()
        if chance < 0.2:
            head["loss_scale"] = 1024.0
        elif chance < 0.3:
            head["clip_grad_norm"] = 0.5
        elif chance < 0.4:
            head["clip_grad_value"] = 0.1
        parts = [self.part(kinds, {**head, "metrics": {"loss": self.random.random()}}) for _ in self.ranks]
        if self.random.random() < 0.15:
            at = self.random.choice([0, 1])
            kind = self.random.choice([data_pb2.CONTRIBUTION_SKIP, data_pb2.CONTRIBUTION_NONFINITE])
            parts[at] = Part({}, {}, {"kind": kind, "weight": float(kind == data_pb2.CONTRIBUTION_NONFINITE)})
        if self.random.random() < 0.2:
            changes = {0: {"lr": self.lr}}
            for part in parts:
                part.head["changes"] = changes
        return parts

    @property
    def lr(self) -> float:
        return self.random.choice([0.3, 0.2, 0.05])

    def send(self, rank: Any, part: Part) -> Any:
        layout = self.job.store.layout
        entries = tuple(
            types_pb2.RowsEntry(parameter=layout.place(name).index, count=len(ids), dtype=dtypes.to_wire(values.dtype))
            for name, (ids, values) in part.sparse.items()
        )
        bundle = [Rows(ids, values) for ids, values in part.sparse.values()]
        while True:
            ticket = rank.begin(rank.push({**part.dense, **part.sparse}, sparse=entries, **part.head))
            if part.head.get("kind", data_pb2.CONTRIBUTION_GRADIENT) == data_pb2.CONTRIBUTION_GRADIENT:
                rank.offer(ticket, *rank.chunks(part.dense), *rows.chunks(bundle))
            outcome = rank.finish(ticket)
            if not isinstance(outcome, Resend):
                return outcome

    def round(self, parts: Sequence[Part]) -> None:
        """Fails as the round does."""
        if not self.host.sync:
            for rank, part in zip(self.ranks, parts, strict=True):
                self.send(rank, part)
            return
        other = self.ranks[0].in_thread(lambda: self.send(self.ranks[0], parts[0]))
        try:
            assert isinstance(self.send(self.ranks[1], parts[1]), Done)
        finally:
            error = other.exception(20)
        if error is not None:
            raise error

    # Edits

    def edit(self) -> None:
        """One that the job allows now, or none."""
        running, job = self.house.running, self.job
        between = not job.store.window.rounds
        match self.random.choice(["lr", "clip", "accumulation", "rename", "replace", "join"]):
            case "lr":
                running.administration.update_group(self.caller(), NEW, 0, {"lr": self.lr})
            case "clip":
                name = self.random.choice(["clip_grad_norm", "clip_grad_value"])
                rules: dict[str, Any] = {"clip_grad_norm": None, "clip_grad_value": None}
                running.administration.update_rules(self.caller(), NEW, rules | {name: self.random.choice([None, 0.3, 2.0])})
            case "accumulation" if between:
                running.administration.update_rules(self.caller(), NEW, {"accumulation": self.random.randint(1, 3)})
            case "rename" if between:
                name = self.random.choice(["w", "d"])
                if name in job.store.layout.by_name:
                    record = ParameterRenamed(self.caller(), name, f"{name}{self.calls}")
                    running.parameter_edits.edit(record.caller, NEW, record)
            case "replace" if between:
                value = np.full((self.random.randint(2, 12), 4), 0.125, np.float32)
                replaced = ParameterReplaced(self.caller(), "table", value, False)
                running.parameter_edits.edit(replaced.caller, NEW, replaced)
            case "join":
                at = self.random.choice([0, 1])
                self.ranks[at] = self.house.join(f"rank{at}", at, f"session {self.random.random()}")

    def fail_to_edit(self) -> None:
        before, state, calls = contents(self.job), self.random.getstate(), self.calls
        self.log.failing = True
        with suppress(errors.StorageError):  # what is not allowed now is no edit
            self.edit()
        assert contents(self.job) == before
        self.log.failing, self.calls = False, calls
        self.random.setstate(state)

    def go(self, count: int) -> None:
        for _ in range(count):
            if self.random.random() < 0.3:
                self.edit()
            self.round(self.drawn())


CONSISTENCIES = {"sync": jobs_pb2.CONSISTENCY_SYNC, "async": jobs_pb2.CONSISTENCY_ASYNC}


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("consistency", CONSISTENCIES)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_any_history_of_rounds_replayed_on_a_new_job_gives_the_same_job(
    house: Build, optimizer: str, consistency: str, seed: int
) -> None:
    history = History(house, optimizer, seed, consistency=CONSISTENCIES[consistency])
    history.go(14)
    assert sum(isinstance(record, RoundApplied) for record in history.log.records) >= 14
    assert contents(history.replayed()) == contents(history.job)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_log_that_fails_leaves_the_job_as_it_was(house: Build, optimizer: str, seed: int) -> None:
    history = History(house, optimizer, seed)
    for _ in range(10):
        if history.random.random() < 0.5:
            history.fail_to_edit()
            history.edit()
        parts = history.drawn()
        before = contents(history.job)
        history.log.failing = True
        with pytest.raises(errors.StorageError, match="full"):
            history.round(parts)
        assert contents(history.job) == before
        history.round(parts)
    assert contents(history.replayed()) == contents(history.job)


# Searches


def closure(rank: int, weights: Mapping[int, np.ndarray]) -> tuple[float, np.ndarray]:
    """Of a valley that is not the same for both ranks, in float64."""
    w = np.asarray(weights[0])[:4]
    a = np.array([1.0, 4.0, 9.0, 2.0 + rank])
    return float((a * (w - rank) ** 4).sum()), 4 * a * (w - rank) ** 3


def step(rank: Any, at: int, token: str, sparse: bool) -> Any:
    """What worker.step(closure) does."""
    job, evaluation, weights = rank.running.job, 0, None
    while True:
        with rank.running.host.changed:
            weights = weights or job.store.snapshot()
        loss, gradient = closure(at, weights)
        dense, entries, bundle = {"w": gradient.reshape(4, 1)}, (), []
        if sparse:
            ids = np.flatnonzero(gradient) if at else np.zeros(0, np.int64)
            dense = {}
            entries = (types_pb2.RowsEntry(parameter=0, count=len(ids), dtype=dtypes.to_wire(np.dtype(np.float64))),)
            bundle = [Rows(ids, gradient[ids].reshape(len(ids), 1))]
        push = rank.push({"w": gradient}, loss=loss, evaluation=evaluation, fingerprint=token, sparse=entries)
        ticket = rank.begin(push)
        rank.offer(ticket, *rank.chunks(dense), *rows.chunks(bundle))
        outcome = rank.finish(ticket)
        if isinstance(outcome, Done):
            return outcome
        weights, evaluation = (outcome.arrays, outcome.evaluation) if isinstance(outcome, Trial) else (None, 0)


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("line_search_fn", [None, "strong_wolfe"])
def test_searches_replayed_on_a_new_job_give_the_same_job_and_a_log_that_fails_leaves_it(
    house: Build, line_search_fn: str | None, sparse: bool
) -> None:
    start = {"w": np.array([[3.0], [-2.0], [0.5], [1.5]])}
    defaults = {"lr": 0.1, "max_iter": 4, "history_size": 3, "line_search_fn": line_search_fn}
    running = house(start, optimizer="lbfgs", defaults=defaults, workers=2)
    host, log = running.running.host, Log()
    second = Job("job-0", host.job.plan, host.job.store.backend, host.job.position.lineage_id)
    host.journal = log
    ranks = [running.join(rank=at) for at in range(2)]
    for number in range(5):
        for fails in (True, False):
            before = contents(host.job)
            log.failing = fails
            other = ranks[0].in_thread(lambda: step(ranks[0], 0, f"step {number}", sparse))  # noqa: B023
            if fails:
                with pytest.raises(errors.StorageError, match="full"):
                    step(ranks[1], 1, f"step {number}", sparse)
                assert isinstance(other.exception(20), errors.StorageError)
                assert contents(host.job) == before
            else:
                assert step(ranks[1], 1, f"step {number}", sparse).result == other.result(20).result
    second.store.set_values(start)
    for record in [Initialized(), *log.records]:
        second.apply(record)
    assert contents(second) == contents(host.job)

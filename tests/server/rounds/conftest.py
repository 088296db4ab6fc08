"""A job that runs without a server around it, with a clock that only the test moves."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
from every_backend import backend_named

from optserve.server.durability.journal import NullJournal
from optserve.server.jobs.sessions import Member
from optserve.server.records import Caller, Changes
from optserve.server.rounds.contributions import Push, Trial
from optserve.server.rounds.registry import Registry, Running
from optserve.server.rounds.tickets import Done, Resend, Ticket, Waiting
from optserve.v1 import data_pb2, jobs_pb2, types_pb2
from optserve.wire import dtypes, errors
from optserve.wire.chunks import Chunk, array_chunks
from optserve.wire.values import to_hyperparameters

Arrays = Mapping[str, np.ndarray]


class Clock:
    """Stands still until it is moved; then the job's waiters look again."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.wake: list[Callable[[], None]] = []

    def __call__(self) -> float:
        return self.now

    def advance(self, seconds: float) -> None:
        self.now += seconds
        for wake in self.wake:
            wake()


@dataclass
class Rank:
    """One worker of the job: makes pushes, and sends them as a stream's handler would."""

    running: Running
    member: Member
    seq: int = 0
    connected: bool = True
    threads: list[threading.Thread] = field(default_factory=list)

    def alive(self) -> bool:
        return self.connected

    def push(
        self,
        gradients: Arrays | None,
        weight: float = 1.0,
        kind: int = data_pb2.CONTRIBUTION_GRADIENT,
        metrics: Mapping[str, float] | None = None,
        seq: int | None = None,
        fingerprint: str = "",
        parameter_count: int | None = None,
        changes: Changes | None = None,
        **more: Any,
    ) -> Push:
        """The head of a push of the next sequence number. `more` are other fields of Push."""
        places = self.running.job.store.layout.places
        absent = [place.index for place in places if place.name not in (gradients or {})]
        count = len(places) if parameter_count is None else parameter_count
        caller = Caller(self.member.session_id, self.member.epoch, seq or self.seq + 1, fingerprint)
        own = dict(metrics or {})
        return Push(caller, ("", 0), kind, weight, count, frozenset(absent), own, changes=changes or {}, **more)

    def chunks(self, gradients: Arrays, kinds: Mapping[int, Any] | None = None) -> list[Chunk]:
        """Every chunk of the gradient, zeros for what is absent. `kinds`: the dtypes of arrays that have another one here."""
        layout = self.running.job.store.layout
        dtypes_of = {array.array_id: array.dtype for array in layout.arrays} | (kinds or {})
        flats = {array.array_id: np.zeros(array.length, dtypes_of[array.array_id]) for array in layout.arrays}
        for place in layout.places:
            if place.name in gradients:
                reals = np.ascontiguousarray(gradients[place.name]).reshape(-1)
                reals = reals.view(dtypes.storage_dtype(reals.dtype))
                flats[place.array_id][place.offset : place.offset + place.size] = reals
        present = [place.index for place in layout.places if place.name in gradients]
        return [
            chunk
            for array_id, blocks in layout.blocks_of(present, dtypes_of).items()
            for chunk in array_chunks(array_id, flats[array_id].view(np.uint8).data, blocks)
        ]

    def begin(self, push: Push) -> Ticket:
        return self.running.pushes.begin(push, self.alive)

    def offer(self, ticket: Ticket, *chunks: Chunk) -> None:
        for chunk in chunks:
            self.running.pushes.offer(ticket, chunk, self.alive)

    def finish(self, ticket: Ticket) -> Done | Trial | Resend | Waiting:
        """Until there is an outcome other than Waiting."""
        while isinstance(outcome := self.running.pushes.finish(ticket, self.alive), Waiting):
            pass
        if isinstance(outcome, Done):
            self.seq = max(self.seq, ticket.push.caller.seq)
        return outcome

    def send(self, gradients: Arrays, **head: Any) -> Done | Trial | Resend:
        """A whole push."""
        ticket = self.begin(self.push(gradients, **head))
        self.offer(ticket, *self.chunks(gradients))
        return self.finish(ticket)

    def in_thread(self, work: Callable[[], Any]) -> Future[Any]:
        """Runs it beside the test."""
        future: Future[Any] = Future()

        def run() -> None:
            try:
                future.set_result(work())
            except BaseException as error:
                future.set_exception(error)

        thread = threading.Thread(target=run, daemon=True)
        self.threads.append(thread)
        thread.start()
        return future

    def lose(self) -> None:
        """Its stream ends."""
        self.connected = False
        stream = object()
        self.running.host.stream_opened(self.member.session_id, stream)
        self.running.host.stream_ended(self.member.session_id, stream)
        self.running.host.wake()


@dataclass
class House:
    """A registry with one job, its clock and its ranks."""

    registry: Registry
    clock: Clock
    running: Running
    ranks: list[Rank] = field(default_factory=list)

    def join(self, name: str = "", rank: int | None = None, session_id: str | None = None) -> Rank:
        session_id = session_id or f"session-{len(self.ranks)}"
        member = self.running.host.join(name, rank, session_id, ("", 0))
        self.ranks.append(Rank(self.running, member, self.running.job.sessions.last_seq(session_id)))
        return self.ranks[-1]

    def values(self) -> dict[str, np.ndarray]:
        store = self.running.job.store
        return {name: view.copy() for name, view in store.layout.views(store.snapshot()).items()}


def spec_of(parameters: Arrays, **fields: Any) -> jobs_pb2.JobSpec:
    """One group of SGD with lr 1 unless the fields say otherwise."""
    groups = [
        jobs_pb2.GroupSpec(
            parameters=[
                types_pb2.Parameter(name=name, shape=value.shape, dtype=dtypes.to_wire(value.dtype))
                for name, value in parameters.items()
            ]
        )
    ]
    settings = {"name": "j", "optimizer": "sgd", "workers": 1, "defaults": {"lr": 1.0}, "groups": groups, **fields}
    settings["defaults"] = to_hyperparameters(settings["defaults"])
    return jobs_pb2.JobSpec(**settings)


@pytest.fixture
def house() -> Iterator[Callable[..., House]]:
    """house(parameters, backend's name, **JobSpec fields) -> House, with the initial values in place."""
    made: list[House] = []

    def build(parameters: Arrays, backend: str = "numpy", **fields: Any) -> House:
        clock = Clock()
        registry = Registry(backend_named(backend), lambda _: NullJournal(), clock)
        running, _ = registry.create(f"job-{len(made)}", spec_of(parameters, **fields), "creator", False)
        clock.wake.append(running.host.wake)
        running.job.store.set_values(parameters)
        running.host.initialized()
        made.append(House(registry, clock, running))
        return made[-1]

    yield build
    for entry in made:
        entry.registry.close(errors.ServerStoppingError("the test is over"))
        for rank in entry.ranks:
            for thread in rank.threads:
                thread.join(20)
                assert not thread.is_alive(), "a push still waits"

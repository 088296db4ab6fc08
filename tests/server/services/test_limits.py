"""What a client asks for too much of, and how much of an answer or an error one message holds."""

from __future__ import annotations

import string
import uuid
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from urllib.parse import quote

import grpc
import numpy as np
import pytest

from optserve.client import Server
from optserve.server import interceptors
from optserve.server.app import App
from optserve.server.backends import select
from optserve.server.durability.journal import NullJournal
from optserve.server.jobs import spec as specs
from optserve.server.rounds.registry import Registry
from optserve.v1 import jobs_pb2, types_pb2
from optserve.wire import errors
from optserve.wire.values import to_hyperparameters

W = {"w": np.ones(8, np.float32)}
PRINTABLE = " " + string.punctuation.replace("%", "")
"""What gRPC sends of a status message as it is, besides letters and digits."""


def spec(groups: int = 1, **fields: Any) -> jobs_pb2.JobSpec:
    """Of one parameter a group, every hyperparameter said."""
    said = to_hyperparameters(dict(specs.find_optimizer("adam").defaults))
    return jobs_pb2.JobSpec(
        **{"optimizer": "adam", "workers": 1, "defaults": said, **fields},
        groups=[
            jobs_pb2.GroupSpec(
                hyperparameters=said,
                parameters=[types_pb2.Parameter(name=f"p{index}", shape=(1,), dtype=types_pb2.DATA_TYPE_FLOAT32)],
            )
            for index in range(groups)
        ],
    )


def many(count: int) -> Registry:
    registry = Registry(select("numpy"), lambda _: NullJournal())
    for index in range(count):
        registry.create(str(uuid.uuid4()), spec(name=f"experiment-{index:04d}"), "s", False)
    return registry


def test_an_unknown_job_names_eight_and_the_nearest() -> None:
    registry = many(40)
    with pytest.raises(errors.JobNotFoundError) as caught:
        registry.find("experiment-0031x")
    assert "did you mean 'experiment-0031'? jobs here: experiment-0000, " in str(caught.value)
    assert str(caught.value).endswith("experiment-0007 and 32 more")


@pytest.mark.parametrize(("count", "known"), [(0, "there is no job here"), (1, "jobs here: experiment-0000")])
def test_an_unknown_job_among_few(count: int, known: str) -> None:
    with pytest.raises(errors.JobNotFoundError, match=f"^no job 'zzz'; {known}$"):
        many(count).find("zzz")


def test_the_ids_of_deleted_jobs_are_forgotten_in_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("optserve.server.rounds.registry._DELETED_KEPT", 2)
    registry = many(3)
    ids = [running.job.job_id for running in registry.all()]
    assert [registry.delete(job_id) for job_id in ids] == [True] * 3
    assert [registry.delete(job_id) for job_id in ids[1:]] == [False] * 2
    with pytest.raises(errors.JobNotFoundError):
        registry.delete(ids[0])


@pytest.mark.parametrize("workers", [4097, 10**7])
def test_more_workers_than_a_round_can_keep_books_on_are_refused(client: Server, workers: int) -> None:
    with pytest.raises(errors.InvalidArgumentError, match=f"at most 4096 workers; workers is {workers}"):
        client.create_job("j", W, optimizer="sgd", lr=1.0, workers=workers)
    client.create_job("j", W, optimizer="sgd", lr=1.0, workers=4096)


def test_more_groups_than_a_message_describes_are_refused() -> None:
    with pytest.raises(errors.InvalidArgumentError, match="9000 parameters in 9000 groups, more than a message can describe"):
        specs.plan(spec(9000))


def test_what_is_accepted_can_be_described(client: Server) -> None:
    count = 2
    while True:
        try:
            specs.check_table([f"p{index}" for index in range(2 * count)], 2 * count)
        except errors.InvalidArgumentError:
            break
        count *= 2
    groups = [{"params": {f"p{index}": np.zeros(1, np.float32)}, "lr": 0.5} for index in range(count)]
    job = client.create_job("j", groups, optimizer="adam", lr=0.1)
    assert len(job.param_groups) == count > 1000


def test_events_come_in_pages(client: Server) -> None:
    job = client.create_job("j", W, optimizer="sgd", lr=1.0)
    metrics = {f"a_metric_of_a_name_that_is_rather_long_{index}": 0.125 + index for index in range(200)}
    with job.join() as worker:
        for _ in range(250):
            worker.push(W, metrics=metrics)
    request = jobs_pb2.ListEventsRequest(job_id=job.job_id)
    pages = []
    while True:
        answer = client._connection.once(request, jobs_pb2.ListEventsResponse)
        if not answer.events:
            break
        assert answer.ByteSize() <= 1 << 20
        pages.append(len(answer.events))
        assert [event.index for event in answer.events] == [request.after + 1 + count for count in range(pages[-1])]
        request.after = answer.events[-1].index
    assert len(pages) > 1
    assert sum(pages) > 250


def test_an_event_larger_than_a_page_comes_without_its_fields(client: Server, app: App) -> None:
    job = client.create_job("j", W, optimizer="sgd", lr=1.0)
    app.registry.find("j").host.announce("long", "a message", short="s", text="x" * (1 << 20))
    [found] = [event for event in job.events() if event.kind == "long"]
    assert found.message == "a message"
    assert not found.fields


def failed(error: errors.OptserveError) -> Any:
    """What a client of a server that answers with the error gets."""

    def answer(request: bytes, context: grpc.ServicerContext) -> bytes:
        interceptors.abort(context, error)

    with ThreadPoolExecutor(1) as pool:
        server = grpc.server(pool)
        handler = grpc.unary_unary_rpc_method_handler(answer)
        server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler("s", {"m": handler})])
        port = server.add_insecure_port("127.0.0.1:0")
        server.start()
        try:
            with grpc.insecure_channel(f"127.0.0.1:{port}") as channel, pytest.raises(grpc.RpcError) as caught:
                channel.unary_unary("/s/m")(b"", timeout=20)
        finally:
            server.stop(None).wait()
    return caught.value


@pytest.mark.parametrize(
    ("message", "beginning"),
    [
        ("x" * (1 << 20), "xxx"),
        ("\u00fc" * 100_000, "\u00fc\u00fc\u00fc"),
        ("%" * 9000, "%%%"),
        ("short", "short"),
        ("\ud800" * 5000, "???"),
    ],
)
def test_an_error_fits_into_trailers(message: str, beginning: str) -> None:
    facts = {f"fact {index}": "\u00e4" * 10_000 for index in range(100)}
    found = failed(errors.JobExistsError(message, **facts))
    assert found.code() == grpc.StatusCode.ALREADY_EXISTS
    assert found.details().startswith(beginning)
    details = sum(len(key) + len(value) * 4 // 3 for key, value in found.trailing_metadata())
    assert details + len(quote(found.details(), safe=PRINTABLE)) < 8 << 10


def test_a_short_error_comes_whole() -> None:
    info = interceptors._short({"from": "3", "to": "1", "lineage_id": "x" * 36})
    assert info == {"from": "3", "to": "1", "lineage_id": "x" * 36}
    assert interceptors._cut("x" * 256, 256) == "x" * 256
    assert interceptors._cut("x" * 257, 256) == "x" * 253 + "..."


def test_a_wait_of_nan_seconds_is_none(client: Server) -> None:
    job = client.create_job("j", W, optimizer="sgd", lr=1.0)
    request = jobs_pb2.WaitForVersionRequest(job_id=job.job_id, version=10**6, timeout_seconds=float("nan"))
    with pytest.raises(errors.DeadlineExceededError, match="did not reach version 1000000 within 0 s"):
        client._connection.once(request, jobs_pb2.WaitForVersionResponse, 10.0)

"""Push, Pull and Stream through the generated stubs alone, as another language would."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

import grpc
import ml_dtypes
import numpy as np
import pytest

from optserve.server.app import App
from optserve.v1 import data_pb2, types_pb2, workers_pb2
from optserve.wire.dtypes import state_dtype

MIB = 1 << 20
RNG = np.random.default_rng(7)


def model() -> dict[str, Any]:
    """Three flat arrays, one of three chunks."""
    return {
        "embedding": RNG.normal(size=(700, 1000)).astype(np.float32),
        "bias": RNG.normal(size=(7,)).astype(np.float32),
        "scalar": np.array(2.5, np.float32),
        "half": RNG.normal(size=(5, 3)).astype(ml_dtypes.bfloat16),
        "double": RNG.normal(size=(4,)),
        "empty": np.zeros((0, 3), np.float32),
        "complex": RNG.normal(size=(4, 5, 2)).astype(np.float32).view(np.complex64)[..., 0],
        "wide": RNG.normal(size=6).view(np.complex128),
    }


def ones(arrays: dict[str, Any]) -> dict[str, Any]:
    return {name: np.ones_like(array) for name, array in arrays.items()}


def test_values_come_back_as_they_were_sent(foreign: Any) -> None:
    arrays = model()
    foreign.create(arrays)
    position = foreign.initialize()
    assert position.version == 1
    assert position.lineage_id
    for name, found in foreign.weights().items():
        np.testing.assert_array_equal(found, arrays[name])


def test_pull_sends_only_the_blocks_of_the_parameters_asked_for(foreign: Any) -> None:
    arrays = model()
    foreign.ready(arrays)
    found = foreign.pull(["double"])
    [double] = [entry for entry in foreign.layout.parameters if entry.name == "double"]
    assert list(found) == [double.array_id]


def test_pull_sends_the_layout_if_asked(foreign: Any) -> None:
    foreign.ready(model())
    request = data_pb2.PullRequest(job_id=foreign.job.job_id, include_layout=True)
    begin = next(iter(foreign.data.Pull(request, timeout=20))).begin
    assert begin.layout == foreign.layout
    assert begin.layout_version == foreign.layout.layout_version


def test_a_push_is_one_step(foreign: Any) -> None:
    arrays = model()
    foreign.ready(arrays)
    result = foreign.push(ones(arrays), metrics={"loss": 0.5})
    assert result.seq == 1
    assert result.position.step == 1
    assert list(result.ranks) == [0]
    assert list(result.learning_rates) == [1.0]
    assert result.grad_norm == pytest.approx(np.sqrt(sum(array.size for array in arrays.values())))
    assert not result.skipped
    for name, found in foreign.weights().items():
        expected = arrays[name].astype(state_dtype(arrays[name].dtype)) - 1
        np.testing.assert_array_equal(found, expected.astype(arrays[name].dtype))


def test_a_repeated_push_gets_the_same_bytes(foreign: Any) -> None:
    arrays = model()
    foreign.ready(arrays)
    items = list(foreign.push_items(ones(arrays), content_fingerprint=5))
    first = foreign.data.Push(iter(items), timeout=20).result
    weights = foreign.weights()
    again = foreign.data.Push(iter(items), timeout=20).result
    for timing in ("waited_seconds",):
        first.ClearField(timing)
        again.ClearField(timing)
    assert again.SerializeToString(deterministic=True) == first.SerializeToString(deterministic=True)
    for name, found in foreign.weights().items():
        np.testing.assert_array_equal(found, weights[name])


def test_a_stream_opens_pushes_and_pulls(foreign: Any, open_stream: Callable[..., Any]) -> None:
    arrays = model()
    foreign.ready(arrays)
    stream = open_stream(foreign)
    opened = stream.receive("opened")
    assert opened.last_seq == 0
    assert opened.position.version == 2
    for step in (1, 2, 3):
        stream.push(foreign, ones(arrays), want_weights=True)
        pushed = stream.receive("pushed")
        assert (pushed.seq, pushed.position.step) == (step, step)
        foreign.seq = pushed.seq
        begin, weights = stream.receive_weights(foreign)
        assert begin.position == pushed.position
        np.testing.assert_array_equal(weights["double"], arrays["double"] - 1.0 * step if step == 1 else weights["double"])
    stream.send(pull=data_pb2.PullWeights())
    begin, pulled = stream.receive_weights(foreign)
    assert begin.position.step == 3
    for name, found in foreign.weights().items():
        np.testing.assert_array_equal(pulled[name], found)


def test_a_push_without_weights_is_answered_with_the_result_alone(foreign: Any, open_stream: Callable[..., Any]) -> None:
    arrays = model()
    foreign.ready(arrays)
    stream = open_stream(foreign)
    stream.receive("opened")
    for _ in range(2):
        stream.push(foreign, ones(arrays))
        foreign.seq = stream.receive("pushed").seq


def test_a_stream_that_reopens_says_which_call_was_the_last(foreign: Any, open_stream: Callable[..., Any]) -> None:
    foreign.ready(model())
    foreign.push(ones(foreign.arrays))
    stream = open_stream(foreign)
    assert stream.receive("opened").last_seq == 1


def test_an_error_on_a_stream_leaves_it_usable(foreign: Any, open_stream: Callable[..., Any]) -> None:
    arrays = model()
    foreign.ready(arrays)
    stream = open_stream(foreign)
    stream.receive("opened")
    stream.push(foreign, ones(arrays), weight=-1.0)
    error = stream.receive("error")
    assert error.reason == types_pb2.ERROR_REASON_INVALID_ARGUMENT
    assert "weight is -1.0" in error.message
    stream.push(foreign, ones(arrays), call=foreign.identity(seq=5))
    assert stream.receive("error").reason == types_pb2.ERROR_REASON_SEQUENCE_GAP
    stream.push(foreign, {**ones(arrays), "bias": np.full(7, np.nan, np.float32)})
    error = stream.receive("error")
    assert error.reason == types_pb2.ERROR_REASON_NONFINITE_GRADIENT
    assert "'bias'" in error.message
    stream.push(foreign, ones(arrays))
    assert stream.receive("pushed").position.step == 1


def test_a_gradient_without_some_parameters_leaves_them_alone(foreign: Any) -> None:
    arrays = model()
    foreign.ready(arrays)
    gradients = {"bias": np.ones(7, np.float32), "double": np.ones(4)}
    index = {entry.name: entry for entry in foreign.layout.parameters}

    def items() -> Any:
        yield data_pb2.PushRequest(begin=foreign.begin(gradients))
        length = next(array.length for array in foreign.layout.arrays if array.array_id == index["double"].array_id)
        flat = np.zeros(length)
        flat[index["double"].offset :][:4] = 1
        yield data_pb2.PushRequest(chunk=types_pb2.TensorChunk(array_id=index["double"].array_id, data=flat.tobytes()))
        length = next(array.length for array in foreign.layout.arrays if array.array_id == index["bias"].array_id)
        flat32 = np.zeros(length, np.float32)
        flat32[index["bias"].offset :][:7] = 1
        offset = index["bias"].offset * 4 // MIB * MIB
        data = flat32.tobytes()[offset : offset + MIB]
        yield data_pb2.PushRequest(chunk=types_pb2.TensorChunk(array_id=index["bias"].array_id, offset=offset, data=data))
        yield data_pb2.PushRequest(end=types_pb2.StreamEnd())

    foreign.data.Push(items(), timeout=20)
    weights = foreign.weights()
    np.testing.assert_array_equal(weights["embedding"], arrays["embedding"])
    np.testing.assert_array_equal(weights["half"], arrays["half"])
    np.testing.assert_array_equal(weights["bias"], arrays["bias"] - 1)
    np.testing.assert_array_equal(weights["double"], arrays["double"] - 1)


def test_a_client_of_an_older_layout_leaves_out_what_it_does_not_know(foreign: Any, build: Any) -> None:
    """It announces fewer parameters than the job has meanwhile."""
    from optserve.v1 import optimizer_pb2

    arrays = {"w": np.zeros(3, np.float32)}
    foreign.ready(arrays)
    admin = foreign.another()
    added = {"v": np.full(2, 9.0, np.float32)}
    entry = types_pb2.BundleEntry(parameter="v", shape=[2], dtype=types_pb2.DATA_TYPE_FLOAT32)
    begin = optimizer_pb2.AddGroupBegin(call=admin.identity(), group=build.group(added), entries=[entry], bundle_bytes=64)
    data = added["v"].tobytes() + bytes(56)
    request = optimizer_pb2.AddGroupRequest
    answer = admin.optimizer.AddGroup(
        iter(
            [
                request(begin=begin),
                request(chunk=types_pb2.TensorChunk(data=data)),
                request(end=types_pb2.StreamEnd()),
            ]
        ),
        timeout=20,
    )
    assert [entry.name for entry in answer.layout.parameters] == ["w", "v"]
    foreign.push(ones(arrays))
    foreign.job.layout.CopyFrom(answer.layout)
    foreign.arrays = {**arrays, **added}
    weights = foreign.weights()
    np.testing.assert_array_equal(weights["v"], added["v"])
    np.testing.assert_array_equal(weights["w"], -np.ones(3, np.float32))


def test_two_workers_on_streams_get_the_mean(foreign: Any, open_stream: Callable[..., Any]) -> None:
    arrays = {"w": np.zeros((600, 1000), np.float32)}
    foreign.ready(arrays, workers=2)
    other = foreign.another()
    other.join()
    streams = [open_stream(foreign), open_stream(other)]
    for stream in streams:
        stream.receive("opened")
    streams[1].push(other, {"w": np.full((600, 1000), 3.0, np.float32)}, want_weights=True)
    streams[0].push(foreign, ones(arrays), want_weights=True)
    for stream, rank in zip(streams, (foreign, other), strict=True):
        pushed = stream.receive("pushed")
        assert list(pushed.ranks) == [0, 1]
        _, weights = stream.receive_weights(rank)
        np.testing.assert_array_equal(weights["w"], np.full((600, 1000), -2.0, np.float32))


def test_a_waiting_push_is_told_whom_it_waits_for(
    foreign: Any, open_stream: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    from optserve.server.rounds import pushes

    monkeypatch.setattr(pushes, "NOTICE_SECONDS", 0.05)
    foreign.ready({"w": np.zeros(3, np.float32)}, workers=3)
    other = foreign.another()
    other.join(name="w1", rank=1)
    stream = open_stream(foreign)
    stream.receive("opened")
    stream.push(foreign, ones(foreign.arrays))
    waiting = stream.receive("waiting")
    assert waiting.round == 1
    assert waiting.waited_seconds >= 0.05
    assert [(member.rank, member.name, member.alive) for member in waiting.missing] == [(1, "w1", True), (2, "", False)]


def test_a_member_that_is_cut_off_half_way_makes_the_other_send_again(
    foreign: Any, open_stream: Callable[..., Any], build: Any, app: App, until: Callable[..., Any]
) -> None:
    arrays = {"w": np.zeros((600, 1000), np.float32)}
    foreign.ready(arrays, workers=2)
    other = foreign.another()
    other.join()
    first, second = open_stream(foreign), open_stream(other)
    first.receive("opened")
    second.receive("opened")
    first.send(push=foreign.begin(arrays))
    first.send(chunk=next(build.chunks(foreign.layout, ones(arrays))))
    running = app.registry.find("j")

    def folded() -> bool:
        gather = running.pushes._round.gather
        return gather is not None and any(c.folded_any for c in gather.contributions.values())

    until(folded, "the first chunk is folded")
    second.push(other, ones(arrays))
    gather = running.pushes._round.gather
    until(lambda: 1 in gather.contributions and gather.contributions[1].ended, "the other push is whole")
    first.close()
    assert second.receive("resend").round == 1
    again = open_stream(foreign)
    assert again.receive("opened").last_seq == 0
    second.push(other, ones(arrays))
    again.push(foreign, ones(arrays))
    assert list(again.receive("pushed").ranks) == [0, 1]
    assert second.receive("pushed").position.step == 1
    np.testing.assert_array_equal(foreign.weights()["w"], -np.ones((600, 1000), np.float32))


def test_the_end_of_an_old_stream_does_not_shorten_the_lease_of_a_new_one(
    foreign: Any, open_stream: Callable[..., Any], app: App, until: Callable[..., Any]
) -> None:
    """A client gives a stream up and opens another; the server may notice in the other order."""
    foreign.ready({"w": np.zeros(3, np.float32)}, lease_seconds=100)
    old = open_stream(foreign)
    old.receive("opened")  # streams that open at the same time may be bound in either order
    new = open_stream(foreign)
    new.receive("opened")
    host = app.registry.find("j").host
    old.close()
    until(lambda: len(app._data.streams) == 1, "the old stream's handler ends")
    new.send(pull=data_pb2.PullWeights())
    new.receive_weights(foreign)
    assert host.leases.deadline(foreign.session_id) > time.monotonic() + 50


def test_a_stream_of_a_fenced_worker_gets_a_goodbye(foreign: Any, open_stream: Callable[..., Any]) -> None:
    foreign.ready({"w": np.zeros(3, np.float32)})
    stream = open_stream(foreign)
    stream.receive("opened")
    foreign.another().join(name="rank0")
    stream.push(foreign, ones(foreign.arrays))
    goodbye = stream.receive("goodbye")
    assert goodbye.error.reason == types_pb2.ERROR_REASON_FENCED
    assert "'rank0'" in goodbye.error.message


def test_a_stream_of_a_deleted_job_gets_a_goodbye(foreign: Any, open_stream: Callable[..., Any]) -> None:
    from optserve.v1 import jobs_pb2

    foreign.ready({"w": np.zeros(3, np.float32)})
    stream = open_stream(foreign)
    stream.receive("opened")
    foreign.jobs.DeleteJob(jobs_pb2.DeleteJobRequest(job_id=foreign.job.job_id), timeout=20)
    stream.push(foreign, ones(foreign.arrays))
    assert stream.receive("goodbye").error.reason == types_pb2.ERROR_REASON_JOB_NOT_FOUND


def test_a_stopping_server_says_goodbye_to_a_push_that_waits(
    foreign: Any, open_stream: Callable[..., Any], app: App, until: Callable[..., Any]
) -> None:
    foreign.ready({"w": np.zeros(3, np.float32)}, workers=2)
    stream = open_stream(foreign)
    stream.receive("opened")
    stream.push(foreign, ones(foreign.arrays))
    running = app.registry.find("j")
    until(lambda: running.pushes._round.busy, "the push waits")
    stopping = threading.Thread(target=app.stop)
    stopping.start()
    assert stream.receive("goodbye").error.reason == types_pb2.ERROR_REASON_SERVER_STOPPING
    stopping.join(20)
    assert not stopping.is_alive()


def test_a_stop_right_after_an_answer_does_not_wait_for_the_grace_to_end(
    foreign: Any, open_stream: Callable[..., Any], app: App, monkeypatch: pytest.MonkeyPatch, until: Callable[..., Any]
) -> None:
    """The stream's handler has answered, and finds the server stopping before it waits for the next request."""
    from optserve.server.services.data import OpenStreams

    foreign.ready({"w": np.zeros(3, np.float32)})
    stream = open_stream(foreign)
    stream.receive("opened")
    until(lambda: all(app._data.streams._idle.values()), "the handler waits for a request")
    stopping = threading.Event()
    mark, hang_up = OpenStreams.mark, OpenStreams.hang_up

    def late(self: OpenStreams, context: Any, idle: bool) -> None:
        if idle:
            stopping.wait(20)
        mark(self, context, idle)

    def told(self: OpenStreams) -> None:
        hang_up(self)
        stopping.set()

    monkeypatch.setattr(OpenStreams, "mark", late)
    monkeypatch.setattr(OpenStreams, "hang_up", told)
    stream.push(foreign, ones(foreign.arrays))
    stream.receive("pushed")
    began = time.monotonic()
    app.stop(10.0)
    assert time.monotonic() - began < 5


def test_more_streams_than_the_server_takes_are_refused(
    start_app: Callable[..., App], open_stream: Callable[..., Any], foreign: Any, channel: grpc.Channel
) -> None:
    app = start_app(max_streams=2)
    with grpc.insecure_channel(app.address) as connection:
        client = type(foreign)(connection)
        client.ready({"w": np.zeros(3, np.float32)}, workers=3)
        others = [client.another() for _ in range(2)]
        for other in others:
            other.join()
        streams = [open_stream(client), open_stream(others[0])]
        for stream in streams:
            stream.receive("opened")
        refused = open_stream(others[1]).failure()
        assert refused.reason == "TOO_MANY_STREAMS"
        assert refused.code is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert "--max-streams allows 2" in refused.message
        # Other calls go on, and a stream that ends makes room.
        client.workers.Heartbeat(
            workers_pb2.HeartbeatRequest(job_id=client.job.job_id, session_id=client.session_id, epoch=client.epoch), timeout=5
        )
        streams[0].half_close()
        with pytest.raises(StopIteration):
            next(streams[0]._call)
        open_stream(others[1]).receive("opened")

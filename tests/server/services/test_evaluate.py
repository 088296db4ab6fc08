"""What a push of a step with a closure is answered with: another point to evaluate it at, on the worker's stream."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from optserve.v1 import data_pb2, types_pb2

LIMIT = 64 << 10


def flat(chunks: list[types_pb2.TensorChunk]) -> Any:
    """Of a job of one array."""
    assert [chunk.offset for chunk in chunks] == [at << 20 for at in range(len(chunks))]
    return np.frombuffer(b"".join(chunk.data for chunk in chunks), np.float32)


def answered(stream: Any) -> tuple[str, Any, Any]:
    """What came, and with `evaluate` the weights."""
    answer = next(stream._call)
    content = answer.WhichOneof("content")
    if content != "evaluate":
        return content, getattr(answer, content), None
    begin, chunks = answer.evaluate.weights, list(answer.evaluate.weights.inline.chunks)
    if not begin.HasField("inline"):
        while (follower := next(stream._call)).WhichOneof("content") == "chunk":
            chunks.append(follower.chunk)
        assert follower.WhichOneof("content") == "end"
    return content, answer.evaluate, flat(chunks)


@pytest.mark.parametrize(("size", "inline"), [(50, LIMIT), (50, 0), (300_000, LIMIT)], ids=["inline", "asked whole", "large"])
def test_the_search_goes_from_point_to_point(foreign: Any, open_stream: Callable[..., Any], size: int, inline: int) -> None:
    start = np.linspace(1, 2, size, dtype=np.float32)
    foreign.ready({"w": start}, optimizer="lbfgs", defaults={"lr": 0.5, "max_iter": 3})
    stream = open_stream(foreign)
    stream.receive("opened")
    position, at, points = foreign.position(), start, []
    for evaluation in range(10):
        stream.push(
            foreign,
            {"w": at.copy()},  # of half the sum of squares
            loss=float((at.astype(np.float64) ** 2).sum() / 2),
            closure=11,
            evaluation=evaluation,
            want_weights=True,
            inline_weights_bytes=inline,
        )
        content, answer, weights = answered(stream)
        if content == "pushed":
            break
        assert content == "evaluate", answer
        assert answer.evaluation == evaluation + 1
        assert answer.weights.layout_version == foreign.layout.layout_version
        assert answer.weights.HasField("inline") == (size == 50 and inline > 0)
        at = weights[:size]
        points.append(float(np.abs(at).max()))
        assert foreign.position() == position
    assert points == sorted(points, reverse=True)
    assert 0 < len(points) < 9
    assert answer.position.step == 1
    assert answer.evaluations == len(points) + 1


def test_an_abandoned_search_leaves_the_job_as_it_was(foreign: Any, open_stream: Callable[..., Any]) -> None:
    start = np.linspace(1, 2, 50, dtype=np.float32)
    foreign.ready({"w": start}, optimizer="lbfgs")
    stream = open_stream(foreign)
    stream.receive("opened")
    stream.push(foreign, {"w": start}, loss=1.0, closure=11)
    assert answered(stream)[0] == "evaluate"
    abandon = foreign.begin({}, contribution=data_pb2.CONTRIBUTION_ABANDON, closure=11, evaluation=1)
    stream.send(push=abandon)
    stream.send(end=types_pb2.StreamEnd())
    error = stream.receive("error")
    assert error.reason == types_pb2.ERROR_REASON_ROUND_FAILED
    assert "rank 0" in error.message
    assert foreign.position().step == 0
    np.testing.assert_array_equal(foreign.weights()["w"], start)
    stream.push(foreign, {"w": start}, loss=1.0, closure=12)
    assert answered(stream)[0] == "evaluate"


def test_an_evaluation_that_nobody_asked_for_begins_again(foreign: Any, open_stream: Callable[..., Any]) -> None:
    foreign.ready({"w": np.ones(50, np.float32)}, optimizer="lbfgs")
    stream = open_stream(foreign)
    stream.receive("opened")
    stream.push(foreign, {"w": np.ones(50, np.float32)}, loss=1.0, closure=11, evaluation=4)
    assert stream.receive("resend").restart

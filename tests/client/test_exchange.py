"""Pushes and pulls on a worker's stream, against a server whose answers are written down."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from written_answers import (
    AWAY,
    FLOAT32,
    GRADIENTS,
    LAYOUT,
    RENAMED,
    STALE,
    TOUCHED,
    Answer,
    Quadratic,
    Written,
    begin_of,
    evaluate,
    evaluations,
    joined,
    opened,
    pushed,
    resend,
    weights,
)

from optserve.v1 import data_pb2
from optserve.wire import errors
from optserve.wire.layout import Layout


def test_the_options_of_a_push_travel_with_it() -> None:
    transport = Written([opened(0), pushed(1), pushed(2), pushed(3)])
    worker = joined(transport)
    worker.push(GRADIENTS, 2.0, {"accuracy": 0.5}, loss_scale=8, clip_grad_norm=1)
    worker.push(None, found_inf=True)
    worker.push(GRADIENTS, clip_grad_value=np.float32(0.5))
    first, second, third = transport.begins
    assert (first.weight, first.loss_scale, first.clip_grad_norm, dict(first.metrics)) == (2, 8, 1, {"accuracy": 0.5})
    assert not first.HasField("clip_grad_value")
    assert (second.contribution, list(second.nonfinite)) == (data_pb2.CONTRIBUTION_NONFINITE, [])
    assert (third.clip_grad_value, third.HasField("loss_scale")) == (0.5, False)
    assert {begin.layout_version for begin in transport.begins} == {LAYOUT.version}


CALLS: dict[str, Callable[..., object]] = {
    "push": lambda worker, **options: worker.push(GRADIENTS, **options),
    "push_pull": lambda worker, **options: worker.push_pull(GRADIENTS, **options),
    "push_pull_async": lambda worker, **options: worker.push_pull_async(GRADIENTS, **options),
    "step": lambda worker, **options: worker.step(Quadratic(), **options),
}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss_scale": 0}, "loss_scale is 0"),
        ({"loss_scale": -1.0}, "loss_scale is -1"),
        ({"loss_scale": np.inf}, "loss_scale is inf"),
        ({"clip_grad_norm": 0}, "clip_grad_norm is 0"),
        ({"clip_grad_value": np.nan}, "clip_grad_value is nan"),
        ({"clip_grad_norm": 1, "clip_grad_value": 1}, "clip_grad_norm is 1 and clip_grad_value is 1"),
        ({"weight": -1}, "weight is -1"),
        ({"metrics": {"loss": "low"}}, "loss"),
    ],
)
def test_options_that_are_not_allowed_are_refused_before_anything_is_sent(call: str, options: Any, message: str) -> None:
    transport = Written([opened(0)])
    worker = joined(transport)
    with pytest.raises(errors.InvalidArgumentError, match=message):
        CALLS[call](worker, **options)
    assert transport.said == ["open"]


def test_rows_are_asked_for_with_the_layout_that_they_are_of() -> None:
    rows = Layout().extended(0, [("w", (3, 1), FLOAT32)])

    def some(seq: int = 0) -> Any:
        begin = data_pb2.WeightsBegin(layout_version=99)
        return pushed(seq, weights=begin) if seq else Answer(weights=begin)

    transport = Written([opened(0), STALE, some(), STALE], [opened(0)], layouts=[rows, rows])
    worker = joined(transport)
    worker._session.layout = rows
    with pytest.raises(errors.StaleLayoutError):
        worker.pull(rows={"w": [2, 0, 2]})
    (asked,) = transport.asked
    assert [(entry.parameter, list(entry.deltas)) for entry in asked.rows] == [(0, [0, 2])]
    assert asked.layout_version == rows.version
    for bad in ({"w": [3]}, {"w": [-1]}, {"v": [0]}):
        with pytest.raises(errors.InputError):
            worker.push_pull({"w": np.ones((3, 1))}, rows=bad)
    assert transport.said == ["open", "pull"]


def test_a_push_of_a_layout_that_is_gone_is_made_again_of_the_new_one() -> None:
    transport = Written([opened(0), STALE, pushed(1), STALE, pushed(2, weights=begin_of(2, TOUCHED))], layouts=[TOUCHED])
    worker = joined(transport)
    worker.update_group(0, lr=0.5)
    worker.push(GRADIENTS)
    assert [begin.layout_version for begin in transport.begins] == [1, 2]
    assert transport.changes[0] == transport.changes[1] != []
    worker._session.layout = LAYOUT
    assert worker.push_pull(GRADIENTS)["w"].tolist() == [2, 2, 2]
    assert [begin.layout_version for begin in transport.begins] == [1, 2, 1, 2]


def test_gradients_that_fit_no_longer_are_the_users_error_and_the_worker_goes_on() -> None:
    transport = Written([opened(0), STALE, pushed(1), weights(1, RENAMED)], layouts=[RENAMED])
    worker = joined(transport)
    worker.update_group(0, lr=0.5)
    with pytest.raises(errors.UnknownParameterError, match="gradient 'w' is not in the job"):
        worker.push(GRADIENTS)
    worker.push({"x": GRADIENTS["w"]})
    assert transport.changes[1] != [], "the edit was not lost"
    assert worker.pull()["x"].tolist() == [1, 1, 1]


def test_a_layout_that_is_refused_though_it_is_the_newest_is_no_endless_loop() -> None:
    transport = Written([opened(0), STALE, STALE])
    worker = joined(transport)
    for call in (lambda: worker.push(GRADIENTS), lambda: worker.push_pull(GRADIENTS)):
        with pytest.raises(errors.StaleLayoutError):
            call()
    assert len(transport.begins) == 2


def test_arrays_that_do_not_fit_the_known_layout_are_looked_at_with_the_newest() -> None:
    replaced = Layout(2, Layout().extended(0, [("w", (4,), FLOAT32)]).places, LAYOUT.arrays, 2)
    transport = Written([opened(0), pushed(1)], layouts=[LAYOUT, replaced])
    worker = joined(transport)
    larger = {"w": np.ones(4, np.float32)}
    with pytest.raises(errors.ShapeMismatchError):
        worker.push(larger)
    worker.push(larger)
    assert transport.begins[0].layout_version == 2


@pytest.mark.parametrize("cut", [False, True])
def test_weights_that_are_stale_right_after_the_step_are_pulled_and_the_push_is_not_made_again(cut: bool) -> None:
    first: list[Any] = [opened(0), pushed(1), AWAY] if cut else [opened(0), pushed(1), STALE, weights(2, RENAMED)]
    transport = Written(first, [opened(1), STALE, weights(2, RENAMED)], layouts=[RENAMED])
    worker = joined(transport)
    assert worker.push_pull(GRADIENTS)["x"].tolist() == [2, 2, 2]
    assert len(transport.begins) == 1


def test_a_push_that_was_applied_is_not_made_again_whatever_becomes_of_the_pull_after_it() -> None:
    transport = Written([opened(0), pushed(1, weights=begin_of(1, TOUCHED)), STALE, pushed(2)], layouts=[TOUCHED])
    worker = joined(transport)
    with pytest.raises(errors.StaleLayoutError):
        worker.push_pull(GRADIENTS)
    assert len(transport.begins) == 1
    assert worker.push(GRADIENTS).step == 2


def test_a_rank_that_sits_out_says_so_once_and_the_server_searches_without_it() -> None:
    after = pushed(1, weights=begin_of(1, value=9))
    transport = Written([opened(0), resend(), AWAY], [opened(0), after, pushed(2)])
    worker = joined(transport)
    worker.update_group(0, lr=0.5)
    assert worker.skip_round({"seen": 0})["w"].tolist() == [9, 9, 9]
    assert [(begin.contribution, begin.closure) for begin in transport.begins] == [(data_pb2.CONTRIBUTION_SKIP, 0)] * 3
    assert evaluations(transport) == [0, 0, 0]
    assert [len(changes) for changes in transport.changes] == [1, 1, 1]
    worker.push(GRADIENTS)
    assert (transport.pushes[-1].seq, transport.changes[-1]) == (2, [])


def test_a_plain_push_is_not_answered_with_an_evaluation() -> None:
    transport = Written([opened(0), evaluate(1, 2)], [opened(0), pushed(1)])
    worker = joined(transport)
    with pytest.raises(errors.ProtocolViolationError, match="as if it had one"):
        worker.push(GRADIENTS)


@pytest.mark.parametrize("answer", [evaluate(0, 1.0), Answer(evaluate=data_pb2.Evaluate(evaluation=1))])
def test_an_evaluation_that_makes_no_sense_is_a_typed_error(answer: Any) -> None:
    if answer.evaluate.evaluation:
        answer.evaluate.weights.layout_version = LAYOUT.version
        answer.evaluate.weights.inline.SetInParent()
    transport = Written([opened(0), weights(3), answer], [opened(0), weights(3), pushed(1)])
    worker = joined(transport)
    with pytest.raises(errors.ProtocolViolationError):
        worker.step(Quadratic())
    assert worker.step(Quadratic()) == 3.0

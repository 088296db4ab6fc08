"""Closures that raise or return no loss, against a server whose answers are written down."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from written_answers import (
    AWAY,
    GRADIENTS,
    Quadratic,
    Written,
    error,
    evaluate,
    goodbye,
    joined,
    one_call,
    opened,
    pushed,
    resend,
    weights,
)

from optserve.client import _exchange
from optserve.client._worker import Worker
from optserve.v1 import data_pb2
from optserve.wire import errors

FAILED = error(errors.RoundFailedError("the closure of rank 0 failed"))


@pytest.mark.parametrize("kind", [KeyError, KeyboardInterrupt, errors.ServerUnavailableError])
def test_a_closure_that_raises_at_once_has_sent_nothing(kind: type[BaseException]) -> None:
    failure = kind("mine")
    transport = Written([opened(0), weights(3), weights(3), pushed(1)])
    worker = joined(transport)
    worker.update_group(0, lr=0.5)
    with pytest.raises(kind) as caught:
        worker.step(Quadratic(_0=failure))
    assert caught.value is failure
    assert transport.said == ["open", "pull"]
    assert worker.step(Quadratic()) == 3.0
    assert len(transport.changes[0]) == 1, "the edit goes with the next step"


@pytest.mark.parametrize("kind", [KeyError, KeyboardInterrupt, errors.ServerUnavailableError])
@pytest.mark.parametrize("number", [1, 2])
def test_a_closure_that_raises_later_gives_the_search_up(kind: type[BaseException], number: int) -> None:
    failure = kind("mine")
    points = [evaluate(1, 2), evaluate(2, 1)][:number]
    transport = Written([opened(0), weights(3), *points, FAILED, weights(3), pushed(1)])
    worker = joined(transport)
    worker.update_group(0, lr=0.5)
    with pytest.raises(kind) as caught:
        worker.step(Quadratic(**{f"_{number}": failure}))
    assert caught.value is failure
    assert caught.value.__cause__ is None
    last = transport.begins[-1]
    assert (last.contribution, last.evaluation) == (data_pb2.CONTRIBUTION_ABANDON, number)
    assert one_call(transport)
    assert worker.step(Quadratic()) == 3.0
    assert transport.pushes[-1].seq == 1
    assert len(transport.changes[-1]) == 1


@pytest.mark.parametrize(
    "answers",
    [
        [AWAY],
        [error(errors.OutOfMemoryError("full"))],
        [pushed(1)],
        [resend(restart=True)],
        [errors.DeadlineExceededError("stood still")],
    ],
    ids=["away", "server error", "pushed", "restart", "silence"],
)
def test_a_search_that_cannot_be_given_up_is_logged_and_the_closures_error_stays(
    answers: list[Any], caplog: pytest.LogCaptureFixture
) -> None:
    refused = [[AWAY]] if answers == [AWAY] else []
    transport = Written([opened(0), weights(3), evaluate(1, 2), *answers], *refused, [opened(0), weights(3), pushed(1)])
    worker = joined(transport, retry_seconds=0.07)
    with pytest.raises(KeyError, match="mine"):
        worker.step(Quadratic(_1=KeyError("mine")))
    said = [entry.getMessage() for entry in caplog.records if "could not say that its closure failed" in entry.getMessage()]
    assert len(said) == 1
    assert said[0].startswith("worker 'rank0' of job 'job'")
    transport.streams = transport.streams[-1:]
    assert worker.step(Quadratic()) == 3.0


def test_giving_up_has_a_deadline_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_exchange, "_ABANDON_SECONDS", 0.05)
    transport = Written([opened(0), weights(3), evaluate(1, 2), AWAY], [AWAY], [AWAY], [opened(0), weights(3), pushed(1)])
    worker = joined(transport, retry_seconds=1000)
    with pytest.raises(KeyError, match="mine"):
        worker.step(Quadratic(_1=KeyError("mine")))
    assert transport.waits[3] == 0.05, "for the answer"
    transport.streams = transport.streams[-1:]
    assert worker.step(Quadratic()) == 3.0


def test_a_roll_back_that_is_told_when_a_search_is_given_up_drops_the_edits(caplog: pytest.LogCaptureFixture) -> None:
    facts = {"from": 9, "to": 5, "lineage_id": "two", "version": 5, "schedule_steps": 2}
    back = goodbye(errors.RolledBackError("back to 5", **facts))
    transport = Written([opened(8, 9), weights(9), evaluate(1, 2), back], [opened(3, 5), pushed(4)])
    worker = joined(transport)
    worker.update_group(0, lr=0.5)
    with caplog.at_level(logging.WARNING, "optserve.client"), pytest.raises(KeyError):
        worker.step(Quadratic(_1=KeyError("mine")))
    assert "back to 5" in caplog.text
    worker.push(GRADIENTS)
    assert not transport.changes[-1]


NO_LOSS: list[tuple[Any, str]] = [
    (None, "returned None; it must return"),
    (1.0, "returned something of type float"),
    ((1.0,), "returned 1 values"),
    ((1.0, GRADIENTS, 2), "returned 3 values"),
    (GRADIENTS, "returned something of type dict"),
    ((None, GRADIENTS), "loss is None; it must be one number"),
    (("1.0", GRADIENTS), "loss is something of type str"),
    ((np.ones(2), GRADIENTS), "loss is something of type ndarray"),
    ((1j, GRADIENTS), "loss is something of type complex"),
    ((GRADIENTS, 1.0), "loss is something of type dict"),
    ((np.nan, GRADIENTS), "loss is NaN"),
    ((np.float32(np.nan), GRADIENTS), "loss is NaN"),
]


@pytest.mark.parametrize("number", [0, 1])
@pytest.mark.parametrize(("found", "message"), NO_LOSS)
def test_a_closure_without_a_loss_is_refused(found: Any, message: str, number: int) -> None:
    points = [evaluate(1, 2), FAILED] if number else []
    transport = Written([opened(0), weights(3), *points, weights(3), pushed(1)])
    worker = joined(transport)
    answers = iter([*[(1.0, GRADIENTS)][:number], found])
    with pytest.raises(errors.InvalidArgumentError, match=message):
        worker.step(lambda _: next(answers))
    assert len(transport.begins) == 2 * number
    assert worker.step(Quadratic()) == 3.0


def test_gradients_that_do_not_fit_give_the_search_up_as_well() -> None:
    transport = Written([opened(0), weights(3), evaluate(1, 2), FAILED, weights(3), pushed(1)])
    worker = joined(transport)
    answers = iter([(1.0, GRADIENTS), (1.0, {"w": np.ones(4, np.float32)})])
    with pytest.raises(errors.ShapeMismatchError):
        worker.step(lambda _: next(answers))
    assert transport.begins[-1].contribution == data_pb2.CONTRIBUTION_ABANDON
    worker.step(Quadratic())


def torch_losses() -> list[Any]:
    import torch

    return [torch.tensor(1.5, requires_grad=True), torch.tensor([1.5], dtype=torch.bfloat16)]


@pytest.mark.parametrize("loss", [1.5, np.float32(1.5), np.array(1.5), np.array([[1.5]]), *torch_losses()])
def test_a_loss_is_whatever_is_one_number(loss: Any) -> None:
    found = joined(Written([opened(0), weights(3), pushed(1)])).step(lambda _: (loss, GRADIENTS))
    assert (type(found), found) == (float, 1.5)


def test_an_infinite_loss_is_a_loss() -> None:
    transport = Written([opened(0), weights(3), pushed(1)])
    assert joined(transport).step(lambda _: [np.inf, GRADIENTS]) == np.inf
    assert transport.begins[0].loss == np.inf


@pytest.mark.parametrize("closure", [None, 1.0, GRADIENTS])
def test_what_is_no_closure_is_refused(closure: Any) -> None:
    transport = Written([opened(0)])
    with pytest.raises(errors.InvalidArgumentError, match="it must be a function of the weights"):
        joined(transport).step(closure)
    assert transport.said == ["open"]


WITHIN: dict[str, Callable[[Worker], object]] = {
    "pull": Worker.pull,
    "push": lambda worker: worker.push(GRADIENTS),
    "push_pull": lambda worker: worker.push_pull(GRADIENTS),
    "push_pull_async": lambda worker: worker.push_pull_async(GRADIENTS),
    "skip_round": Worker.skip_round,
    "step": lambda worker: worker.step(Quadratic()),
    "update_group": lambda worker: worker.update_group(0, lr=0.5),
    "step_schedule": Worker.step_schedule,
}


@pytest.mark.parametrize("method", WITHIN)
def test_a_closure_that_calls_its_worker_is_refused_and_does_not_wait_for_itself(method: str) -> None:
    transport = Written([opened(0), weights(3), weights(3), pushed(1)])
    worker = joined(transport)

    def closure(_: Any) -> Any:
        WITHIN[method](worker)
        return 1.0, GRADIENTS

    with pytest.raises(errors.InvalidArgumentError, match=rf"the closure called worker\.{method}\(\); it gets the weights"):
        worker.step(closure)
    assert worker.step(Quadratic()) == 3.0


def test_a_closure_may_close_its_worker() -> None:
    worker = joined(Written([opened(0), weights(3)]))

    def closure(_: Any) -> Any:
        worker.leave()
        return 1.0, GRADIENTS

    with pytest.raises(errors.ClosedError, match="it has left"):
        worker.step(closure)


def test_a_closure_may_read_what_its_worker_knows() -> None:
    worker = joined(Written([opened(0), weights(3), pushed(1)]))
    seen = []

    def closure(_: Any) -> Any:
        seen.append((worker.rank, worker.name, worker.last_step, len(worker.param_groups)))
        return 1.0, GRADIENTS

    worker.step(closure)
    assert seen == [(0, "rank0", None, 1)]

"""Closures that raise, or give no loss or gradient, at any evaluation: the job is as it was."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
from valley import LBFGS, Array, Valley, all_of, raises, round_events, stepped

from optserve.client import Server, errors


def test_a_rank_whose_closure_raises_at_once_may_step_again(server: Server, embedded: Any, same: Any) -> None:
    valleys = [Valley(1), Valley(2)]
    _, weights = stepped(embedded, 1, Valley(1), Valley(2))
    job = server.create_job("j", valleys[0].zeros(), **LBFGS, workers=2)
    with job.join(rank=0) as first, job.join(rank=1) as second:
        before = job.position()

        def late() -> None:
            with pytest.raises(KeyError, match="mine"):
                second.step(valleys[1].begin(_0=raises(KeyError("mine"))))
            assert job.position() == before
            second.step(valleys[1].begin())

        assert all_of([lambda: first.step(valleys[0]), late])[1] is None
        same(first.pull(), weights)
        assert job.position().step == 1


@pytest.mark.parametrize("number", [1, 3])
@pytest.mark.parametrize("failing", [0, 1])
def test_a_rank_whose_closure_raises_later_ends_the_step_for_all_and_leaves_no_trace(
    server: Server, snapshot: Any, embedded: Any, same: Any, number: int, failing: int
) -> None:
    valleys = [Valley(1), Valley(2)]
    told, weights = stepped(embedded, 3, Valley(1), Valley(2))
    job = server.create_job("j", valleys[0].zeros(), **LBFGS, workers=2)
    workers = [job.join(rank=0, name="a"), job.join(rank=1, name="b")]

    def both() -> list[Any]:
        return all_of([lambda w=w, v=v: w.step(v) for w, v in zip(workers, valleys, strict=True)])

    both()
    before = snapshot(job)
    error = KeyError("mine")
    valleys[failing].begin(**{f"_{number}": raises(error)})
    found = both()
    assert found[failing] is error
    with pytest.raises(errors.RoundFailedError, match=f"the closure of rank {failing} '{'ab'[failing]}' failed"):
        raise found[1 - failing]
    assert snapshot(job) == before
    valleys[failing].begin()
    assert all(isinstance(loss, float) for loss in both() + both())
    same(workers[0].pull(), weights)
    assert workers[0].last_step.evaluations == told[-1].evaluations
    assert len(round_events(job)) == 3
    for worker in workers:
        worker.leave()


@pytest.mark.parametrize("bad", [None, 1.0, (None, {}), (np.nan, {}), ("low", {}), (1.0, {"w": np.ones(3)}), (1.0, {"v": 1})])
@pytest.mark.parametrize("number", [0, 2])
def test_what_is_no_loss_or_no_gradient_changes_nothing(embedded: Server, snapshot: Any, bad: Any, number: int) -> None:
    valley = Valley(1)
    job = embedded.create_job("j", valley.zeros(), **LBFGS)

    def closure(weights: Mapping[str, Array]) -> Any:
        good = valley(weights)
        return bad if valley.calls == number + 1 else good

    with job.join() as worker:
        before = snapshot(job)
        with pytest.raises(errors.InputError):
            worker.step(closure)
        assert snapshot(job) == before
        worker.step(valley.begin())
        assert worker.last_step.step == 1


def test_an_interrupt_in_a_closure_gives_the_search_up(server: Server) -> None:
    valleys = [Valley(1), Valley(2)]
    job = server.create_job(None, valleys[0].zeros(), **LBFGS, workers=2)
    with job.join(rank=0) as first, job.join(rank=1) as second:
        valleys[1].begin(_2=raises(KeyboardInterrupt()))
        found = all_of([lambda: first.step(valleys[0]), lambda: second.step(valleys[1])])
        assert [type(error) for error in found] == [errors.RoundFailedError, KeyboardInterrupt]
        found = all_of([lambda: first.step(valleys[0]), lambda: second.step(valleys[1])])
        assert all(isinstance(loss, float) for loss in found)


def test_nan_in_a_gradient_is_the_senders_and_the_others_go_on_with_its_next_step(server: Server) -> None:
    valleys = [Valley(1), Valley(2)]
    job = server.create_job(None, valleys[0].zeros(), **LBFGS, workers=2)

    def closure(weights: Mapping[str, Array]) -> Any:
        loss, gradients = valleys[1](weights)
        if valleys[1].calls == 2:
            gradients["b"][0] = np.nan
        return loss, gradients

    with job.join(rank=0) as first, job.join(rank=1) as second:

        def late() -> None:
            with pytest.raises(errors.NonfiniteGradientError, match="'b'"):
                second.step(closure)
            second.step(closure)

        found = all_of([lambda: first.step(valleys[0]), late])
        assert isinstance(found[0], float)
        assert found[1] is None
        assert job.position().step == 1

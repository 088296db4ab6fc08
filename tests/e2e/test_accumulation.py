"""Accumulation: k rounds of several workers equal torch's loop that adds up loss / k and steps every k-th time."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
import whole_steps as whole  # noqa: E402

from optserve.client import Server, StepInfo, connect, errors  # noqa: E402
from optserve.server.app import App  # noqa: E402

STEPS, K = 50, 4


@pytest.mark.parametrize("workers", [1, 2, 4])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize(("optimizer", "rule"), [("adam", {}), ("sgd", {"clip_grad_norm": 50.0})])
def test_fifty_steps_equal_torchs_loop(
    client: Server, side_by_side: Any, same: Callable[..., None], workers: int, dtype: str, optimizer: str, rule: Any
) -> None:
    oracle = whole.Oracle(dtype, optimizer)
    options = whole.OPTIMIZERS[optimizer][1]
    job = client.create_job("j", whole.start(dtype), optimizer=optimizer, workers=workers, accumulation=K, **options, **rule)
    run = whole.train(job, workers, STEPS * K, whole.plain(dtype), side_by_side)
    before = whole.start(dtype)
    for number in range(STEPS * K):
        for name, gradient in whole.mean(dtype, workers, number).items():
            parameter = oracle.parameters[name]
            parameter.grad = gradient / K if parameter.grad is None else parameter.grad + gradient / K
        step = run.steps[number]
        assert (step.step, step.accumulated) == ((number + 1) // K, (number + 1) % K)
        assert not step.skipped
        if (number + 1) % K:
            same(run.weights[number], before)
            continue
        norm = torch.nn.utils.get_total_norm([parameter.grad for parameter in oracle.parameters.values()])
        assert step.grad_norm == pytest.approx(float(norm), rel=1e-5 if dtype == "float32" else 1e-10)
        if rule:
            torch.nn.utils.clip_grad_norm_(oracle.parameters.values(), rule["clip_grad_norm"], foreach=False)
        oracle.torch.step()
        oracle.torch.zero_grad()
        before = run.weights[number]
        if number // K % 7 == 0 or number + 1 == STEPS * K:
            oracle.compare(before)
    assert (job.position().step, job.info().accumulated) == (STEPS, 0)


def test_two_runs_give_the_same_bits(server: Server, side_by_side: Any, same: Callable[..., None]) -> None:
    runs = []
    for name in ("one", "two"):
        job = server.create_job(name, whole.start("float32"), optimizer="adam", lr=0.01, workers=4, accumulation=K)
        runs.append(whole.train(job, 4, 12, whole.plain("float32"), side_by_side))
    same(runs[0].weights[-1], runs[1].weights[-1])
    for key, entry in runs[0].state["state"].items():
        same(entry, runs[1].state["state"][key])


@pytest.mark.parametrize("saved_at", [1, 3])
@pytest.mark.parametrize("how", ["restored", "another job"])
def test_a_checkpoint_in_the_midst_of_a_window_goes_on_to_the_same_bits(
    server: Server, side_by_side: Any, same: Callable[..., None], tmp_path: Path, saved_at: int, how: str
) -> None:
    """An uninterrupted run and one that was resumed after 1 or 3 of 4 rounds of the window."""
    rounds = 3 * K
    job = server.create_job("j", whole.start("float32"), optimizer="adam", lr=0.01, workers=2, accumulation=K)
    whole.train(job, 2, K + saved_at, whole.plain("float32"), side_by_side)
    assert job.info().accumulated == saved_at
    job.save_checkpoint("window")
    straight = whole.train(job, 2, rounds, whole.plain("float32"), side_by_side, first=K + saved_at)
    if how == "restored":
        whole.train(job, 2, 1, whole.plain("float32"), side_by_side, first=99)
        job.restore_checkpoint("window")
        resumed_job = job
    else:
        job.download_checkpoint("window", tmp_path / "window")
        resumed_job = server.create_job("again", from_checkpoint=tmp_path / "window")
    info = resumed_job.info()
    assert (info.accumulated, info.position.step) == (saved_at, 1)
    resumed = whole.train(resumed_job, 2, rounds, whole.plain("float32"), side_by_side, first=K + saved_at)
    for one, other in zip(straight.weights, resumed.weights, strict=True):
        same(one, other)
    assert [step.accumulated for step in straight.steps] == [step.accumulated for step in resumed.steps]
    for key, entry in straight.state["state"].items():
        same(entry, resumed.state["state"][key])


def test_a_round_that_is_skipped_does_not_count(server: Server) -> None:
    job = server.create_job("j", whole.start("float64"), optimizer="sgd", lr=1.0, accumulation=2)
    with job.join() as worker:
        assert worker.push(whole.gradient("float64", 0, 0)).accumulated == 1
        skipped = worker.push(None, found_inf=True)
        assert (skipped.skipped, skipped.accumulated, skipped.step) == (True, 1, 0)
        worker.skip_round()
        assert worker.last_step is not None
        assert (worker.last_step.skip_reason, worker.last_step.accumulated) == ("no weight", 1)
        found = worker.push_pull(whole.gradient("float64", 0, 1))
        assert (worker.last_step.step, worker.last_step.accumulated) == (1, 0)
    for name, begun in whole.start("float64").items():
        total = whole.gradient("float64", 0, 0)[name] + whole.gradient("float64", 0, 1)[name]
        np.testing.assert_allclose(found[name], begun - total / 2, rtol=1e-12)


def test_each_push_of_an_async_job_is_a_round_of_the_window(server: Server) -> None:
    job = server.create_job(
        "j", whole.start("float64"), optimizer="sgd", lr=1.0, workers=2, consistency="async", accumulation=2
    )
    with job.join(rank=0) as first, job.join(rank=1) as second:
        steps: list[StepInfo] = [
            first.push(whole.gradient("float64", 0, 0)),
            second.push(whole.gradient("float64", 1, 0)),
            second.push(whole.gradient("float64", 1, 1), loss_scale=1.0),
            first.push(whole.gradient("float64", 0, 1), clip_grad_norm=1e-3),
        ]
    assert [(step.step, step.accumulated) for step in steps] == [(0, 1), (1, 0), (1, 1), (2, 0)]
    assert steps[3].clip_factor * steps[3].grad_norm == pytest.approx(1e-3, rel=1e-2)


def test_accumulation_is_not_changed_in_the_middle_of_a_window(server: Server) -> None:
    job = server.create_job("j", whole.start("float32"), optimizer="adam", lr=0.01, accumulation=3)
    with job.join() as worker:
        worker.push(whole.gradient("float32", 0, 0))
        before = job.position()
        with pytest.raises(errors.InvalidArgumentError, match="in the middle of a window: 1 of 3 rounds are summed up"):
            job.update_rules(accumulation=2)
        assert job.position() == before
        assert job.info().accumulation == 3
        job.update_rules(clip_grad_norm=1.0)
        worker.push(whole.gradient("float32", 0, 1))
        step = worker.push(whole.gradient("float32", 0, 2))
        assert (step.step, step.accumulated) == (1, 0)
        assert step.clip_factor < 1.0
        job.update_rules(accumulation=1)
        assert worker.push(whole.gradient("float32", 0, 3)).step == 2


def test_a_window_outlives_a_server_that_was_stopped(
    start_app: Callable[..., App], tmp_path: Path, same: Callable[..., None]
) -> None:
    """The next server reads the newest checkpoint of its data dir."""
    gradients = [whole.gradient("float32", 0, number) for number in range(4)]
    found = []
    for stopped in (False, True):
        app = start_app(data_dir=tmp_path / f"data{stopped}")
        with connect(app.address) as server:
            job = server.create_job("j", whole.start("float32"), optimizer="adam", lr=0.01, accumulation=4)
            with job.join() as worker:
                worker.push(gradients[0])
                worker.push(gradients[1])
                job.save_checkpoint("window")
                if not stopped:
                    worker.push(gradients[2])
                    found.append(worker.push_pull(gradients[3]))
        app.stop()
    with connect(start_app(data_dir=tmp_path / "dataTrue").address) as server:
        job = server.job("j")
        assert job.info().accumulated == 2
        with job.join() as worker:
            worker.push(gradients[2])
            found.append(worker.push_pull(gradients[3]))
    same(found[0], found[1])

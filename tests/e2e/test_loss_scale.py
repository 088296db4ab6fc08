"""A loss scale as torch's GradScaler has it: what is not finite on one rank skips the step for all, and advances nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
import whole_steps as whole  # noqa: E402

from optserve.client import Server, StepInfo, errors  # noqa: E402

STEPS = 50
BAD = {3: 0, 11: 1, 12: 3, 30: 2}
"""In these rounds the rank's gradient, modulo the workers, holds Inf."""

INIT, GROWTH = 2.0**10, 5


class Scaler:
    """What GradScaler.update does, by what came of each round."""

    def __init__(self) -> None:
        self.scale, self._good = INIT, 0

    def update(self, last: StepInfo | None) -> float:
        if last is not None and last.skipped:
            self.scale, self._good = self.scale / 2, 0
        elif last is not None:
            self._good += 1
            if self._good == GROWTH:
                self.scale, self._good = self.scale * 2, 0
        return self.scale


def scaled(dtype: str, workers: int, found_inf: bool = False) -> whole.Options:
    """Each rank scales its loss by its own scaler."""
    scalers = [Scaler() for _ in range(workers)]

    def options(rank: int, number: int, last: StepInfo | None) -> Any:
        scale = scalers[rank].update(last)
        bad = number in BAD and BAD[number] % workers == rank
        if bad and found_inf:
            return None, {"loss_scale": scale, "found_inf": True}
        gradients = {
            name: value * np.asarray(scale).astype(dtype) for name, value in whole.gradient(dtype, rank, number).items()
        }
        if bad:
            gradients["w"] = gradients["w"].copy()
            gradients["w"][4, 4] = np.inf
        return gradients, {"loss_scale": scale}

    return options


@pytest.mark.parametrize("workers", [1, 2, 4])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
def test_fifty_rounds_equal_grad_scaler(
    client: Server, side_by_side: Any, same: Callable[..., None], workers: int, dtype: str, optimizer: str
) -> None:
    oracle = whole.Oracle(dtype, optimizer)
    scaler = torch.amp.GradScaler("cpu", init_scale=INIT, growth_interval=GROWTH)
    options = whole.OPTIMIZERS[optimizer][1]
    job = client.create_job("j", whole.start(dtype), optimizer=optimizer, workers=workers, clip_grad_norm=50.0, **options)
    run = whole.train(job, workers, STEPS, scaled(dtype, workers), side_by_side)
    scaler.scale(torch.ones(()))  # makes its scale
    steps = 0
    for number in range(STEPS):
        gradients = {name: value * scaler.get_scale() for name, value in whole.mean(dtype, workers, number).items()}
        if number in BAD:
            gradients["w"][4, 4] = float("inf")
        oracle.give(gradients)
        scaler.unscale_(oracle.torch)
        norm = torch.nn.utils.clip_grad_norm_(oracle.parameters.values(), 50.0, foreach=False)
        scaler.step(oracle.torch)
        scaler.update()
        step = run.steps[number]
        steps += number not in BAD
        assert step.step == steps
        assert step.skipped == (number in BAD)
        if step.skipped:
            assert step.skip_reason == "nonfinite"
            same(run.weights[number], run.weights[number - 1])
        else:
            assert step.grad_norm == pytest.approx(float(norm), rel=1e-5 if dtype == "float32" else 1e-10)
        if number % 7 == 0:
            oracle.compare(run.weights[number])
    assert job.position().step == STEPS - len(BAD)
    if optimizer == "adam":
        assert {int(entry["step"]) for entry in run.state["state"].values()} == {STEPS - len(BAD)}


def test_found_inf_says_the_same_and_the_bits_are_those_of_another_run(
    server: Server, side_by_side: Any, same: Callable[..., None]
) -> None:
    """That gradients hold Inf, found by client or server, and found_inf=True without any are one thing."""
    runs = []
    for name, found_inf in (("one", False), ("two", True), ("three", True)):
        job = server.create_job(name, whole.start("float32"), optimizer="adam", lr=0.01, workers=2)
        runs.append(whole.train(job, 2, 14, scaled("float32", 2, found_inf), side_by_side))
    for run in runs[1:]:
        same(run.weights[-1], runs[0].weights[-1])
        assert [step.skipped for step in run.steps] == [number in BAD for number in range(14)]


def test_a_skipped_round_is_told_in_the_events(server: Server) -> None:
    job = server.create_job("j", whole.start("float32"), optimizer="adam", lr=0.01)
    with job.join() as worker:
        bad = {**whole.gradient("float32", 0, 0), "b": np.full(7, np.nan, np.float32)}
        step = worker.push(bad, loss_scale=1024.0)
        assert step.skipped
        assert (step.step, step.skip_reason) == (0, "nonfinite")
        assert worker.push(None, found_inf=True).skipped
        with pytest.raises(errors.NonfiniteGradientError):
            worker.push(bad)
        assert worker.push(whole.gradient("float32", 0, 0)).step == 1
    messages = [event.message for event in job.events() if event.kind == "round"]
    assert messages == ["round skipped: nonfinite; the loss scale is 1024", "round skipped: nonfinite", "step 1"]


@pytest.mark.parametrize("scale", [0.0, -1.0, float("nan"), float("inf"), "much"])
def test_a_bad_loss_scale_is_refused_before_anything_is_sent(refused: Any, worker: Any, scale: Any) -> None:
    gradients = {"w": np.ones((3, 4), np.float32), "b": np.ones(4, np.float32)}
    with refused(errors.InvalidArgumentError, "loss_scale"):
        worker.push(gradients, loss_scale=scale)

"""Whole runs: the same bits every time, and torch's numbers."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from optserve.client import Job, Server, connect
from optserve.server.app import App
from optserve.wire.dtypes import state_dtype, storage_dtype

WEIGHTS = (1.0, 3.0, 0.0, 2.5)


def train(
    job: Job, model: Any, side_by_side: Any, steps: int, first: int = 0, weights: Any = WEIGHTS, delays: Any = None
) -> list[Any]:
    """Each rank pushes its own gradients; every rank's last weights."""

    def rank_of(rank: int) -> Any:
        def work() -> Any:
            found = None
            with job.join(rank=rank) as worker:
                ready.wait(30)
                for step in range(first, first + steps):
                    if delays is not None:
                        time.sleep(delays.random() * 0.002)
                    gradients = model.draw(1 + rank, step)
                    found = worker.push_pull(gradients, weight=weights[rank], metrics={"loss": rank}, out=found)
                ready.wait(30)
            return found

        return work

    ready = threading.Barrier(len(weights))
    return side_by_side([rank_of(rank) for rank in range(len(weights))])


def test_four_workers_give_the_same_bits_in_twenty_runs(
    client: Server, model: Any, side_by_side: Any, same: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Shuffled arrival: threads start when they like, sleep at random between pushes, and chunks are delayed at random."""
    from optserve.server.rounds.pushes import Pushes

    delays = random.Random(0)
    offer = Pushes.offer

    def late(self: Pushes, *arguments: Any) -> None:
        if delays.random() < 0.3:
            time.sleep(delays.random() * 0.003)
        offer(self, *arguments)

    monkeypatch.setattr(Pushes, "offer", late)
    first = None
    for run in range(20):
        job = client.create_job(f"run{run}", model.groups(lr=0.5), optimizer="sgd", lr=0.1, momentum=0.9, workers=4)
        results = train(job, model, side_by_side, steps=2, delays=delays)
        for found in results[1:]:
            same(found, results[0])
        assert job.position().step == 2
        first = first or results[0]
        same(results[0], first)
        job.delete()


def test_the_sum_is_the_definition(server: Server, model: Any, side_by_side: Any) -> None:
    """Σ (wᵣ/w₀)·gᵣ in rank order in float32, times 1/Σ(wᵣ/w₀)."""
    job = server.create_job("j", model.draw(0), optimizer="sgd", lr=1.0, workers=4)
    found = train(job, model, side_by_side, steps=1)[0]
    scale = np.float32(1.0 / (1.0 + 3.0 + 2.5))
    for name, start in model.draw(0).items():
        total = None
        for rank, weight in enumerate(WEIGHTS):
            if weight:
                term = model.draw(1 + rank, 0)[name] * np.float32(weight)
                total = term if total is None else total + term
        expected = start + np.float32(-1.0) * (total * scale)
        np.testing.assert_array_equal(found[name], expected)
    assert job.info().metrics == {"loss": pytest.approx((0 * 1 + 1 * 3 + 3 * 2.5) / 6.5)}


def test_over_grpc_and_embedded_the_bits_are_the_same(client: Server, embedded: Server, mixed: Any, same: Any) -> None:
    results = []
    for server in (client, embedded):
        job = server.create_job("j", mixed.groups(lr=0.01), optimizer="adam", lr=0.1, weight_decay=0.01, amsgrad=True)
        with job.join() as worker:
            for step in range(3):
                found = worker.push_pull(mixed.draw(1, step))
        results.append((found, job.state_dict()))
    same(results[0][0], results[1][0])
    for key, entry in results[0][1]["state"].items():
        same(entry, results[1][1]["state"][key])


OPTIMIZERS = {
    "sgd": ("SGD", {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01, "nesterov": True}),
    "adam": ("Adam", {"lr": 0.01, "amsgrad": True, "weight_decay": 0.1}),
    "adamw": ("AdamW", {"lr": 0.01, "betas": (0.8, 0.95)}),
}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_four_workers_equal_torch_on_the_mean_gradient(server: Server, small: Any, side_by_side: Any, optimizer: str) -> None:
    torch = pytest.importorskip("torch")
    name, options = OPTIMIZERS[optimizer]
    job = server.create_job("j", small.draw(0), optimizer=optimizer, **options, workers=4)
    found = train(job, small, side_by_side, steps=5, weights=(1.0, 1.0, 1.0, 1.0))[0]
    parameters = {key: torch.nn.Parameter(torch.from_numpy(value.copy())) for key, value in small.draw(0).items()}
    reference = getattr(torch.optim, name)(parameters.values(), **options)
    for step in range(5):
        for key, parameter in parameters.items():
            mean = np.mean([small.draw(1 + rank, step)[key].astype(np.float64) for rank in range(4)], axis=0)
            parameter.grad = torch.from_numpy(mean.astype(np.float32))
        reference.step()
    for key, parameter in parameters.items():
        np.testing.assert_allclose(found[key], parameter.detach().numpy(), rtol=1e-5, atol=1e-6)
    ours, theirs = job.state_dict(), reference.state_dict()
    assert [{**group, "param_names": None} for group in ours["param_groups"]] == [
        {**group, "param_names": None} for group in theirs["param_groups"]
    ]
    for key, entry in theirs["state"].items():
        for slot, value in entry.items():
            np.testing.assert_allclose(ours["state"][key][slot], value.numpy(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_state_dict_of_torch_continues_here(server: Server, small: Any, optimizer: str) -> None:
    torch = pytest.importorskip("torch")
    name, options = OPTIMIZERS[optimizer]
    parameters = {key: torch.nn.Parameter(torch.from_numpy(value.copy())) for key, value in small.draw(0).items()}
    reference = getattr(torch.optim, name)(parameters.values(), **options)

    def torch_step(step: int) -> None:
        for key, parameter in parameters.items():
            parameter.grad = torch.from_numpy(small.draw(1, step)[key])
        reference.step()

    for step in range(3):
        torch_step(step)
    now = {key: parameter.detach().numpy().copy() for key, parameter in parameters.items()}
    job = server.create_job("j", now, optimizer=optimizer, lr=1.0)
    job.load_state_dict(reference.state_dict())
    with job.join() as worker:
        for step in range(3, 6):
            found = worker.push_pull(small.draw(1, step))
            torch_step(step)
    for key, parameter in parameters.items():
        np.testing.assert_allclose(found[key], parameter.detach().numpy(), rtol=1e-5, atol=1e-6)
    again = getattr(torch.optim, name)(parameters.values(), lr=1.0)
    converted = job.state_dict()
    for entry in converted["state"].values():
        entry.update({slot: torch.from_numpy(np.array(value)) for slot, value in entry.items()})
    again.load_state_dict(converted)
    assert again.param_groups[0]["lr"] == options["lr"]


def test_many_jobs_side_by_side_do_not_disturb_each_other(client: Server, small: Any, side_by_side: Any, same: Any) -> None:
    def work(index: int) -> Any:
        def run() -> Any:
            job = client.create_job(f"job{index}", small.draw(index), optimizer="adam", lr=0.1)
            with job.join() as worker:
                for step in range(10):
                    found = worker.push_pull(small.draw(index, step))
            return found

        return run

    together = side_by_side([work(index) for index in range(12)])
    assert len(client.jobs()) == 12
    for job in client.jobs():
        client.job(job.name).delete()
    for index, found in enumerate(together):
        same(found, work(index)())


def test_async_workers_each_make_their_steps(server: Server, small: Any, side_by_side: Any) -> None:
    job = server.create_job("j", small.draw(0), optimizer="sgd", lr=1.0, workers=3, consistency="async")

    def work() -> None:
        with job.join() as worker:
            for _ in range(20):
                worker.push_pull({"w": np.ones((3, 4), np.float32), "b": None})

    side_by_side([work] * 3)
    assert job.position().step == 60
    found = job.pull()
    np.testing.assert_allclose(found["w"], small.draw(0)["w"] - 60, rtol=1e-5)
    np.testing.assert_array_equal(found["b"], small.draw(0)["b"])


def test_a_large_model_of_every_dtype_and_several_groups_goes_there_and_back(server: Server, mixed: Any, same: Any) -> None:
    job = server.create_job("j", mixed.groups(lr=0.5), optimizer="sgd", lr=1.0)
    same(job.pull(), mixed.draw(0))
    same(job.pull(["s", "embedding"]), {name: mixed.draw(0)[name] for name in ("s", "embedding")})
    with job.join() as worker:
        found = worker.push_pull(mixed.draw(1))
    for index, (name, start) in enumerate(mixed.draw(0).items()):
        dtype = state_dtype(start.dtype)
        rate = storage_dtype(dtype).type(1.0 if index < 3 else 0.5)
        expected = start.astype(dtype) - rate * mixed.draw(1)[name].astype(dtype)
        same({name: found[name]}, {name: expected.astype(start.dtype)})


def test_out_is_filled_and_given_back(server: Server, mixed: Any, same: Any) -> None:
    job = server.create_job("j", mixed.groups(), optimizer="sgd", lr=1.0)
    own = {name: np.empty(shape, mixed.dtypes[name]) for name, shape in mixed.shapes.items()}
    strided = {name: np.empty((*shape, 2), mixed.dtypes[name])[..., 0] for name, shape in mixed.shapes.items()}
    with job.join() as worker:
        kept = dict(own)
        assert worker.push_pull(mixed.draw(1), out=own) is own
        assert all(own[name] is array for name, array in kept.items())
        assert worker.pull(out=strided) is strided
        same(strided, own)
        pulled = worker.pull()
        assert worker.pull(out=pulled) is pulled
        same(pulled, own)


def test_gradients_may_be_any_layout_and_are_not_changed(server: Server, small: Any, same: Any) -> None:
    results = []
    for kind in (np.ascontiguousarray, np.asfortranarray, lambda array: np.stack([array, array], -1)[..., 0]):
        job = server.create_job(f"j{len(results)}", small.draw(0), optimizer="adam", lr=0.1)
        gradients = {name: kind(array) for name, array in small.draw(1).items()}
        for array in gradients.values():
            array.flags.writeable = False
        with job.join() as worker:
            results.append(worker.push_pull(gradients))
        same({name: np.ascontiguousarray(array) for name, array in gradients.items()}, small.draw(1))
    for found in results[1:]:
        same(found, results[0])


def test_async_futures_push_in_order(server: Server, small: Any) -> None:
    job = server.create_job("j", small.draw(0), optimizer="sgd", lr=1.0)
    with job.join() as worker:
        futures = [worker.push_pull_async(small.draw(1, step)) for step in range(5)]
        results = [future.result(20) for future in futures]
        assert worker.last_step.step == 5
    expected = small.draw(0)["w"]
    for step, found in enumerate(results):
        expected = expected - small.draw(1, step)["w"]
        np.testing.assert_array_equal(found["w"], expected)


@pytest.mark.parametrize("backend", ["numpy", "auto"])
def test_backends_agree_bit_for_bit(start_app: Callable[..., App], mixed: Any, same: Any, backend: str) -> None:
    found = []
    for name in ("numpy", backend):
        with connect(start_app(backend=name).address) as server:
            job = server.create_job("j", mixed.groups(lr=0.01), optimizer="adam", lr=0.1, amsgrad=True, weight_decay=0.1)
            with job.join() as worker:
                for step in range(3):
                    weights = worker.push_pull(mixed.draw(1, step))
            found.append(weights)
    same(found[1], found[0])


def test_what_a_worker_is_told_of_its_step(server: Server, small: Any) -> None:
    job = server.create_job("j", small.groups(lr=0.5), optimizer="sgd", lr=0.25)
    with job.join() as worker:
        assert worker.last_step is None
        gradients = {"w": np.zeros((3, 4), np.float32), "b": np.array([3, 0, 4, 0], np.float32)}
        step = worker.push(gradients)
        assert step == worker.last_step
        assert (step.step, step.version, step.lr) == (1, 3, (0.25, 0.5))
        assert (step.grad_norm, step.skipped, step.ranks, step.waited_for) == (5.0, False, (0,), None)
        worker.skip_round()
        assert worker.last_step.skipped
        assert worker.last_step.skip_reason == "no weight"
        assert worker.last_step.step == 1
        worker.push_pull({})
        assert worker.last_step.step == 2


def test_skip_keeps_a_bad_step_from_all(server: Server, small: Any, side_by_side: Any, same: Any) -> None:
    job = server.create_job("j", small.draw(0), optimizer="sgd", lr=1.0, workers=2, on_nonfinite="skip")
    with job.join() as first, job.join() as second:
        bad = {"w": np.full((3, 4), np.nan, np.float32)}
        results = side_by_side([lambda: first.push_pull(bad), lambda: second.push_pull(small.draw(1))])
        for found in results:
            same(found, small.draw(0))
        assert first.last_step.skip_reason == second.last_step.skip_reason == "nonfinite"
        side_by_side([lambda: first.push(small.draw(1)), lambda: second.push(small.draw(1))])
        assert first.last_step.step == 1


DTYPES = [np.float32, np.float64, np.float16, ml_dtypes.bfloat16, np.complex64, np.complex128]


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: np.dtype(d).name)
def test_a_model_of_one_dtype(server: Server, dtype: Any, same: Any) -> None:
    start = {"w": np.arange(10).astype(dtype)}
    job = server.create_job("j", start, optimizer="sgd", lr=1.0)
    with job.join() as worker:
        found = worker.push_pull({"w": np.ones(10, dtype)})
    same(found, {"w": (np.arange(10) - 1).astype(dtype)})

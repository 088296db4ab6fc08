"""Clipped steps of several workers equal torch's clip_grad_norm_ and clip_grad_value_ on the mean gradient."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
import whole_steps as whole  # noqa: E402

from optserve.client import Job, Server, errors  # noqa: E402

STEPS = 50


@pytest.mark.parametrize("workers", [1, 2, 4])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
@pytest.mark.parametrize("rule", [{"clip_grad_norm": 100.0}, {"clip_grad_norm": 1.0}, {"clip_grad_value": 0.5}])
def test_fifty_steps_equal_torch(
    client: Server, side_by_side: Any, workers: int, dtype: str, optimizer: str, rule: dict[str, float]
) -> None:
    """A bound of 100 clips some of the steps, that of 1 all of them."""
    oracle = whole.Oracle(dtype, optimizer)
    options = whole.OPTIMIZERS[optimizer][1]
    job = client.create_job("j", whole.start(dtype), optimizer=optimizer, workers=workers, **options, **rule)
    run = whole.train(job, workers, STEPS, whole.plain(dtype), side_by_side)
    parameters = list(oracle.parameters.values())
    for number in range(STEPS):
        oracle.give(whole.mean(dtype, workers, number))
        norm = torch.nn.utils.get_total_norm([parameter.grad for parameter in parameters])
        if "clip_grad_norm" in rule:
            returned = torch.nn.utils.clip_grad_norm_(parameters, rule["clip_grad_norm"], foreach=False)
            assert run.steps[number].grad_norm == pytest.approx(float(returned), rel=1e-5 if dtype == "float32" else 1e-10)
            factor = min(1.0, rule["clip_grad_norm"] / (float(norm) + 1e-6))
            assert run.steps[number].clip_factor == pytest.approx(factor, rel=1e-5 if dtype == "float32" else 1e-10)
        else:
            torch.nn.utils.clip_grad_value_(parameters, rule["clip_grad_value"], foreach=False)
            assert run.steps[number].grad_norm == pytest.approx(float(norm), rel=1e-5 if dtype == "float32" else 1e-10)
            assert run.steps[number].clip_factor == 1.0
        oracle.torch.step()
        if number % 7 == 0:
            oracle.compare(run.weights[number])


def test_where_the_mean_is_near_zero_float32_is_as_close_to_float64_as_torch(server: Server, side_by_side: Any) -> None:
    """The ranks' gradients nearly cancel, and clipping makes what is left as small as Adam's eps: then the last bit of a sum
    is more than the 1e-5 of other tests, in one process of torch as well."""
    weights = (1.0, 0.7)
    start = np.ones(4000, np.float32)

    def ranks(number: int) -> list[np.ndarray]:
        bits = np.random.default_rng(number)
        first = bits.normal(size=4000).astype(np.float32)
        second = (-first / 0.7 * (1 + bits.uniform(-1e-5, 1e-5, 4000))).astype(np.float32)
        second[0] = 100.0
        return [first, second]

    def stock(dtype: Any) -> np.ndarray:
        parameter = torch.nn.Parameter(torch.from_numpy(start.astype(dtype)))
        adam = torch.optim.Adam([parameter], lr=0.01, foreach=False)
        for number in range(3):
            parts = zip(weights, ranks(number), strict=True)
            total = sum(dtype(weight) * part.astype(dtype) for weight, part in parts) / dtype(sum(weights))
            parameter.grad = torch.from_numpy(np.asarray(total, dtype))
            torch.nn.utils.clip_grad_norm_([parameter], 1.0)
            adam.step()
        return parameter.detach().numpy()

    job = server.create_job("j", {"w": start}, optimizer="adam", lr=0.01, workers=2, clip_grad_norm=1.0)
    members = [job.join(rank=rank) for rank in range(2)]
    for number in range(3):
        given = zip(members, ranks(number), weights, strict=True)
        side_by_side([lambda m=member, p=part, w=weight: m.push({"w": p}, weight=w) for member, part, weight in given])
    ours, theirs = (np.abs(found - stock(np.float64)) for found in (job.pull()["w"], stock(np.float32)))
    assert theirs.max() > 1e-5
    assert ours.max() <= 1.25 * theirs.max()
    assert np.sqrt(np.mean(ours**2)) <= 1.1 * np.sqrt(np.mean(theirs**2))
    for member in members:
        member.leave()


@pytest.mark.parametrize("rule", [{"clip_grad_norm": 1.0}, {"clip_grad_value": 0.5}])
def test_two_runs_give_the_same_bits(server: Server, side_by_side: Any, same: Callable[..., None], rule: Any) -> None:
    runs = []
    for name in ("one", "two"):
        job = server.create_job(name, whole.start("float32"), optimizer="adam", lr=0.01, workers=4, **rule)
        runs.append(whole.train(job, 4, 12, whole.plain("float32"), side_by_side))
    same(runs[0].weights[-1], runs[1].weights[-1])
    for key, entry in runs[0].state["state"].items():
        same(entry, runs[1].state["state"][key])
    assert [step.grad_norm for step in runs[0].steps] == [step.grad_norm for step in runs[1].steps]


def test_a_push_may_bring_its_own_and_the_job_may_be_edited(server: Server, side_by_side: Any) -> None:
    job = server.create_job("j", whole.start("float64"), optimizer="sgd", lr=0.1, workers=2, clip_grad_norm=1.0)
    factors = []
    for options in ({}, {"clip_grad_norm": 5.0}, {"clip_grad_value": 0.1}):
        run = whole.train(job, 2, 1, whole.plain("float64", **options), side_by_side)
        factors.append(run.steps[0].clip_factor * run.steps[0].grad_norm)
    assert factors[:2] == pytest.approx([1.0, 5.0], rel=1e-5)
    assert factors[2] == run.steps[0].grad_norm
    job.update_rules(clip_grad_norm=None)
    run = whole.train(job, 2, 1, whole.plain("float64"), side_by_side)
    assert run.steps[0].clip_factor == 1.0


@pytest.mark.parametrize(
    ("first", "second", "text"),
    [
        ({"clip_grad_norm": 1.0}, {"clip_grad_norm": 2.0}, r"rank 0 has clip_grad_norm=1\.0, rank 1 clip_grad_norm=2\.0"),
        ({"clip_grad_norm": 1.0}, {"clip_grad_value": 1.0}, r"clip_grad_norm=1\.0, rank 1 clip_grad_value=1\.0"),
        ({}, {"clip_grad_value": 1.0}, r"rank 0 has no clipping, rank 1 clip_grad_value=1\.0"),
        ({"loss_scale": 8.0}, {"loss_scale": 16.0}, r"rank 0 has 8\.0, rank 1 16\.0"),
        ({"loss_scale": 8.0}, {}, r"rank 0 has 8\.0, rank 1 1\.0"),
    ],
)
def test_ranks_that_disagree_are_told_both_values(
    server: Server, side_by_side: Any, snapshot: Callable[[Job], Any], first: Any, second: Any, text: str
) -> None:
    job = server.create_job("j", whole.start("float32"), optimizer="adam", lr=0.1, workers=2)
    workers = [job.join(rank=rank) for rank in range(2)]
    try:
        before = snapshot(job)

        def disagrees(rank: int) -> Callable[[], None]:
            def work() -> None:
                with pytest.raises(errors.RanksDisagreeError, match=text):
                    workers[rank].push(whole.gradient("float32", rank, 0), **(first, second)[rank])

            return work

        side_by_side([disagrees(0), disagrees(1)])
        assert snapshot(job) == before
        steps = side_by_side(
            [lambda rank=rank: workers[rank].push(whole.gradient("float32", rank, 0), **second) for rank in range(2)]
        )
        assert [step.step for step in steps] == [1, 1]
    finally:
        for worker in workers:
            worker.leave()


@pytest.mark.parametrize(
    "options",
    [{"clip_grad_norm": 0.0}, {"clip_grad_value": -1.0}, {"clip_grad_norm": float("nan")}, {"clip_grad_norm": "much"}],
)
def test_bad_bounds_are_refused_before_anything_is_sent(refused: Any, worker: Any, options: Any) -> None:
    gradients = {"w": np.ones((3, 4), np.float32), "b": np.ones(4, np.float32)}
    with refused(errors.InvalidArgumentError, next(iter(options))):
        worker.push(gradients, **options)
    with refused(errors.InvalidArgumentError, "clip_grad_norm.*clip_grad_value"):
        worker.push(gradients, clip_grad_norm=1.0, clip_grad_value=1.0)

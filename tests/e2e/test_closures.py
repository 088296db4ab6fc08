"""worker.step(closure): plain optimizers evaluate it once, LBFGS searches; a step is one version of the job."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch
from valley import LBFGS, SIZE, Array, Valley, round_events, stepped

from optserve.client import Server, SparseGradient, errors


@pytest.mark.parametrize("optimizer", ["adam", "sgd", "lion"])
def test_a_plain_optimizer_evaluates_a_closure_once(server: Server, embedded: Any, same: Any, optimizer: str) -> None:
    valley, again = Valley(1, SIZE), Valley(1, SIZE)
    job = server.create_job("j", valley.zeros(), optimizer=optimizer, lr=0.1)
    plain = embedded.create_job(None, valley.zeros(), optimizer=optimizer, lr=0.1)
    with job.join() as worker, plain.join() as other:
        weights = other.pull()
        for step in range(1, 4):
            version = job.position().version
            loss, gradients = again(weights)
            assert worker.step(valley) == loss
            weights = other.push_pull(gradients)
            same(worker.pull(), weights)
            assert valley.calls == step
            assert (worker.last_step.evaluations, worker.last_step.metrics) == (1, {"loss": loss})
            assert worker.last_step.version == job.position().version == version + 1
        assert len(round_events(job)) == 3


def test_ranks_of_a_plain_optimizer_step_with_the_mean(server: Server, side_by_side: Any, same: Any) -> None:
    valleys = [Valley(1), Valley(2)]
    job = server.create_job(None, valleys[0].zeros(), optimizer="sgd", lr=0.5, workers=2)
    with job.join() as first, job.join() as second:
        outs: list[Any] = [{}, {}]
        losses = side_by_side(
            [
                lambda: first.step(valleys[0], 1.0, metrics={"accuracy": 1}, out=outs[0]),
                lambda: second.step(valleys[1], 3.0, metrics={"accuracy": 0}, out=outs[1]),
            ]
        )
        zeros = valleys[0].zeros()
        (one, first_gradients), (two, second_gradients) = (valley(zeros) for valley in valleys)
        assert losses == [one, two]
        mean = {name: (first_gradients[name] + 3 * second_gradients[name]) / 4 for name in zeros}
        for out in outs:
            np.testing.assert_allclose(out["w"], zeros["w"] - 0.5 * mean["w"], rtol=1e-14)
        same(outs[0], outs[1])
        same(outs[0], first.pull())
        assert first.last_step.metrics == pytest.approx({"loss": (one + 3 * two) / 4, "accuracy": 0.25})


def test_every_push_of_an_async_job_may_have_a_closure(server: Server) -> None:
    valley = Valley(1)
    job = server.create_job(None, valley.zeros(), optimizer="sgd", lr=0.1, workers=2, consistency="async")
    with job.join() as first, job.join() as second:
        losses = [worker.step(valley) for worker in (first, second, first)]
        assert losses == sorted(losses, reverse=True)
        assert job.position().step == 3


def test_a_closure_may_give_sparse_gradients(server: Server) -> None:
    job = server.create_job("j", {"e": np.zeros((5, 2)), "b": np.zeros(1)}, optimizer="sgd", lr=1.0)

    def closure(weights: Any) -> Any:
        return weights["b"], {"e": SparseGradient([3, 1, 3], np.ones((3, 2))), "b": np.ones(1)}

    with job.join() as worker:
        assert [worker.step(closure), worker.step(closure)] == [0.0, -1.0]
        assert worker.pull()["e"][:, 0].tolist() == [0, -2, 0, -4, 0]


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_search_is_torchs_and_each_step_is_one_version(server: Server, side_by_side: Any, ranks: int) -> None:
    valleys = [Valley(seed) for seed in range(ranks)]
    start = valleys[0].zeros()
    parameters = {name: torch.from_numpy(value.copy()).requires_grad_() for name, value in start.items()}
    oracle = torch.optim.LBFGS(parameters.values(), lr=1.0, max_iter=4, line_search_fn="strong_wolfe")
    reference = [Valley(seed) for seed in range(ranks)]

    def mean() -> float:
        found = [valley({name: tensor.detach().numpy() for name, tensor in parameters.items()}) for valley in reference]
        for name, tensor in parameters.items():
            tensor.grad = torch.from_numpy(sum(gradients[name] for _, gradients in found) / ranks)
        return sum(loss for loss, _ in found) / ranks

    job = server.create_job("j", start, **LBFGS, workers=ranks)
    workers = [job.join(rank=rank) for rank in range(ranks)]
    for step in range(1, 7):
        version, before = job.position().version, reference[0].calls
        expected = float(oracle.step(mean))
        losses = side_by_side([lambda w=w, v=v: w.step(v) for w, v in zip(workers, valleys, strict=True)])
        assert sum(losses) / ranks == pytest.approx(expected, rel=1e-7, abs=1e-9)
        told = workers[0].last_step
        assert (told.step, told.version) == (step, version + 1)
        assert told.evaluations == valleys[0].calls - (before if step > 1 else 0) == reference[0].calls - before
        assert told.metrics["loss"] == pytest.approx(expected, rel=1e-7, abs=1e-9)
    weights = workers[0].pull()
    for name, tensor in parameters.items():
        np.testing.assert_allclose(weights[name], tensor.detach().numpy(), rtol=1e-7, atol=1e-9)
    assert [event.fields["evaluations"] for event in round_events(job)] != []
    assert len(round_events(job)) == 6
    for worker in workers:
        worker.leave()


def test_ranks_of_a_search_see_the_same_points(server: Server, side_by_side: Any) -> None:
    class Watching(Valley):
        points: list[bytes]

        def __call__(self, weights: Mapping[str, Array]) -> Any:
            self.points.append(weights["w"].tobytes() + weights["b"].tobytes())
            return super().__call__(weights)

    valleys = [Watching(seed, SIZE, np.float32) for seed in (1, 2)]
    for valley in valleys:
        valley.points = []
    job = server.create_job(None, valleys[0].zeros(), **LBFGS, workers=2)
    with job.join(rank=0) as first, job.join(rank=1) as second:
        for _ in range(2):
            side_by_side([lambda: first.step(valleys[0]), lambda: second.step(valleys[1], 2.0)])
        assert valleys[0].points == valleys[1].points
        assert len(set(valleys[0].points)) > 4
        assert first.last_step.evaluations == second.last_step.evaluations > 2


def test_the_weights_after_a_search_come_with_it(server: Server, same: Any) -> None:
    valley = Valley(1, SIZE)
    with server.create_job(None, valley.zeros(), **LBFGS).join() as worker:
        out = worker.pull()
        arrays = {name: id(array) for name, array in out.items()}
        for _ in range(2):
            worker.step(valley, out=out)
            assert {name: id(array) for name, array in out.items()} == arrays
            same(out, worker.pull())


def test_a_scaled_search_is_the_same_search(embedded: Server) -> None:
    told, weights = stepped(embedded, 3, Valley(1))
    valley = Valley(1)

    def scaled(found: Mapping[str, Array]) -> Any:
        loss, gradients = valley(found)
        return loss, {name: 1024 * gradient for name, gradient in gradients.items()}

    with embedded.create_job(None, valley.zeros(), **LBFGS).join() as worker:
        for _ in range(3):
            worker.step(scaled, loss_scale=1024)
        assert worker.last_step.evaluations == told[-1].evaluations
        np.testing.assert_allclose(worker.pull()["w"], weights["w"], rtol=1e-12)


def test_a_push_without_a_closure_says_what_is_needed(server: Server) -> None:
    valley = Valley(1)
    job = server.create_job(None, valley.zeros(), **LBFGS)
    with job.join() as worker:
        before = job.position()
        for call in (worker.push, worker.push_pull):
            with pytest.raises(errors.InvalidArgumentError, match=r"worker\.step\(closure\)"):
                call(valley(worker.pull())[1])
        assert job.position() == before
        worker.step(valley)
        assert worker.last_step.step == 1


def test_a_rank_that_sits_out_waits_for_the_whole_step(server: Server, side_by_side: Any, embedded: Any, same: Any) -> None:
    valley = Valley(1, SIZE)
    told, weights = stepped(embedded, 2, Valley(1, SIZE))
    job = server.create_job("sat-out", valley.zeros(), **LBFGS, workers=2)
    with job.join(rank=0) as first, job.join(rank=1) as second:
        for _ in range(2):
            _, found = side_by_side([lambda: first.step(valley), second.skip_round])
        same(found, weights)
        assert first.last_step.ranks == second.last_step.ranks == (0,)
        assert second.last_step.evaluations == told[-1].evaluations
        assert job.position().step == 2


def test_edits_of_a_worker_go_with_the_first_evaluation(server: Server) -> None:
    valley = Valley(1)
    job = server.create_job(None, valley.zeros(), **LBFGS)
    with job.join() as worker:
        worker.step(valley)
        worker.update_group(0, lr=0.5)
        worker.step(valley)
        assert worker.last_step.lr == (0.5,)
        assert (job.param_groups[0]["lr"], worker.param_groups[0]["lr"]) == (0.5, 0.5)
        assert len([event for event in job.events() if event.kind == "group"]) == 1

"""LBFGS over workers that hold shards: one torch process on the weighted mean loss comes to the same, parameters and state."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch

from optserve.client import Job, Server, Worker, connect
from optserve.server.app import App

pytestmark = pytest.mark.usefixtures("one_torch_thread")

Values = dict[str, np.ndarray]

WOLFE = {"line_search_fn": "strong_wolfe"}
WEIGHTS = [3.0, 0.5, 1.0, 2.0]
HALF = (ml_dtypes.bfloat16, np.float32)
TOLERANCES = {np.float32: 1e-3, np.float64: 1e-9}


class Shard:
    """Softmax regression with a penalty, on rows of its own; closures for NumPy and for torch."""

    def __init__(self, rank: int, dtype: Any) -> None:
        random = np.random.default_rng(rank)
        self.inputs = random.normal(size=(40, 6)).astype(dtype)
        self.labels = random.integers(0, 3, 40)
        self.calls = 0

    def torch_loss(self, w: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        fit = torch.nn.functional.cross_entropy(torch.tensor(self.inputs) @ w + b, torch.tensor(self.labels))
        return fit + 0.05 * (w**2).sum()

    def __call__(self, weights: Mapping[str, np.ndarray]) -> tuple[float, Values]:
        self.calls += 1
        w, b = (torch.tensor(weights[name]).requires_grad_() for name in ("w", "b"))
        loss = self.torch_loss(w, b)
        slopes = torch.autograd.grad(loss, [w, b])
        return float(loss.detach()), {name: slope.numpy() for name, slope in zip("wb", slopes, strict=True)}


def start(dtype: Any) -> Values:
    random = np.random.default_rng(99)
    return {"w": random.normal(size=(6, 3)).astype(dtype), "b": random.normal(size=3).astype(dtype)}


def shards(workers: int, dtype: Any) -> list[Shard]:
    return [Shard(rank, dtype) for rank in range(workers)]


class Stock:
    """torch on the weighted mean of the shards' losses. `changed` does with the gradients what users do in closures."""

    def __init__(
        self, parts: Sequence[Shard], values: Values, changed: Callable[[Any], Any] = lambda _: None, **options: Any
    ) -> None:
        self.parts, self.changed = parts, changed
        self.parameters = [torch.tensor(value).requires_grad_() for value in values.values()]
        self.optimizer = torch.optim.LBFGS(self.parameters, **options)
        self.evaluations = 0

    def closure(self) -> torch.Tensor:
        self.evaluations += 1
        self.optimizer.zero_grad()
        weights = WEIGHTS[: len(self.parts)]
        losses = [weight * part.torch_loss(*self.parameters) for weight, part in zip(weights, self.parts, strict=True)]
        loss = torch.stack(losses).sum() / sum(weights)
        loss.backward()
        self.changed(self.parameters)
        return loss

    def step(self) -> float:
        self.evaluations = 0
        return float(self.optimizer.step(self.closure).detach())

    @property
    def values(self) -> Values:
        return {name: part.detach().numpy() for name, part in zip("wb", self.parameters, strict=True)}


def near(ours: Values, theirs: Values, tolerance: float) -> None:
    for name, value in theirs.items():
        assert (ours[name].dtype, ours[name].shape) == (value.dtype, value.shape)
        np.testing.assert_allclose(ours[name], value, rtol=tolerance, atol=tolerance)


def steps(workers: Sequence[Worker], parts: Sequence[Shard], side_by_side: Any, count: int = 1) -> list[float]:
    """The ranks' first losses of the last step."""
    for _ in range(count):
        jobs = zip(workers, parts, WEIGHTS, strict=False)
        losses = side_by_side([lambda w=worker, p=part, f=weight: w.step(p, f) for worker, part, weight in jobs])
    return losses


def joined(job: Job, count: int) -> list[Worker]:
    return [job.join(rank=rank) for rank in range(count)]


def leave(workers: Sequence[Worker]) -> None:
    for worker in workers:
        worker.leave()


def as_torch(value: Any) -> Any:
    """A state_dict's arrays as tensors, at whatever depth."""
    if isinstance(value, np.ndarray):
        return torch.from_numpy(value.copy())
    if isinstance(value, dict):
        return {key: as_torch(entry) for key, entry in value.items()}
    return [as_torch(entry) for entry in value] if isinstance(value, list) else value


def plain(value: Any) -> Any:
    """Comparable by ==, bit for bit."""
    if isinstance(value, np.ndarray):
        return value.dtype.name, value.shape, value.tobytes()
    if isinstance(value, dict):
        return {key: plain(entry) for key, entry in value.items()}
    return [plain(entry) for entry in value] if isinstance(value, list | tuple) else value


@pytest.mark.parametrize("workers", [1, 2, 4])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("options", [{"max_iter": 2, "lr": 0.3}, {"max_iter": 2, "history_size": 3, **WOLFE}], ids=str)
def test_fifty_steps_equal_one_torch_process(
    client: Server, side_by_side: Any, options: dict[str, Any], dtype: Any, workers: int
) -> None:
    parts = shards(workers, dtype)
    job, stock = (
        client.create_job("j", start(dtype), optimizer="lbfgs", workers=workers, **options),
        Stock(parts, start(dtype), **options),
    )
    members = joined(job, workers)
    for number in range(50):
        before = [part.calls for part in parts]
        losses = steps(members, parts, side_by_side)
        loss = stock.step()
        mean = np.average(losses, weights=WEIGHTS[:workers])
        np.testing.assert_allclose(mean, loss, rtol=TOLERANCES[dtype])
        near(members[-1].pull(), stock.values, TOLERANCES[dtype])
        called = {part.calls - was for part, was in zip(parts, before, strict=True)}
        assert called == {members[0].last_step.evaluations}
        assert job.position().step == number + 1
        if dtype is np.float64:
            assert called == {stock.evaluations}
    leave(members)


@pytest.mark.parametrize("rule", [{"clip_grad_norm": 0.5}, {"clip_grad_value": 0.1}], ids=str)
def test_gradients_are_clipped_at_every_evaluation_as_in_a_closure(
    server: Server, side_by_side: Any, rule: dict[str, float]
) -> None:
    def changed(parameters: Any) -> None:
        if "clip_grad_norm" in rule:
            torch.nn.utils.clip_grad_norm_(parameters, rule["clip_grad_norm"])
        else:
            torch.nn.utils.clip_grad_value_(parameters, rule["clip_grad_value"])

    parts, options = shards(2, np.float64), {"max_iter": 2, "lr": 0.1}
    job = server.create_job("j", start(np.float64), optimizer="lbfgs", workers=2, **options, **rule)
    stock, members = Stock(parts, start(np.float64), changed, **options), joined(job, 2)
    for number in range(8):
        steps(members, parts, side_by_side)
        stock.step()
        near(members[0].pull(), stock.values, 1e-9)
        if "clip_grad_norm" in rule and number == 0:
            assert members[0].last_step.clip_factor < 1
    leave(members)


def test_repeated_runs_have_the_same_bits(client: Server, side_by_side: Any) -> None:
    found = []
    for name in ("first", "second"):
        parts = shards(4, np.float32)
        job = client.create_job(name, start(np.float32), optimizer="lbfgs", workers=4, max_iter=3, **WOLFE)
        members = joined(job, 4)
        steps(members, parts, side_by_side, 6)
        found.append((plain(job.pull()), plain(job.state_dict())))
        leave(members)
    assert found[0] == found[1]


def test_a_checkpoint_continues_with_the_same_bits(server: Server, side_by_side: Any) -> None:
    parts = shards(2, np.float64)
    job = server.create_job("j", start(np.float64), optimizer="lbfgs", workers=2, lr=0.2, max_iter=2, history_size=3)
    members = joined(job, 2)
    steps(members, parts, side_by_side, 4)
    job.save_checkpoint("here")
    steps(members, parts, side_by_side, 3)
    further = plain(job.pull()), plain(job.state_dict())
    leave(members)
    job.restore_checkpoint("here")
    members = joined(job, 2)
    steps(members, parts, side_by_side, 3)
    assert (plain(job.pull()), plain(job.state_dict())) == further
    leave(members)


def test_another_server_continues_with_the_same_bits(start_app: Callable[..., App], tmp_path: Path, embedded: Server) -> None:
    """Stopped and started again on its data dir, or made of a downloaded checkpoint; masters of 16-bit weights come along."""
    values = {name: value.astype(dtype) for (name, value), dtype in zip(start(np.float64).items(), HALF, strict=True)}

    def closure(weights: Mapping[str, np.ndarray]) -> tuple[float, Values]:
        loss, slopes = Shard(0, np.float64)({name: weights[name].astype(np.float64) for name in values})
        return loss, {name: slope.astype(values[name].dtype) for name, slope in slopes.items()}

    def go_on(job: Job, steps: int) -> tuple[Any, Any]:
        with job.join() as worker:
            for _ in range(steps):
                worker.step(closure)
        return plain(job.pull()), plain(job.state_dict()["state"])

    straight = go_on(embedded.create_job("straight", values, optimizer="lbfgs", max_iter=3, history_size=4), 6)
    app = start_app(data_dir=tmp_path / "data")
    with connect(app.address) as first:
        job = first.create_job("j", values, optimizer="lbfgs", max_iter=3, history_size=4)
        go_on(job, 3)
        job.save_checkpoint("here")
        folder = job.download_checkpoint("here", tmp_path / "here")
    app.stop()
    with connect(start_app(data_dir=tmp_path / "data").address) as second:
        assert go_on(second.job("j"), 3) == straight
    assert go_on(embedded.create_job("again", from_checkpoint=folder), 3) == straight


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("options", [{"max_iter": 1, "lr": 0.3}, {"max_iter": 3, "history_size": 2, **WOLFE}], ids=str)
def test_state_dicts_are_torchs_key_for_key_and_go_both_ways(server: Server, options: dict[str, Any], dtype: Any) -> None:
    (part,) = parts = shards(1, dtype)
    job, stock = server.create_job("j", start(dtype), optimizer="lbfgs", **options), Stock(parts, start(dtype), **options)
    with job.join() as worker:
        assert job.state_dict()["state"] == stock.optimizer.state_dict()["state"] == {}
        for _ in range(3):
            worker.step(part)
            stock.step()
            alike(job.state_dict(), stock.optimizer.state_dict())
        ours, theirs = job.state_dict(), stock.optimizer.state_dict()
        second = Stock(parts, job.pull())
        second.optimizer.load_state_dict(as_torch(ours))
        other = server.create_job("other", stock.values, optimizer="lbfgs", history_size=7)
        other.load_state_dict(theirs)
        alike(other.state_dict(), theirs)
        again = server.create_job("again", job.pull(), optimizer="lbfgs")
        again.load_state_dict(ours)
        assert plain(again.state_dict()) == plain(ours)
        with other.join() as follower, again.join() as twin:
            for _ in range(3):
                for each in (worker, follower, twin):
                    each.step(part)
                stock.step()
                second.step()
                near(worker.pull(), second.values, TOLERANCES[dtype])
                near(follower.pull(), stock.values, TOLERANCES[dtype])
                assert plain(twin.pull()) == plain(worker.pull())
            assert plain(again.state_dict()) == plain(job.state_dict())


def alike(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> None:
    """`t` is a float here always, and `H_diag` an array: torch has either."""
    (group,), (other,) = ours["param_groups"], theirs["param_groups"]
    assert {name: value for name, value in group.items() if name != "param_names"} == other
    mine, wanted = ours["state"][0], theirs["state"][0]
    assert list(ours["state"]) == list(theirs["state"]) == [0]
    assert mine.keys() == wanted.keys()
    for name, value in wanted.items():
        found = mine[name]
        if isinstance(value, list):
            assert type(found) is list
            assert [entry is None for entry in found] == [entry is None for entry in value]
            pairs = [pair for pair in zip(found, value, strict=True) if pair[1] is not None]
        else:
            pairs = [(found, value)]
        for entry, tensor in pairs:
            if isinstance(tensor, torch.Tensor) and name != "t":
                assert (type(entry), entry.dtype, entry.shape) == (np.ndarray, tensor.numpy().dtype, tuple(tensor.shape))
            if isinstance(tensor, int) and name in ("func_evals", "n_iter"):
                assert (type(entry), entry) == (int, tensor)
            size = float(np.max(np.abs(np.asarray(tensor)), initial=0.0))
            np.testing.assert_allclose(np.asarray(entry), np.asarray(tensor), rtol=2e-2, atol=2e-2 * size, err_msg=name)


def test_max_eval_is_shown_and_edits_hold_from_the_next_step(client: Server) -> None:
    options = {"lr": 0.4, "max_iter": 2}
    (part,) = parts = shards(1, np.float64)
    job, stock = (
        client.create_job("j", start(np.float64), optimizer="lbfgs", **options),
        Stock(parts, start(np.float64), **options),
    )
    assert job.param_groups[0]["max_eval"] == stock.optimizer.param_groups[0]["max_eval"] == 2
    job.set_lr_schedule("StepLR", step_size=1, gamma=0.5)
    schedule = torch.optim.lr_scheduler.StepLR(stock.optimizer, 1, 0.5)
    with job.join() as worker:
        for number in range(6):
            if number == 3:
                worker.update_group(0, lr=0.3, max_iter=4, max_eval=4)
                stock.optimizer.param_groups[0] |= {"lr": 0.3, "max_iter": 4, "max_eval": 4}
            worker.step(part)
            stock.step()
            near(worker.pull(), stock.values, 1e-9)
            worker.step_schedule()
            schedule.step()


def test_a_renamed_parameter_keeps_the_state_and_an_empty_or_absent_one_is_zero(client: Server) -> None:
    """An absent gradient is zeros for LBFGS, as in torch."""
    (part,) = parts = shards(1, np.float64)
    values = {**start(np.float64), "never": np.ones(2), "nothing": np.zeros((0, 3))}
    job, stock = (
        client.create_job("j", values, optimizer="lbfgs", max_iter=2, lr=0.3),
        Stock(parts, start(np.float64), max_iter=2, lr=0.3),
    )
    with job.join() as worker:
        for number in range(4):
            names = {"w": "w", "b": "b"} if number < 2 else {"w": "weight", "b": "b"}

            def closure(weights: Mapping[str, np.ndarray], names: Mapping[str, str] = names) -> tuple[float, Values]:
                loss, slopes = part({own: weights[name] for own, name in names.items()})
                return loss, {names[own]: slope for own, slope in slopes.items()}

            worker.step(closure)
            stock.step()
            found = worker.pull()
            near({own: found[name] for own, name in names.items()}, stock.values, 1e-9)
            np.testing.assert_array_equal(found["never"], np.ones(2))
            if number == 1:
                job.rename_parameter("w", "weight")

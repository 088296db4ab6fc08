"""state_dict in torch's layout both ways: a torch optimizer continues from ours and ours from torch's, key for key."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import oracle
import pytest
import torch
from oracle import APART, Configuration, Stock

from optserve.client import Job, Server

CASES = [case for case in oracle.configurations() if case.optimizer not in APART]
DEFAULTS = [case for case in CASES if case.description == "default"]
COMPLEX = [case for case in DEFAULTS if case.optimizer not in ("Adafactor", "Muon")]
SHAPES = {"w": (5, 4), "v": (6, 3), "b": (4,), "scalar": ()}
Values = dict[str, np.ndarray]


def start(case: Configuration, dtype: Any) -> Values:
    shapes = {name: shape for name, shape in SHAPES.items() if case.optimizer != "Muon" or len(shape) == 2}
    values = oracle.initial(shapes, np.float64)
    turned = {name: value * (1 + 0.5j) for name, value in values.items()} if np.dtype(dtype).kind == "c" else values
    return {name: np.asarray(value).astype(dtype) for name, value in turned.items()}


def slopes(values: Mapping[str, Any], step: int) -> Values:
    """The last parameter is without a gradient at every third step."""
    found = {
        name: np.asarray(0.2 * value + oracle.wave(value.shape, step) * (1 - 2j if np.iscomplexobj(value) else 1)).astype(
            value.dtype
        )
        for name, value in values.items()
    }
    if step % 3 == 2:
        found.popitem()
    return found


def go_on(job: Job, stock: Stock, steps: range) -> None:
    """Each side with the gradients of its own parameters."""
    with job.join() as worker:
        values = worker.pull()
        for step in steps:
            values = worker.push_pull(slopes(values, step))
            stock.step(slopes(stock.values, step))


def as_torch(state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """As docs/optimizers.md has it."""
    state = {key: {k: torch.as_tensor(v) for k, v in entry.items()} for key, entry in state_dict["state"].items()}
    return {"state": state, "param_groups": state_dict["param_groups"]}


def keys_are_torchs(ours: Mapping[str, Any], theirs: Mapping[str, Any], names: list[str]) -> None:
    """In order, groups and state; values of groups too."""
    assert list(ours) == list(theirs) == ["state", "param_groups"]
    (mine,), (its,) = ours["param_groups"], theirs["param_groups"]
    assert [key for key in mine if key != "param_names"] == list(its)
    assert mine["param_names"] == names
    assert {key: mine[key] for key in its} == {key: oracle.number(value) for key, value in its.items()}
    assert [(key, list(entry)) for key, entry in ours["state"].items()] == [
        (key, list(entry)) for key, entry in theirs["state"].items()
    ]


def alike(job: Job, stock: Stock, case: Configuration, tolerance: float) -> None:
    """Parameters and state; the step exactly."""
    for name, value in job.pull().items():
        near(value, stock.values[name], case, tolerance, name)
    theirs = stock.optimizer.state_dict()["state"]
    ours = job.state_dict()["state"]
    assert ours.keys() == theirs.keys()
    for key, entry in theirs.items():
        for slot, value in entry.items():
            near(ours[key][slot], value.numpy(), case, 0.0 if slot == "step" else tolerance, f"{slot} of {key}")


def near(found: Any, expected: Any, case: Configuration, tolerance: float, what: str) -> None:
    largest = float(np.max(np.abs(expected), initial=0.0))
    extra = 0.0 if tolerance == 0 else oracle.slack(case)
    np.testing.assert_allclose(found, expected, rtol=tolerance, atol=tolerance * largest + extra, err_msg=what)


def tolerance_of(dtype: Any) -> float:
    return {4: 1e-5, 8: 1e-13}[np.dtype(dtype).type(0).real.itemsize]


def from_torch(server: Server, case: Configuration, dtype: Any) -> tuple[Job, Stock]:
    """A torch run of five steps, and a job that took over."""
    stock = Stock(case.optimizer, case.options, start(case, dtype))
    for step in range(5):
        stock.step(slopes(stock.values, step))
    job = server.create_job(None, {name: value.copy() for name, value in stock.values.items()}, optimizer=case.optimizer)
    job.load_state_dict(stock.optimizer.state_dict())
    return job, stock


def check_from_torch(server: Server, case: Configuration, dtype: Any) -> None:
    job, stock = from_torch(server, case, dtype)
    keys_are_torchs(job.state_dict(), stock.optimizer.state_dict(), list(stock.values))
    alike(job, stock, case, 0.0)
    go_on(job, stock, range(5, 10))
    keys_are_torchs(job.state_dict(), stock.optimizer.state_dict(), list(stock.values))
    alike(job, stock, case, tolerance_of(dtype))


def check_to_torch(server: Server, case: Configuration, dtype: Any) -> None:
    """torch turns carried scalars into the parameter's dtype when it loads, and rounds them differently from then on."""
    options = {**case.numbers, **({"foreach": False} if "foreach" in case.ours.defaults else {})}
    job = server.create_job(None, start(case, dtype), optimizer=case.optimizer, **options)
    first = Stock(case.optimizer, case.options, start(case, dtype))
    go_on(job, first, range(5))
    again = Stock(case.optimizer, {}, job.pull())
    again.optimizer.load_state_dict(as_torch(job.state_dict()))
    keys_are_torchs(job.state_dict(), first.optimizer.state_dict(), list(first.values))
    for group, wanted in zip(again.optimizer.param_groups, first.optimizer.param_groups, strict=True):
        assert {k: v for k, v in group.items() if k not in ("params", "param_names")} == {
            k: oracle.number(v) for k, v in wanted.items() if k != "params"
        }
    alike(job, again, case, 0.0)
    go_on(job, again, range(5, 10))
    alike(job, again, case, max(tolerance_of(dtype), 1e-6 if case.ours.scalar_keys else 0.0))
    job.load_state_dict(again.optimizer.state_dict())


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_job_continues_from_torch(embedded: Server, case: Configuration) -> None:
    check_from_torch(embedded, case, np.float32)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_torch_continues_from_a_job(embedded: Server, case: Configuration) -> None:
    check_to_torch(embedded, case, np.float32)


@pytest.mark.parametrize("case", DEFAULTS, ids=str)
def test_both_ways_in_float64(embedded: Server, case: Configuration) -> None:
    check_from_torch(embedded, case, np.float64)
    check_to_torch(embedded, case, np.float64)


@pytest.mark.parametrize("dtype", [np.complex64, np.complex128])
@pytest.mark.parametrize("case", COMPLEX, ids=str)
def test_both_ways_of_complex_parameters(embedded: Server, case: Configuration, dtype: Any) -> None:
    check_from_torch(embedded, case, dtype)
    check_to_torch(embedded, case, dtype)


@pytest.mark.parametrize("name", ["Adafactor", "Muon"])
def test_a_torch_run_that_was_resumed_and_then_given_a_group_is_taken_over(embedded: Server, name: str) -> None:
    """torch's load gives `differentiable` to the groups that come after it, though these two have no such option."""
    first, second = (torch.ones(2, 3, requires_grad=True) for _ in range(2))
    resumed = getattr(torch.optim, name)([first])
    resumed.load_state_dict(resumed.state_dict())
    resumed.add_param_group({"params": [second], "lr": 0.5})
    assert [group.get("differentiable") for group in resumed.param_groups] == [None, False]
    value = np.ones((2, 3), np.float32)
    job = embedded.create_job(None, [{"params": {"first": value}}, {"params": {"second": value}}], optimizer=name)
    job.load_state_dict(resumed.state_dict())
    assert [group["lr"] for group in job.param_groups] == [group["lr"] for group in resumed.param_groups]
    assert all("differentiable" not in group for group in job.param_groups)

"""What LBFGS does not take: groups, options, plain pushes, states of another shape; each leaves the job as it was."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest

from optserve.client import Job, Server, errors

Values = dict[str, np.ndarray]


def start() -> Values:
    random = np.random.default_rng(99)
    return {"w": random.normal(size=(6, 3)), "b": random.normal(size=3)}


def paraboloid(weights: Mapping[str, np.ndarray]) -> tuple[float, Values]:
    slopes = {name: (index + 1) * value for index, (name, value) in enumerate(weights.items())}
    return sum(float((value * slopes[name]).sum()) / 2 for name, value in weights.items()), slopes


@pytest.fixture
def stepped(client: Server) -> Job:
    """A job of LBFGS that has a history."""
    job = client.create_job("j", start(), optimizer="lbfgs", max_iter=3)
    with job.join() as worker:
        worker.step(paraboloid)
    return job


def changed(state_dict: dict[str, Any], **entries: Any) -> dict[str, Any]:
    """With other entries in the state; None: without them."""
    state = {name: value for name, value in {**state_dict["state"][0], **entries}.items() if value is not None}
    return {**state_dict, "state": {0: state}}


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"d": np.zeros(5)}, r"state 'd' has shape \(5,\); the parameters have 21 elements"),
        ({"d": np.zeros((3, 7))}, r"d of LBFGS's state has shape \(3, 7\).*must be a vector"),
        ({"d": 3 + np.zeros(21, np.complex64)}, "d of LBFGS's state has .*complex64; it must be a vector of reals"),
        ({"d": None}, "but no d"),
        ({"old_dirs": np.zeros((2, 21))}, "old_dirs of LBFGS's state is a ndarray; it must be a list"),
        ({"old_dirs": [np.zeros(21), np.zeros(20)]}, "old_dirs of LBFGS's state, entry 1, has 20 elements"),
        ({"old_dirs": []}, "0 of old_dirs, 1 of old_stps, 1 of ro; these must be equally many"),
        ({"ro": [1.0, np.zeros(2)]}, r"ro of LBFGS's state has shape \(2,\)"),
        ({"n_iter": -1}, "state 'n_iter' is -1.0; it must be a whole number"),
        ({"t": "x"}, "t of LBFGS's state"),
        ({"exp_avg": np.zeros(21)}, "state 'exp_avg' is not LBFGS's; allowed are func_evals"),
    ],
    ids=str,
)
def test_a_state_that_is_not_lbfgss_is_refused(stepped: Job, snapshot: Any, entries: dict[str, Any], message: str) -> None:
    before = snapshot(stepped)
    with pytest.raises(errors.InvalidStateDictError, match=message):
        stepped.load_state_dict(changed(stepped.state_dict(), **entries))
    assert snapshot(stepped) == before


def test_a_state_in_another_order_or_of_some_parameters_is_refused(stepped: Job, client: Server, snapshot: Any) -> None:
    before, state_dict = snapshot(stepped), stepped.state_dict()
    stepped.load_state_dict(state_dict, by="name")
    (group,) = state_dict["param_groups"]
    turned = {**state_dict, "param_groups": [{**group, "param_names": ["b", "w"]}]}
    with pytest.raises(errors.InvalidStateDictError, match="not the job's in the job's order"):
        stepped.load_state_dict(turned, by="name")
    more = client.create_job("more", {**start(), "c": np.zeros(2)}, optimizer="lbfgs")
    with pytest.raises(errors.InvalidStateDictError, match="not the job's in the job's order"):
        more.load_state_dict(state_dict, by="name", strict=False)
    adam = client.create_job("adam", start(), optimizer="adam")
    with pytest.raises(errors.InvalidStateDictError):
        adam.load_state_dict(state_dict)
    assert snapshot(stepped)["state"] == before["state"]


def test_one_param_group_is_all_that_it_takes(client: Server, stepped: Job, snapshot: Any) -> None:
    message = r"LBFGS doesn't support per-parameter options \(parameter groups\)"
    values = start()
    with pytest.raises(ValueError, match=message) as caught:
        client.create_job("two", [{"params": {"w": values["w"]}}, {"params": {"b": values["b"]}}], optimizer="lbfgs")
    assert isinstance(caught.value, errors.InvalidArgumentError)
    before = snapshot(stepped)
    with pytest.raises(errors.InvalidArgumentError, match=message):
        stepped.add_param_group({"params": {"c": np.zeros(2)}})
    assert snapshot(stepped) == before


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"line_search_fn": "wolfe"}, errors.InvalidHyperparameterError, "only 'strong_wolfe' is supported"),
        ({"l1": 0.1}, errors.InvalidHyperparameterError, "LBFGS takes no l1 penalty"),
        ({"lr": -1}, errors.InvalidHyperparameterError, "Invalid learning rate: -1"),
        ({"history_size": 0}, errors.InvalidHyperparameterError, "Invalid history_size value: 0"),
        ({"accumulation": 2}, errors.InvalidArgumentError, "accumulation is 2; LBFGS"),
        ({"consistency": "async"}, errors.InvalidArgumentError, "consistency is 'async'; LBFGS"),
    ],
    ids=str,
)
def test_what_it_does_not_take_is_refused(
    client: Server, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        client.create_job("j", start(), optimizer="lbfgs", **options)
    assert client.jobs() == []


def test_a_plain_push_is_told_to_call_step(client: Server, stepped: Job, snapshot: Any) -> None:
    with stepped.join() as worker:
        before = snapshot(stepped)
        with pytest.raises(errors.InvalidArgumentError, match=r"LBFGS needs a closure: call worker\.step\(closure\)"):
            worker.push({name: np.ones_like(value) for name, value in start().items()})
        assert snapshot(stepped) == before

"""load_state_dict by name: torch's own state_dict in another order and grouping, strict and partial."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import pytest
import torch

from optserve.client import Job, Loaded, Server, errors

VALUES: dict[str, np.ndarray] = {
    "w": np.linspace(-1, 1, 12, dtype=np.float32).reshape(3, 4),
    "b": np.linspace(0, 1, 4, dtype=np.float32),
    "v": np.linspace(1, 2, 12, dtype=np.float32).reshape(3, 4),
    "c": np.linspace(2, 3, 2, dtype=np.float32),
}


def gradients(step: int) -> dict[str, np.ndarray]:
    bits = np.random.default_rng((7, step))
    return {name: bits.normal(size=value.shape).astype(np.float32) for name, value in VALUES.items()}


class Trained:
    """A torch run over named parameters, in these groups."""

    def __init__(self, groups: Sequence[Mapping[str, Any]], optimizer: type[torch.optim.Optimizer] = torch.optim.Adam) -> None:
        self.parameters: dict[str, torch.nn.Parameter] = {}
        given = []
        for group in groups:
            own = {name: torch.nn.Parameter(torch.from_numpy(VALUES[name].copy())) for name in group["names"]}
            self.parameters |= own
            given.append({"params": list(own.items()), **{key: value for key, value in group.items() if key != "names"}})
        self.optimizer = optimizer(given, lr=0.01)

    def step(self, turn: int) -> None:
        for name, parameter in self.parameters.items():
            parameter.grad = torch.from_numpy(gradients(turn)[name])
        self.optimizer.step()

    def trained(self, turns: int) -> Trained:
        for turn in range(turns):
            self.step(turn)
        return self

    @property
    def state_dict(self) -> dict[str, Any]:
        return self.optimizer.state_dict()

    @property
    def weights(self) -> dict[str, np.ndarray]:
        return {name: parameter.detach().numpy() for name, parameter in self.parameters.items()}


def job_of(server: Server, names: Sequence[Sequence[str]], values: Mapping[str, np.ndarray] = VALUES, **options: Any) -> Job:
    """Each group with an lr of its own, so that one which stays can be told from another."""
    groups = [{"params": {name: values[name] for name in entry}, "lr": 0.5 + index} for index, entry in enumerate(names)]
    return server.create_job(None, groups, **{"optimizer": "adam", "lr": 0.1, **options})


def state_of(job: Job) -> dict[str, dict[str, np.ndarray]]:
    """By name."""
    found = job.state_dict()
    names = [name for group in found["param_groups"] for name in group["param_names"]]
    return {names[key]: entry for key, entry in found["state"].items()}


def assert_torchs(entry: Mapping[str, np.ndarray], run: Trained, name: str) -> None:
    wanted = run.optimizer.state[run.parameters[name]]
    assert list(entry) == list(wanted)
    for key, tensor in wanted.items():
        np.testing.assert_array_equal(entry[key], tensor.numpy(), err_msg=f"{key} of {name}")


@pytest.mark.parametrize("optimizer", ["Adam", "NAdam", "Adafactor", "SGD"])
def test_torchs_own_state_dict_in_another_order_and_grouping(server: Server, optimizer: str) -> None:
    """And the job goes on as torch does."""
    one = [{"names": ["c", "w", "b", "v"]}]
    extra = {"momentum": 0.9} if optimizer == "SGD" else {}
    run = Trained([{**group, **extra} for group in one], getattr(torch.optim, optimizer)).trained(3)
    job = job_of(server, [["v", "w"], ["b", "c"]], run.weights, optimizer=optimizer)
    found = job.load_state_dict(run.state_dict, by="name")
    assert isinstance(found, Loaded)
    assert (found.missing, found.unexpected) == ((), ())
    assert (found.version, found.lineage_id) == (job.position().version, job.position().lineage_id)
    for name, entry in state_of(job).items():
        assert_torchs(entry, run, name)
    saved = run.state_dict["param_groups"][0]
    for group in job.param_groups:
        assert group["lr"] == saved["lr"] == 0.01
    with job.join() as worker:
        for turn in range(3, 6):
            worker.push(gradients(turn))
            run.step(turn)
    for name, weights in run.weights.items():
        np.testing.assert_allclose(job.pull()[name], weights, rtol=2e-6, atol=2e-6, err_msg=name)


def test_our_own_state_dict_by_name_is_the_same_state(server: Server, same: Any) -> None:
    source = job_of(server, [["w", "b"], ["v", "c"]])
    with source.join() as worker:
        worker.push(gradients(0))
        worker.push({**gradients(1), "b": None})
    target = job_of(server, [["c", "b"], ["w", "v"]])
    saved = source.state_dict()
    for group in saved["param_groups"]:
        group["lr"] = 0.25
    target.load_state_dict(saved, by="name")
    found, wanted = state_of(target), state_of(source)
    assert found.keys() == wanted.keys()
    for name, entry in wanted.items():
        same(found[name], entry)


def test_a_group_gets_what_the_group_of_its_parameters_has(server: Server) -> None:
    run = Trained([{"names": ["b", "c"], "lr": 0.125, "betas": (0.5, 0.75)}, {"names": ["v", "w"], "lr": 0.25}]).trained(1)
    job = job_of(server, [["w"], ["c"], ["v"], ["b"]])
    job.load_state_dict(run.state_dict, by="name")
    assert [group["lr"] for group in job.param_groups] == [0.25, 0.125, 0.25, 0.125]
    assert [group["betas"] for group in job.param_groups] == [(0.9, 0.999), (0.5, 0.75)] * 2


def test_partial_loads_what_both_have_and_leaves_the_rest(server: Server, same: Any) -> None:
    run = Trained([{"names": ["c", "w"], "amsgrad": True}]).trained(4)
    job = job_of(server, [["w", "b"], ["v"]])
    with job.join() as worker:
        worker.push({name: gradient for name, gradient in gradients(0).items() if name != "c"})
        before, weights = state_of(job), job.pull()
        found = job.load_state_dict(run.state_dict, by="name", strict=False)
        assert (found.missing, found.unexpected) == (("b", "v"), ("c",))
        after = state_of(job)
        assert_torchs(after["w"], run, "w")
        for name in ("b", "v"):
            same({key: after[name][key] for key in before[name]}, before[name])
        same(job.pull(), weights)
        assert [(group["lr"], group["amsgrad"]) for group in job.param_groups] == [(0.01, True), (1.5, False)]
        worker.push({name: gradient for name, gradient in gradients(1).items() if name != "c"})
    assert {name: float(entry["step"]) for name, entry in state_of(job).items()} == {"w": 5.0, "b": 2.0, "v": 2.0}


def test_partial_with_an_entry_without_state_begins_it_again(server: Server) -> None:
    """torch's optimizer that had no gradient for w."""
    run = Trained([{"names": ["w"]}])
    job = job_of(server, [["w", "b"]])
    with job.join() as worker:
        worker.push({"w": gradients(0)["w"], "b": gradients(0)["b"]})
        job.load_state_dict(run.state_dict, by="name", strict=False)
        assert list(state_of(job)) == ["b"]
        worker.push({"w": gradients(1)["w"], "b": gradients(1)["b"]})
    assert {name: float(entry["step"]) for name, entry in state_of(job).items()} == {"w": 1.0, "b": 2.0}


@pytest.mark.parametrize("optimizer", ["Adam", "Adafactor"])
def test_a_partial_load_is_that_of_torch_with_the_other_parameters_untouched(server: Server, optimizer: str) -> None:
    """Numbers after it: w goes on from torch's fourth step, b from the job's own first."""
    made = getattr(torch.optim, optimizer)
    run, own = Trained([{"names": ["w"]}], made).trained(4), Trained([{"names": ["b"]}], made)
    job = server.create_job(None, {"b": VALUES["b"], "w": run.weights["w"]}, optimizer=optimizer, lr=0.01)
    with job.join() as worker:
        worker.push({"b": gradients(0)["b"]})
        own.step(0)
        job.load_state_dict(run.state_dict, by="name", strict=False)
        for turn in range(4, 7):
            worker.push({"w": gradients(turn)["w"], "b": gradients(turn)["b"]})
            run.step(turn)
            own.step(turn)
    for name, reference in (("w", run), ("b", own)):
        np.testing.assert_allclose(job.pull()[name], reference.weights[name], rtol=2e-6, atol=2e-6, err_msg=name)


def without_names(saved: dict[str, Any]) -> dict[str, Any]:
    del saved["param_groups"][0]["param_names"]
    return saved


def with_names(*names: Any) -> Callable[[dict[str, Any]], dict[str, Any]]:
    def change(saved: dict[str, Any]) -> dict[str, Any]:
        saved["param_groups"][0]["param_names"] = list(names)
        return saved

    return change


REFUSALS: list[tuple[Callable[[dict[str, Any]], dict[str, Any]], str]] = [
    (without_names, "param group 0 has no 'param_names', so it cannot be loaded by name"),
    (with_names("w", "b"), "group 0 has 4 params and 2 param_names"),
    (with_names("w", "b", "v", 3), "param_names of group 0 are .*; they must be a list of str"),
    (with_names("w", "b", "v", "w"), "the state_dict's param_names have 'w' more than once"),
    (with_names("w", "b", "v", "d"), "missing are 'c'; unexpected are 'd'; strict=False loads those that both have"),
    (with_names("w", "b", "x", "y"), "missing are 'v', 'c'; unexpected are 'x', 'y'"),
    (with_names("b", "w", "v", "c"), r"state 'exp_avg' of 'b' has shape \(3, 4\); the parameter has shape \(4,\)"),
]


@pytest.mark.parametrize(("change", "message"), REFUSALS)
def test_a_state_dict_whose_names_do_not_fit_changes_nothing(
    server: Server, snapshot: Any, change: Callable[[dict[str, Any]], dict[str, Any]], message: str
) -> None:
    run = Trained([{"names": ["w", "b", "v", "c"]}]).trained(2)
    job = job_of(server, [["w", "b"], ["v", "c"]])
    before = snapshot(job)
    saved = change(copy.deepcopy(run.state_dict))
    with pytest.raises(errors.InvalidStateDictError, match=message):
        job.load_state_dict(saved, by="name")
    assert snapshot(job) == before


@pytest.mark.parametrize("strict", [True, False])
def test_a_group_cannot_get_what_several_groups_have(server: Server, snapshot: Any, strict: bool) -> None:
    run = Trained([{"names": ["w", "c"], "lr": 0.125}, {"names": ["b", "v"], "eps": 1e-3}]).trained(1)
    job = job_of(server, [["w", "b"], ["v", "c"]])
    before = snapshot(job)
    with pytest.raises(
        errors.InvalidStateDictError,
        match="the parameters of group 0 are in groups 0 and 1 of the state_dict, which differ in lr, eps; a group has one",
    ):
        job.load_state_dict(run.state_dict, by="name", strict=strict)
    assert snapshot(job) == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"strict": False}, 'strict=False goes with by="name"'),
        ({"by": "id"}, "by is 'id'; allowed are 'position' and 'name'"),
        ({"by": "name", "strict": 1}, "strict is 1; it must be True or False"),
    ],
)
def test_arguments_that_do_not_go_together(server: Server, arguments: dict[str, Any], message: str) -> None:
    job = job_of(server, [["w", "b"]])
    with pytest.raises(errors.InvalidArgumentError, match=message):
        job.load_state_dict(job.state_dict(), **arguments)


def test_by_position_stays_the_default(server: Server) -> None:
    """Whatever the names: torch's of another model with the same shapes."""
    run = Trained([{"names": ["w", "b"]}]).trained(1)
    saved = run.state_dict
    saved["param_groups"][0]["param_names"] = ["x", "y"]
    job = job_of(server, [["w", "b"]])
    found = job.load_state_dict(saved)
    assert found == job.position()
    assert_torchs(state_of(job)["w"], run, "w")


def test_by_name_after_a_rename(server: Server) -> None:
    job = job_of(server, [["w", "b"]])
    with job.join() as worker:
        worker.push({"w": gradients(0)["w"], "b": gradients(0)["b"]})
    saved = job.state_dict()
    job.rename_parameter("w", "x")
    with pytest.raises(errors.InvalidStateDictError, match="missing are 'x'; unexpected are 'w'"):
        job.load_state_dict(saved, by="name")
    assert job.load_state_dict(saved, by="name", strict=False).missing == ("x",)
    job.load_state_dict(saved)
    assert job.state_dict()["param_groups"][0]["param_names"] == ["x", "b"]

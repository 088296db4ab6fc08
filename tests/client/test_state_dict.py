from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import pytest
import torch

from optserve.client import Server, _state_dict
from optserve.client._matching import by_position
from optserve.wire import errors
from optserve.wire.layout import Layout
from optserve.wire.values import from_hyperparameters

LAYOUT = Layout().extended(0, [("w", (3, 2), np.dtype(np.float32)), ("b", (2,), np.dtype(np.float32))])
NAMES = [["w", "b"]]
COMPLEX = Layout().extended(0, [("z", (3, 2), np.dtype(np.complex64)), ("zz", (2,), np.dtype(np.complex128))])


def torch_run(
    optimizer: type[torch.optim.Optimizer], dtype: torch.dtype, **arguments: Any
) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = torch.nn.Linear(2, 3, bias=optimizer is not torch.optim.Muon).to(dtype)
    made = optimizer(model.parameters(), **arguments)
    for _ in range(3):
        made.zero_grad()
        model(torch.ones(1, 2, dtype=dtype)).square().sum().backward()
        made.step()
    return model, made


CASES: list[tuple[type[torch.optim.Optimizer], dict[str, Any]]] = [
    (torch.optim.Adam, {"lr": 0.1, "amsgrad": True}),
    (torch.optim.AdamW, {"lr": 0.1, "betas": (0.8, 0.99)}),
    (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9}),
    (torch.optim.SGD, {"lr": 0.1}),
    (torch.optim.Adadelta, {"lr": 0.5, "weight_decay": 0.1}),
    (torch.optim.Adafactor, {"lr": 0.1}),
    (torch.optim.Adagrad, {"lr": 0.1, "initial_accumulator_value": 0.2}),
    (torch.optim.Adamax, {"lr": 0.1}),
    (torch.optim.ASGD, {"lr": 0.1, "t0": 1}),
    (torch.optim.Muon, {"lr": 0.1}),
    (torch.optim.NAdam, {"lr": 0.1}),
    (torch.optim.RAdam, {"lr": 0.1}),
    (torch.optim.RMSprop, {"lr": 0.1, "momentum": 0.9, "centered": True}),
    (torch.optim.Rprop, {"lr": 0.1}),
]


@pytest.mark.parametrize(("optimizer", "arguments"), CASES)
def test_torchs_state_dict_goes_in_and_comes_out_again(
    server: Server, optimizer: type[torch.optim.Optimizer], arguments: dict[str, Any]
) -> None:
    model, made = torch_run(optimizer, torch.float32, **arguments)
    params = {name: parameter.detach().numpy() for name, parameter in model.named_parameters()}
    job = server.create_job(None, params, optimizer=optimizer.__name__, lr=1.0)
    wanted = made.state_dict()
    job.load_state_dict(wanted)
    got = job.state_dict()
    assert {key: list(entry) for key, entry in got["state"].items()} == {
        key: list(entry) for key, entry in wanted["state"].items()
    }
    for key, entry in wanted["state"].items():
        for slot, tensor in entry.items():
            np.testing.assert_array_equal(got["state"][key][slot], tensor.numpy(), strict=True)
            assert got["state"][key][slot].dtype == np.float32
    (group,) = got["param_groups"]
    assert group.pop("param_names") == list(params)
    assert group == wanted["param_groups"][0]
    assert [key for key in group if key != "params"] == [key for key in wanted["param_groups"][0] if key != "params"]


@pytest.mark.parametrize(("optimizer", "arguments"), CASES)
def test_our_state_dict_continues_in_torch(
    embedded: Server, optimizer: type[torch.optim.Optimizer], arguments: dict[str, Any]
) -> None:
    model, made = torch_run(optimizer, torch.float32, **arguments)
    params = {name: parameter.detach().numpy() for name, parameter in model.named_parameters()}
    job = embedded.create_job(None, params, optimizer=optimizer.__name__, lr=1.0)
    job.load_state_dict(made.state_dict())
    ours = job.state_dict()
    as_tensors = {
        key: {slot: torch.from_numpy(array.copy()) for slot, array in entry.items()} for key, entry in ours["state"].items()
    }
    again = optimizer(model.parameters(), **arguments)
    again.load_state_dict({"state": as_tensors, "param_groups": ours["param_groups"]})
    before = [parameter.detach().clone() for parameter in model.parameters()]
    made.step()
    after = [parameter.detach().clone() for parameter in model.parameters()]
    with torch.no_grad():
        for parameter, value in zip(model.parameters(), before, strict=True):
            parameter.copy_(value)
    again.step()
    assert all(torch.equal(parameter, value) for parameter, value in zip(model.parameters(), after, strict=True))


def test_the_state_of_16_bit_parameters_is_float32(embedded: Server) -> None:
    import ml_dtypes

    model, made = torch_run(torch.optim.Adam, torch.bfloat16, lr=0.1)
    params = {
        name: parameter.detach().float().numpy().astype(ml_dtypes.bfloat16) for name, parameter in model.named_parameters()
    }
    job = embedded.create_job(None, params, optimizer="adam", lr=0.1)
    wanted = made.state_dict()
    job.load_state_dict(wanted)
    got = job.state_dict()["state"][0]
    assert set(got) == {"step", "exp_avg", "exp_avg_sq"}
    assert got["exp_avg"].dtype == np.float32
    np.testing.assert_array_equal(got["exp_avg"], wanted["state"][0]["exp_avg"].float().numpy())


def test_older_torchs_empty_momentum_is_no_state() -> None:
    saved = {"state": {0: {"momentum_buffer": None}}, "param_groups": [{"lr": 0.1, "params": [0, 1]}]}
    loading = _state_dict.parse(saved, partial(by_position, names=NAMES), LAYOUT)
    assert (loading.steps, loading.tensors) == ({}, [])


def entry(**slots: Any) -> dict[str, Any]:
    return {"state": {0: {"step": 1.0, **slots}}, "param_groups": [{"lr": 0.1, "params": [0, 1]}]}


@pytest.mark.parametrize(
    ("saved", "message"),
    [
        ({"state": {}}, "a state_dict must have 'state' and 'param_groups'; it lacks 'param_groups'"),
        ({"state": {}, "param_groups": [{"lr": 0.1}]}, "param group 0 must have 'params'"),
        (None, "a state_dict is a NoneType; it must be a dict"),
        ({"state": [], "param_groups": [{"params": [0, 1]}]}, "the state is a list; it must be a dict"),
        ({"state": {0: None}, "param_groups": [{"params": [0, 1]}]}, "the state of parameter 0 is a NoneType"),
        ({"state": {}, "param_groups": {"params": [0, 1]}}, "param_groups is a dict; it must be a list"),
        ({"state": {}, "param_groups": [[0, 1]]}, "param group 0 is a list; it must be a dict"),
        ({"state": {}, "param_groups": [{"params": 0}]}, "params of group 0 is a int; it must be a list"),
        ({"state": {}, "param_groups": [{"params": [[0], [1]]}]}, r"params name the parameter \[0\]"),
        ({"state": {}, "param_groups": [{"params": [1, 1]}]}, "params name the parameter 1; each must have an id of its own"),
        ({"state": {}, "param_groups": []}, "different number of parameter groups: 0; the job has 1"),
        ({"state": {}, "param_groups": [{"params": [0]}]}, "group 0 has 1 parameters; the job's has 2"),
        ({"state": {}, "param_groups": [{"params": [0, 1], "lr": object()}]}, "param group cannot be loaded: lr is <object"),
        ({"state": {}, "param_groups": [{"params": [0, 1], 3: 0.1}]}, "a hyperparameter's name is 3 of type int"),
        ({"state": {7: {}}, "param_groups": [{"params": [0, 1]}]}, "parameter 7 is in no param group"),
        ({"state": {0: {3: 1.0}}, "param_groups": [{"params": [0, 1]}]}, "the state of parameter 'w' has the key 3"),
        (entry(exp_avg="text"), "exp_avg of parameter 'w' has dtype"),
        (entry(exp_avg=[True, False]), "exp_avg of parameter 'w' has dtype bool; it must be an array of floats or complex"),
        (entry(exp_avg=[[1.0], [2.0, 3.0]]), "exp_avg of parameter 'w' is a list that is no array"),
        (entry(exp_avg=torch.ones(3, 2).to_sparse()), "exp_avg of parameter 'w' is a Tensor that is no array: .*Sparse"),
        (entry(exp_avg=torch.ones(3, 2, device="meta")), "exp_avg of parameter 'w' is a Tensor that is no array: .*meta"),
        (
            entry(exp_avg=np.zeros((3, 2), np.complex64)),
            "exp_avg of parameter 'w' has dtype complex64; the parameter has dtype float32",
        ),
        (entry(step="often"), "the step of parameter 'w' is no number: .*'often'"),
        (entry(step=10**5000), "the step of parameter 'w' is no number"),
    ],
)
def test_a_state_dict_that_does_not_fit_is_refused(saved: Any, message: str) -> None:
    with pytest.raises(errors.InvalidStateDictError, match=message):
        _state_dict.parse(saved, partial(by_position, names=NAMES), LAYOUT)


def test_a_tensor_as_a_hyperparameter_is_its_number() -> None:
    group = {"params": [0, 1], "lr": torch.tensor(0.5), "betas": (torch.tensor(0.25), torch.tensor(0.75))}
    loading = _state_dict.parse({"state": {}, "param_groups": [group]}, partial(by_position, names=NAMES), LAYOUT)
    assert from_hyperparameters(loading.matched.groups[0].hyperparameters) == {"lr": 0.5, "betas": (0.25, 0.75)}


def test_what_float32_cannot_hold_is_infinite_and_nobody_is_warned() -> None:
    loading = _state_dict.parse(
        entry(exp_avg=np.full((3, 2), 1e300), mu_product=1e300), partial(by_position, names=NAMES), LAYOUT
    )
    assert [np.isposinf(array).all() for _, _, array in loading.tensors] == [True, True]


def test_scalars_and_factored_state_keep_their_own_shapes_and_reals_stay_real() -> None:
    saved = entry(
        mu_product=torch.tensor(0.5),
        eta=0.25,
        row_var=torch.ones(3, 1),
        exp_avg=torch.full((3, 2), 1 + 2j).conj(),
        exp_avg_sq=np.ones((2, 3), np.complex128).T,
        sum=np.ones(3, np.int64),
    )
    loading = _state_dict.parse(saved, partial(by_position, names=[["z", "zz"]]), COMPLEX)
    found = {slot: array for name, slot, array in loading.tensors if name == "z"}
    assert {slot: (array.dtype.name, array.shape) for slot, array in found.items()} == {
        "mu_product": ("float32", ()),
        "eta": ("float32", ()),
        "row_var": ("float32", (3, 1)),
        "exp_avg": ("complex64", (3, 2)),
        "exp_avg_sq": ("complex64", (3, 2)),
        "sum": ("float32", (3,)),
    }
    assert found["exp_avg"][0, 0] == 1 - 2j
    assert found["eta"] == 0.25


@pytest.mark.parametrize(
    "change",
    [{"momentum_buffer": np.zeros((2, 2), np.float32)}, {}, {"exp_avg": np.zeros(4, np.float32)}],
    ids=["slot of another optimizer", "step missing", "another shape"],
)
def test_state_of_another_optimizer_changes_nothing(server: Server, change: dict[str, Any]) -> None:
    job = server.create_job(None, {"w": np.ones((2, 2), np.float32)}, optimizer="adam", lr=0.1)
    before = job.position()
    slots = {slot: np.zeros((2, 2), np.float32) for slot in ("exp_avg", "exp_avg_sq")}
    state = {**slots, "step": np.float32(1), **change}
    if not change:
        del state["step"]
    saved = {"state": {0: state}, "param_groups": job.state_dict()["param_groups"]}
    with pytest.raises(errors.InvalidStateDictError):
        job.load_state_dict(saved)
    assert job.position() == before
    job.update_group(0, lr=0.2)

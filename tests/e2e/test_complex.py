"""Complex parameters from end to end, beside torch's, which computes with them as pairs of reals."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from optserve.client import Job, Server, errors

SHAPES = {"z": (33, 4), "r": (5,), "zz": (2, 3), "s": (), "none": (0, 3)}
DTYPES = {"z": np.complex64, "r": np.float32, "zz": np.complex128, "s": np.complex64, "none": np.complex64}

OPTIMIZERS: dict[str, tuple[str, dict[str, Any]]] = {
    "sgd": ("SGD", {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 0.01}),
    "adam": ("Adam", {"lr": 0.01, "amsgrad": True, "weight_decay": 0.1}),
    "adamw": ("AdamW", {"lr": 0.01, "maximize": True}),
    "nadam": ("NAdam", {"lr": 0.01, "weight_decay": 0.1, "decoupled_weight_decay": True}),
    "radam": ("RAdam", {"lr": 0.01, "betas": (0.5, 0.6)}),
    "adamax": ("Adamax", {"lr": 0.01}),
    "adadelta": ("Adadelta", {"lr": 1.0}),
    "adagrad": ("Adagrad", {"lr": 0.1, "initial_accumulator_value": 0.2}),
    "rmsprop": ("RMSprop", {"lr": 0.01, "centered": True, "momentum": 0.5}),
    "rprop": ("Rprop", {"lr": 0.01}),
    "asgd": ("ASGD", {"lr": 0.01, "t0": 1}),
}

Arrays = dict[str, Any]


def draw(*seed: int) -> Arrays:
    bits = np.random.default_rng(seed)
    found = {name: bits.normal(size=(*shape, 2)) @ np.array([1, 1j]) for name, shape in SHAPES.items()}
    return {
        name: (value if np.iscomplexobj(np.empty(0, DTYPES[name])) else value.real).astype(DTYPES[name])
        for name, value in found.items()
    }


def as_parameters(values: Mapping[str, Any]) -> dict[str, torch.nn.Parameter]:
    return {name: torch.nn.Parameter(torch.from_numpy(np.array(value))) for name, value in values.items()}


def made(optimizer: str, parameters: Mapping[str, torch.nn.Parameter]) -> torch.optim.Optimizer:
    name, options = OPTIMIZERS[optimizer]
    found: torch.optim.Optimizer = getattr(torch.optim, name)(parameters.values(), **options, foreach=False)
    return found


def mean(step: int) -> Arrays:
    """Of two ranks' gradients, as the server folds them."""
    first, second = draw(1, step), draw(2, step)
    return {name: (first[name] + second[name]) * first[name].real.dtype.type(0.5) for name in SHAPES}


def torch_steps(optimizer: torch.optim.Optimizer, parameters: Mapping[str, torch.nn.Parameter], steps: range) -> None:
    for step in steps:
        for name, gradient in mean(step).items():
            parameters[name].grad = torch.from_numpy(np.array(gradient))
        optimizer.step()


def train(job: Job, side_by_side: Any, steps: range) -> None:
    """Two ranks side by side, each with its own gradients."""

    def rank_of(rank: int) -> Callable[[], None]:
        def work() -> None:
            with job.join(rank=rank) as worker:
                weights = worker.pull()
                for step in steps:
                    weights = worker.push_pull(draw(1 + rank, step), out=weights)

        return work

    side_by_side([rank_of(0), rank_of(1)])


def close(found: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    for name, array in expected.items():
        wide = np.asarray(array).dtype in (np.float64, np.complex128)
        tight = 1e-12 if wide else 3e-6
        assert found[name].dtype == np.asarray(array).dtype, name
        np.testing.assert_allclose(found[name], array, rtol=tight, atol=tight, err_msg=name)


def as_arrays(parameters: Mapping[str, torch.nn.Parameter]) -> Arrays:
    return {name: parameter.detach().numpy() for name, parameter in parameters.items()}


@pytest.fixture(params=OPTIMIZERS)
def optimizer(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def create(server: Server, optimizer: str, name: str = "j", workers: int = 2) -> Job:
    return server.create_job(name, draw(0), optimizer=optimizer, **OPTIMIZERS[optimizer][1], workers=workers)


def test_two_workers_equal_torch_on_the_mean_gradient(embedded: Server, optimizer: str, side_by_side: Any) -> None:
    job = create(embedded, optimizer)
    train(job, side_by_side, range(5))
    parameters = as_parameters(draw(0))
    reference = made(optimizer, parameters)
    torch_steps(reference, parameters, range(5))
    close(job.pull(), as_arrays(parameters))
    found, expected = job.state_dict()["state"], reference.state_dict()["state"]
    assert list(found) == list(expected)
    for key, entry in expected.items():
        assert list(found[key]) == list(entry)
        close(found[key], {slot: value.numpy() for slot, value in entry.items()})


def test_torch_goes_on_from_our_state_and_we_from_torchs(embedded: Server, optimizer: str, side_by_side: Any) -> None:
    parameters = as_parameters(draw(0))
    reference = made(optimizer, parameters)
    torch_steps(reference, parameters, range(3))
    job = embedded.create_job("j", as_arrays(parameters), optimizer=optimizer, **OPTIMIZERS[optimizer][1], workers=2)
    job.load_state_dict(reference.state_dict())
    ours = job.state_dict()
    for key, entry in reference.state_dict()["state"].items():
        for slot, value in entry.items():
            np.testing.assert_array_equal(ours["state"][key][slot], value.numpy(), strict=True)
    again = as_parameters(as_arrays(parameters))
    continued = made(optimizer, again)
    tensors = {key: {slot: torch.from_numpy(value) for slot, value in entry.items()} for key, entry in ours["state"].items()}
    continued.load_state_dict({"state": tensors, "param_groups": ours["param_groups"]})
    for running, values in ((reference, parameters), (continued, again)):
        torch_steps(running, values, range(3, 6))
    assert all(torch.equal(again[name], parameters[name]) for name in SHAPES)
    train(job, side_by_side, range(3, 6))
    close(job.pull(), as_arrays(parameters))


@pytest.mark.parametrize("optimizer", ["adam", "nadam"])
def test_a_checkpoint_holds_complex_parameters_and_groups_that_came_later(
    client: Server, optimizer: str, side_by_side: Any, same: Any, tmp_path: Path
) -> None:
    job = create(client, optimizer, "straight", workers=1)
    late = {"late": np.array([[1 + 2j], [3 - 4j]]), "pairs": np.ones((3, 2))}
    job.add_param_group({"params": late, "lr": 0.5})

    def go_on(found: Job, steps: range) -> None:
        with found.join() as worker:
            for step in steps:
                worker.push(draw(1, step) | {name: value * (1 + step) for name, value in late.items()})

    go_on(job, range(3))
    job.save_checkpoint("middle")
    job.download_checkpoint("middle", tmp_path / "middle")
    go_on(job, range(3, 6))
    expected, state = job.pull(), job.state_dict()
    assert {name: value.dtype for name, value in expected.items() if name in late} == {
        "late": np.complex128,
        "pairs": np.float64,
    }
    job.restore_checkpoint("middle")
    for found in (job, client.create_job("again", from_checkpoint=tmp_path / "middle")):
        go_on(found, range(3, 6))
        same(found.pull(), expected)
        for key, entry in state["state"].items():
            same(found.state_dict()["state"][key], entry)


def test_a_gradient_whose_imaginary_part_is_not_finite_is_refused_by_name(server: Server, same: Any) -> None:
    job = create(server, "adam", workers=1)
    gradients = draw(1)
    gradients["zz"][1, 2] = complex(0, np.inf)
    with job.join() as worker:
        with pytest.raises(errors.NonfiniteGradientError, match="'zz'"):
            worker.push(gradients)
        same(job.pull(), draw(0))
        worker.push(draw(1))
    assert job.position().step == 1


@pytest.mark.parametrize(
    ("name", "slot", "kind"),
    [("z", "exp_avg", np.float32), ("r", "exp_avg", np.complex64)],
    ids=["real state of a complex parameter", "complex state of a real parameter"],
)
def test_state_that_is_complex_where_the_parameter_is_not_changes_nothing(
    server: Server, name: str, slot: str, kind: Any, same: Any
) -> None:
    job = create(server, "adam", workers=1)
    with job.join() as worker:
        worker.push(draw(1))
    before, position = job.state_dict(), job.position()
    wrong = job.state_dict()
    index = list(SHAPES).index(name)
    wrong["state"][index][slot] = np.zeros(SHAPES[name], kind)
    with pytest.raises(errors.InvalidStateDictError, match=f"{slot}.*{name}.*complex64|{name}.*{slot}.*complex64"):
        job.load_state_dict(wrong)
    assert job.position() == position
    for key, entry in before["state"].items():
        same(job.state_dict()["state"][key], entry)


def test_a_gradient_and_a_parameter_are_both_complex_or_both_real(server: Server, same: Any) -> None:
    job = create(server, "adam", workers=1)
    with job.join() as worker:
        for name, wrong in (("z", np.float32), ("zz", np.float64), ("r", np.complex64)):
            message = f"gradient '{name}' has dtype {np.dtype(wrong)}; the parameter has dtype {np.dtype(DTYPES[name])}"
            with pytest.raises(errors.DtypeMismatchError, match=message):
                worker.push({name: np.zeros(SHAPES[name], wrong)})
    same(job.pull(), draw(0))


@pytest.mark.parametrize(
    ("optimizer", "value", "message"),
    [
        ("adafactor", np.ones((2, 3), np.complex64), "'w': Adafactor does not support complex parameters"),
        ("muon", np.ones((2, 3), np.complex64), "'w': Muon does not support complex parameters"),
        ("muon", np.ones(3), r"'w': Muon only supports 2D parameters .* size: torch.Size\(\[3\]\)"),
    ],
)
def test_a_parameter_that_the_optimizer_cannot_take_is_refused_as_torch_does(
    server: Server, optimizer: str, value: Any, message: str
) -> None:
    with pytest.raises(errors.UnsupportedParameterError, match=message):
        server.create_job("j", {"w": value}, optimizer=optimizer)
    assert server.jobs() == []
    job = server.create_job("j", {"v": np.ones((2, 3))}, optimizer=optimizer)
    before = job.info()
    with pytest.raises(errors.UnsupportedParameterError, match=message):
        job.add_param_group({"params": {"w": value}})
    assert job.info() == before

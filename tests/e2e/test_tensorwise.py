"""Optimizers that look at parameters as a whole, through a server: state, checkpoints, torch's state_dict, refusals."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch

from optserve.client import Job, Server, errors

OPTIMIZERS: dict[str, dict[str, Any]] = {
    "adafactor": {"lr": 0.05},
    "lamb": {"lr": 0.01, "weight_decay": 0.1},
    "lars": {"lr": 5.0},
    "muon": {"lr": 0.02},
}
SHAPES = {"w": (12, 7), "half": (9, 4), "wide": (4, 15), "none": (0, 3)}
DTYPES = {"w": np.float32, "half": ml_dtypes.bfloat16, "wide": np.float64, "none": np.float32}

Arrays = dict[str, Any]


def draw(*seed: int) -> Arrays:
    bits = np.random.default_rng(seed)
    return {name: bits.normal(size=shape).astype(DTYPES[name]) for name, shape in SHAPES.items()}


def train(job: Job, steps: range) -> None:
    with job.join() as worker:
        for step in steps:
            worker.push(draw(1, step))


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_training_goes_on_from_a_checkpoint_with_the_same_bits(
    optimizer: str, client: Server, same: Any, tmp_path: Path
) -> None:
    job = client.create_job("straight", draw(0), optimizer=optimizer, **OPTIMIZERS[optimizer])
    train(job, range(3))
    job.save_checkpoint("middle")
    job.download_checkpoint("middle", tmp_path / "middle")
    train(job, range(3, 6))
    expected, state = job.pull(), job.state_dict()
    assert not any(np.array_equal(expected[name], value) for name, value in draw(0).items() if value.size)
    job.restore_checkpoint("middle")
    for found in (job, client.create_job("again", from_checkpoint=tmp_path / "middle")):
        train(found, range(3, 6))
        same(found.pull(), expected)
        assert found.state_dict()["param_groups"] == state["param_groups"]
        for key, entry in state["state"].items():
            same(found.state_dict()["state"][key], entry)


def test_an_epsilon_that_is_none_travels_and_is_edited(client: Server) -> None:
    job = client.create_job("j", draw(0), optimizer="adafactor")
    assert job.param_groups[0]["eps"] == (None, 1e-3)
    job.update_group(0, eps=(1e-30, 1e-2))
    assert client.job("j").param_groups[0]["eps"] == (1e-30, 1e-2)
    job.update_group(0, eps=(None, 1e-2))
    assert client.job("j").param_groups[0]["eps"] == (None, 1e-2)


@pytest.mark.parametrize("optimizer", ["adafactor", "muon"])
def test_torchs_state_is_taken_and_ours_is_torchs(optimizer: str, embedded: Server) -> None:
    start = {name: value for name, value in draw(0).items() if name in ("w", "wide")}
    parameters = {name: torch.from_numpy(value.copy()).requires_grad_() for name, value in start.items()}
    kind = torch.optim.Adafactor if optimizer == "adafactor" else torch.optim.Muon
    reference = kind(list(parameters.values()), **OPTIMIZERS[optimizer])

    def torch_steps(steps: range) -> None:
        for step in steps:
            for name, gradient in draw(1, step).items():
                if name in parameters:
                    parameters[name].grad = torch.from_numpy(gradient)
            reference.step()

    torch_steps(range(3))
    values = {name: value.detach().numpy() for name, value in parameters.items()}
    job = embedded.create_job("j", values, optimizer=optimizer, **OPTIMIZERS[optimizer])
    job.load_state_dict(reference.state_dict())
    theirs, ours = reference.state_dict(), job.state_dict()
    for key, entry in theirs["state"].items():
        assert list(ours["state"][key]) == list(entry)
        for slot, value in entry.items():
            np.testing.assert_array_equal(ours["state"][key][slot], value.numpy(), strict=True)
    torch_steps(range(3, 6))
    with job.join() as worker:
        for step in range(3, 6):
            worker.push({name: gradient for name, gradient in draw(1, step).items() if name in parameters})
    for name, value in job.pull().items():
        np.testing.assert_allclose(value, parameters[name].detach().numpy(), rtol=0, atol=0.01 if optimizer == "muon" else 1e-6)


@pytest.mark.parametrize(
    ("optimizer", "value", "message"),
    [
        ("muon", np.zeros(3, np.float32), r"Muon only supports 2D parameters .* torch.Size\(\[3\]\)"),
        ("muon", np.zeros((2, 2), np.complex64), "Muon does not support complex parameters"),
        ("adafactor", np.zeros(3, np.complex64), "Adafactor does not support complex parameters"),
    ],
)
def test_a_parameter_that_the_optimizer_cannot_take_is_refused(
    optimizer: str, value: np.ndarray, message: str, client: Server
) -> None:
    with pytest.raises(errors.UnsupportedParameterError, match=message):
        client.create_job("j", {"w": np.zeros((2, 3), np.float32), "odd": value}, optimizer=optimizer)
    job = client.create_job("j", {"w": np.zeros((2, 3), np.float32)}, optimizer=optimizer)
    with pytest.raises(errors.UnsupportedParameterError, match=message):
        job.add_param_group({"params": {"odd": value}})
    assert [name for group in job.param_groups for name in group["params"]] == ["w"]

"""Muon beside torch's, whose iteration is in bfloat16, and beside one in float64."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch

from optserve.server.formulas import blocks, find
from optserve.server.formulas.muon import orthogonalised, round_to_bfloat16

pytestmark = pytest.mark.usefixtures("one_torch_thread")

SHAPES = [(3, 4), (40, 17), (17, 40), (20, 20), (1, 1), (7, 1), (0, 5)]
OPTIONS: list[dict[str, Any]] = [
    {},
    {"lr": 0.02, "nesterov": False, "adjust_lr_fn": "match_rms_adamw"},
    {"lr": 0.05, "momentum": 0.3, "weight_decay": 0.0, "ns_steps": 3, "adjust_lr_fn": "original"},
    {"lr": 0.01, "momentum": 0.0, "eps": 0.7, "ns_steps": 0},
    {"lr": 0.01, "ns_coefficients": (2, -1.5, 0.5), "ns_steps": 8},
]
COEFFICIENTS = find("muon").defaults["ns_coefficients"]
NAN = float("nan")


def run_torch(options: Mapping[str, Any], start: np.ndarray, descend: Any, steps: int) -> tuple[np.ndarray, np.ndarray]:
    parameter = torch.from_numpy(start.copy()).requires_grad_()
    optimizer = torch.optim.Muon([parameter], **options)
    for index in range(steps):
        parameter.grad = torch.from_numpy(descend(parameter.detach().numpy(), index))
        optimizer.step()
    state = optimizer.state[parameter]
    assert list(state) == ["momentum_buffer"]
    return parameter.detach().numpy(), state["momentum_buffer"].numpy()


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_hundred_steps_stay_within_half_a_learning_rate_of_torchs(
    shape: tuple[int, int], options: dict[str, Any], dtype: Any, run: Any, start: Any, descend: Any
) -> None:
    begin = start(shape, dtype)
    ours = run("muon", options, begin).steps_down(100)
    value, kept = run_torch(options, begin, descend, 100)
    tolerance = 0.5 * ours.group["lr"]
    np.testing.assert_allclose(ours.value, value, rtol=0, atol=tolerance)
    np.testing.assert_allclose(ours.state["momentum_buffer"], kept, rtol=0, atol=tolerance)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_without_iterations_in_between_a_step_equals_torchs(
    options: dict[str, Any], run: Any, start: Any, descend: Any
) -> None:
    """Decay, momentum, adjustment and normalisation, of a matrix of several blocks."""
    options, begin = {**options, "ns_steps": 0}, start((300, 200))
    assert begin.size > blocks.HOST_BLOCK
    ours = run("muon", options, begin).steps_down(3)
    value, kept = run_torch(options, begin, descend, 3)
    np.testing.assert_allclose(ours.value, value, rtol=1e-13, atol=1e-15)
    np.testing.assert_allclose(ours.state["momentum_buffer"], kept, rtol=1e-13, atol=1e-15)


def exactly(matrix: np.ndarray, steps: int) -> np.ndarray:
    """The iteration in float64."""
    a, b, c = COEFFICIENTS
    x = matrix / np.linalg.norm(matrix)
    for _ in range(steps):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
@pytest.mark.parametrize("shape", [(40, 90), (90, 40), (64, 64), (200, 300)], ids=str)
def test_the_iteration_is_no_worse_than_torchs(shape: tuple[int, int], dtype: Any, start: Any) -> None:
    matrix = start(shape, dtype)
    ours = orthogonalised(np, matrix, COEFFICIENTS, 5, 1e-7)
    theirs = torch.optim._muon._zeropower_via_newtonschulz(torch.from_numpy(matrix), COEFFICIENTS, 5, 1e-7)  # type: ignore[attr-defined]
    assert theirs.dtype == torch.bfloat16
    assert ours.shape == shape
    assert np.array_equal(ours, ours.astype(ml_dtypes.bfloat16))
    truth = exactly(matrix.astype(np.float64), 5)
    error, error_of_torch = (np.sqrt(np.mean((x - truth) ** 2)) for x in (ours, theirs.float().numpy()))
    assert error <= 1.1 * error_of_torch
    assert np.sqrt(np.mean((ours - theirs.float().numpy()) ** 2)) <= error_of_torch


def test_singular_values_come_out_near_one(start: Any) -> None:
    stretched = start((30, 50)) * np.geomspace(1, 1e-2, 30)[:, None]
    found = np.linalg.svd(orthogonalised(np, stretched, COEFFICIENTS, 5, 1e-7), compute_uv=False)
    assert 0.6 < found.min() < found.max() < 1.25


def test_the_gradient_and_the_momentum_are_only_read_by_the_iteration(start: Any) -> None:
    for shape in ((5, 9), (9, 5)):
        matrix = start(shape, np.float32)
        before = matrix.copy()
        orthogonalised(np, matrix, COEFFICIENTS, 5, 1e-7)
        assert np.array_equal(matrix, before)


def test_a_gradient_of_zeros_moves_nothing_but_decays(run: Any, start: Any) -> None:
    begin = start((4, 5))
    ours = run("muon", {"lr": 0.1, "weight_decay": 0.5}, begin)
    ours.step(np.zeros((4, 5)))
    np.testing.assert_allclose(ours.value, 0.95 * begin, rtol=1e-15)


def test_a_parameter_without_elements_is_left_alone(run: Any, start: Any, descend: Any) -> None:
    for shape in ((3, 0), (0, 5), (0, 0)):
        run("muon", {}, start(shape)).steps_down(2)
    with pytest.raises(ZeroDivisionError):
        run_torch({}, start((3, 0)), descend, 1)


def test_rounding_is_to_nearest_even_for_every_pattern_and_keeps_nan() -> None:
    random = np.random.default_rng(3)
    halves = np.arange(1 << 16, dtype=np.uint32) << 16
    bits = np.concatenate([
        *(halves | np.uint32(low) for low in (0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF)),
        random.integers(0, 1 << 32, 100_000, dtype=np.uint64).astype(np.uint32),
    ])  # fmt: skip
    values = bits.view(np.float32)
    with np.errstate(all="ignore"):
        expected = values.astype(ml_dtypes.bfloat16).astype(np.float32)
    round_to_bfloat16(np, values)
    assert np.array_equal(np.isnan(values), np.isnan(expected))
    numbers = ~np.isnan(expected)
    assert np.array_equal(values.view(np.uint32)[numbers], expected.view(np.uint32)[numbers])
    assert not np.any(values.view(np.uint32) & 0xFFFF)


@pytest.mark.parametrize("shape", [(), (7,), (2, 3, 4)], ids=str)
def test_only_matrices_are_taken_with_torchs_words(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError) as theirs:
        torch.optim.Muon([torch.zeros(shape)])
    for is_complex in (False, True):
        with pytest.raises(ValueError) as ours:
            find("muon").check_parameter("w", shape, is_complex)
        assert str(ours.value) == str(theirs.value)
    find("muon").check_parameter("w", (2, 3), False)


def test_complex_parameters_are_refused_with_torchs_words() -> None:
    parameter = torch.zeros(2, 2, dtype=torch.complex64, requires_grad=True)
    parameter.grad = torch.zeros_like(parameter)
    with pytest.raises(RuntimeError) as theirs:
        torch.optim.Muon([parameter]).step()
    with pytest.raises(RuntimeError) as ours:
        find("muon").check_parameter("w", (2, 2), True)
    assert str(ours.value) == str(theirs.value)


REFUSED: list[dict[str, Any]] = [
    *({key: value} for key in ("lr", "weight_decay", "momentum") for value in (-0.5, NAN)),
    {"adjust_lr_fn": "spectral"}, {"adjust_lr_fn": ""}, {"adjust_lr_fn": 1},
    {"ns_steps": 100}, {"ns_steps": 10**6}, {"ns_coefficients": (1.0, 2.0)}, {"ns_coefficients": (1.0, 2.0, 3.0, 4.0)},
]  # fmt: skip


@pytest.mark.parametrize("options", REFUSED, ids=str)
def test_what_torch_refuses_when_made_or_at_the_first_step_is_refused_with_its_words(options: dict[str, Any]) -> None:
    parameter = torch.zeros(2, 2, requires_grad=True)
    parameter.grad = torch.ones(2, 2)
    with pytest.raises(ValueError) as theirs:
        torch.optim.Muon([parameter], **options).step()
    with pytest.raises(ValueError) as ours:
        find("muon").check({**find("muon").defaults, **options})
    assert str(ours.value) == str(theirs.value)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"eps": NAN}, ValueError, "Invalid eps value: nan"),
        ({"ns_coefficients": (1, NAN, 1)}, ValueError, "Invalid coefficient at index 1: nan"),
        ({"ns_coefficients": (1, 2, "3")}, TypeError, r"ns_coefficients\[2\] is '3' of type str"),
        ({"ns_coefficients": 1.0}, TypeError, "ns_coefficients is 1.0 of type float"),
        ({"ns_steps": 5.0}, TypeError, "ns_steps is 5.0 of type float; it must be an int"),
        ({"ns_steps": True}, TypeError, "ns_steps is True of type bool"),
        ({"nesterov": 1}, TypeError, "nesterov is 1 of type int"),
        ({"eps": None}, TypeError, "eps is None of type NoneType"),
        ({"momentum": "0.9"}, TypeError, "momentum is '0.9' of type str"),
    ],
)
def test_a_wrong_type_or_nan_is_named(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        find("muon").check({**find("muon").defaults, **options})


@pytest.mark.parametrize(
    "options",
    [
        {"lr": 10**300, "weight_decay": 10**300}, {"lr": float("inf")}, {"momentum": 10**300}, {"eps": -1}, {"eps": 10**300},
        {"ns_steps": -1}, {"ns_coefficients": (10**300, 0, -(10**300))}, {"ns_steps": 99},
    ],
    ids=str,
)  # fmt: skip
def test_no_step_of_what_torch_allows_raises(options: dict[str, Any], run: Any, start: Any) -> None:
    torch.optim.Muon([torch.zeros(2, 2)], **options)
    run("muon", options, start((3, 4), np.float32)).steps_down(3)

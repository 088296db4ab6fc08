"""Adafactor beside torch's."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch

from optserve.server.formulas import blocks, find

SHAPES = [(3, 4), (), (7,), (1, 1), (65, 33), (1, 9), (9, 1), (2, 3, 40, 24)]
LARGE = [(40_000,), (300, 200), (3, 40_000), (6_000, 3, 3)]
OPTIONS: list[dict[str, Any]] = [
    {},
    {"lr": 0.1, "weight_decay": 0.1},
    {"lr": 0.3, "d": 2.5, "eps": (1e-30, 0.05)},
    {"beta2_decay": -0.3, "eps": (0.02, 1e-4), "maximize": True},
    {"beta2_decay": 0, "foreach": True},
]
CLOSE: dict[Any, dict[str, float]] = {np.float64: {"rtol": 1e-11, "atol": 1e-12}, np.float32: {"rtol": 1e-5, "atol": 1e-5}}


def run_torch(
    options: Mapping[str, Any], start: np.ndarray, descend: Any, steps: int
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    parameter = torch.from_numpy(start.copy()).requires_grad_()
    optimizer = torch.optim.Adafactor([parameter], **options)
    for index in range(steps):
        parameter.grad = torch.from_numpy(descend(parameter.detach().numpy(), index))
        optimizer.step()
    return parameter.detach().numpy(), {key: value.numpy() for key, value in optimizer.state[parameter].items()}


def compare(ours: Any, theirs: tuple[np.ndarray, dict[str, np.ndarray]], tolerance: Mapping[str, float]) -> None:
    value, state = theirs
    np.testing.assert_allclose(ours.value, value, **tolerance)
    assert list(state) == ["step", *ours.state]
    assert state.pop("step") == ours.steps
    for slot, kept in state.items():
        assert ours.state[slot].shape == kept.shape, slot
        np.testing.assert_allclose(ours.state[slot], kept, **tolerance, err_msg=slot)


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_hundred_steps_equal_torchs(
    shape: tuple[int, ...], options: dict[str, Any], dtype: Any, run: Any, start: Any, descend: Any
) -> None:
    begin = start(shape, dtype)
    compare(run("adafactor", options, begin).steps_down(100), run_torch(options, begin, descend, 100), CLOSE[dtype])


@pytest.mark.parametrize("options", OPTIONS[1:4], ids=str)
@pytest.mark.parametrize("shape", LARGE, ids=str)
def test_parameters_of_several_blocks_equal_torchs(
    shape: tuple[int, ...], options: dict[str, Any], run: Any, start: Any, descend: Any
) -> None:
    begin = start(shape)
    assert begin.size > blocks.HOST_BLOCK
    compare(run("adafactor", options, begin).steps_down(4), run_torch(options, begin, descend, 4), CLOSE[np.float64])


@pytest.mark.parametrize(
    ("dtype", "eps"), [(np.float16, 2**-10), (ml_dtypes.bfloat16, 2**-7), (np.float32, 2**-23), (np.float64, 2**-52)]
)
def test_the_first_epsilon_is_that_of_the_parameters_own_dtype(
    dtype: Any, eps: float, run: Callable[..., Any], start: Any
) -> None:
    def small(value: np.ndarray, index: int) -> np.ndarray:
        """So small that the bound counts."""
        return np.asarray(eps * np.cos(np.arange(value.size) + index).reshape(value.shape)).astype(value.dtype)

    begin = start((6, 5), np.float64 if dtype is np.float64 else np.float32)
    ours = run("adafactor", {}, begin)
    for index in range(5):
        ours.step(small(ours.value, index), dtype)
    compare(ours, run_torch({"eps": (eps, 1e-3)}, begin, small, 5), {"rtol": 1e-6, "atol": 1e-7})
    others = run_torch({"eps": (2 * eps, 1e-3)}, begin, small, 5)[0]
    assert np.max(np.abs(ours.value - others)) > 1e-3


def test_a_parameter_without_elements_is_left_alone_where_torch_divides_by_zero(run: Any, start: Any, descend: Any) -> None:
    for shape in ((1, 0, 2), (0,), (3, 0)):
        ours = run("adafactor", {}, start(shape))
        ours.steps_down(2)
        assert not any(np.any(kept) for kept in ours.state.values())
    with pytest.raises(ZeroDivisionError):
        run_torch({}, start((1, 0, 2)), descend, 1)


def test_complex_parameters_are_refused_with_torchs_words() -> None:
    parameter = torch.zeros(2, dtype=torch.complex64, requires_grad=True)
    parameter.grad = torch.zeros_like(parameter)
    with pytest.raises(RuntimeError) as theirs:
        torch.optim.Adafactor([parameter]).step()
    with pytest.raises(RuntimeError) as ours:
        find("adafactor").check_parameter("w", (2,), True)
    assert str(ours.value) == str(theirs.value)
    find("adafactor").check_parameter("w", (2,), False)


NAN = float("nan")
REFUSED: list[dict[str, Any]] = [
    *({key: value} for key, value in itertools.product(("lr", "weight_decay", "d"), (-0.5, NAN))),
    {"d": 0.99}, {"beta2_decay": 0.1}, {"beta2_decay": NAN},
    {"eps": (-1e-30, 1e-3)}, {"eps": (NAN, 1e-3)}, {"eps": (None, -1e-3)}, {"eps": (None, NAN)},
]  # fmt: skip


@pytest.mark.parametrize("options", REFUSED, ids=str)
def test_what_torch_refuses_is_refused_with_its_words(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError) as theirs:
        torch.optim.Adafactor([torch.zeros(1)], **options)
    with pytest.raises(ValueError) as ours:
        find("adafactor").check({**find("adafactor").defaults, **options})
    assert str(ours.value) == str(theirs.value)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"eps": 1e-3}, TypeError, "eps is 0.001 of type float"),
        ({"eps": (1e-3,)}, ValueError, "eps has 1 values; it must have 2"),
        ({"eps": ("a", 1e-3)}, TypeError, r"eps\[0\] is 'a' of type str"),
        ({"eps": (None, None)}, TypeError, r"eps\[1\] is None of type NoneType"),
        ({"beta2_decay": "0"}, TypeError, "beta2_decay is '0' of type str"),
        ({"d": None}, TypeError, "d is None of type NoneType"),
    ],
)
def test_a_wrong_type_is_named(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        find("adafactor").check({**find("adafactor").defaults, **options})


@pytest.mark.parametrize(
    "options",
    [
        {"lr": 10**300, "weight_decay": 10**300}, {"lr": float("inf")}, {"beta2_decay": -(10**300)}, {"eps": (0, 0)},
        {"eps": (10**200, 10**200)}, {"d": 10**300},
    ],
    ids=str,
)  # fmt: skip
def test_no_step_of_what_torch_allows_raises(options: dict[str, Any], run: Any, start: Any) -> None:
    torch.optim.Adafactor([torch.zeros(1)], **options)
    for shape in ((3, 4), (5,)):
        run("adafactor", options, start(shape, np.float32)).steps_down(3)

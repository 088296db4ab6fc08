"""Where torch's numbers hang on a detail that no textbook has: float32 host scalars, comparisons, branches, first steps."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pytest
import torch

from optserve.server.backends import select
from optserve.server.formulas import Elementwise, find
from optserve.server.formulas.arithmetic import power, quotient, single


class Alone:
    """One parameter, stepped by the formula's kernel without a store."""

    def __init__(self, name: str, options: Mapping[str, Any], start: np.ndarray) -> None:
        optimizer = find(name)
        assert isinstance(optimizer, Elementwise)
        self.optimizer, self.group = optimizer, {**optimizer.defaults, **options}
        initial = optimizer.initial(self.group)
        self.values, self.steps = start.copy(), 0
        self.slots = {key: np.full_like(start, initial.get(key, 0.0)) for key in optimizer.slots(self.group)}
        self.carried = {key: single(initial.get(key, 0.0)) for key in optimizer.scalar_keys}
        self._kernel = select("numpy").kernel(optimizer, optimizer.choices(self.group), start.dtype)

    def step(self, gradient: np.ndarray) -> None:
        self.steps += 1
        scalars = self.optimizer.values(self.group, self.steps, self.carried)
        self._kernel(self.values, gradient, list(self.slots.values()), scalars, 1.0, None)
        self.carried = {k: single(v) for k, v in self.optimizer.carry(self.group, self.steps, self.carried).items()}


class Both:
    """The same beside stock torch; every step's gradient is given to both."""

    def __init__(self, name: str, options: Mapping[str, Any], start: Sequence[float], dtype: Any = np.float32) -> None:
        values = np.array(start, dtype)
        self.ours = Alone(name, options, values)
        self.tensor = torch.from_numpy(values.copy()).requires_grad_()
        kind = getattr(torch.optim, self.ours.optimizer.name)
        self.theirs = kind([self.tensor], foreach=False, **options)

    def edit(self, **options: Any) -> None:
        self.ours.group.update(options)
        self.theirs.param_groups[0].update(options)

    def step(self, gradient: Sequence[float]) -> None:
        slope = np.array(gradient, self.ours.values.dtype)
        self.tensor.grad = torch.from_numpy(slope.copy())
        self.theirs.step()
        self.ours.step(slope)

    @property
    def values(self) -> tuple[np.ndarray, np.ndarray]:
        return self.ours.values, self.tensor.detach().numpy()

    def slot(self, key: str) -> tuple[np.ndarray, np.ndarray]:
        return self.ours.slots[key], self.theirs.state[self.tensor][key].numpy()

    def assert_scalars_are_the_same(self) -> None:
        theirs = {key: self.theirs.state[self.tensor][key].item() for key in self.ours.optimizer.scalar_keys}
        assert self.ours.carried == theirs


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize(
    ("name", "options", "edits"),
    [
        ("nadam", {"momentum_decay": 0.013}, {"betas": (0.77, 0.9)}),
        ("asgd", {"lr": 0.1, "lambd": 0.07, "t0": 20}, {"lr": 0.03, "alpha": 0.5}),
        ("asgd", {"lr": 0.1, "lambd": 0.07, "t0": 20.3}, {"t0": 45.7}),
    ],
)
def test_carried_scalars_have_torchs_bits(name: str, options: dict[str, Any], edits: dict[str, Any], dtype: Any) -> None:
    both = Both(name, options, [0.3, -2.0], dtype)
    for index in range(80):
        if index == 40:
            both.edit(**edits)
        both.step([math.sin(index), 0.1])
        both.assert_scalars_are_the_same()
        np.testing.assert_allclose(*both.values, rtol=1e-5 if dtype is np.float32 else 1e-13)


def test_asgd_takes_an_edited_learning_rate_one_step_late() -> None:
    both = Both("asgd", {"lr": 0.1}, [1.0], np.float64)
    moves = []
    for lr in (0.1, 0.5, 0.5):
        both.edit(lr=lr)
        before = both.ours.values.copy()
        both.step([1.0])
        moves.append(float(before[0] - both.ours.values[0]))
        np.testing.assert_allclose(*both.values, rtol=1e-15)
    assert moves == pytest.approx([0.1, 0.1, 0.5], rel=1e-2)


def test_asgd_copies_the_parameter_until_averaging_begins() -> None:
    both = Both("asgd", {"t0": 3}, [1e-30, 1e30, 0.1])
    both.ours.slots["ax"][:] = np.inf
    for index in range(1, 7):
        both.step([0.3, 1e25, -0.2])
        assert np.array_equal(both.ours.slots["ax"], both.ours.values) is (index <= 5)
        np.testing.assert_allclose(*both.slot("ax"), rtol=1e-6)


def test_rprop_has_torchs_bits_and_reads_the_learning_rate_once() -> None:
    random = np.random.default_rng(0)
    both = Both("rprop", {"lr": 0.04, "step_sizes": (0.001, 0.2)}, random.normal(size=300))
    for _ in range(30):
        slope = random.normal(size=300)
        both.step(np.where(np.arange(300) < 100, np.abs(slope), slope).tolist())
        both.edit(lr=5.0)
        for pair in (both.values, both.slot("prev"), both.slot("step_size")):
            np.testing.assert_array_equal(*pair)
    assert both.ours.slots["step_size"].min() == np.float32(0.001)
    assert both.ours.slots["step_size"].max() == np.float32(0.2)


@pytest.mark.parametrize(
    "options",
    [{"step_sizes": (0.5, 0.1)}, {"step_sizes": (0.01, 0.01)}, {"etas": (1 - 1e-9, 1.5)}, {"etas": (1 - 1e-9, 1 + 1e-9)}],
)
def test_rprop_in_its_corners(options: dict[str, Any]) -> None:
    """Bounds the wrong way round; an η⁻ that float32 rounds to 1, so that torch takes every sign for turned; products of
    gradients that vanish."""
    both = Both("rprop", options, [1.0, -1.0, 0.5, 2.0])
    for gradient in ([1, 2, 1e-30, 0], [1, -2, 1e-30, 3], [1, 2, -1e-30, -3], [-1, 2, 0, -3]):
        both.step(gradient)
        for pair in (both.values, both.slot("prev"), both.slot("step_size")):
            np.testing.assert_array_equal(*pair)


def test_radam_divides_by_nothing_before_it_adapts() -> None:
    both = Both("radam", {"eps": 0.0}, [1.0, 2.0])
    for index in range(1, 8):
        both.step([0.0, 1.0])
        np.testing.assert_allclose(*both.values, rtol=1e-6)
        assert math.isnan(both.ours.values[0]) is (index > 5)


def test_rmsprop_gives_a_negative_variance_the_root_that_torch_gives_it() -> None:
    both = Both("rmsprop", {"alpha": 1.0, "centered": True}, [1.0, 1.0])
    both.step([0.5, 0.5])
    for key, values in {"square_avg": [0.1, 0.5], "grad_avg": [0.6, 0.6]}.items():
        both.ours.slots[key][:] = values
        both.theirs.state[both.tensor][key].copy_(torch.tensor(values))
    both.step([0.5, 0.5])
    assert np.isnan(both.ours.values).tolist() == [True, False]
    np.testing.assert_allclose(*both.values, rtol=1e-6)


def test_adamax_keeps_a_nan_of_its_norm() -> None:
    both = Both("adamax", {}, [1.0, 1.0])
    both.step([0.5, 0.5])
    both.ours.slots["exp_inf"][0] = math.nan
    both.theirs.state[both.tensor]["exp_inf"][0] = math.nan
    both.step([0.5, 0.5])
    assert np.isnan(both.ours.values).tolist() == [True, False]
    np.testing.assert_allclose(*both.values, rtol=1e-6)


@pytest.mark.parametrize(
    ("x", "y", "expected"), [(1.0, 0.0, math.inf), (-1.0, 0.0, -math.inf), (0.0, 0.0, math.nan), (1e308, 1e-308, math.inf)]
)
def test_quotients_that_python_refuses(x: float, y: float, expected: float) -> None:
    assert quotient(x, y) == pytest.approx(expected, nan_ok=True)


@pytest.mark.parametrize(("x", "y", "expected"), [(1e300, 2.0, math.inf), (-0.5, 0.75, math.nan), (0.0, -1.0, math.inf)])
def test_powers_that_python_refuses(x: float, y: float, expected: float) -> None:
    assert power(x, y) == pytest.approx(expected, nan_ok=True)


def test_where_python_does_not_refuse_the_bits_are_its_own() -> None:
    random = np.random.default_rng(0)
    for x, y in np.exp(random.normal(scale=5, size=(2000, 2))).tolist():
        assert quotient(x, y) == x / y
        assert power(1 + x * 1e-3, y * 1e-3) == (1 + x * 1e-3) ** (y * 1e-3)


def test_singles_are_float32() -> None:
    for x in (0.1, 1 / 3, 1e-45, 1e300, -1e300):
        assert single(x) == torch.tensor(x, dtype=torch.float32).item()

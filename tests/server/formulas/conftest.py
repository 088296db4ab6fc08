"""Runs a whole-tensor optimizer on one array, as the store does."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import numpy as np
import pytest

from optserve.server.formulas import Tensorwise, find

Slope = Callable[[np.ndarray, int], np.ndarray]


@cache
def wave(shape: tuple[int, ...], step: int) -> np.ndarray:
    place = np.arange(math.prod(shape), dtype=np.float64).reshape(shape)
    return np.sin(place + 1.3 * step) * np.exp2(-np.mod(place, 10.0))


def slope(value: np.ndarray, step: int) -> np.ndarray:
    """Of a paraboloid that moves; its elements span three decades."""
    return np.asarray(0.8 * value.astype(np.float64) + wave(value.shape, step)).astype(value.dtype)


class Run:
    """A parameter's value and state after some steps."""

    def __init__(self, name: str, options: Mapping[str, Any], start: np.ndarray) -> None:
        optimizer = find(name)
        assert isinstance(optimizer, Tensorwise)
        self.optimizer, self.group = optimizer, {**optimizer.defaults, **options}
        optimizer.check(self.group)
        self.value = start.copy()
        self.state = {
            slot: np.zeros(shape, start.dtype) for slot, shape in optimizer.state_shapes(self.group, start.shape).items()
        }
        self.steps = 0

    def step(self, gradient: np.ndarray, dtype: Any = None, xp: Any = np) -> None:
        self.steps += 1
        kind, scratch = np.dtype(dtype or self.value.dtype), gradient.copy()
        with np.errstate(all="ignore"):
            self.optimizer.step(xp, self.group, self.steps, kind, self.value, scratch, self.state)

    def steps_down(self, count: int, dtype: Any = None, xp: Any = np) -> Run:
        """So many steps along `slope`."""
        for index in range(count):
            self.step(slope(self.value, index), dtype, xp)
        return self


@pytest.fixture
def run() -> Callable[..., Run]:
    """run(name, options, start) -> Run"""
    return Run


@pytest.fixture
def descend() -> Slope:
    """descend(value, step) -> gradient, as Run.steps_down has it"""
    return slope


@pytest.fixture
def start() -> Callable[..., np.ndarray]:
    """start(shape, dtype): values of size 1, always the same."""

    def make(shape: tuple[int, ...], dtype: Any = np.float64) -> np.ndarray:
        return np.asarray(np.random.default_rng(7).normal(size=shape)).astype(dtype)

    return make

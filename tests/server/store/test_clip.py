"""Gradients clipped by value, fused into every optimizer's step: as torch's clip_grad_value_ before torch's step."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import oracle
import pytest
import torch
from every_backend import BACKENDS
from host_kernels import has_compiler
from oracle import NAMES, Build, Configuration, Step, Stock

from optserve.server.formulas import OPTIMIZERS, Searching, Tensorwise
from optserve.server.formulas.language import CLIP
from optserve.server.store import Store

BOUND = 0.11
SHAPES = {"w": (3, 4), "scalar": (), "nothing": (0, 5), "large": (60, 301)}
STEPS = 8


def variants() -> list[Configuration]:
    """Every optimizer, plain and with what else changes its gradient."""
    found = []
    for optimizer in OPTIMIZERS.values():
        if isinstance(optimizer, Searching):
            continue  # its gradient is clipped before it searches
        found.append(Configuration(optimizer.name))
        if "maximize" in optimizer.defaults:
            decay = {"weight_decay": 0.1} if "weight_decay" in optimizer.defaults else {}
            found.append(Configuration(optimizer.name, {"maximize": True, **decay}))
    return found


def start(case: Configuration, dtype: Any) -> dict[str, np.ndarray]:
    allowed = {"Muon": lambda shape: len(shape) == 2, "SparseAdam": lambda shape: len(shape) > 0}
    takes = allowed.get(case.optimizer, lambda _: True)
    return oracle.initial({name: shape for name, shape in SHAPES.items() if takes(shape)}, dtype)


def bits(store: Store) -> dict[str, bytes]:
    content = store.export()
    return {name: array.tobytes() for name, array in {**content.values, **content.state}.items()}


def clipped(slopes: oracle.Arrays) -> dict[str, np.ndarray]:
    """By torch."""
    found = {name: torch.zeros(value.shape, requires_grad=True) for name, value in slopes.items()}
    for name, parameter in found.items():
        parameter.data = torch.zeros_like(oracle.to_torch(slopes[name]))
        parameter.grad = oracle.to_torch(slopes[name])
    torch.nn.utils.clip_grad_value_(found.values(), BOUND)
    return {name: parameter.grad.numpy() for name, parameter in found.items() if parameter.grad is not None}


PENALISED = [Configuration(found.name, {"l1": 0.05}, "l1") for found in OPTIMIZERS.values() if isinstance(found, Tensorwise)]
"""Where the penalty is no part of a kernel."""

cases = pytest.mark.parametrize("case", [*variants(), *PENALISED], ids=str)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("case", [case for case in variants() if case.optimizer in (*NAMES, "SparseAdam")], ids=str)
def test_a_step_is_torchs_of_what_torch_clips(case: Configuration, dtype: Any, backend: str, build: Build, step: Step) -> None:
    first, group = start(case, dtype), {**case.group, CLIP: BOUND}
    store = build(case.ours, backend, [first], [group], 1)
    stock = Stock(case.optimizer, case.options, {k: v for k, v in first.items() if v.size or case.optimizer != "Adafactor"})
    for index in range(STEPS):
        step(store, [group], oracle.gradients(oracle.weights(store), index, "closed", case.maximizes))
        stock.step(clipped(oracle.gradients(stock.values, index, "closed", case.maximizes)))
    oracle.compare(store.export(), stock, case, oracle.TOLERANCES[dtype])


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
@cases
def test_the_bits_are_those_of_gradients_that_were_clipped_before(
    case: Configuration, dtype: Any, build: Build, step: Step
) -> None:
    """On every backend; the bound is the state dtype's number, and what the gradients are scaled with comes first."""
    first, wide = start(case, dtype), np.float64 if dtype is np.float64 else np.float32
    groups = [{**case.group, CLIP: BOUND}, case.group]
    ways = ["numba", "numpy", *(["cupy-on-host"] if has_compiler else [])]
    given = [build(case.ours, backend, [first], [groups[0]], 1) for backend in ways]
    by_hand = build(case.ours, "numpy", [first], [case.group], 1)
    for index in range(STEPS):
        slopes = {name: oracle.wave(value.shape, index).astype(wide) for name, value in first.items()}
        for store in given:
            step(store, [groups[0]], slopes, 0.5)
        bound = wide(BOUND)
        step(by_hand, [groups[1]], {name: np.clip(wide(0.5) * value, -bound, bound) for name, value in slopes.items()})
    expected = bits(by_hand)
    assert all(bits(store) == expected for store in given)
    plain = build(case.ours, "numpy", [first], [case.group], 1)
    for index in range(STEPS):
        step(plain, [case.group], {name: oracle.wave(value.shape, index).astype(wide) for name, value in first.items()}, 0.5)
    assert bits(plain) != expected, "nothing was clipped"


def test_the_penalty_comes_after_the_bound(build: Build, step: Step) -> None:
    """As where the loss that was differentiated has none, and λ·sign(p) is added by the optimizer, like weight decay."""
    sgd = OPTIMIZERS["sgd"]
    group = {**sgd.defaults, "lr": 1.0, "l1": 4.0, CLIP: 0.5}
    for backend in ("numba", "numpy"):
        store = build(sgd, backend, [{"w": np.array([1.0, -1.0, 2.0])}], [group])
        step(store, [group], {"w": np.array([3.0, -0.25, -3.0])})
        assert store.export().values["w"].tolist() == [1.0 - 4.5, -1.0 + 4.25, 2.0 - 3.5]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bound", [0.5, np.inf, 1e-300])
def test_the_edges_of_the_bound_are_torchs(bound: float, backend: str, build: Build, step: Step) -> None:
    """NaN stays, infinities become the bound; zeros keep their sign."""
    sgd = OPTIMIZERS["sgd"]
    group = {**sgd.defaults, "lr": -1.0, CLIP: bound}
    slopes = np.array([0.0, -0.0, 0.5, -0.5, 0.75, -0.75, np.inf, -np.inf, np.nan, 1e-310, 3.0])
    parameter = torch.zeros(11, dtype=torch.float64, requires_grad=True)
    parameter.grad = torch.from_numpy(slopes.copy())
    torch.nn.utils.clip_grad_value_([parameter], bound)
    store = build(sgd, backend, [{"w": np.full(11, -0.0)}], [group])
    step(store, [group], {"w": slopes})
    np.testing.assert_array_equal(store.export().values["w"], parameter.grad.numpy())


def test_every_kernel_is_compiled_before_the_step(build: Build) -> None:
    adam = OPTIMIZERS["adam"]
    store = build(adam, "numba", [{"w": np.ones(5, np.float32)}], [adam.defaults])
    clipping = {**adam.defaults, CLIP: 0.5}
    store.prepare([clipping])
    before = dict(store.backend._kernels)  # type: ignore[attr-defined]
    store.update([clipping], store.accumulators())
    assert store.backend._kernels == before  # type: ignore[attr-defined]


def test_every_optimizer_of_torch_is_among_them() -> None:
    assert {*NAMES, "SparseAdam"} <= {case.optimizer for case in variants()}

"""Every optimizer over torch's own optim_db: a hundred steps beside stock torch, parameters and state.

Open loop: both sides get the same gradients. Closed loop: the gradients of each side come from its own parameters.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import ml_dtypes
import numpy as np
import oracle
import pytest
from every_backend import GPU
from oracle import APART, NAMES, Arrays, Build, Configuration, Step, Stock

from optserve.server.formulas import OPTIMIZERS, Elementwise
from optserve.server.store import Store, StoreState

BFLOAT16 = ml_dtypes.bfloat16
EPS = float(ml_dtypes.finfo(BFLOAT16).eps)
STEPS = 100
CASES = [case for case in oracle.configurations() if case.optimizer not in APART]
HERE = [case for case in CASES if case.optimizer.lower() in OPTIMIZERS]
DIVIDE_BY_SIZE = frozenset({"Adafactor"})
"""Where torch's own step fails for a parameter without elements."""

backends = pytest.mark.parametrize("backend", ["numba", "numpy", GPU])
loops = pytest.mark.parametrize("loop", ["open", "closed"])
cases = pytest.mark.parametrize("case", HERE, ids=str)


def start(case: Configuration, dtype: Any) -> dict[str, np.ndarray]:
    shapes = oracle.shapes_for(case.optimizer)
    if case.description == "default" and "large" in shapes:
        shapes = {**shapes, "larger": (70_001,)}
    return oracle.initial(shapes, dtype)


def run_store(case: Configuration, loop: str, dtype: Any, backend: str, build: Build, step: Step, steps: int = STEPS) -> Store:
    group = case.group
    store = build(case.ours, backend, [start(case, dtype)], [group], 1)
    for index in range(steps):
        step(store, [group], oracle.gradients(oracle.weights(store), index, loop, case.maximizes))
    return store


def run_stock(case: Configuration, loop: str, first: Arrays, steps: int = STEPS, grain: Any = None, **how: Any) -> Stock:
    """`grain`: the dtype to which gradients are rounded before they are used."""
    skipped = {name for name, value in first.items() if not value.size and case.optimizer in DIVIDE_BY_SIZE}
    stock = Stock(case.optimizer, case.options, {k: v for k, v in first.items() if k not in skipped}, **how)
    for index in range(steps):
        slopes = oracle.gradients(stock.values, index, loop, case.maximizes)
        if grain is not None:
            slopes = {name: value.astype(grain).astype(value.dtype) for name, value in slopes.items()}
        stock.step(slopes)
    return stock


@lru_cache(maxsize=1)
def stock_of(case: Configuration, loop: str, dtype: Any) -> Stock:
    return run_stock(case, loop, start(case, dtype))


def test_every_optimizer_of_torch_is_here() -> None:
    assert {name.lower() for name in NAMES} <= OPTIMIZERS.keys()


@backends
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@loops
@cases
def test_a_hundred_steps_equal_torch(
    case: Configuration, loop: str, dtype: Any, backend: str, build: Build, step: Step
) -> None:
    store = run_store(case, loop, dtype, backend, build, step)
    oracle.compare(store.export(), stock_of(case, loop, dtype), case, oracle.TOLERANCES[dtype])


@lru_cache(maxsize=1)
def bounds(case: Configuration, loop: str) -> dict[str, tuple[np.ndarray, float]]:
    """What a float64 run from the bfloat16 start comes to, and how far torch's worst bfloat16 implementation is from it."""
    first = start(case, BFLOAT16)
    truth = run_stock(case, loop, {name: value.astype(np.float64) for name, value in first.items()})
    ways = [{}, {"foreach": True}] if "foreach" in oracle.implementations(case.optimizer) else [{}]
    runs = [contents(run_stock(case, loop, first, **how)) for how in ways]
    return {key: (value, max(gap(run[key], value) for run in runs)) for key, value in contents(truth).items()}


def contents(found: Stock | StoreState) -> dict[str, np.ndarray]:
    return {**found.values, **found.state}


def gap(found: np.ndarray, truth: np.ndarray) -> float:
    return float(np.max(np.abs(found.astype(np.float64) - truth.astype(np.float64)), initial=0.0))


@backends
@loops
@cases
def test_a_hundred_steps_in_bfloat16_stray_no_further_than_torch(
    case: Configuration, loop: str, backend: str, build: Build, step: Step
) -> None:
    """Rprop's `prev` is a gradient, or 0 where its sign turned: in the closed loop one rounding decides which."""
    ours = contents(run_store(case, loop, BFLOAT16, backend, build, step).export())
    left_out = ("step/", "prev/") if loop == "closed" else ("step/",)
    for key, (truth, worst) in bounds(case, loop).items():
        if not key.startswith(left_out):
            largest = float(np.max(np.abs(truth), initial=0.0 if "/" in key else 1.0))
            assert gap(ours[key], truth) <= 1.25 * worst + 2 * EPS * largest, key


@backends
@cases
def test_masters_and_state_of_bfloat16_are_those_of_float32(
    case: Configuration, backend: str, build: Build, step: Step
) -> None:
    """Float32 masters do better than torch: beside the same gradients, they are what torch makes of float32 parameters."""
    content = run_store(case, "open", BFLOAT16, backend, build, step).export()
    wide = {name: value.astype(np.float32) for name, value in start(case, BFLOAT16).items()}
    stock = run_stock(in_float32(case), "open", wide, grain=BFLOAT16)
    for name, value in content.values.items():
        master = content.state.pop(f"master/{name}")
        np.testing.assert_array_equal(value, master.astype(BFLOAT16))
        content.values[name] = master
    oracle.compare(content, stock, case, oracle.TOLERANCES[np.float32])


def in_float32(case: Configuration) -> Configuration:
    """Adafactor takes its eps from the parameter's dtype."""
    if case.optimizer != "Adafactor":
        return case
    first, second = case.options.get("eps", (None, 1e-3))
    return Configuration("Adafactor", {**case.options, "eps": (EPS if first is None else first, second)})


@backends
@cases
def test_one_step_in_bfloat16_is_within_the_bound_of_torch(case: Configuration, backend: str, build: Build, step: Step) -> None:
    before, group = start(case, BFLOAT16), case.group
    store = build(case.ours, backend, [before], [group], 1)
    slopes = {name: away_from_decay(value, case.maximizes) for name, value in before.items()}
    step(store, [group], slopes)
    stock = run_stock(case, "open", before, steps=0)
    stock.step(slopes)
    for name, theirs in stock.values.items():
        ours, after, old = (array.astype(np.float64) for array in (oracle.weights(store)[name], theirs, before[name]))
        ulp = np.exp2(np.floor(np.log2(np.maximum(np.maximum(np.abs(after), np.abs(old)), 1e-30)))) * EPS
        assert np.all(np.abs(ours - after) <= ulp + 4 * EPS * np.abs(after - old) + oracle.slack(case)), name


def away_from_decay(value: np.ndarray, uphill: bool) -> np.ndarray:
    """Gradients that decay does not cancel: where it does, the sign of a whole step is rounding."""
    return np.asarray(np.copysign(oracle.wave(value.shape, 0), -value if uphill else value)).astype(value.dtype)


@pytest.mark.parametrize("name", sorted({case.optimizer for case in HERE}))
def test_switches_of_how_torch_executes_change_no_kernel(name: str) -> None:
    """Runs with foreach, capturable, differentiable or fused would be those above, loop for loop."""
    optimizer = OPTIMIZERS[name.lower()]
    switches = [switch for switch in ("foreach", "capturable", "differentiable", "fused") if switch in optimizer.defaults]
    assert set(oracle.implementations(name)) <= {*switches}
    for switch in switches:
        group = {**optimizer.defaults, switch: True}
        optimizer.check(group)
        assert optimizer.initial(group) == optimizer.initial(optimizer.defaults)
        if isinstance(optimizer, Elementwise):
            carried = optimizer.initial(group)
            assert optimizer.choices(group) == optimizer.choices(optimizer.defaults)
            assert optimizer.values(group, 3, carried) == optimizer.values(optimizer.defaults, 3, carried)

"""The l1 option of every optimizer: as if λ·sign(p) had been added by hand to the gradient that is minimised along."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import oracle
import pytest
from oracle import NAMES, Arrays, Build, Configuration, Step, Stock

from optserve.server.formulas import OPTIMIZERS, Searching, find

PENALTY = 0.03
SHAPES = {"w": (3, 4), "scalar": (), "nothing": (0, 5), "large": (60, 301)}
STEPS = 8


def variants() -> list[Configuration]:
    """Every optimizer that takes dense gradients, plain and with what else changes its gradient."""
    found = []
    for optimizer in OPTIMIZERS.values():
        if optimizer.no_dense or isinstance(optimizer, Searching):
            continue
        found.append(Configuration(optimizer.name))
        if "maximize" in optimizer.defaults:
            decay = {"weight_decay": 0.1} if "weight_decay" in optimizer.defaults else {}
            found.append(Configuration(optimizer.name, {"maximize": True, **decay}))
    return found


def start(case: Configuration, dtype: Any) -> dict[str, np.ndarray]:
    """With zeros of both signs, which the penalty leaves alone."""
    shapes = {name: shape for name, shape in SHAPES.items() if case.optimizer != "Muon" or len(shape) == 2}
    values = oracle.initial(shapes, dtype)
    values["w"][0], values["w"][1] = 0.0, -0.0
    return values


def penalised(slopes: Arrays, values: Arrays, uphill: bool) -> dict[str, np.ndarray]:
    """By hand, in the values' dtype."""
    sign = -1.0 if uphill else 1.0
    return {
        name: np.asarray(slope + values[name].dtype.type(sign * PENALTY) * np.sign(values[name]))
        for name, slope in slopes.items()
    }


cases = pytest.mark.parametrize("case", variants(), ids=str)
backends = pytest.mark.parametrize("backend", ["numba", "numpy"])


@pytest.mark.parametrize("backend", ["numpy"])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("case", [case for case in variants() if case.optimizer in NAMES], ids=str)
def test_a_penalty_is_torchs_step_of_the_penalised_gradient(
    case: Configuration, dtype: Any, backend: str, build: Build, step: Step
) -> None:
    first, group = start(case, dtype), {**case.group, "l1": PENALTY}
    store = build(case.ours, backend, [first], [group], 1)
    stock = Stock(case.optimizer, case.options, {k: v for k, v in first.items() if v.size or case.optimizer != "Adafactor"})
    for index in range(STEPS):
        step(store, [group], oracle.gradients(oracle.weights(store), index, "closed", case.maximizes))
        slopes = oracle.gradients(stock.values, index, "closed", case.maximizes)
        stock.step(penalised(slopes, stock.values, case.maximizes))
    oracle.compare(store.export(), stock, case, oracle.TOLERANCES[dtype])


@backends
@pytest.mark.parametrize("dtype", [np.float32, np.float64, ml_dtypes.bfloat16])
@cases
def test_a_penalty_is_the_same_bits_as_one_added_by_hand(
    case: Configuration, dtype: Any, backend: str, build: Build, step: Step
) -> None:
    first = start(case, dtype)
    groups = [{**case.group, "l1": PENALTY}, case.group]
    given, by_hand = (build(case.ours, backend, [first], [group], 1) for group in groups)
    wide = np.float32 if dtype is ml_dtypes.bfloat16 else dtype
    for index in range(STEPS):
        slopes = oracle.gradients(oracle.weights(given), index, "open", case.maximizes)
        slopes = {name: value.astype(wide) for name, value in slopes.items()}
        masters = by_hand.export()
        values = {name: masters.state.get(f"master/{name}", value) for name, value in masters.values.items()}
        update(given, groups[0], slopes)
        update(by_hand, groups[1], penalised(slopes, values, case.maximizes))
    assert bits(given) == bits(by_hand)
    plain = build(case.ours, backend, [first], [case.group], 1)
    for index in range(STEPS):
        step(plain, [case.group], oracle.gradients(oracle.weights(plain), index, "open", case.maximizes))
    assert bits(plain) != bits(given)


def update(store: Any, group: Any, slopes: Arrays) -> None:
    """One step with gradients in the state dtype."""
    flats = store.accumulators()
    for place in store.layout.places:
        flats[place.array_id][place.offset : place.offset + place.size] = slopes[place.name].reshape(-1)
    store.update([group], flats)


def bits(store: Any) -> dict[str, bytes]:
    content = store.export()
    return {name: array.tobytes() for name, array in {**content.values, **content.state}.items()}


def test_every_optimizer_of_torch_is_among_them() -> None:
    assert {find(name).name for name in NAMES} <= {case.optimizer for case in variants()}

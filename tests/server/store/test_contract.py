"""Every elementwise optimizer, backend, dtype and shape against a float64 textbook loop and stock torch: parameters and state.

An optimizer that torch does not have has the textbook alone; the ids of its variants say so.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Mapping
from dataclasses import replace
from functools import cache
from typing import Any

import ml_dtypes
import numpy as np
import oracle
import pytest
import torch
from every_backend import BACKENDS
from host_kernels import has_compiler
from reference import LOOPS, VARIANTS, Variant

from optserve.server.formulas import OPTIMIZERS, Elementwise, Optimizer, find
from optserve.server.formulas.language import maximum, sqrt
from optserve.server.store import Store

SHAPES = {"w": (3, 4), "scalar": (), "nothing": (1, 0, 2), "large": (20_001,), "larger": (70_000,)}
TOLERANCES = {np.float32: {"rtol": 1.3e-6, "atol": 2e-6}, np.float64: {"rtol": 1e-12, "atol": 1e-13}}
Build = Callable[..., Store]
Step = Callable[..., None]


def torch_class(name: str) -> Any:
    """None where torch has no such optimizer."""
    return getattr(torch.optim, find(name).name, None)


def name_of(variant: Variant) -> str:
    return str(variant) if torch_class(variant.optimizer) else f"{variant}-textbook only"


IN_TORCH = [variant for variant in VARIANTS if torch_class(variant.optimizer)]
HALVES = [variant for variant in IN_TORCH if variant.in_float16]


def test_every_optimizer_has_a_textbook_loop_and_variants() -> None:
    """But torch's that are not elementwise, whose tests beside torch are in tests/server/formulas."""
    expected = {name for name, optimizer in OPTIMIZERS.items() if isinstance(optimizer, Elementwise) or not torch_class(name)}
    assert set(LOOPS) == {variant.optimizer for variant in VARIANTS} == expected


def initial(dtype: Any, optimizer: str = "") -> dict[str, np.ndarray]:
    """Of an optimizer that steps rows no scalar: it has none."""
    random = np.random.default_rng(7)
    found = {name: np.asarray(random.normal(size=shape)).astype(dtype) for name, shape in SHAPES.items()}
    return {name: value for name, value in found.items() if value.shape or not optimizer or not find(optimizer).no_dense}


def gradient(value: np.ndarray, step: int) -> np.ndarray:
    """Elementwise, and so steep and varied that neither small nor large squares are missing."""
    return (0.8 * value.astype(np.float64) + wave(value.shape, step)).astype(value.dtype)


@cache
def wave(shape: tuple[int, ...], step: int) -> np.ndarray:
    place = np.arange(math.prod(shape), dtype=np.float64).reshape(shape)
    return np.sin(place + step) * np.exp2(-np.mod(place, 12.0))


def run_store(store: Store, step: Step, group: Mapping[str, Any], steps: int) -> None:
    for index in range(steps):
        values = store.export().values
        step(store, [group], {name: gradient(value, index) for name, value in values.items()})


def stock(name: str, tensors: Mapping[str, torch.Tensor], options: Mapping[str, Any], **how: Any) -> Any:
    """Torch's; single-tensor unless `how` says otherwise."""
    found = find(name).name
    switches = {"foreach": False, **how} if "foreach" in oracle.implementations(found) else {}
    return torch_class(name)(list(tensors.values()), **options, **switches)


def run_torch(name: str, options: Mapping[str, Any], start: Mapping[str, np.ndarray], steps: int, **how: Any) -> Any:
    tensors = {key: torch.from_numpy(value.copy()).requires_grad_() for key, value in start.items()}
    optimizer = stock(name, tensors, options, **how)
    for index in range(steps):
        for tensor in tensors.values():
            tensor.grad = oracle.slope(find(name).name, np.asarray(gradient(tensor.detach().numpy(), index)))
        optimizer.step()
    return tensors, optimizer


_kept: dict[Hashable, Any] = {}


def kept(key: Hashable, run: Callable[[], Any]) -> Any:
    """What `run` returns. Backends take turns at the same variant, and torch's side of it is the same for all of them."""
    if key not in _kept:
        for old in list(_kept)[:-1]:
            del _kept[old]
        _kept[key] = run()
    return _kept[key]


def compare(store: Store, tensors: Mapping[str, torch.Tensor], optimizer: Any, tolerance: Mapping[str, float]) -> None:
    content = store.export()
    keys = {"step"} if store.optimizer.counts_steps else set()
    for name, tensor in tensors.items():
        np.testing.assert_allclose(content.values[name], tensor.detach().numpy(), **tolerance, err_msg=name)
        state = optimizer.state.get(tensor, {})
        ours = {key.partition("/")[0] for key in content.state if key.endswith(f"/{name}")}
        assert ours | (keys if state else set()) == set(state), name
        for slot in ours:
            np.testing.assert_allclose(content.state[f"{slot}/{name}"], state[slot].numpy(), **tolerance, err_msg=slot)
        if "step" in state:
            assert content.steps[name] == oracle.number(state["step"])


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("variant", VARIANTS, ids=name_of)
def test_twenty_steps_equal_the_textbook_and_torch(
    variant: Variant, backend: str, dtype: Any, build: Build, step: Step
) -> None:
    name, options = variant.optimizer, variant.options
    optimizer, start = find(name), initial(dtype, name)
    if not isinstance(optimizer, Elementwise):
        del start["larger"]  # its textbook takes every element
    group = {**optimizer.defaults, **options}
    store = build(optimizer, backend, [start], [group])
    run_store(store, step, group, 20)
    compare_with_textbook(store, name, group, start, TOLERANCES[dtype])
    if torch_class(name):
        theirs = kept((20, str(variant), dtype), lambda: run_torch(name, options, start, 20))
        compare(store, *theirs, TOLERANCES[dtype])


def compare_with_textbook(
    store: Store, name: str, group: Mapping[str, Any], start: Mapping[str, np.ndarray], tolerance: Mapping[str, float]
) -> None:
    """On every 997th element, where the formula is elementwise."""
    content = store.export()
    for key, value in start.items():
        chosen = np.arange(0, value.size, 997 if isinstance(store.optimizer, Elementwise) else 1)
        wide = value.astype(np.float64).reshape(-1)
        state: dict[str, Any] = {}
        for index in range(20):
            slope = gradient(wide.reshape(value.shape), index).reshape(-1)[chosen]
            wide[chosen] = LOOPS[name](group, wide[chosen].tolist(), slope.tolist(), state)
        np.testing.assert_allclose(content.values[key].reshape(-1)[chosen], wide[chosen], **tolerance, err_msg=key)
        slots = state.keys() - {"step"}
        assert {slot for slot, _, parameter in (entry.partition("/") for entry in content.state) if parameter == key} == slots
        assert not store.optimizer.counts_steps or content.steps[key] == state["step"]
        for slot in slots:
            found = content.state[f"{slot}/{key}"]
            ours = found if slot in store.optimizer.scalar_keys else found.reshape(-1)[chosen]
            np.testing.assert_allclose(ours, state[slot], **tolerance, err_msg=slot)


def gap(values: Mapping[str, np.ndarray], truth: Mapping[str, np.ndarray]) -> float:
    return max(float(np.max(np.abs(values[name].astype(np.float64) - truth[name]), initial=0.0)) for name in truth)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("variant", HALVES, ids=name_of)
def test_float16_strays_no_further_from_a_float64_run_than_torch_does(
    variant: Variant, backend: str, build: Build, step: Step
) -> None:
    """bfloat16 has the same test over torch's own configurations; of those, most divide by zero in float16."""
    name, options = variant.optimizer, variant.options
    options = {**options, "maximize": False, **variant.float16}
    group = {**find(name).defaults, **options}
    start = {key: value for key, value in initial(np.float16).items() if key != "larger"}
    truth, worst = kept(("16 bits", str(variant)), lambda: strayed(name, options, start))
    store = build(find(name), backend, [start], [group])
    run_store(store, step, group, 100)
    assert gap(store.export().values, truth) <= 1.25 * worst + 2 * float(np.finfo(np.float16).eps)


def strayed(name: str, options: Mapping[str, Any], start: Mapping[str, np.ndarray]) -> tuple[dict[str, np.ndarray], float]:
    """A float64 run of torch, and how far the worse of its ways strays from it in float16."""

    def run(start: Mapping[str, np.ndarray], **how: Any) -> dict[str, np.ndarray]:
        return {key: value.detach().numpy() for key, value in run_torch(name, options, start, 100, **how)[0].items()}

    truth = run({key: value.astype(np.float64) for key, value in start.items()})
    return truth, max(gap(run(start, foreach=way), truth) for way in (False, True))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("variant", IN_TORCH, ids=name_of)
def test_a_parameter_without_a_gradient_is_left_alone_and_counts_its_own_steps(
    variant: Variant, backend: str, build: Build, step: Step
) -> None:
    name, options = variant.optimizer, variant.options
    random = np.random.default_rng(1)
    start = {key: random.normal(size=(5, 7)) for key in "abcde"}
    group = {**find(name).defaults, **options}
    store = build(find(name), backend, [start], [group])
    tensors = {key: torch.from_numpy(value.copy()).requires_grad_() for key, value in start.items()}
    optimizer = stock(name, tensors, options)
    for present in ("abcde", "ac", "bcd", "", "e", "abcde", "abcde", "abd", "abd"):
        before = store.export()
        slopes = {key: random.normal(size=(5, 7)) for key in present}
        step(store, [group], slopes)
        for key, tensor in tensors.items():
            tensor.grad = oracle.slope(find(name).name, slopes[key]) if key in present else None
        optimizer.step()
        after = store.export()
        for key in set("abcde") - set(present):
            assert np.array_equal(before.values[key], after.values[key])
            assert before.steps.get(key) == after.steps.get(key)
            assert all(np.array_equal(before.state[s], after.state[s]) for s in before.state if s.endswith(f"/{key}"))
        compare(store, tensors, optimizer, TOLERANCES[np.float64])
    if store.optimizer.counts_steps:
        assert store.export().steps == {"a": 6, "b": 6, "c": 5, "d": 6, "e": 4}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("name", "options", "edits"),
    [
        ("adam", {"lr": 0.01}, [{"lr": 0.1}, {"weight_decay": 0.2}, {"betas": (0.4, 0.9)}, {"eps": 0.1, "maximize": True}]),
        ("adamw", {"lr": 0.01}, [{"weight_decay": 0.0}, {"weight_decay": 0.5, "lr": 0.3}]),
        ("sgd", {"lr": 0.01}, [{"momentum": 0.9, "dampening": 0.5}, {"momentum": 0.0}, {"momentum": 0.7}, {"weight_decay": 1}]),
        ("adadelta", {"lr": 0.5}, [{"rho": 0.5}, {"eps": 0.01, "maximize": True}, {"weight_decay": 0.1}]),
        ("adagrad", {"lr": 0.1}, [{"lr_decay": 0.5}, {"eps": 0.1}, {"initial_accumulator_value": 3}, {"weight_decay": 0.1}]),
        ("adamax", {"lr": 0.01}, [{"betas": (0.4, 0.7)}, {"lr": 0.1, "eps": 0.1}, {"weight_decay": 0.1}]),
        ("asgd", {"lr": 0.1}, [{"lr": 0.3, "lambd": 0.1}, {"alpha": 0.3, "t0": 2}, {"weight_decay": 0.1}]),
        ("nadam", {"lr": 0.01}, [{"momentum_decay": 0.1}, {"betas": (0.4, 0.7), "weight_decay": 0.1}, {"eps": 0.1}]),
        ("radam", {"lr": 0.01}, [{"betas": (0.4, 0.99)}, {"betas": (0.4, 0.5)}, {"weight_decay": 0.1}, {"eps": 0.1}]),
        ("rmsprop", {"lr": 0.01, "momentum": 0.9, "centered": True}, [{"alpha": 0.4}, {"momentum": 0.0}, {"momentum": 0.5}]),
        ("rprop", {"lr": 0.01}, [{"lr": 0.1}, {"etas": (0.9, 1.1)}, {"step_sizes": (0.02, 0.03)}, {"maximize": True}]),
    ],
)
def test_edited_hyperparameters_act_from_the_next_step(
    name: str, options: dict[str, Any], edits: list[dict[str, Any]], backend: str, build: Build, step: Step
) -> None:
    start = {"w": np.random.default_rng(3).normal(size=(30, 40))}
    group = {**find(name).defaults, **options}
    store = build(find(name), backend, [start], [group])
    tensor = torch.from_numpy(start["w"].copy()).requires_grad_()
    optimizer = torch_class(name)([tensor], foreach=False, **options)
    for index, edit in enumerate([{}, *edits]):
        group.update(edit)
        optimizer.param_groups[0].update(edit)
        for again in range(3):
            value = store.export().values["w"]
            step(store, [group], {"w": gradient(value, 3 * index + again)})
            tensor.grad = torch.from_numpy(gradient(tensor.detach().numpy(), 3 * index + again))
            optimizer.step()
        compare(store, {"w": tensor}, optimizer, TOLERANCES[np.float64])


def eps_inside_the_root(p, g, m, v, v_max, step_size, one_minus_beta1, beta2, one_minus_beta2, root_correction, eps,
                        *, maximize, decays_weights, decays_gradient, lerps_from_gradient, amsgrad):  # fmt: skip
    m = m + one_minus_beta1 * (g - m)
    v = v * beta2 + one_minus_beta2 * g * g
    return p - step_size * m / sqrt(v / root_correction / root_correction + eps * eps), m, v, v_max


def forgotten_largest(p, g, m, v, v_max, step_size, one_minus_beta1, beta2, one_minus_beta2, root_correction, eps,
                      *, maximize, decays_weights, decays_gradient, lerps_from_gradient, amsgrad):  # fmt: skip
    m = m + one_minus_beta1 * (g - m)
    v = v * beta2 + one_minus_beta2 * g * g
    return p - step_size * m / (sqrt(maximum(v_max, v)) / root_correction + eps), m, v, v_max


def uncorrected(group: Mapping[str, Any], _: int, carried: Mapping[str, float]) -> dict[str, float]:
    return find("adam").scalars(group, 2**24, carried)


def dampened_from_the_start(group: Mapping[str, Any], step: int, carried: Mapping[str, float]) -> dict[str, float]:
    return find("sgd").scalars(group, step + 1, carried)


MUTANTS: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("adam", {"eps": 0.05}, {"formula": eps_inside_the_root}),
    ("adam", {"amsgrad": True, "betas": (0.9, 0.7)}, {"formula": forgotten_largest}),
    ("adam", {}, {"scalars": uncorrected}),
    ("adam", {}, {"scalars": lambda group, step, carried: find("adam").scalars(group, step + 1, carried)}),
    ("adam", {"weight_decay": 0.1, "decoupled_weight_decay": True},
     {"options": lambda group: find("adam").options({**group, "decoupled_weight_decay": False})}),
    ("sgd", {"momentum": 0.9, "dampening": 0.1}, {"scalars": dampened_from_the_start}),
    ("sgd", {"momentum": 0.9, "nesterov": True}, {"options": lambda group: find("sgd").options({**group, "nesterov": False})}),
]  # fmt: skip


@pytest.mark.parametrize("mutant", MUTANTS, ids=range(len(MUTANTS)))
def test_these_tests_catch_a_wrong_optimizer(
    mutant: tuple[str, dict[str, Any], dict[str, Any]], build: Build, step: Step
) -> None:
    name, options, changes = mutant
    wrong: Optimizer = replace(find(name), _programs={}, **changes)
    group = {**wrong.defaults, **options}
    start = initial(np.float32)
    store = build(wrong, "numpy", [start], [group])
    run_store(store, step, group, 5)
    with pytest.raises(AssertionError, match="Not equal"):
        compare(store, *run_torch(name, options, start, 5), TOLERANCES[np.float32])


def bits(store: Store) -> dict[str, bytes]:
    content = store.export()
    return {name: array.tobytes() for name, array in {**content.values, **content.state}.items()}


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("variant", VARIANTS, ids=name_of)
def test_backends_and_thread_counts_agree_bit_for_bit(variant: Variant, dtype: Any, build: Build, step: Step) -> None:
    name, options = variant.optimizer, variant.options
    group = {**find(name).defaults, **options}
    random = np.random.default_rng(0)
    start = {**initial(dtype, name), "huge": random.normal(size=300_000).astype(dtype)}
    slopes = [{key: random.normal(size=value.shape).astype(dtype) for key, value in start.items()} for _ in range(4)]
    results = []
    ways = [("numba", 1), ("numba", 3), ("numpy", 1), ("numpy", 2)]
    if isinstance(find(name), Elementwise) and has_compiler:
        ways.append(("cupy-on-host", 1))
    for backend, threads in ways:
        store = build(find(name), backend, [start], [group], threads)
        for index, entry in enumerate(slopes):
            step(store, [group], entry, scale=(1.0, 1 / 3)[index % 2])
        results.append(bits(store))
    assert all(result == results[0] for result in results[1:])

"""Defaults, checks and messages are torch's; NaN and wrong types are refused."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import oracle
import pytest
import torch

from optserve.server.backends import select
from optserve.server.formulas import OPTIMIZERS, Elementwise, find
from optserve.server.formulas.arithmetic import single

NAN = math.nan
TORCH = {
    name: getattr(torch.optim, optimizer.name) for name, optimizer in OPTIMIZERS.items() if hasattr(torch.optim, optimizer.name)
}
"""torch's classes of the optimizers that it has; the others have nothing there to be compared with."""


def elementwise(name: str) -> Elementwise:
    found = find(name)
    assert isinstance(found, Elementwise)
    return found


def test_the_registry_is_sorted_and_finds_names_in_any_case() -> None:
    assert list(OPTIMIZERS) == sorted(OPTIMIZERS)
    assert find("AdamW") is OPTIMIZERS["adamw"]
    with pytest.raises(KeyError):
        find("adamm")


@pytest.mark.parametrize("name", sorted(OPTIMIZERS))
def test_names_are_torchs_and_defaults_are_allowed(name: str) -> None:
    optimizer = find(name)
    assert optimizer.name.lower() == name
    assert optimizer.name == {each.lower(): each for each in torch.optim.__all__}.get(name, optimizer.name)
    optimizer.check(optimizer.defaults)


@pytest.mark.parametrize("name", sorted(TORCH))
def test_defaults_are_torchs_in_torchs_order(name: str) -> None:
    optimizer = find(name)
    theirs = TORCH[name]([torch.zeros(1, 1)]).param_groups[0]
    theirs.pop("params")
    assert list(optimizer.complete(optimizer.defaults).items()) == list(theirs.items())


AT_LEAST_ZERO: dict[str, tuple[str, ...]] = {
    "adadelta": ("lr", "rho", "eps", "weight_decay"),
    "adagrad": ("lr", "lr_decay", "weight_decay", "initial_accumulator_value", "eps"),
    "adam": ("lr", "eps", "weight_decay"),
    "adamax": ("lr", "eps", "weight_decay"),
    "adamw": ("lr", "eps", "weight_decay"),
    "asgd": ("lr", "weight_decay"),
    "nadam": ("lr", "eps", "weight_decay", "momentum_decay"),
    "radam": ("lr", "eps", "weight_decay"),
    "rmsprop": ("lr", "eps", "momentum", "weight_decay", "alpha"),
    "rprop": ("lr",),
}
"""Of these torch refuses negative numbers and NaN."""

REFUSED_BY_TORCH: list[tuple[str, dict[str, Any]]] = [
    *((name, {key: value}) for name, keys in AT_LEAST_ZERO.items() for key in keys for value in (-0.1, -1, -math.inf, NAN)),
    *((name, {"betas": betas}) for name in ("adam", "adamax", "adamw", "nadam", "radam") for betas in (
        (-0.1, 0.9), (1.0, 0.9), (0.9, 1.0), (0.9, 2), (NAN, 0.9), (0.9, NAN), (1, -1),
    )),
    *(("sparseadam", options) for options in (
        {"lr": 0}, {"lr": -0.1}, {"lr": NAN}, {"eps": 0.0}, {"eps": -1}, {"eps": NAN},
        {"betas": (1.0, 0.9)}, {"betas": (0.9, 1)},
        {"betas": (-0.1, 0.9)}, {"betas": (0.9, NAN)},
    )),
    *((name, options) for name in ("adagrad", "adam", "adamw", "sgd") for options in (
        {"fused": True, "differentiable": True}, {"fused": True, "foreach": True},
    )),
    ("adadelta", {"rho": 1.1}), ("adadelta", {"rho": math.inf}), ("adam", {"betas": (0, 0.9)}), ("adamw", {"betas": (0.9, 0)}),
    *(("rprop", {"etas": etas}) for etas in (
        (0, 1.2), (1.0, 1.2), (0.5, 1), (0.5, 0.9), (-0.5, 2), (NAN, 2), (0.5, NAN),
    )),
    ("sgd", {"lr": -1e-3}), ("sgd", {"momentum": -0.5}), ("sgd", {"weight_decay": -1}), ("sgd", {"nesterov": True}),
    ("sgd", {"nesterov": True, "momentum": 0.9, "dampening": 0.1}),
]  # fmt: skip


@pytest.mark.parametrize(("name", "options"), REFUSED_BY_TORCH, ids=str)
def test_what_torch_refuses_is_refused_with_its_words(name: str, options: dict[str, Any]) -> None:
    with pytest.raises((ValueError, RuntimeError)) as theirs:
        TORCH[name]([torch.zeros(1, 1)], **options)
    with pytest.raises(theirs.type) as ours:
        find(name).check({**find(name).defaults, **options})
    assert str(ours.value) == str(theirs.value)


ALLOWED_BY_TORCH: list[tuple[str, dict[str, Any]]] = [
    *((name, {key: 0}) for name, keys in AT_LEAST_ZERO.items() for key in keys),
    *((name, {key: math.inf}) for name, keys in AT_LEAST_ZERO.items() for key in keys if key != "rho"),
    *((name, {"betas": (0, 0)}) for name in ("adamax", "nadam", "radam")),
    *((name, {"betas": (1 - 1e-16, 1 - 1e-16)}) for name in ("adam", "adamax", "nadam", "radam")),
    *((name, {"lr": 10**200, "weight_decay": 10**200}) for name in AT_LEAST_ZERO if "weight_decay" in AT_LEAST_ZERO[name]),
    ("adadelta", {"rho": 1}), ("rmsprop", {"alpha": 1.5, "centered": True}),
    ("asgd", {"lambd": -1e4}), ("asgd", {"lambd": -100.0, "alpha": 1}), ("asgd", {"alpha": -1e300}), ("asgd", {"alpha": 1e300}),
    ("asgd", {"t0": -3}), ("asgd", {"t0": math.inf}), ("asgd", {"lambd": math.inf, "alpha": 0}),
    ("nadam", {"betas": (1 - 1e-12, 0.9), "momentum_decay": 1e9}), ("nadam", {"decoupled_weight_decay": True}),
    ("sparseadam", {"betas": (0, 0)}), ("sparseadam", {"betas": (1 - 1e-16, 1 - 1e-16), "lr": math.inf, "eps": math.inf}),
    ("rprop", {"step_sizes": (50, 1e-6)}), ("rprop", {"step_sizes": (-1, math.inf)}), ("rprop", {"etas": (1e-300, 10**300)}),
]  # fmt: skip


@pytest.mark.parametrize(("name", "options"), ALLOWED_BY_TORCH, ids=str)
def test_what_torch_allows_is_allowed_and_no_step_of_it_raises(name: str, options: dict[str, Any]) -> None:
    """Some of torch's own raise at the step. A server that applies a round must not."""
    TORCH[name]([torch.zeros(1, 1)], **options)
    optimizer = elementwise(name)
    group = {**optimizer.defaults, **options}
    optimizer.check(group)
    carried = {key: single(value) for key, value in optimizer.initial(group).items()}
    kernel = select("numpy").kernel(optimizer, optimizer.choices(group), np.dtype(np.float32))
    values, gradients = np.ones(1, np.float32), np.ones(1, np.float32)
    slots = [np.ones(1, np.float32) for _ in optimizer.slots(group)]
    for step in (1, 2, 3, 2**24, 2**24 + 5, 2**40):
        scalars = optimizer.values(group, step, carried)
        assert {type(value) for value in scalars.values()} == {float}  # a compiled loop takes no integer beyond 64 bits
        kernel(values, gradients, slots, scalars, 1.0, None)
        carried |= {key: single(value) for key, value in optimizer.carry(group, step, carried).items()}


@pytest.mark.parametrize(
    ("name", "key"),
    [
        *(("sgd", key) for key in ("lr", "momentum", "dampening", "weight_decay")),
        *(("asgd", key) for key in ("lambd", "alpha", "t0")),
    ],
)
def test_the_nan_that_torch_lets_pass_is_refused(name: str, key: str) -> None:
    TORCH[name]([torch.zeros(1, 1)], **{key: NAN})
    with pytest.raises(ValueError, match=r"Invalid .*: nan"):
        find(name).check({**find(name).defaults, key: NAN})


@pytest.mark.parametrize("bounds", [(NAN, 50), (1e-6, NAN)])
def test_rprop_refuses_nan_for_a_bound(bounds: tuple[float, float]) -> None:
    with pytest.raises(ValueError, match=r"Invalid step sizes: .*nan"):
        find("rprop").check({**find("rprop").defaults, "step_sizes": bounds})


WRONG: list[tuple[str, Any]] = [
    ("lr", "0.1"), ("lr", None), ("lr", True), ("lr", (0.1,)), ("weight_decay", "0"), ("maximize", 1), ("maximize", "no"),
    ("fused", 1), ("foreach", "yes"), ("capturable", 0), ("differentiable", "x"), ("amsgrad", 0), ("centered", None),
    ("decoupled_weight_decay", 1), ("nesterov", 0), ("rho", None), ("alpha", "1"), ("lambd", None), ("t0", "1e6"),
    ("etas", 0.5), ("step_sizes", "ab"), ("lr_decay", None), ("initial_accumulator_value", "0"), ("momentum_decay", ()),
    ("momentum", None), ("dampening", "0"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "key", "value"),
    [(name, key, value) for name in sorted(OPTIMIZERS) for key, value in WRONG if key in OPTIMIZERS[name].defaults],
)
def test_a_wrong_type_is_named(name: str, key: str, value: Any) -> None:
    with pytest.raises(TypeError, match=rf"{key} is .* of type {type(value).__name__}; it must be"):
        find(name).check({**find(name).defaults, key: value})


@pytest.mark.parametrize(
    ("value", "error", "message"),
    [
        (0.9, TypeError, " is 0.9 of type float"),
        ("ab", TypeError, " is 'ab'"),
        ((0.9,), ValueError, " has 1 values; it must have 2"),
        ((0.9, "x"), TypeError, r"\[1\] is 'x' of type str"),
    ],
)
@pytest.mark.parametrize(
    ("name", "key"),
    [
        *((name, "betas") for name in ("adam", "adamax", "adamw", "nadam", "radam")),
        ("rprop", "etas"),
        ("rprop", "step_sizes"),
    ],
)
def test_a_pair_is_two_numbers(name: str, key: str, value: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=key + message):
        find(name).check({**find(name).defaults, key: value})


def test_an_integer_beyond_float64_is_refused() -> None:
    with pytest.raises(ValueError, match="lr is an integer beyond"):
        find("adam").check({**find("adam").defaults, "lr": 10**400})


ELEMENTWISE = sorted(name for name, optimizer in OPTIMIZERS.items() if isinstance(optimizer, Elementwise))
OPTIONS: list[tuple[str, dict[str, Any]]] = [
    *((name, {}) for name in ELEMENTWISE),
    ("sgd", {"momentum": 0.1}), ("adamw", {"amsgrad": True}), ("rmsprop", {"momentum": 0.1}), ("rmsprop", {"centered": True}),
    ("rmsprop", {"momentum": 0.1, "centered": True}),
]  # fmt: skip


@pytest.mark.parametrize(("name", "options"), [case for case in OPTIONS if case[0] in TORCH], ids=str)
def test_a_parameters_state_has_torchs_names_in_torchs_order(name: str, options: dict[str, Any]) -> None:
    optimizer, parameter = elementwise(name), torch.zeros(3, requires_grad=True)
    group = {**optimizer.defaults, **options}
    theirs = TORCH[name]([parameter], **options)
    assert bool(theirs.state[parameter]) is optimizer.stateful_from_creation
    parameter.grad = oracle.slope(optimizer.name, np.ones(3, np.float32))
    theirs.step()
    step = ["step"] if optimizer.counts_steps else []
    state = {key: value for key, value in theirs.state[parameter].items() if value is not None}
    assert [*step, *optimizer.scalar_keys, *optimizer.slots(group)] == list(state)
    assert optimizer.state_shapes(group, (3,)) == {key: (3,) for key, value in state.items() if np.ndim(value)}


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("adagrad", {"lr_decay": 0.1}),
        ("adam", {"betas": (0.9, 1 - 1e-9)}),
        ("adamax", {"betas": (1 - 1e-9, 0.9)}),
        ("asgd", {"t0": 100}),
        ("nadam", {"betas": (0.9, 1 - 1e-9)}),
        ("radam", {"betas": (0.9, 1 - 1e-9)}),
    ],
)
def test_the_step_is_counted_in_float32_as_torch_does(name: str, options: dict[str, Any]) -> None:
    optimizer = elementwise(name)
    group = {**optimizer.defaults, **options}
    carried = optimizer.initial(group)
    before, last, beyond = (
        (optimizer.scalars(group, step, carried), optimizer.carry(group, step, carried))
        for step in (2**24 - 1, 2**24, 2**24 + 7)
    )
    assert before != last == beyond

"""Defaults, checks and messages are torch's; NaN and wrong types are refused."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from optserve.server.formulas import OPTIMIZERS, find

TORCH = {
    name: getattr(torch.optim, optimizer.name) for name, optimizer in OPTIMIZERS.items() if hasattr(torch.optim, optimizer.name)
}
"""torch's classes of the optimizers that it has; the others have nothing there to be compared with."""


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
    theirs = TORCH[name]([torch.zeros(1)]).param_groups[0]
    theirs.pop("params")
    assert list(optimizer.defaults.items()) == list(theirs.items())


REFUSED_BY_TORCH: list[tuple[str, dict[str, Any]]] = [
    ("sgd", {"lr": -1e-3}),
    ("sgd", {"momentum": -0.5}),
    ("sgd", {"weight_decay": -1}),
    ("sgd", {"nesterov": True}),
    ("sgd", {"nesterov": True, "momentum": 0.9, "dampening": 0.1}),
    ("sgd", {"fused": True, "differentiable": True}),
    ("sgd", {"fused": True, "foreach": True}),
    *((name, case) for name in ("adam", "adamw") for case in (
        {"lr": -1.0}, {"lr": math.nan}, {"eps": -1e-8}, {"eps": math.nan}, {"betas": (-0.1, 0.9)}, {"betas": (1.0, 0.9)},
        {"betas": (0.9, 1.0)}, {"betas": (0.9, 2)}, {"betas": (math.nan, 0.9)}, {"betas": (0.9, math.nan)}, {"betas": (0, 0.9)},
        {"weight_decay": -0.1}, {"weight_decay": math.nan}, {"fused": True, "differentiable": True},
        {"fused": True, "foreach": True},
    )),
]  # fmt: skip


@pytest.mark.parametrize(("name", "options"), REFUSED_BY_TORCH, ids=str)
def test_what_torch_refuses_is_refused_with_its_words(name: str, options: dict[str, Any]) -> None:
    with pytest.raises((ValueError, RuntimeError)) as theirs:
        TORCH[name]([torch.zeros(1)], **options)
    with pytest.raises(theirs.type) as ours:
        find(name).check({**find(name).defaults, **options})
    assert str(ours.value) == str(theirs.value)


@pytest.mark.parametrize("key", ["lr", "momentum", "dampening", "weight_decay"])
def test_sgd_refuses_the_nan_that_torch_lets_pass(key: str) -> None:
    with pytest.raises(ValueError, match=r"Invalid .*: nan"):
        find("sgd").check({**find("sgd").defaults, key: math.nan})


WRONG: list[tuple[str, Any]] = [
    ("lr", "0.1"), ("lr", None), ("lr", True), ("lr", (0.1,)), ("weight_decay", "0"), ("maximize", 1), ("maximize", "no"),
    ("fused", 1), ("foreach", "yes"),
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
        (0.9, TypeError, "betas is 0.9 of type float"),
        ("ab", TypeError, "betas is 'ab'"),
        ((0.9,), ValueError, "betas has 1 values; it must have 2"),
        ((0.9, "x"), TypeError, r"betas\[1\] is 'x' of type str"),
    ],
)
def test_betas_are_two_numbers(value: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        find("adam").check({**find("adam").defaults, "betas": value})


def test_an_integer_beyond_float64_is_refused() -> None:
    with pytest.raises(ValueError, match="lr is an integer beyond"):
        find("adam").check({**find("adam").defaults, "lr": 10**400})


@pytest.mark.parametrize(
    ("name", "options", "slots"),
    [
        ("sgd", {}, ()),
        ("sgd", {"momentum": 0.1}, ("momentum_buffer",)),
        ("adam", {}, ("exp_avg", "exp_avg_sq")),
        ("adamw", {"amsgrad": True}, ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")),
    ],
)
def test_slots_follow_the_options(name: str, options: dict[str, Any], slots: tuple[str, ...]) -> None:
    optimizer = find(name)
    assert optimizer.slots({**optimizer.defaults, **options}) == slots


def test_the_step_is_counted_in_float32_as_torch_does() -> None:
    group = {**find("adam").defaults, "betas": (0.9, 1 - 1e-9)}
    last, beyond = find("adam").scalars(group, 2**24), find("adam").scalars(group, 2**24 + 7)
    assert last == beyond

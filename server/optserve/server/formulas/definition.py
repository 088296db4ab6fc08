"""What an optimizer is: its hyperparameters and state, and one formula for every backend.

`Elementwise` optimizers are one function of one element, compiled by every backend. `Tensorwise` ones look at a parameter as a
whole (its norms, its rows and columns); they are array functions on NumPy or CuPy.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from optserve.server.formulas.language import L1, Formula, Program, specialise

Group = Mapping[str, Any]
"""A param group's hyperparameters by name; names that the optimizer does not know are ignored."""

Shape = tuple[int, ...]

Carried = Mapping[str, float]
"""A parameter's scalar state, by torch's names."""


def _nothing(*_: Any) -> dict[str, Any]:
    return {}


def _anything(*_: Any) -> None:
    """Every parameter will do."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Optimizer:
    """What every optimizer has. `name` is torch's class name, where torch has it."""

    name: str
    defaults: Mapping[str, Any]
    """In torch's order, with the switches that torch shows in a param group."""
    check: Callable[[Group], None]
    """Raises torch's error for hyperparameters that are not allowed: ValueError, RuntimeError; TypeError for a wrong type."""
    slot_keys: tuple[str, ...]
    """Names in torch's state of the tensors that any options may need."""
    counts_steps: bool = True
    """Whether torch's state has a `step`. The store counts steps either way, while there is state."""
    scalar_keys: tuple[str, ...] = ()
    """Names in torch's state of the scalars that each parameter carries from step to step, in float32 as there."""
    initial: Callable[[Group], dict[str, float]] = _nothing
    """What slots and carried scalars begin with, where that is not 0. Read at a parameter's first step."""
    stateful_from_creation: bool = False
    """Whether torch makes the state when the optimizer is made, not at the first step."""
    check_parameter: Callable[[str, Shape, bool], None] = _anything
    """(name, shape, whether complex): raises ValueError or RuntimeError for a parameter that it cannot take."""

    def state_shapes(self, group: Group, shape: Shape) -> dict[str, Shape]:
        """The slots that these hyperparameters need for a parameter of that shape, with the slots' own shapes.

        If empty, there is no state and steps are not counted.
        """
        raise NotImplementedError


@dataclass(frozen=True, eq=False, kw_only=True)
class Elementwise(Optimizer):
    """An optimizer whose elements do not know of each other: one scalar formula for all backends."""

    options: Callable[[Group], dict[str, bool]]
    """The formula's static options."""
    scalars: Callable[[Group, int, Carried], dict[str, float]]
    """The formula's host scalars, in float64, for the step-th step of a parameter (from 1) that carries these scalars."""
    carry: Callable[[Group, int, Carried], dict[str, float]] = _nothing
    """The carried scalars after that step."""
    formula: Formula
    _programs: dict[tuple[tuple[str, bool], ...], Program] = field(default_factory=dict, repr=False)

    def choices(self, group: Group) -> dict[str, bool]:
        """What decides which kernel: the formula's options, and whether there is an l1 penalty."""
        return {**self.options(group), L1: bool(group.get(L1))}

    def values(self, group: Group, step: int, carried: Carried) -> dict[str, float]:
        """What a kernel of these choices is given: floats, since a compiled one takes no integer beyond 64 bits."""
        return {name: float(value) for name, value in self.scalars(group, step, carried).items()} | {L1: _penalty(group)}

    def program(self, choices: Mapping[str, bool]) -> Program:
        """The formula specialised for the choices; cached."""
        key = tuple(choices.items())
        found = self._programs.get(key)
        if found is None:
            found = self._programs[key] = specialise(self.formula, self.slot_keys, choices)
        return found

    def slots(self, group: Group) -> tuple[str, ...]:
        """The state's names that these hyperparameters need, in the order in which a kernel takes them."""
        return self.program(self.choices(group)).slot_keys

    def state_shapes(self, group: Group, shape: Shape) -> dict[str, Shape]:
        return dict.fromkeys(self.slots(group), shape)


@dataclass(frozen=True, eq=False, kw_only=True)
class Tensorwise(Optimizer):
    """An optimizer that looks at each parameter as a whole."""

    shapes: Callable[[Group, Shape], dict[str, Shape]]
    """Implements `state_shapes`."""
    update: Callable[..., None]
    """(xp, group, step, dtype, p, g, state): one step of one parameter, in place on p and on the arrays of `state`.

    `xp` is numpy or cupy. p (the master, in its parameter's shape), g and the slots have the state dtype; `dtype` is the
    parameter's own. g is the function's to change. A complex parameter comes as reals with a last axis of 2 more.
    """

    def step(self, xp: Any, group: Group, step: int, dtype: Any, p: Any, g: Any, state: Mapping[str, Any]) -> None:
        """`update`, with the l1 penalty's slope added to g before."""
        penalty = _penalty(group)
        if penalty:
            g += p.dtype.type(penalty) * xp.sign(p)
        self.update(xp, group, step, dtype, p, g, state)

    def state_shapes(self, group: Group, shape: Shape) -> dict[str, Shape]:
        return self.shapes(group, shape)


def _penalty(group: Group) -> float:
    """λ of λ·sign(p), with the sign that it has in a gradient that is still to be negated where the group maximizes."""
    found = float(group.get(L1) or 0.0)
    return -found if group.get("maximize") else found

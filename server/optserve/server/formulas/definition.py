"""What an optimizer is: its hyperparameters and state, and one formula for every backend.

`Elementwise` optimizers are one function of one element, compiled by every backend. `Tensorwise` ones look at a parameter as a
whole (its norms, its rows and columns); they are array functions on NumPy or CuPy. `Searching` ones look at all parameters as
one vector, and ask for the loss and the gradient at points of their own.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass, field
from typing import Any

from optserve.server.formulas.language import CLIP, L1, Formula, Program, specialise

Group = Mapping[str, Any]
"""A param group's hyperparameters by name; names that the optimizer does not know are ignored."""

Shape = tuple[int, ...]

Carried = Mapping[str, float]
"""A parameter's scalar state, by torch's names."""

Evaluation = tuple[float, Any]
"""The loss at a point, and the gradient there: a vector, the receiver's to change."""


def _nothing(*_: Any) -> dict[str, Any]:
    return {}


def _as_given(group: Group) -> dict[str, Any]:
    return dict(group)


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
    complete: Callable[[Group], dict[str, Any]] = _as_given
    """A checked group with what torch fills in from its other hyperparameters."""
    several_groups: str = ""
    """torch's message for more than one param group, where the optimizer takes no more."""
    slot_keys: tuple[str, ...]
    """Names in torch's state of the tensors that any options may need."""
    counts_steps: bool = True
    """Whether torch's state has a `step`. The store counts steps either way, while there is state."""
    integer_steps: bool = False
    """Whether torch's `step` is an int, and not a float32 tensor."""
    scalar_keys: tuple[str, ...] = ()
    """Names in torch's state of the scalars that each parameter carries from step to step, in float32 as there."""
    initial: Callable[[Group], dict[str, float]] = _nothing
    """What slots and carried scalars begin with, where that is not 0. Read at a parameter's first step."""
    stateful_from_creation: bool = False
    """Whether torch makes the state when the optimizer is made, not at the first step."""
    check_parameter: Callable[[str, Shape, bool], None] = _anything
    """(name, shape, whether complex): raises ValueError or RuntimeError for a parameter that it cannot take."""
    sparse: Callable[[Group], bool] | None = None
    """How it takes a gradient of some rows: raises torch's RuntimeError for hyperparameters that do not go with one; True where
    rows without a gradient move all the same, so that it counts as a dense one. None: it takes none."""
    no_sparse: str = ""
    """torch's message for a sparse gradient, where it is not "<name> does not support sparse gradients"."""
    no_dense: str = ""
    """torch's message for a dense gradient, where the optimizer takes none."""

    def moves_all(self, group: Group) -> bool:
        """Whether a sparse gradient counts as a dense one. RuntimeError, with torch's message, if it takes none."""
        if self.sparse is None:
            raise RuntimeError(self.no_sparse or f"{self.name} does not support sparse gradients")
        if group.get(L1):
            raise RuntimeError("l1 option is not compatible with sparse gradients")
        return self.sparse(group)

    def check_dense(self) -> None:
        """RuntimeError, with torch's message, if it takes no dense gradient."""
        if self.no_dense:
            raise RuntimeError(self.no_dense)

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
        """What decides which kernel: the formula's options, whether the gradient is clipped, whether there is an l1 penalty."""
        return {**self.options(group), CLIP: CLIP in group, L1: bool(group.get(L1))}

    def values(self, group: Group, step: int, carried: Carried) -> dict[str, float]:
        """What a kernel of these choices is given: floats, since a compiled one takes no integer beyond 64 bits."""
        own = {name: float(value) for name, value in self.scalars(group, step, carried).items()}
        return own | {CLIP: float(group.get(CLIP, 0.0)), L1: _penalty(group)}

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
        """`update`, after g was clipped to the bound that comes with the group, and the l1 penalty's slope added to it."""
        if CLIP in group:
            bound = p.dtype.type(group[CLIP])
            xp.clip(g, -bound, bound, out=g)
        penalty = _penalty(group)
        if penalty:
            g += p.dtype.type(penalty) * xp.sign(p)
        self.update(xp, group, step, dtype, p, g, state)

    def state_shapes(self, group: Group, shape: Shape) -> dict[str, Shape]:
        return self.shapes(group, shape)


@dataclass(frozen=True, eq=False, kw_only=True)
class Searching(Optimizer):
    """An optimizer that evaluates a closure at points of its own, one step after the other."""

    search: Callable[[Any, Group, Mapping[str, Any], Any], Generator[Any, Evaluation, dict[str, Any]]]
    """(xp, group, state, x): one step of all parameters, as a generator.

    `x` is one vector of reals, all parameters in torch's order (a complex one as pairs), and the generator's to change. It
    yields a point, a vector that must not be changed before the next evaluation, and is sent the loss and the gradient there;
    the first point is x itself. It returns the new state; x then holds the new parameters. `state` is what it returned before,
    by torch's names, or empty; it is not changed. xp is numpy or cupy.
    """
    counts: tuple[str, ...]
    """Names in the state of whole numbers, which are always there. The others are there once there was a move."""
    moves: str
    """The one of them that counts moves."""
    numbers: tuple[str, ...]
    """Of floats."""
    vectors: tuple[str, ...]
    """Of vectors as long as x, which are replaced and never changed."""
    histories: tuple[str, ...]
    """Of lists of vectors, equally many in each: the oldest are dropped, new ones come last."""
    lists: tuple[str, ...]
    """Of lists of floats, one for each vector of a history."""
    most_vectors: Callable[[Group], int]
    """How many vectors the state of these hyperparameters may hold, those of histories too."""
    scratch: tuple[str, ...] = ()
    """Of lists of floats that are shown for torch's sake, and not needed."""

    @property
    def state_keys(self) -> tuple[str, ...]:
        """All names in the state."""
        return (*self.counts, *self.numbers, *self.vectors, *self.histories, *self.lists, *self.scratch)

    def state_shapes(self, group: Group, shape: Shape) -> dict[str, Shape]:  # noqa: ARG002 - no parameter has state of its own
        return {}


def _penalty(group: Group) -> float:
    """λ of λ·sign(p), with the sign that it has in a gradient that is still to be negated where the group maximizes."""
    found = float(group.get(L1) or 0.0)
    return -found if group.get("maximize") else found

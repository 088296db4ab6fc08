"""What an elementwise optimizer is."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from optserve.server.formulas.language import Formula, Program, specialise

Group = Mapping[str, Any]
"""A param group's hyperparameters by name; names that the optimizer does not know are ignored."""


@dataclass(frozen=True, eq=False)
class Optimizer:
    """One optimizer: its hyperparameters, state, host scalars and formula. `name` is torch's class name."""

    name: str
    defaults: Mapping[str, Any]
    """In torch's order, with the switches that torch shows in a param group."""
    slot_keys: tuple[str, ...]
    """The state's names in torch for the formula's slots, all that any options may need."""
    counts_steps: bool
    """Whether torch's state has a `step`. The store counts steps either way, while there are slots."""
    check: Callable[[Group], None]
    """Raises torch's error for hyperparameters that are not allowed: ValueError, RuntimeError; TypeError for a wrong type."""
    options: Callable[[Group], dict[str, bool]]
    """The formula's static options."""
    scalars: Callable[[Group, int], dict[str, float]]
    """The formula's host scalars, in float64, for the step-th step of a parameter (from 1)."""
    formula: Formula
    _programs: dict[tuple[bool, ...], Program] = field(default_factory=dict, repr=False)

    def program(self, options: Mapping[str, bool]) -> Program:
        """The formula specialised for the options; cached."""
        key = tuple(options.values())
        found = self._programs.get(key)
        if found is None:
            found = self._programs[key] = specialise(self.formula, self.slot_keys, options)
        return found

    def slots(self, group: Group) -> tuple[str, ...]:
        """The state's names that these hyperparameters need; if empty, there is no state and steps are not counted."""
        return self.program(self.options(group)).slot_keys

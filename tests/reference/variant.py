"""What the tests know of an optimizer: its textbook loop, and the hyperparameters with which they run it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

State = dict[str, Any]
"""By torch's names: slots as lists, carried scalars as floats, `step` as an int."""

Loop = Callable[[Mapping[str, Any], Sequence[float], Sequence[float], State], list[float]]
"""(group, a parameter's elements, its gradient's elements, its state, which is empty at first and changed in place) -> its new
elements."""


@dataclass(frozen=True)
class Variant:
    """An optimizer with hyperparameters, and what the tests must know of the two together."""

    optimizer: str
    options: Mapping[str, Any] = field(default_factory=dict)
    in_float16: bool = False
    """Also a hundred steps in float16, beside torch: one or two variants of an optimizer are enough."""
    float16: Mapping[str, Any] = field(default_factory=dict)
    """Options that make torch, whose state has 16 bits there, a fair opponent."""

    def __str__(self) -> str:
        return "-".join([self.optimizer, *(f"{name}={value}" for name, value in self.options.items())])


FAIR = {"eps": 1e-3}
"""For `float16`: torch's float16 optimizers divide by zero where eps is 1e-8."""

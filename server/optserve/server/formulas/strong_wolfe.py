"""The line search of torch.optim.LBFGS: the strong Wolfe conditions by cubic interpolation.

A step t along d is looked for with f(t) ≤ f(0) + c₁ t f'(0) and |f'(t)| ≤ -c₂ f'(0), f' the slope g·d: first a bracket around
such a t, then zooming into it. Nocedal & Wright, "Numerical Optimization", 2006, algorithms 3.5 and 3.6; in torch from minFunc.

Numbers are of the vectors' dtype where torch has 0-d tensors, and Python's where it has those: comparisons come out alike.

Deviations: where torch divides by zero (an lr of 0) and raises, the interpolation falls back to bisecting; where it raises for
a `max_ls` below 0, one evaluation is made.
"""

from __future__ import annotations

from collections.abc import Generator
from typing import Any, NamedTuple

import numpy as np

from optserve.server.formulas.arithmetic import quotient
from optserve.server.formulas.definition import Evaluation
from optserve.server.formulas.vectors import along, dot, largest

_C1, _C2 = 1e-4, 0.9


class Point(NamedTuple):
    """A step t along the direction, with the loss, the gradient and the slope there."""

    t: Any
    loss: float
    g: Any
    slope: Any


class Line(NamedTuple):
    """x + t·d, and what it is at t = 0."""

    xp: Any
    x: Any
    d: Any
    start: Point

    def at(self, t: Any) -> Generator[Any, Evaluation, Point]:
        """The point there."""
        loss, g = yield along(self.xp, self.x, t, self.d)
        return Point(t, loss, g, dot(self.xp, g, self.d))

    def too_high(self, point: Point) -> bool:
        """Whether the loss has not come down enough (Armijo)."""
        return bool(point.loss > (self.start.loss + _C1 * point.t * self.start.slope))

    def flat(self, point: Point) -> bool:
        """Whether the slope is flat enough."""
        return bool(abs(point.slope) <= -_C2 * self.start.slope)


def strong_wolfe(line: Line, t: Any, tolerance_change: float, max_ls: int) -> Generator[Any, Evaluation, tuple[Point, int]]:
    """The point found, and how often the loss was evaluated. `t` is tried first."""
    bracket, done, evaluated = yield from _bracketed(line, t, max_ls)
    width, stalled = largest(line.xp, line.d), False
    low = _lower(bracket)
    while not done and evaluated <= max_ls:
        if abs(bracket[1].t - bracket[0].t) * width < tolerance_change:
            break
        t, stalled = _next(bracket, stalled)
        new = yield from line.at(t)
        evaluated += 1
        if line.too_high(new) or new.loss >= bracket[low].loss:
            bracket[1 - low] = new
            low = _lower(bracket)
            continue
        if line.flat(new):
            done = True
        elif new.slope * (bracket[1 - low].t - bracket[low].t) >= 0:
            bracket[1 - low] = bracket[low]
        bracket[low] = new
    return bracket[low], evaluated


def _lower(bracket: list[Point]) -> int:
    """Which end has the lower loss."""
    return 0 if bracket[0].loss <= bracket[-1].loss else 1


def _bracketed(line: Line, t: Any, max_ls: int) -> Generator[Any, Evaluation, tuple[list[Point], bool, int]]:
    """Two points around one that fulfils the conditions, or (True) the one; and how often the loss was evaluated."""
    previous, new = line.start, (yield from line.at(t))
    for tried in range(max_ls):
        if line.too_high(new) or (tried > 1 and new.loss >= previous.loss):
            return [previous, new], False, tried + 1
        if line.flat(new):
            return [new], True, tried + 1
        if new.slope >= 0:
            return [previous, new], False, tried + 1
        bounds = new.t + 0.01 * (new.t - previous.t), new.t * 10
        t = interpolated(previous, new, bounds)
        previous, new = new, (yield from line.at(t))
    return [line.start, new], False, max(max_ls, 0) + 1


def _next(bracket: list[Point], stalled: bool) -> tuple[Any, bool]:
    """The next step to try, and whether it is close to an end: after two of these it is put a tenth away from one."""
    ends = [point.t for point in bracket]
    t = interpolated(bracket[0], bracket[1], (min(ends), max(ends)))
    margin = 0.1 * (max(ends) - min(ends))
    if not min(max(ends) - t, t - min(ends)) < margin:
        return t, False
    if not (stalled or t >= max(ends) or t <= min(ends)):
        return t, True
    is_high = abs(t - max(ends)) < abs(t - min(ends))
    return (max(ends) - margin if is_high else min(ends) + margin), False


def interpolated(one: Point, two: Point, bounds: tuple[Any, Any]) -> Any:
    """Where the cubic through both points, with their slopes, is lowest within the bounds; their middle if it is nowhere."""
    least, most = bounds
    width = one.t - two.t
    rise = 3 * (one.loss - two.loss)
    d1 = one.slope + two.slope - (rise / width if width != 0 else quotient(rise, 0.0))
    square = d1**2 - one.slope * two.slope
    if not square >= 0:
        return (least + most) / 2.0
    d2 = np.sqrt(square)
    if not one.t <= two.t:
        one, two = two, one
    lowest = two.t - (two.t - one.t) * ((two.slope + d2 - d1) / (two.slope - one.slope + 2 * d2))
    return min(max(lowest, least), most)

"""Steps with a closure: the optimizer asks for loss and gradient, at the weights and, if it searches, at points of its own."""

from __future__ import annotations

import secrets
from collections.abc import Callable
from dataclasses import replace
from typing import Any, SupportsFloat

from optserve.client import _gradients
from optserve.client._exchange import BEGIN_AGAIN, Exchange, Wanted
from optserve.client._gradients import Gradients, Push
from optserve.client._info import StepInfo
from optserve.client._options import PushOptions
from optserve.client._weights import Destination, Weights
from optserve.wire.errors import InvalidArgumentError, RoundFailedError, StaleLayoutError
from optserve.wire.layout import Layout
from optserve.wire.metrics import MOST_METRICS

MOST_BEGINNINGS = 100
"""Of one step, which begins again when a rank comes or goes in the middle of its search."""

Closure = Callable[[Weights], tuple[SupportsFloat, Gradients]]


class KeptWeights:
    """The arrays that closures are given if the user has none for them. Its owner's lock guards it."""

    def __init__(self) -> None:
        self._layout: Layout | None = None
        self._arrays: Weights = {}

    def of(self, layout: Layout) -> Weights:
        """Those of the last evaluation; none yet where the layout is another one."""
        if self._layout != layout:
            self._layout, self._arrays = layout, {}
        return self._arrays


class ClosureStep:
    """One step of one worker, whose lock is held from its beginning to its end."""

    def __init__(
        self, exchange: Exchange, closure: Closure, options: PushOptions, out: Weights | None, kept: KeptWeights
    ) -> None:
        """`out`: the weights that the closure is given, and at the end those after the step. Else the closure gets `kept`."""
        self._exchange = exchange
        self._closure = closure
        self._options = replace(options, closure=secrets.randbits(64) or 1)
        self._given: Wanted = lambda layout: Destination(layout, None, kept.of(layout) if out is None else out)
        self._out = out
        self._weights: Weights = {}

    def run(self, restores: frozenset[str]) -> float:
        """The loss at the weights as they were."""
        for _ in range(MOST_BEGINNINGS):
            self._weights = self._exchange.pull(self._given, restores)
            first, outcome = self._evaluated(0, restores)
            while not isinstance(outcome, StepInfo) and outcome != BEGIN_AGAIN:
                _, outcome = self._evaluated(outcome, restores)
            if isinstance(outcome, StepInfo):
                return first
        raise RoundFailedError(f"the step was begun {MOST_BEGINNINGS} times: ranks came or went in the middle of each search")

    def _evaluated(self, number: int, restores: frozenset[str]) -> tuple[float, StepInfo | int]:
        """The closure's loss, and what came of pushing it with its gradients."""
        layout = self._exchange.session.layout
        try:
            loss, gradients = _checked(self._closure(dict(self._weights)))
            metrics = dict(self._options.metrics or {})
            if len(metrics) < MOST_METRICS:
                metrics.setdefault("loss", loss)
            options = replace(self._options, metrics=metrics, loss=loss, evaluation=number)
            push, point = _gradients.checked(layout, gradients, options), self._given(layout)
        except BaseException:
            if number:
                self._exchange.abandon(_gradients.abandoned(layout, replace(self._options, evaluation=number)), restores)
            raise
        return loss, self._pushed(push, point, restores)

    def _pushed(self, push: Push, point: Destination, restores: frozenset[str]) -> StepInfo | int:
        after = None if self._out is None else point
        try:
            outcome = self._exchange.send(push, restores, after, point)
        except StaleLayoutError as error:
            self._exchange.refresh(push.layout, error)
            return BEGIN_AGAIN
        if isinstance(outcome, StepInfo):
            if after is not None:
                self._exchange.finished(after, self._given)
        elif outcome != BEGIN_AGAIN:
            if not point.filled:  # a group was added meanwhile
                self._exchange.session.refresh_layout()
                return BEGIN_AGAIN
            self._weights = point.finished()
        return outcome


def _checked(found: object) -> tuple[float, Any]:
    """A closure's loss and gradients. InvalidArgumentError says what it returned instead."""
    if not isinstance(found, tuple | list) or len(found) != 2:
        what = f"{len(found)} values" if isinstance(found, tuple | list) else _described(found)
        raise InvalidArgumentError(f"the closure returned {what}; it must return (loss, gradients)")
    return _loss(found[0]), found[1]


def _loss(loss: Any) -> float:
    try:
        if isinstance(loss, str | bytes | bytearray):
            raise TypeError("text is no number")
        item = getattr(loss, "item", None)  # of an array or a tensor with one element
        number = float(item() if callable(item) else loss)
    except (TypeError, ValueError, OverflowError, RuntimeError) as error:
        raise InvalidArgumentError(
            f"the closure's loss is {_described(loss)}; it must be one number: return (loss, gradients)"
        ) from error
    if number != number:
        raise InvalidArgumentError("the closure's loss is NaN; nothing was sent for this evaluation")
    return number


def _described(value: object) -> str:
    return "None" if value is None else f"something of type {type(value).__name__}"

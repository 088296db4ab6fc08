"""What a push says beside its gradients."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

from optserve.wire.errors import InvalidArgumentError
from optserve.wire.metrics import checked as checked_metrics


@dataclass(frozen=True)
class PushOptions:
    """What the fields mean is said in Worker.push and PushBegin; `loss`, `closure` and `evaluation` are Worker.step's own."""

    weight: float = 1.0
    metrics: Mapping[str, float] | None = None
    loss_scale: float | None = None
    clip_grad_norm: float | None = None
    clip_grad_value: float | None = None
    found_inf: bool = False
    loss: float | None = None
    closure: int = 0
    evaluation: int = 0

    def checked(self) -> PushOptions:
        """What the caller said, with Python's own numbers. InvalidArgumentError names what is not allowed."""
        norm = _positive("clip_grad_norm", self.clip_grad_norm)
        value = _positive("clip_grad_value", self.clip_grad_value)
        if norm is not None and value is not None:
            raise InvalidArgumentError(f"clip_grad_norm is {norm:g} and clip_grad_value is {value:g}; a push brings one")
        scale = _positive("loss_scale", self.loss_scale)
        if scale is not None and math.isinf(scale):
            raise InvalidArgumentError(f"loss_scale is {self.loss_scale!r}; it must be a finite number above 0")
        return replace(
            self,
            weight=_weight(self.weight),
            metrics=checked_metrics({} if self.metrics is None else self.metrics),
            loss_scale=scale,
            clip_grad_norm=norm,
            clip_grad_value=value,
            found_inf=_flag("found_inf", self.found_inf),
        )


def _number(value: object) -> float:
    """NaN for what is no number, such as text."""
    if isinstance(value, str | bytes | bytearray):
        return math.nan
    try:
        return float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError):
        return math.nan


def _positive(name: str, value: object) -> float | None:
    if value is None:
        return None
    number = _number(value)
    if not number > 0:
        raise InvalidArgumentError(f"{name} is {value!r}; it must be a number above 0, or None")
    return number


def _weight(value: object) -> float:
    number = _number(value)
    if not math.isfinite(number) or number < 0:
        raise InvalidArgumentError(f"weight is {value!r}; it must be a finite number of at least 0")
    return number


def _flag(name: str, value: object) -> bool:
    try:
        if isinstance(value, str | bytes | bytearray):
            raise TypeError("text is no flag")
        return bool(value)  # also of a tensor of one number, as torch's GradScaler has it
    except (TypeError, ValueError, RuntimeError):
        raise InvalidArgumentError(f"{name} is {value!r}; it must be True or False") from None

"""Metrics are numbers by name, few and short enough for an event."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
import torch

from optserve.wire.errors import InvalidArgumentError
from optserve.wire.metrics import MOST_METRICS, MOST_NAME_BYTES, checked


@pytest.mark.parametrize(
    "value",
    [
        2,
        2.0,
        np.float32(2),
        np.array(2.0),
        np.int64(2),
        torch.tensor(2.0, requires_grad=True),
        torch.tensor([2.0]),
        Fraction(2),
    ],
)
def test_a_number_is_what_gives_one(value: object) -> None:
    found = checked({"loss": value})
    assert found == {"loss": 2.0}
    assert type(found["loss"]) is float


def test_a_loss_may_be_nan_or_inf() -> None:
    found = checked({"a": math.nan, "b": -math.inf})
    assert math.isnan(found["a"])
    assert found["b"] == -math.inf


@pytest.mark.parametrize("value", ["2", None, 1j, [2.0], np.ones(2), torch.ones(2), 10**400, b"2", {}])
def test_what_is_no_number_is_refused_by_name(value: object) -> None:
    with pytest.raises(InvalidArgumentError, match=r"metric 'loss' is of type .*; it must be one number"):
        checked({"loss": value})


def test_any_text_is_a_name_up_to_its_limit_in_bytes() -> None:
    names = ["kind", "ranks", "a b/c.d", "é" * (MOST_NAME_BYTES // 2)]
    assert list(checked(dict.fromkeys(names, 1.0))) == names
    for name in ("", "é" * (MOST_NAME_BYTES // 2) + "x"):
        with pytest.raises(InvalidArgumentError, match=f"allowed are 1 to {MOST_NAME_BYTES}"):
            checked({name: 1.0})
    with pytest.raises(InvalidArgumentError, match="is no text"):
        checked({"\ud800": 1.0})
    with pytest.raises(InvalidArgumentError, match="of type int; it must be a str"):
        checked({1: 1.0})  # type: ignore[dict-item]


def test_there_is_a_most_of_them() -> None:
    assert len(checked({str(index): 1.0 for index in range(MOST_METRICS)})) == MOST_METRICS
    with pytest.raises(InvalidArgumentError, match=f"{MOST_METRICS + 1} metrics .* {MOST_METRICS} are the most"):
        checked({str(index): 1.0 for index in range(MOST_METRICS + 1)})
    with pytest.raises(InvalidArgumentError, match="numbers by name; got list"):
        checked([("loss", 1.0)])  # type: ignore[arg-type]

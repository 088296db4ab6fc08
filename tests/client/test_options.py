from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from optserve.client._options import PushOptions
from optserve.wire import errors


def test_what_is_said_becomes_pythons_own_numbers() -> None:
    said = PushOptions(
        np.float32(2),
        {"loss": torch.tensor(0.5)},
        np.int64(8),
        torch.tensor(1.5),
        None,
        torch.tensor(0.0),  # type: ignore[arg-type, dict-item]
    )
    assert said.checked() == PushOptions(2.0, {"loss": 0.5}, 8.0, 1.5, None, False)
    assert type(said.checked().loss_scale) is float


def test_nothing_said_is_a_weight_of_one() -> None:
    assert PushOptions().checked() == PushOptions(1.0, {})


def test_no_clipping_may_be_said() -> None:
    assert PushOptions(clip_grad_norm=float("inf")).checked().clip_grad_norm == float("inf")


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        *(("weight", value, "weight is") for value in (-1.0, float("nan"), float("inf"), "heavy", "1", None)),
        *(
            (option, value, f"{option} is .*; it must be a number above 0, or None")
            for option in ("loss_scale", "clip_grad_norm", "clip_grad_value")
            for value in (0, -2.0, float("nan"), "much", "2", b"2", [1.0, 2.0])
        ),
        ("loss_scale", float("inf"), "loss_scale is inf; it must be a finite number above 0"),
        ("found_inf", np.array([True, False]), "found_inf is"),
        ("found_inf", torch.tensor([True, False]), "found_inf is"),
        ("found_inf", "no", "found_inf is 'no'; it must be True or False"),
        ("metrics", {"loss": "low"}, "metric 'loss'"),
        ("metrics", 0.5, "metrics must be numbers by name"),
    ],
)
def test_what_is_not_allowed_is_named(option: str, value: Any, message: str) -> None:
    with pytest.raises(errors.InvalidArgumentError, match=message):
        PushOptions(**{option: value}).checked()


def test_a_push_clips_in_one_way() -> None:
    with pytest.raises(errors.InvalidArgumentError, match="clip_grad_norm is 1 and clip_grad_value is 2; a push brings one"):
        PushOptions(clip_grad_norm=1, clip_grad_value=2).checked()

"""A schedule's state_dict between torch's types and the wire's text."""

from __future__ import annotations

import json
import math
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch

from optserve.client._schedule_state import check_functions, from_text, load_functions, to_text
from optserve.wire.errors import InvalidStateDictError


class Factor:
    """A callable object, whose state torch saves."""

    def __init__(self, value: float) -> None:
        self.value = value

    def __call__(self, epoch: int) -> float:
        return self.value**epoch


def test_every_bit_and_type_survives() -> None:
    state_dict = {
        "milestones": Counter({50: 3, 3: 1}),
        "best": -math.inf,
        "mode_worse": math.inf,
        "base_lrs": [0.1, 1, 5e-324, -0.0],
        "_milestones": [5],
        "_is_initial": False,
        "lr_lambdas": [None, None],
        "default_min_lr": None,
        "_schedulers": [{"milestones": Counter(), "T_i": 2**70}],
    }
    back = from_text(to_text(state_dict))
    assert back == state_dict
    assert repr(back["base_lrs"]) == repr(state_dict["base_lrs"])
    assert isinstance(back["milestones"], Counter)
    assert list(back) == list(state_dict)


def test_numbers_of_numpy_and_torch_are_numbers() -> None:
    given = {"_last_lr": [torch.tensor(0.5), np.float64(0.25)], "last_epoch": np.int64(3), "milestones": Counter([np.int64(3)])}
    assert json.loads(to_text(given)) == {"_last_lr": [0.5, 0.25], "last_epoch": 3, "milestones": [[3, 1]]}


ENDLESS: dict[str, Any] = {}
ENDLESS["_schedulers"] = [ENDLESS]
NONE = [3, None, "x", [], {"lr": object()}, {"lr": np.zeros(2)}, {"lr": [1j]}, {"lr": math.cos}]
WORSE = [ENDLESS, {"milestones": Counter({"a": 1, 2: 1})}, {"milestones": Counter({1: object()})}]


@pytest.mark.parametrize("value", NONE + WORSE)
def test_what_no_state_dict_holds_is_refused(value: Any) -> None:
    with pytest.raises(InvalidStateDictError, match="state_dict"):
        to_text(value)


def test_a_callable_objects_state_stays_with_the_object_as_in_torch() -> None:
    optimizer = torch.optim.SGD([{"params": [torch.zeros(1)]}, {"params": [torch.zeros(1)]}], lr=0.1)
    theirs = torch.optim.lr_scheduler.LambdaLR(optimizer, [Factor(0.5), lambda _: 1.0])
    state_dict = {"_schedulers": [theirs.state_dict(), {"step_size": 3}]}
    assert from_text(to_text(state_dict))["_schedulers"][0]["lr_lambdas"] == [None, None]
    mine = [Factor(0.9), abs]
    check_functions(state_dict, [mine])
    load_functions(state_dict, [mine])
    assert mine[0].value == 0.5
    for absent in ([], [[None, abs]], [[]], [None]):
        with pytest.raises(InvalidStateDictError, match=r"lr_lambdas\[0\] has the state of a callable object"):
            check_functions(state_dict, absent)
    for saved in (3, "x", [1]):
        with pytest.raises(InvalidStateDictError, match=r"lr_lambdas\[0\] has the state"):
            check_functions({"lr_lambdas": [saved]}, [[Factor(0.9)]])
    shared = Factor(0.9)
    load_functions({"lr_lambdas": [{"value": 0.25}, {"value": 0.25}]}, [shared])
    assert shared.value == 0.25

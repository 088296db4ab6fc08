"""Schedule arguments between Python and the wire."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from optserve.v1 import optimizer_pb2
from optserve.v1 import types_pb2 as pb
from optserve.wire.arguments import MOST_DEEP, MOST_SCHEDULES, NOT_CALLED, Factors, from_arguments, to_arguments
from optserve.wire.errors import InvalidArgumentError, InvalidHyperparameterError
from optserve.wire.values import from_hyperparameters, from_value, to_hyperparameters

LEAVES = st.one_of(st.none(), st.booleans(), st.integers(-5, 5), st.floats(allow_nan=False), st.text("abc"))
NAMES = st.text("abcdef", min_size=1)
ARGUMENTS = st.recursive(
    st.dictionaries(NAMES, LEAVES, max_size=3),
    lambda inner: st.fixed_dictionaries({"schedulers": st.lists(st.tuples(NAMES, inner), max_size=3).map(tuple)}),
    max_leaves=5,
)


@given(ARGUMENTS)
def test_arguments_keep_types_order_and_nesting(arguments: dict[str, Any]) -> None:
    message = optimizer_pb2.SetScheduleRequest(arguments=to_arguments(arguments))
    back = from_arguments(optimizer_pb2.SetScheduleRequest.FromString(message.SerializeToString()).arguments)
    assert back == arguments
    assert repr(back) == repr(arguments)


def test_lists_and_numpy_scalars_count_as_python_values() -> None:
    given = {"schedulers": [["StepLR", {"step_size": np.int64(3), "milestones": [1, 2]}]]}
    assert from_arguments(to_arguments(given)) == {"schedulers": (("StepLR", {"step_size": 3, "milestones": (1.0, 2.0)}),)}


@pytest.mark.parametrize(
    "value", [None, 3, "StepLR", {"StepLR": {}}, [("StepLR",)], ["StepLR"], [("StepLR", 3)], [(3, {})], [("a", {}, {})]]
)
def test_schedulers_of_another_form_are_refused(value: object) -> None:
    with pytest.raises(InvalidHyperparameterError, match=r'schedulers is .*; it must be a list of .* like \[\("StepLR"'):
        to_arguments({"schedulers": value})


def test_a_function_in_a_nested_schedule_is_refused_by_name() -> None:
    with pytest.raises(InvalidHyperparameterError, match="lr_lambda is <built-in function abs>"):
        to_arguments({"schedulers": [("LambdaLR", {"lr_lambda": abs})]})


def nested(depth: int) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for _ in range(depth - 1):
        found = {"schedulers": [("ChainedScheduler", found)]}
    return found


def deep_message(depth: int) -> list[pb.Hyperparameter]:
    found: list[pb.Hyperparameter] = []
    for _ in range(depth - 1):
        entry = pb.ScheduleEntry(name="ChainedScheduler", arguments=found)
        found = [pb.Hyperparameter(name="schedulers", value=pb.Value(schedules=pb.ScheduleList(entries=[entry])))]
    return found


def wide_message(count: int) -> list[pb.Hyperparameter]:
    entries = [pb.ScheduleEntry(name="LinearLR")] * (count - 1)
    return [pb.Hyperparameter(name="schedulers", value=pb.Value(schedules=pb.ScheduleList(entries=entries)))]


def test_nesting_is_bounded_both_ways() -> None:
    assert from_arguments(to_arguments(nested(MOST_DEEP))) == from_arguments(deep_message(MOST_DEEP))
    from_arguments(wide_message(MOST_SCHEDULES))
    for call in (
        lambda: to_arguments(nested(MOST_DEEP + 1)),
        lambda: to_arguments({"schedulers": [("LinearLR", {})] * MOST_SCHEDULES}),
        lambda: from_arguments(deep_message(MOST_DEEP + 1)),
        lambda: from_arguments(wide_message(MOST_SCHEDULES + 1)),
    ):
        with pytest.raises(InvalidHyperparameterError, match="8 deep in one another and 64 in all"):
            call()


def test_an_argument_given_twice_is_refused() -> None:
    entry = pb.Hyperparameter(name="gamma", value=pb.Value(number=1.0))
    with pytest.raises(InvalidHyperparameterError, match="'gamma' is given twice"):
        from_arguments([entry, entry])


def test_schedules_are_no_hyperparameter() -> None:
    with pytest.raises(InvalidHyperparameterError, match="no hyperparameter"):
        from_hyperparameters(wide_message(2))
    with pytest.raises(InvalidHyperparameterError, match="no hyperparameter"):
        from_value(wide_message(2)[0].value)
    with pytest.raises(InvalidHyperparameterError, match="schedulers is"):
        to_hyperparameters({"schedulers": [("StepLR", {})]})


@pytest.mark.parametrize("factors", [Factors(NOT_CALLED), Factors(3, (0.1, 0.2)), Factors(0, (float("inf"),), True)])
def test_factors_travel(factors: Factors) -> None:
    message = optimizer_pb2.Factors.FromString(factors.to_proto().SerializeToString())
    assert Factors.from_proto(message) == factors


def test_factors_are_one_a_group_or_one_for_all() -> None:
    assert Factors(0, (0.5,), True).of(3) == (0.5, 0.5, 0.5)
    assert Factors(0, (0.5, 0.25)).of(2) == (0.5, 0.25)
    with pytest.raises(InvalidArgumentError, match="Expected 2 lr_lambdas, but got 1"):
        Factors(0, (0.5,)).of(2)

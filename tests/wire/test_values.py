"""Hyperparameters between Python and the wire."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from optserve.v1 import types_pb2 as pb
from optserve.wire import values
from optserve.wire.errors import InvalidHyperparameterError

VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**63), 2**63 - 1),
    st.floats(allow_nan=False),
    st.text(st.characters(codec="utf-8")),
    st.lists(st.none() | st.floats(allow_nan=False), max_size=4).map(tuple),
)


@given(VALUES)
def test_value_keeps_its_type_over_the_wire(value: object) -> None:
    back = values.from_value(pb.Value.FromString(values.to_value("lr", value).SerializeToString()))
    assert type(back) is type(value)
    assert back == value


def test_nan_travels_so_that_the_server_can_name_it() -> None:
    back = values.from_value(values.to_value("lr", math.nan))
    assert isinstance(back, float)
    assert math.isnan(back)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (np.float64(0.5), 0.5),
        (np.float32(0.5), 0.5),
        (np.int64(3), 3),
        (np.bool_(True), True),
        (np.array(0.5), 0.5),
        ([0.9, 0.999], (0.9, 0.999)),
        ((0, 1), (0.0, 1.0)),
        ((np.float32(0.5), np.int64(1)), (0.5, 1.0)),
    ],
)
def test_numpy_scalars_and_lists_count_as_python_values(value: object, expected: object) -> None:
    back = values.from_value(values.to_value("betas", value))
    assert type(back) is type(expected)
    assert back == expected


@pytest.mark.parametrize(
    "value",
    [2**63, -(2**63) - 1, 1j, b"x", {}, object(), ("a",), (True,), np.zeros(2), (10**400,), 10**5000, (10**5000,), "\ud800"],
    ids=[
        "2**63",
        "-2**63-1",
        "complex",
        "bytes",
        "dict",
        "object",
        "texts",
        "bools",
        "array",
        "10**400 in a tuple",
        "10**5000",
        "10**5000 in a tuple",
        "surrogate",
    ],
)
def test_value_that_cannot_travel_is_refused_by_name(value: object) -> None:
    with pytest.raises(InvalidHyperparameterError, match="weight_decay is "):
        values.to_value("weight_decay", value)


def test_a_refusal_is_short_whatever_was_given() -> None:
    with pytest.raises(InvalidHyperparameterError) as caught:
        values.to_value("betas", [[0.9] * 10_000])
    assert len(str(caught.value)) < 200


@pytest.mark.parametrize("name", [3, None, b"lr"])
def test_a_name_that_is_no_text_is_refused(name: object) -> None:
    with pytest.raises(InvalidHyperparameterError, match="a hyperparameter's name is"):
        values.to_hyperparameters({name: 0.1})


def test_a_tuple_cannot_be_none_where_it_has_no_number() -> None:
    with pytest.raises(InvalidHyperparameterError, match="number 2 of a tuple of 2 cannot be None"):
        values.from_value(pb.Value(numbers=pb.NumberList(values=[0.1, 0.2], none=[0, 2])))


def test_hyperparameters_keep_their_order() -> None:
    given = {"lr": 1e-3, "betas": (0.9, 0.999), "amsgrad": False, "fused": None}
    assert list(values.from_hyperparameters(values.to_hyperparameters(given)).items()) == list(given.items())


def test_hyperparameter_given_twice_is_refused() -> None:
    entry = pb.Hyperparameter(name="lr", value=pb.Value(number=1.0))
    with pytest.raises(InvalidHyperparameterError, match="'lr' is given twice"):
        values.from_hyperparameters([entry, entry])

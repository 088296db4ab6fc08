"""KEY=VALUE on the command line."""

from __future__ import annotations

import math

import click
import pytest

from optserve.cli.assignments import Assignment, collect
from optserve.wire.values import Value


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4),
        ("3", 3),
        ("-0.5", -0.5),
        ("true", True),
        ("False", False),
        ("None", None),
        ("0.9,0.99", (0.9, 0.99)),
        ("(0.9, 0.99)", (0.9, 0.99)),
        ("none,1e-3", (None, 1e-3)),
        ("(None, 0.1)", (None, 0.1)),
        ("'none'", "none"),
        ("none,cos", "none,cos"),
        ("[10,20]", (10, 20)),
        ("10,", (10,)),
        ("cos", "cos"),
        ("'3'", "3"),
        ("", ""),
        ("a=b", "a=b"),
        ("inf", math.inf),
    ],
)
def test_a_value_is_what_it_looks_like(text: str, value: Value) -> None:
    key, found = Assignment().convert(f"x={text}", None, None)
    assert key == "x"
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("milestones=10", (10,)),
        ("milestones=10,", (10,)),
        ("milestones=10,20", (10, 20)),
        ("betas=0.9", (0.9,)),
        ("milestones=true", True),
        ("milestones=ten", "ten"),
    ],
)
def test_one_number_is_a_list_where_a_list_is_wanted(text: str, value: Value) -> None:
    assert Assignment().convert(text, None, None)[1] == value


def test_nan_is_a_number() -> None:
    _, value = Assignment().convert("lr=nan", None, None)
    assert isinstance(value, float)
    assert math.isnan(value)


@pytest.mark.parametrize("text", ["lr", "=1", "a-b=1", ""])
def test_anything_else_is_refused(text: str) -> None:
    with pytest.raises(click.BadParameter, match="KEY=VALUE"):
        Assignment().convert(text, None, None)


def test_a_key_given_twice_is_refused() -> None:
    with pytest.raises(click.UsageError, match="lr is given twice"):
        collect((("lr", 1.0), ("lr", 2.0)))

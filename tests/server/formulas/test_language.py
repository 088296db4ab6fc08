# type: ignore
# ruff: noqa: ARG005, F821, F841 - formulas, many of them wrong on purpose
"""The formula language: what it lowers to, and everything it refuses, with the line."""

from __future__ import annotations

import math

import pytest

from optserve.server.formulas import OPTIMIZERS, Elementwise, FormulaError, find
from optserve.server.formulas.language import Operation, maximum, minimum, sign, specialise, sqrt, where


def with_options(p, g, a, b, lr, unused, *, first, second):
    """A docstring is no statement."""
    if first and not second:
        a = a + 2 * g
    elif second or first:
        b = where(g > 0, b, -1.5)
    forgotten = sqrt(lr)
    return p - lr * g, a, b


def test_options_are_folded_and_unused_slots_scalars_and_operations_vanish() -> None:
    neither = specialise(with_options, ("A", "B"), {"first": False, "second": False})
    assert (neither.slots, neither.slot_keys, neither.scalars, dict(neither.literals)) == ((), (), ("lr",), {})
    assert neither.operations == (Operation("_1", "multiply", ("lr", "g")), Operation("_2", "subtract", ("p", "_1")))
    first = specialise(with_options, ("A", "B"), {"first": True, "second": False})
    assert (first.slots, first.slot_keys, dict(first.literals)) == (("a",), ("A",), {"_c0": 2.0})
    second = specialise(with_options, ("A", "B"), {"first": False, "second": True})
    assert second.slot_keys == ("B",)
    assert list(second.literals.values()) == [0.0, -1.5]
    assert [operation.name for operation in second.operations] == ["greater", "where", "multiply", "subtract"]


def power(p, g, *, o):
    return p - g**2


def conditional(p, g, *, o):
    return p if o else g


def dynamic_if(p, g, *, o):
    if g > 0:
        g = -g
    return p - g


def unknown_call(p, g, *, o):
    return p - exp(g)


def attribute_call(p, g, *, o):
    return p - math.sqrt(g)


def attribute(p, g, *, o):
    return p - math.pi


def loop(p, g, *, o):
    for _ in range(3):
        p = p - g
    return p


def augmented(p, g, *, o):
    p -= g
    return p


def unpacking(p, g, *, o):
    p, g = g, p
    return p


def subscript(p, g, *, o):
    return p - g[0]


def bare_comparison(p, g, *, o):
    return p - (g > 0)


def chained(p, g, *, o):
    return where(0 < g < 1, p, g)


def number_as_condition(p, g, *, o):
    return where(g, p, g)


def boolean_literal(p, g, *, o):
    return p - True


def text(p, g, *, o):
    return p - "1"


def modulo(p, g, *, o):
    return p % g


def inverted(p, g, *, o):
    return ~p


def walrus(p, g, *, o):
    return (q := p) - g


def outside_name(p, g, *, o):
    return p - SOMEWHERE


def unassigned(p, g, *, o):
    if o:
        q = g
    return p - q


def assigned_option(p, g, *, o):
    o = g
    return p - o


def option_as_number(p, g, *, o):
    return p - o * g


def two_returns(p, g, *, o):
    return p
    return g


def wrong_arity(p, g, *, o):
    return maximum(p)


def keyword_call(p, g, *, o):
    return sqrt(x=p)


@pytest.mark.parametrize(
    ("formula", "line", "why"),
    [
        (power, "return p - g**2", "`**` is not allowed"),
        (conditional, "return p if o else g", "conditional expressions"),
        (dynamic_if, "if g > 0:", "static options only"),
        (unknown_call, "return p - exp(g)", "only these calls"),
        (attribute_call, "return p - math.sqrt(g)", "only these calls"),
        (attribute, "return p - math.pi", "not in the formula language"),
        (loop, "for _ in range(3):", "only assignments"),
        (augmented, "p -= g", "only assignments"),
        (unpacking, "p, g = g, p", "only assignments"),
        (subscript, "return p - g[0]", "not in the formula language"),
        (bare_comparison, "return p - (g > 0)", "only as the condition"),
        (chained, "return where(0 < g < 1, p, g)", "one comparison"),
        (number_as_condition, "return where(g, p, g)", "one comparison"),
        (boolean_literal, "return p - True", "only real numbers"),
        (text, "return p - ", "only real numbers"),
        (modulo, "return p % g", "not in the formula language"),
        (inverted, "return ~p", "not in the formula language"),
        (walrus, "return (q := p) - g", "not in the formula language"),
        (outside_name, "return p - SOMEWHERE", "'SOMEWHERE' is not an argument"),
        (unassigned, "return p - q", "'q' is not an argument"),
        (assigned_option, "o = g", "'o' cannot be assigned"),
        (option_as_number, "return p - o * g", "'o' is not an argument"),
        (two_returns, "return g", "one return, at its end"),
        (wrong_arity, "return maximum(p)", "only these calls"),
        (keyword_call, "return sqrt(x=p)", "only these calls"),
    ],
)
def test_anything_else_is_refused_with_its_line(formula: object, line: str, why: str) -> None:
    number = formula.__code__.co_firstlineno
    with pytest.raises(FormulaError) as caught:
        specialise(formula, (), {"o": False})
    assert why in str(caught.value)
    assert line in str(caught.value)
    file, found = str(caught.value).split(":")[0], int(str(caught.value).split(":")[1])
    assert file.endswith("test_language.py")
    assert number < found <= number + 3


def no_return(p, g, *, o):
    p = g


def defaults(p, g, lr=1, *, o):
    return p


def starred(p, g, *rest, o):
    return p


def underscored(p, g, _x, *, o):
    return p


def misnamed(w, g, *, o):
    return w


def too_many(p, g, *, o):
    return p, g


@pytest.mark.parametrize("formula", [no_return, defaults, starred, underscored, misnamed, too_many, lambda p, g, *, o: p])
def test_a_formula_of_another_form_is_refused(formula: object) -> None:
    with pytest.raises(FormulaError):
        specialise(formula, (), {"o": False})


def test_options_must_be_those_of_the_formula() -> None:
    with pytest.raises(FormulaError, match=r"the options are \['o'\], but \['x'\] were given"):
        specialise(power, (), {"x": True})


def test_the_plain_functions_mean_what_backends_compute() -> None:
    nan = math.nan
    assert (maximum(1, 2), maximum(2, 1), minimum(1, 2), minimum(2, 1)) == (2, 2, 1, 1)
    assert all(math.isnan(f(*x)) for f in (maximum, minimum) for x in ((nan, 1), (1, nan)))
    assert math.copysign(1, maximum(-0.0, 0.0)) == 1
    assert math.copysign(1, maximum(0.0, -0.0)) == -1
    assert (sign(3), sign(-3), sign(0.0)) == (1, -1, 0)
    assert math.copysign(1, sign(-0.0)) == -1
    assert math.isnan(sign(nan))
    assert math.isnan(sqrt(-1.0))


@pytest.mark.parametrize("name", sorted(name for name, optimizer in OPTIMIZERS.items() if isinstance(optimizer, Elementwise)))
def test_formulas_also_run_as_plain_python(name: str) -> None:
    optimizer = find(name)
    assert isinstance(optimizer, Elementwise)
    group = {**optimizer.defaults, "lr": 0.1}
    initial = optimizer.initial(group)
    program, scalars = optimizer.program(optimizer.options(group)), optimizer.scalars(group, 1, initial)
    arguments = optimizer.formula.__code__.co_varnames[2 + len(optimizer.slot_keys) : optimizer.formula.__code__.co_argcount]
    slots = [initial.get(key, 0.0) for key in optimizer.slot_keys]
    new, *_ = optimizer.formula(1.0, 1.0, *slots, *(scalars[name] for name in arguments), **optimizer.options(group))
    assert math.isfinite(new)
    assert new != 1.0
    assert set(program.scalars) <= set(scalars)

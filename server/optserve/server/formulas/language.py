"""The formula language: the part of Python in which an elementwise optimizer is written once, for every backend.

A formula is a plain function of one element. Its positional arguments are the parameter, the gradient, the slots and the host
scalars; its keyword-only arguments are static options. It holds assignments, `if` on options, and one return of the new
parameter and the new slots. Expressions are names, numbers, `+ - * /`, unary minus, `sqrt abs sign maximum minimum where`, and
comparisons as the condition of `where`. Everything else raises FormulaError with the source line: `**` and conditional
expressions mean different bits, or nothing at all, in NumPy, Numba and CUDA.

`specialise` folds the options and lowers what remains to a Program, a list of operations named as NumPy's ufuncs. `sign`,
`maximum` and `minimum` are lowered to `where` (NaN propagates; of two zeros the second is the maximum), since the backends' own
disagree about the sign of zero.
"""

from __future__ import annotations

import ast
import inspect
import math
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Formula = Callable[..., Any]

L1 = "l1"
"""Option and scalar of a penalty that every formula takes: λ·|p|, whose slope λ·sign(p) is added to the gradient first."""

CLIP = "clip_grad_value"
"""Option and scalar of a bound that every formula takes: the gradient is first of all clipped to it, as by clip_grad_value_."""


class FormulaError(ValueError):
    """A formula uses something outside the language; the message has the file, the line and its text."""


def sqrt(x: float) -> float:
    """The correctly rounded square root; NaN below zero."""
    return math.sqrt(x) if x >= 0 else math.nan


def where(condition: bool, x: float, y: float) -> float:
    """x where the condition holds, else y."""
    return x if condition else y


def sign(x: float) -> float:
    """1, -1, or x itself if it is a zero or NaN."""
    return where(x > 0, 1.0, where(x < 0, -1.0, x))


def maximum(x: float, y: float) -> float:
    """The greater; NaN if either is."""
    return where(x > y, x, where(x != x, x, y))


def minimum(x: float, y: float) -> float:
    """The smaller; NaN if either is."""
    return where(x < y, x, where(x != x, x, y))


@dataclass(frozen=True)
class Operation:
    """One elementwise operation. `name` is NumPy's ufunc name, or "where"; comparisons give booleans, the rest numbers."""

    result: str
    name: str
    operands: tuple[str, ...]


@dataclass(frozen=True)
class Program:
    """A formula for one choice of options, in static single assignment.

    Values are named: "p", "g", the symbols in `slots` and `scalars`, the keys of `literals`, and the operations' results,
    which begin with an underscore. `results` holds the new p and then the new value of each slot in order.
    """

    slots: tuple[str, ...]
    slot_keys: tuple[str, ...]
    scalars: tuple[str, ...]
    literals: Mapping[str, float]
    operations: tuple[Operation, ...]
    results: tuple[str, ...]


COMPARISONS = frozenset({"less", "less_equal", "greater", "greater_equal", "equal", "not_equal"})

_ARITHMETIC: dict[type[ast.operator], str] = {
    ast.Add: "add",
    ast.Sub: "subtract",
    ast.Mult: "multiply",
    ast.Div: "divide",
}
_COMPARE: dict[type[ast.cmpop], str] = {
    ast.Lt: "less",
    ast.LtE: "less_equal",
    ast.Gt: "greater",
    ast.GtE: "greater_equal",
    ast.Eq: "equal",
    ast.NotEq: "not_equal",
}
_ARITY = {"sqrt": 1, "abs": 1, "sign": 1, "maximum": 2, "minimum": 2, "where": 3}


class _Lowering:
    """One pass over a formula's syntax tree."""

    def __init__(self, formula: Formula, options: Mapping[str, bool], clipped: bool, penalised: bool) -> None:
        lines, self._first_line = inspect.getsourcelines(formula)
        self._lines = textwrap.dedent("".join(lines)).splitlines()
        self._file = inspect.getsourcefile(formula) or "?"
        self._options = options
        self.literals: dict[str, float] = {}
        self.operations: list[Operation] = []
        self.returned: list[str] | None = None
        node = ast.parse("\n".join(self._lines)).body[0]
        if not isinstance(node, ast.FunctionDef) or node.decorator_list:
            raise self._refusal(node, "a formula is a plain undecorated function")
        self.arguments = self._signature(node)
        self._values = {name: name for name in self.arguments}
        if clipped:
            self._values["g"] = self._clipped("g")
        if penalised:
            self._values["g"] = self._emit("add", self._values["g"], self._emit("multiply", L1, self._sign("p")))
        body = node.body[1:] if ast.get_docstring(node) is not None else node.body
        self._block(body)
        if self.returned is None:
            raise self._refusal(node, "a formula ends with one return")

    def _refusal(self, node: ast.AST, why: str) -> FormulaError:
        line = getattr(node, "lineno", 1)
        return FormulaError(f"{self._file}:{self._first_line + line - 1}: {why}: {self._lines[line - 1].strip()!r}")

    def _signature(self, node: ast.FunctionDef) -> list[str]:
        arguments = node.args
        if arguments.vararg or arguments.kwarg or arguments.defaults or any(arguments.kw_defaults):
            raise self._refusal(node, "a formula's arguments have no defaults and no stars")
        options = {argument.arg for argument in arguments.kwonlyargs}
        if options != set(self._options):
            raise self._refusal(node, f"the options are {sorted(options)}, but {sorted(self._options)} were given")
        names = [argument.arg for argument in (*arguments.posonlyargs, *arguments.args)]
        if any(name.startswith("_") or name in (L1, CLIP) for name in names):
            raise self._refusal(node, f"names do not begin with an underscore, and none is {L1!r} or {CLIP!r}")
        return names

    def _block(self, statements: Sequence[ast.stmt]) -> None:
        for statement in statements:
            if self.returned is not None:
                raise self._refusal(statement, "a formula has one return, at its end")
            match statement:
                case ast.Assign(targets=[ast.Name(id=name)], value=value):
                    if name in self._options or name.startswith("_"):
                        raise self._refusal(statement, f"{name!r} cannot be assigned")
                    self._values[name] = self._number(value)
                case ast.If(test=test, body=body, orelse=orelse):
                    self._block(body if self._static(test) else orelse)
                case ast.Return(value=ast.Tuple(elts=elements)):
                    self.returned = [self._number(element) for element in elements]
                case ast.Return(value=ast.expr() as value):
                    self.returned = [self._number(value)]
                case _:
                    raise self._refusal(statement, "only assignments to names, `if` on options and one return are allowed")

    def _static(self, test: ast.expr) -> bool:
        match test:
            case ast.Name(id=name) if name in self._options:
                return self._options[name]
            case ast.UnaryOp(op=ast.Not(), operand=operand):
                return not self._static(operand)
            case ast.BoolOp(op=ast.And(), values=values):
                return all(self._static(value) for value in values)
            case ast.BoolOp(values=values):
                return any(self._static(value) for value in values)
            case _:
                raise self._refusal(test, "`if` takes static options only; use where()")

    def _emit(self, name: str, *operands: str) -> str:
        result = f"_{len(self.operations)}"
        self.operations.append(Operation(result, name, operands))
        return result

    def _literal(self, value: float) -> str:
        for name, known in self.literals.items():
            if known == value and math.copysign(1.0, known) == math.copysign(1.0, value):
                return name
        name = f"_c{len(self.literals)}"
        self.literals[name] = value
        return name

    def _number(self, node: ast.expr) -> str:
        match node:
            case ast.Constant(value=bool() | complex() | str() | bytes() | None):
                raise self._refusal(node, "only real numbers are allowed")
            case ast.Constant(value=int() | float() as value):
                return self._literal(float(value))
            case ast.Name(id=name) if name in self._values:
                return self._values[name]
            case ast.Name(id=name):
                raise self._refusal(node, f"{name!r} is not an argument and not assigned here")
            case ast.UnaryOp(op=ast.USub(), operand=ast.Constant(value=int() | float() as value)) if value is not True:
                return self._literal(-float(value))
            case ast.UnaryOp(op=ast.USub(), operand=operand):
                return self._emit("negative", self._number(operand))
            case ast.BinOp(left=left, op=operator, right=right) if type(operator) in _ARITHMETIC:
                return self._emit(_ARITHMETIC[type(operator)], self._number(left), self._number(right))
            case ast.BinOp(op=ast.Pow()):
                raise self._refusal(node, "`**` is not allowed; write x * x, or sqrt(x)")
            case ast.IfExp():
                raise self._refusal(node, "conditional expressions are not allowed; use where()")
            case ast.Compare():
                raise self._refusal(node, "a comparison stands only as the condition of where()")
            case ast.Call(func=ast.Name(id=name), args=arguments, keywords=[]) if _ARITY.get(name) == len(arguments):
                return self._call(name, arguments)
            case ast.Call():
                allowed = ", ".join(f"{name}/{arity}" for name, arity in _ARITY.items())
                raise self._refusal(node, f"only these calls are allowed: {allowed}")
            case _:
                raise self._refusal(node, "not in the formula language")

    def _call(self, name: str, arguments: Sequence[ast.expr]) -> str:
        if name == "where":
            condition = self._condition(arguments[0])
            return self._emit("where", condition, self._number(arguments[1]), self._number(arguments[2]))
        x, *rest = [self._number(argument) for argument in arguments]
        if name == "sqrt":
            return self._emit("sqrt", x)
        if name == "abs":
            return self._emit("absolute", x)
        if name == "sign":
            return self._sign(x)
        wins = self._emit("greater" if name == "maximum" else "less", x, rest[0])
        return self._emit("where", wins, x, self._emit("where", self._emit("not_equal", x, x), x, rest[0]))

    def _clipped(self, x: str) -> str:
        low = self._emit("negative", CLIP)
        high = self._emit("where", self._emit("greater", x, CLIP), CLIP, x)
        return self._emit("where", self._emit("less", x, low), low, high)

    def _sign(self, x: str) -> str:
        zero, one, minus_one = self._literal(0.0), self._literal(1.0), self._literal(-1.0)
        negative = self._emit("where", self._emit("less", x, zero), minus_one, x)
        return self._emit("where", self._emit("greater", x, zero), one, negative)

    def _condition(self, node: ast.expr) -> str:
        match node:
            case ast.Compare(left=left, ops=[operator], comparators=[right]) if type(operator) in _COMPARE:
                return self._emit(_COMPARE[type(operator)], self._number(left), self._number(right))
            case _:
                raise self._refusal(node, "the condition of where() is one comparison")


def specialise(formula: Formula, slot_keys: Sequence[str], options: Mapping[str, bool]) -> Program:
    """The formula with its options folded; slots that it then neither reads nor changes are gone, as are unused scalars.

    `slot_keys` are the state's names (torch's) of the arguments after the parameter and the gradient. `options` are the
    formula's own and, where the gradient may be clipped or the group have a penalty, CLIP and L1. FormulaError if the formula
    is not in the language.
    """
    own = {name: chosen for name, chosen in options.items() if name not in (L1, CLIP)}
    lowering = _Lowering(formula, own, options.get(CLIP, False), options.get(L1, False))
    arguments, returned = lowering.arguments, lowering.returned or []
    slots = arguments[2 : 2 + len(slot_keys)]
    if arguments[:2] != ["p", "g"] or len(slots) != len(slot_keys) or len(returned) != 1 + len(slots):
        raise FormulaError(
            f"{formula.__name__} must take p, g and {len(slot_keys)} slots, and return p and these slots; "
            f"it takes {arguments} and returns {len(returned)} values"
        )
    wanted = {returned[0], *(new for old, new in zip(slots, returned[1:], strict=True) if new != old)}
    live: list[Operation] = []
    for operation in reversed(lowering.operations):
        if operation.result in wanted:
            wanted.update(operation.operands)
            live.append(operation)
    changed = {old for old, new in zip(slots, returned[1:], strict=True) if new != old}
    kept = [index for index, symbol in enumerate(slots) if symbol in wanted or symbol in changed]
    return Program(
        slots=tuple(slots[index] for index in kept),
        slot_keys=tuple(slot_keys[index] for index in kept),
        scalars=tuple(name for name in (*arguments[2 + len(slot_keys) :], L1, CLIP) if name in wanted),
        literals={name: value for name, value in lowering.literals.items() if name in wanted},
        operations=tuple(reversed(live)),
        results=(returned[0], *(returned[1 + index] for index in kept)),
    )

"""Formulas compiled by Numba into one fused loop a kernel.

No fastmath and no contraction: LLVM fuses a multiplication and an addition only where it is told to. 16-bit arrays are passed
as uint16 patterns, since Numba has no such floats on a CPU, and converted in the loop.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from operator import itemgetter
from typing import Any

import numba
import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from optserve.server.backends.interface import Array, check_lengths
from optserve.server.backends.memory import HostMemory
from optserve.server.backends.norms import LANES, segmented_sum
from optserve.server.formulas import Elementwise
from optserve.server.formulas.language import Program
from optserve.wire.dtypes import state_dtype

_SYMBOLS = {
    "add": "{} + {}",
    "subtract": "{} - {}",
    "multiply": "{} * {}",
    "divide": "{} / {}",
    "negative": "-{}",
    "sqrt": "sqrt({})",
    "absolute": "abs({})",
    "where": "where({}, {}, {})",
    "less": "{} < {}",
    "less_equal": "{} <= {}",
    "greater": "{} > {}",
    "greater_equal": "{} >= {}",
    "equal": "{} == {}",
    "not_equal": "{} != {}",
}


@intrinsic
def _widen_float16(_: Any, bits: Any) -> Any:
    def generate(_: Any, builder: Any, __: Any, arguments: Any) -> Any:
        return builder.fpext(builder.bitcast(arguments[0], ir.HalfType()), ir.FloatType())

    return types.float32(bits), generate


@intrinsic
def _narrow_float16(_: Any, value: Any) -> Any:
    def generate(_: Any, builder: Any, __: Any, arguments: Any) -> Any:
        return builder.bitcast(builder.fptrunc(arguments[0], ir.HalfType()), ir.IntType(16))

    return types.uint16(value), generate


@intrinsic
def _widen_bfloat16(_: Any, bits: Any) -> Any:
    def generate(_: Any, builder: Any, __: Any, arguments: Any) -> Any:
        word = ir.IntType(32)
        return builder.bitcast(builder.shl(builder.zext(arguments[0], word), word(16)), ir.FloatType())

    return types.float32(bits), generate


@intrinsic
def _narrow_bfloat16(_: Any, value: Any) -> Any:
    """Rounds to nearest even; NaN becomes the quiet NaN of its sign, as ml_dtypes has it."""

    def generate(_: Any, builder: Any, __: Any, arguments: Any) -> Any:
        word = ir.IntType(32)
        bits = builder.bitcast(arguments[0], word)
        odd = builder.and_(builder.lshr(bits, word(16)), word(1))
        rounded = builder.lshr(builder.add(bits, builder.add(odd, word(0x7FFF))), word(16))
        quiet = builder.or_(builder.and_(builder.lshr(bits, word(16)), word(0x8000)), word(0x7FC0))
        is_nan = builder.fcmp_unordered("uno", arguments[0], arguments[0])
        return builder.trunc(builder.select(is_nan, quiet, rounded), ir.IntType(16))

    return types.uint16(value), generate


@numba.njit
def _where(condition: Any, x: Any, y: Any) -> Any:
    return x if condition else y


@numba.njit
def _same(value: Any) -> Any:
    return value


_WIDEN = {"float16": _widen_float16, "bfloat16": _widen_bfloat16}
_NARROW = {"float16": _narrow_float16, "bfloat16": _narrow_bfloat16}


def _compiled(function: Callable[..., Any], *arguments: Any) -> Callable[..., Any]:
    """Compiled now, for these types alone."""
    signature = types.void(*arguments)
    return numba.njit(signature, nogil=True, error_model="numpy")(function)  # type: ignore[no-any-return]


def _element(dtype: np.dtype[Any]) -> Any:
    """Numba's type of an array's elements."""
    return numba.from_dtype(dtype)


def _pattern(dtype: np.dtype[Any]) -> Any:
    """Numba's type of an element: 16-bit floats as their patterns."""
    return types.uint16 if dtype.itemsize == 2 else _element(dtype)


def _input(element: Any) -> Any:
    """Also takes aligned and writable arrays; unaligned vector loads cost the same."""
    return types.Array(element, 1, "C", readonly=True, aligned=False)


def _output(element: Any) -> Any:
    return types.Array(element, 1, "C", aligned=False)


def _bits(values: Array) -> Array:
    """16-bit floats as patterns, others as they are."""
    return values.view(np.uint16) if values.dtype.itemsize == 2 else values


def source(program: Program, narrows: bool) -> str:
    """The loop of a program. `real`, `widen`, `narrow`, `sqrt` and `where` are bound when it is compiled."""
    arrays = ["_p", "_g", *(f"_s_{slot}" for slot in program.slots), *(["_w"] if narrows else [])]
    lines = [f"def kernel({', '.join([*arrays, '_scale', *program.scalars])}):"]
    lines += [f"    {name} = real({name})" for name in ("_scale", *program.scalars)]
    lines += [f"    {name} = real({value!r})" for name, value in program.literals.items()]
    lines += ["    for _i in range(_p.shape[0]):", "        p = _p[_i]", "        g = widen(_g[_i]) * _scale"]
    lines += [f"        {slot} = _s_{slot}[_i]" for slot in program.slots]
    lines += [f"        {o.result} = {_SYMBOLS[o.name].format(*o.operands)}" for o in program.operations]
    lines += [f"        {array}[_i] = {result}" for array, result in zip(_state_arrays(program), program.results, strict=True)]
    if narrows:
        lines.append(f"        _w[_i] = narrow({program.results[0]})")
    return "\n".join(lines)


def _state_arrays(program: Program) -> list[str]:
    return ["_p", *(f"_s_{slot}" for slot in program.slots)]


class _Kernel:
    """Implements Kernel. Gradients of a 16-bit wire dtype compile their own loop at their first use."""

    def __init__(self, program: Program, dtype: np.dtype[Any]) -> None:
        self._program, self._dtype, self._state = program, dtype, state_dtype(dtype)
        self._lock = threading.Lock()  # guards _loops
        self._loops: dict[np.dtype[Any], Callable[..., Any]] = {}
        self._pick: Callable[[Mapping[str, float]], Sequence[float]]
        names = program.scalars
        self._pick = itemgetter(*names) if len(names) > 1 else lambda scalars: [scalars[name] for name in names]
        self._loop(self._state)

    def _loop(self, gradient: np.dtype[Any]) -> Callable[..., Any]:
        with self._lock:
            if gradient in self._loops:
                return self._loops[gradient]
            if gradient not in (self._dtype, self._state):
                raise ValueError(f"gradients have dtype {gradient}; allowed are {self._dtype} and {self._state}")
            narrows = self._dtype.itemsize == 2
            real = _element(self._state)
            scope = {
                "real": real,
                "widen": _WIDEN.get(gradient.name, _same),
                "narrow": _NARROW.get(self._dtype.name),
                "sqrt": np.sqrt,
                "where": _where,
            }
            exec(source(self._program, narrows), scope)
            state = [_output(real)] * len(self._program.slots)
            weights = [_output(types.uint16)] if narrows else []
            scalars = [types.float64] * (1 + len(self._program.scalars))
            function: Any = scope["kernel"]
            loop = _compiled(function, _output(real), _input(_pattern(gradient)), *state, *weights, *scalars)
            self._loops[gradient] = loop
            return loop

    def __call__(
        self,
        masters: Array,
        gradients: Array,
        slots: Sequence[Array],
        scalars: Mapping[str, float],
        scale: float,
        weights: Array | None,
    ) -> None:
        check_lengths(masters, gradients, slots, weights)
        loop = self._loops.get(gradients.dtype) or self._loop(gradients.dtype)
        narrowed = () if weights is None else (weights.view(np.uint16),)
        loop(masters, _bits(gradients), *slots, *narrowed, scale, *self._pick(scalars))


def _fold(widen: Callable[..., Any], real: Any) -> Callable[..., None]:
    def fold(into: Any, values: Any, ratio: Any, first: Any) -> None:
        factor = real(ratio)
        if first:
            for i in range(into.shape[0]):
                into[i] = widen(values[i]) * factor
        else:
            for i in range(into.shape[0]):
                into[i] = into[i] + widen(values[i]) * factor

    return fold


def _finite(unsigned: Any, exponent: int) -> Callable[..., bool]:
    mask = unsigned(exponent)

    def finite(patterns: Any) -> bool:
        for begin in range(0, patterns.shape[0], 16384):
            block = patterns[begin : begin + 16384]
            largest = unsigned(0)
            for i in range(block.shape[0]):
                largest = max(largest, block[i] & mask)
            if largest == mask:
                return False
        return True

    return finite


def _add_squares(lanes: Any, values: Any) -> None:
    for begin in range(0, values.shape[0], LANES):
        row = values[begin : begin + LANES]
        for lane in range(row.shape[0]):
            value = np.float64(row[lane])
            lanes[lane] += value * value


_EXPONENTS = {"float16": 0x7C00, "bfloat16": 0x7F80, "float32": 0x7F800000, "float64": 0x7FF0000000000000}


class NumbaBackend(HostMemory):
    """Implements Backend."""

    name = "numba"

    def __init__(self) -> None:
        self._lock = threading.RLock()  # guards the caches below; held while compiling
        self._kernels: dict[tuple[Any, ...], _Kernel] = {}
        self._functions: dict[tuple[Any, ...], Callable[..., Any]] = {}

    def kernel(self, optimizer: Elementwise, options: Mapping[str, bool], dtype: np.dtype[Any]) -> _Kernel:
        key = (optimizer, dtype, *options.values())
        found = self._kernels.get(key)
        if found is None:
            with self._lock:
                found = self._kernels.get(key) or _Kernel(optimizer.program(options), dtype)
                self._kernels[key] = found
        return found

    def prepare(self, dtype: np.dtype[Any]) -> None:
        state = state_dtype(dtype)
        self._finite_loop(dtype)
        self._fold_loop(state, dtype)
        self._square_loop(state)

    def _cached(self, key: tuple[Any, ...], compiled: Callable[[], Callable[..., Any]]) -> Callable[..., Any]:
        found = self._functions.get(key)
        if found is None:
            with self._lock:
                found = self._functions.get(key) or compiled()
                self._functions[key] = found
        return found

    def _finite_loop(self, dtype: np.dtype[Any]) -> Callable[..., Any]:
        def compiled() -> Callable[..., bool]:
            unsigned = _element(np.dtype(f"u{dtype.itemsize}"))
            signature = types.boolean(_input(unsigned))
            return numba.njit(signature, nogil=True)(_finite(unsigned, _EXPONENTS[dtype.name]))  # type: ignore[no-any-return]

        return self._cached(("finite", dtype), compiled)

    def _fold_loop(self, state: np.dtype[Any], dtype: np.dtype[Any]) -> Callable[..., Any]:
        def compiled() -> Callable[..., Any]:
            real = _element(state)
            arguments = (_output(real), _input(_pattern(dtype)), types.float64, types.boolean)
            return _compiled(_fold(_WIDEN.get(dtype.name, _same), real), *arguments)

        return self._cached(("fold", state, dtype), compiled)

    def _square_loop(self, state: np.dtype[Any]) -> Callable[..., Any]:
        return self._cached(
            ("squares", state), lambda: _compiled(_add_squares, _output(types.float64), _input(_element(state)))
        )

    def finite(self, values: Array) -> bool:
        return bool(self._finite_loop(values.dtype)(values.view(f"u{values.dtype.itemsize}")))

    def fold(self, into: Array, values: Array, ratio: float, first: bool) -> None:
        if len(into) != len(values):
            raise ValueError(f"{len(values)} values cannot be folded into {len(into)}")
        self._fold_loop(into.dtype, values.dtype)(into, _bits(values), ratio, first)

    def sum_of_squares(self, values: Array) -> float:
        return segmented_sum(values, self._square_loop(values.dtype))

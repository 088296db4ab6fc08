"""CUDA C++ from a formula's Program: one kernel that reads and writes 16 bytes at a time, widens and narrows on its way.

The text is C++17 without any header, so that NVRTC takes it as it is, and a host compiler too, given `__global__`, `blockIdx`
and their like: tests run whole kernels so. It is to be compiled without contraction of multiplications and additions, without
flushing of denormals and with correctly rounded division and roots; then its bits are those of the other backends. 16-bit
floats are patterns, converted here: NVRTC has no header for them.

Elements up to `packs` times the pack's size go by packs, the others one by one. The caller passes 0 packs where an array does
not begin at a multiple of 16 bytes: such an access would end the CUDA context.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import ml_dtypes
import numpy as np

from optserve.server.backends.norms import LANES
from optserve.server.formulas.language import FormulaError, Program
from optserve.wire.dtypes import state_dtype

THREADS = 256
"""Of a block, in every kernel here."""

ACCESS_BYTES = 16
HALVED = 32
"""How many values one thread of the kernel `halve` adds up: LANES is its square, so two launches leave one."""

SHORT = {"float32": "f32", "float64": "f64", "float16": "f16", "bfloat16": "bf16"}
_TYPES = {"float32": "float", "float64": "double", "float16": "f16", "bfloat16": "bf16"}
_SYMBOLS = {
    "add": "{} + {}",
    "subtract": "{} - {}",
    "multiply": "{} * {}",
    "divide": "{} / {}",
    "negative": "-{}",
    "sqrt": "root({})",
    "absolute": "absolute({})",
    "where": "{} ? {} : {}",
    "less": "{} < {}",
    "less_equal": "{} <= {}",
    "greater": "{} > {}",
    "greater_equal": "{} >= {}",
    "equal": "{} == {}",
    "not_equal": "{} != {}",
}

PRELUDE = """\
typedef long long Index;
struct bf16 { unsigned short bits; };
struct f16 { unsigned short bits; };
template <class T, int N> struct alignas(sizeof(T) * N < 16 ? sizeof(T) * N : 16) Pack { T at[N]; };

#ifdef __CUDACC__
#define INLINE __device__ __forceinline__
#define PRAGMA(text) _Pragma(#text)
#define UNROLL(times) PRAGMA(unroll times)
INLINE unsigned bits_of(float x) { return __float_as_uint(x); }
INLINE float float_of(unsigned bits) { return __uint_as_float(bits); }
INLINE float widen(f16 h) { float x; asm("cvt.f32.f16 %0, %1;" : "=f"(x) : "h"(h.bits)); return x; }
INLINE void narrow(float x, f16& h) { asm("cvt.rn.f16.f32 %0, %1;" : "=h"(h.bits) : "f"(x)); }
INLINE float root(float x) { return sqrtf(x); }
INLINE double root(double x) { return sqrt(x); }
INLINE float absolute(float x) { return fabsf(x); }
INLINE double absolute(double x) { return fabs(x); }
#else
#define INLINE static inline
#define UNROLL(times)
template <class To, class From> INLINE To same_bits(From from) { To to; __builtin_memcpy(&to, &from, sizeof to); return to; }
INLINE unsigned bits_of(float x) { return same_bits<unsigned>(x); }
INLINE float float_of(unsigned bits) { return same_bits<float>(bits); }
INLINE float widen(f16 h) { return (float)same_bits<_Float16>(h.bits); }
INLINE void narrow(float x, f16& h) { h.bits = same_bits<unsigned short>((_Float16)x); }
INLINE float root(float x) { return __builtin_sqrtf(x); }
INLINE double root(double x) { return __builtin_sqrt(x); }
INLINE float absolute(float x) { return __builtin_fabsf(x); }
INLINE double absolute(double x) { return __builtin_fabs(x); }
#endif
INLINE float widen(float x) { return x; }
INLINE double widen(double x) { return x; }
INLINE float widen(bf16 h) { return float_of((unsigned)h.bits << 16); }
INLINE void narrow(float x, bf16& h) {
  const unsigned bits = bits_of(x);
  h.bits = x != x ? (bits >> 16 & 0x8000u) | 0x7fc0u : (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
}
template <int N, class T> INLINE Pack<T, N> load(const T* array, Index pack) {
  return reinterpret_cast<const Pack<T, N>*>(array)[pack];
}
template <int N, class T> INLINE void store(T* array, Index pack, const Pack<T, N>& values) {
  reinterpret_cast<Pack<T, N>*>(array)[pack] = values;
}
INLINE Index first_of() { return (Index)blockIdx.x * blockDim.x + threadIdx.x; }
INLINE Index stride_of() { return (Index)gridDim.x * blockDim.x; }
"""


def pack_size(*dtypes: np.dtype[Any]) -> int:
    """Elements that a thread takes at a time, so that the narrowest array is read 16 bytes at a time."""
    return ACCESS_BYTES // min(dtype.itemsize for dtype in dtypes)


def kernel_name(optimizer: str, dtype: np.dtype[Any], gradient: np.dtype[Any]) -> str:
    """What profilers show for parameters of a wire dtype: optserve_adam_f32_g_f32, optserve_adam_f32_g_bf16_w_bf16."""
    weights = f"_w_{SHORT[dtype.name]}" if dtype.itemsize == 2 else ""
    return f"optserve_{optimizer.lower()}_{SHORT[state_dtype(dtype).name]}_g_{SHORT[gradient.name]}{weights}"


def scalars_dtype(program: Program, dtype: np.dtype[Any]) -> np.dtype[Any]:
    """The kernel's struct of scalars, passed by value: the gradient's factor, then the program's scalars."""
    state = state_dtype(dtype)
    return np.dtype([("scale", state), *((f"scalar_{name}", state) for name in program.scalars)])


def kernel(program: Program, name: str, dtype: np.dtype[Any], gradient: np.dtype[Any]) -> str:
    """The kernel `name` for parameters of a wire dtype and gradients of that or the state dtype; PRELUDE goes before it.

    Arguments: masters, gradients, the slots in order, the weights if the wire dtype has 16 bits, the struct of scalars, the
    number of packs, the number of elements.
    """
    state, narrows = state_dtype(dtype), dtype.itemsize == 2
    size = pack_size(state, gradient, dtype)
    real, slots = _TYPES[state.name], [f"slot_{slot}" for slot in program.slots]
    changed = ["p", *slots]
    written = [*changed, "w"] if narrows else changed
    fields = "".join(f" {real} {field};" for field in scalars_dtype(program, dtype).names or ())
    values = [f"{real}& p", f"const {real} g", *(f"{real}& {slot}" for slot in slots), f"const {name}_scalars& s"]
    arrays = [f"{real}* __restrict__ p_", f"const {_TYPES[gradient.name]}* __restrict__ g_"]
    arrays += [f"{real}* __restrict__ {slot}_" for slot in slots]
    if narrows:
        arrays.append(f"{_TYPES[dtype.name]}* __restrict__ w_")
    each = ["p.at[j]", "widen(g.at[j]) * s.scale", *(f"{slot}.at[j]" for slot in slots), "s"]
    # Two blocks a processor: without that bound NVRTC 13 spills Rprop's registers for the sake of more blocks.
    return f"""\
struct {name}_scalars {{{fields} }};
INLINE void {name}_step({", ".join(values)}) {{
{_lines("  ", _statements(program, real))}
}}
extern "C" __global__ void __launch_bounds__({THREADS}, 2) {name}(
    {", ".join(arrays)}, const {name}_scalars s, const Index packs, const Index n) {{
  const Index first = first_of(), stride = stride_of();
  UNROLL(1) for (Index i = first; i < packs; i += stride) {{
{_lines("    ", [f"auto {array} = load<{size}>({array}_, i);" for array in [*changed, "g"]])}
    {f"Pack<{_TYPES[dtype.name]}, {size}> w;" if narrows else ""}
    UNROLL({size}) for (int j = 0; j < {size}; ++j) {{
      {name}_step({", ".join(each)});
      {"narrow(p.at[j], w.at[j]);" if narrows else ""}
    }}
{_lines("    ", [f"store<{size}>({array}_, i, {array});" for array in written])}
  }}
  UNROLL(1) for (Index i = packs * {size} + first; i < n; i += stride) {{
{_lines("    ", [f"{real} {array} = {array}_[i];" for array in changed])}
    {name}_step({", ".join(["p", "widen(g_[i]) * s.scale", *slots, "s"])});
{_lines("    ", [f"{array}_[i] = {array};" for array in changed])}
    {"narrow(p, w_[i]);" if narrows else ""}
  }}
}}
"""


def _lines(indent: str, lines: Iterable[str]) -> str:
    return "\n".join(f"{indent}{line}" for line in lines)


def _statements(program: Program, real: str) -> list[str]:
    """The formula: every operation, then all results, then what they replace; a result may be another's old value."""
    names = {"p": "p", "g": "g", **{slot: f"slot_{slot}" for slot in program.slots}}
    names |= {scalar: f"s.scalar_{scalar}" for scalar in program.scalars}
    names |= {name: _literal(value, real) for name, value in program.literals.items()}
    lines = []
    for operation in program.operations:
        names[operation.result] = f"t{operation.result}"
        operands = [names[operand] for operand in operation.operands]
        lines.append(f"const auto {names[operation.result]} = {_SYMBOLS[operation.name].format(*operands)};")
    targets = [names[home] for home in ("p", *program.slots)]
    lines += [f"const {real} new_{target} = {names[result]};" for target, result in zip(targets, program.results, strict=True)]
    return lines + [f"{target} = new_{target};" for target in targets]


def _literal(value: float, real: str) -> str:
    if not math.isfinite(value):
        raise FormulaError(f"the literal {value!r} cannot be written in C++")
    return f"{real}({value!r})"


def fold_name(state: np.dtype[Any], values: np.dtype[Any], first: bool) -> str:
    return f"optserve_fold_{SHORT[state.name]}_g_{SHORT[values.name]}_{'first' if first else 'next'}"


def folds(state: np.dtype[Any], values: np.dtype[Any]) -> str:
    """Both kernels that fold gradients: `into = widen(values) * ratio`, and `into = into + ...`.

    Arguments: into, values, the ratio, the number of packs (of `pack_size`), the number of elements.
    """
    real, narrow, size = _TYPES[state.name], _TYPES[values.name], pack_size(state, values)
    texts = []
    for first in (True, False):
        old = "" if first else "into.at[j] + "
        single = "" if first else "into_[i] + "
        loaded = f"Pack<{real}, {size}> into;" if first else f"auto into = load<{size}>(into_, i);"
        texts.append(f"""\
extern "C" __global__ void __launch_bounds__({THREADS}) {fold_name(state, values, first)}(
    {real}* __restrict__ into_, const {narrow}* __restrict__ values_, const {real} ratio, const Index packs, const Index n) {{
  const Index first = first_of(), stride = stride_of();
  UNROLL(1) for (Index i = first; i < packs; i += stride) {{
    const auto values = load<{size}>(values_, i);
    {loaded}
    UNROLL({size}) for (int j = 0; j < {size}; ++j) into.at[j] = {old}widen(values.at[j]) * ratio;
    store<{size}>(into_, i, into);
  }}
  UNROLL(1) for (Index i = packs * {size} + first; i < n; i += stride) into_[i] = {single}widen(values_[i]) * ratio;
}}
""")
    return "".join(texts)


def narrow_name(dtype: np.dtype[Any]) -> str:
    return f"optserve_narrow_{SHORT[dtype.name]}"


def narrowing(dtype: np.dtype[Any]) -> str:
    """16-bit weights from masters. Arguments: masters, weights, packs of 8, elements."""
    narrow, size = _TYPES[dtype.name], pack_size(dtype)
    return f"""\
extern "C" __global__ void __launch_bounds__({THREADS}) {narrow_name(dtype)}(
    const float* __restrict__ masters_, {narrow}* __restrict__ weights_, const Index packs, const Index n) {{
  const Index first = first_of(), stride = stride_of();
  UNROLL(1) for (Index i = first; i < packs; i += stride) {{
    const auto masters = load<{size}>(masters_, i);
    Pack<{narrow}, {size}> weights;
    UNROLL({size}) for (int j = 0; j < {size}; ++j) narrow(masters.at[j], weights.at[j]);
    store<{size}>(weights_, i, weights);
  }}
  UNROLL(1) for (Index i = packs * {size} + first; i < n; i += stride) narrow(masters_[i], weights_[i]);
}}
"""


def squares_name(state: np.dtype[Any]) -> str:
    return f"optserve_squares_{SHORT[state.name]}"


def squares(state: np.dtype[Any]) -> str:
    """The sums of squares of backends/norms.py, a thread for each lane of each row, each in order.

    Arguments: values, the lanes (LANES doubles for each row), the number of rows, a row's length, the number of elements.
    """
    return f"""\
extern "C" __global__ void __launch_bounds__({THREADS}) {squares_name(state)}(
    const {_TYPES[state.name]}* __restrict__ values, double* __restrict__ lanes,
    const Index rows, const Index length, const Index n) {{
  const Index stride = stride_of();
  for (Index i = first_of(); i < rows * {LANES}; i += stride) {{
    const Index row = i / {LANES}, begin = row * length + i % {LANES}, end = n < (row + 1) * length ? n : (row + 1) * length;
    double sum = 0;
    UNROLL(16) for (Index k = begin; k < end; k += {LANES}) {{
      const double value = values[k];
      sum = sum + value * value;
    }}
    lanes[i] = sum;
  }}
}}
"""


HALVE = "optserve_halve"
CLEAR, TAKE, PUT = ({width: f"optserve_{what}_{8 * width}" for width in (2, 4, 8)} for what in ("clear", "take", "put"))

COMMON = f"""\
// Each row's {HALVED} * width values are halved onto each other until width are left.
extern "C" __global__ void __launch_bounds__({THREADS}) {HALVE}(
    const double* __restrict__ lanes, double* __restrict__ sums, const Index rows, const Index width) {{
  const Index stride = stride_of();
  for (Index i = first_of(); i < rows * width; i += stride) {{
    const double* from = lanes + i / width * width * {HALVED} + i % width;
    double x[{HALVED}];
    UNROLL({HALVED}) for (int k = 0; k < {HALVED}; ++k) x[k] = from[k * width];
    UNROLL({HALVED}) for (int half = {HALVED // 2}; half > 0; half /= 2)
      UNROLL({HALVED}) for (int k = 0; k < half; ++k) x[k] = x[k] + x[k + half];
    sums[i] = x[0];
  }}
}}
""" + "".join(
    f"""\
extern "C" __global__ void __launch_bounds__({THREADS}) {CLEAR[width]}(
    {word}* __restrict__ array, const Index* __restrict__ indices, const Index n) {{
  const Index stride = stride_of();
  for (Index i = first_of(); i < n; i += stride) array[indices[i]] = 0;
}}
extern "C" __global__ void __launch_bounds__({THREADS}) {TAKE[width]}(
    const {word}* __restrict__ rows, const Index* __restrict__ ids, {word}* __restrict__ into,
    const Index size, const Index n) {{
  const Index stride = stride_of();
  for (Index i = first_of(); i < n; i += stride) into[i] = rows[ids[i / size] * size + i % size];
}}
extern "C" __global__ void __launch_bounds__({THREADS}) {PUT[width]}(
    const {word}* __restrict__ values, const Index* __restrict__ ids, {word}* __restrict__ rows,
    const Index size, const Index n) {{
  const Index stride = stride_of();
  for (Index i = first_of(); i < n; i += stride) rows[ids[i / size] * size + i % size] = values[i];
}}
"""
    for width, word in ((2, "unsigned short"), (4, "unsigned"), (8, "unsigned long long"))
)
"""Kernels of no dtype: `halve` (lanes, sums, rows, width) and, for each width in bytes, `clear` (array, indices, count), `take`
(a matrix, numbers of rows, where these come, elements of a row, of all) and `put` (rows, their numbers, a matrix, the same)."""


def shared() -> tuple[str, tuple[str, ...]]:
    """The source of all kernels that do not depend on an optimizer, and their names."""
    wire = [np.dtype(kind) for kind in (np.float32, np.float64, np.float16, ml_dtypes.bfloat16)]
    narrow, states = wire[2:], wire[:2]
    pairs = [(state, dtype) for state in states for dtype in wire if dtype.itemsize <= state.itemsize]
    texts = [folds(*pair) for pair in pairs] + [narrowing(dtype) for dtype in narrow]
    texts += [squares(state) for state in states]
    names = [fold_name(*pair, first) for pair in pairs for first in (True, False)]
    names += [narrow_name(dtype) for dtype in narrow] + [squares_name(state) for state in states]
    return "".join([PRELUDE, *texts, COMMON]), (*names, HALVE, *CLEAR.values(), *TAKE.values(), *PUT.values())

"""The generated kernels, run whole on the host: packs, tail, grid stride, conversions. Bit for bit what NumPy computes."""

from __future__ import annotations

import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from host_kernels import Launch, compiled, needs_compiler
from reference import VARIANTS, Variant

from optserve.server.backends import select
from optserve.server.backends.cupy import source
from optserve.server.backends.norms import LANES, SEGMENT
from optserve.server.formulas import Elementwise, find
from optserve.server.formulas.language import Program
from optserve.wire.dtypes import state_dtype

F32, F64, F16, BF16 = (np.dtype(kind) for kind in (np.float32, np.float64, np.float16, ml_dtypes.bfloat16))
PAIRS = [(F32, F32), (F64, F64), (F16, F32), (F16, F16), (BF16, F32), (BF16, BF16)]
"""Wire dtype and gradient dtype."""
SIZES = (0, 1, 3, 4, 7, 8, 9, 255, 256, 100_003)
SPECIAL = np.array([0.0, -0.0, 1.0, -1.0, np.inf, -np.inf, np.nan, 1e-40, -1e-40, 3e38, 0.5, 65504.0, 6e-8, 1e-310], np.float64)
ELEMENTWISE = [variant for variant in VARIANTS if isinstance(find(variant.optimizer), Elementwise)]

pytestmark = needs_compiler


def group_of(variant: Variant) -> dict[str, Any]:
    return {**find(variant.optimizer).defaults, **variant.options}


def program_of(variant: Variant) -> Program:
    optimizer = find(variant.optimizer)
    return optimizer.program(optimizer.choices(group_of(variant)))


PROGRAMS = [program_of(variant) for variant in ELEMENTWISE]


def name_of(program: Program, pair: tuple[np.dtype[Any], np.dtype[Any]]) -> str:
    """The same for equal programs."""
    return source.kernel_name(f"program{PROGRAMS.index(program)}", *pair)


@pytest.fixture(scope="session")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Launch]:
    """All kernels of this file, from one source a pair of dtypes."""
    folder = tmp_path_factory.mktemp("kernels")

    def of_pair(pair: tuple[np.dtype[Any], np.dtype[Any]]) -> dict[str, Launch]:
        texts = {name_of(program, pair): source.kernel(program, name_of(program, pair), *pair) for program in PROGRAMS}
        return compiled("".join([source.PRELUDE, *texts.values()]), folder)

    with ThreadPoolExecutor() as pool:
        return {name: launch for found in pool.map(of_pair, PAIRS) for name, launch in found.items()}


@pytest.fixture(scope="session")
def others(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Launch]:
    """Folds, narrowing, squares, clearing."""
    return compiled(source.shared()[0], tmp_path_factory.mktemp("others"))


@pytest.fixture(autouse=True)
def no_misaligned_access(capfd: pytest.CaptureFixture[str]) -> Any:
    """UBSan reports on stderr."""
    yield
    assert "misaligned" not in capfd.readouterr().err


def grid(size: int, seed: int, dtype: np.dtype[Any]) -> np.ndarray:
    random = np.random.default_rng(seed)
    chosen = np.where(random.random(size) < 0.1, random.choice(SPECIAL, size), random.normal(size=size))
    with np.errstate(all="ignore"):
        return aligned(chosen.astype(dtype))


def aligned(values: np.ndarray, offset: int = 0) -> np.ndarray:
    """A copy that begins `offset` elements after a multiple of 64 bytes."""
    raw = np.empty(values.nbytes + 64 + offset * values.itemsize, np.uint8)
    begin = -raw.ctypes.data % 64 + offset * values.itemsize
    copy = raw[begin : begin + values.nbytes].view(values.dtype)
    copy[:] = values
    return copy


def assert_same_bits(found: np.ndarray, expected: np.ndarray) -> None:
    """NaN equals NaN: what sign and payload an invalid operation gives differs between processors."""
    bits = f"u{found.itemsize}"
    nan = expected != expected
    assert np.array_equal(nan, found != found)
    assert np.array_equal(found.view(bits)[~nan], expected.view(bits)[~nan])


def structure(program: Program, dtype: np.dtype[Any], scale: float, values: dict[str, float]) -> np.ndarray:
    with np.errstate(all="ignore"):
        row = (scale, *(values[name] for name in program.scalars))
        return np.array([row], source.scalars_dtype(program, dtype))


@pytest.mark.parametrize("pair", PAIRS, ids=lambda pair: f"{pair[0].name}-{pair[1].name}")
@pytest.mark.parametrize("index", range(len(ELEMENTWISE)), ids=lambda index: str(ELEMENTWISE[index]))
def test_a_kernel_gives_the_same_bits(
    index: int, pair: tuple[np.dtype[Any], np.dtype[Any]], kernels: dict[str, Launch]
) -> None:
    dtype, gradient = pair
    program, launch = PROGRAMS[index], kernels[name_of(PROGRAMS[index], pair)]
    optimizer, group, state = find(ELEMENTWISE[index].optimizer), group_of(ELEMENTWISE[index]), state_dtype(dtype)
    reference = select("numpy").kernel(optimizer, optimizer.choices(group), dtype)
    values = optimizer.values(group, 3, optimizer.initial(group))
    for size in SIZES:
        for offset, blocks in ((0, 1), (0, 98), (1, 2)) if size < 1000 else ((0, 5), (1, 3)):
            scale = 0.37 if blocks > 1 else 1.0
            given = [grid(size, seed, state) for seed in range(1 + len(program.slots))]
            g = aligned(grid(size, 99, gradient), offset)
            p, *slots = (aligned(array, offset) for array in given)
            weights = [aligned(np.zeros(size, dtype), offset)] if dtype.itemsize == 2 else []
            packs = 0 if offset else size // source.pack_size(state, gradient, dtype)
            scalars = structure(program, dtype, scale, values)
            launch(blocks, source.THREADS, [p, g, *slots, *weights, scalars, np.int64(packs), np.int64(size)])
            expected, narrowed = given, np.zeros(size, dtype) if weights else None
            reference(expected[0], g, expected[1:], values, scale, narrowed)
            for found, wanted in zip((p, *slots), expected, strict=True):
                assert_same_bits(found, wanted)
            if narrowed is not None:
                assert_same_bits(weights[0], narrowed)


@pytest.mark.parametrize("dtype", [F32, F64, F16, BF16], ids=lambda dtype: dtype.name)
def test_folds_give_the_same_bits(dtype: np.dtype[Any], others: dict[str, Launch]) -> None:
    state = state_dtype(dtype)
    for size in SIZES:
        for offset in (0, 1):
            values = aligned(grid(size, size, dtype), offset)
            into = aligned(grid(size, size + 1, state), offset)
            expected = into.copy()
            for first, ratio in ((False, 0.3), (True, 1 / 3), (False, 1.0)):
                packs = 0 if offset else size // source.pack_size(state, dtype)
                launch = others[source.fold_name(state, dtype, first)]
                launch(3, source.THREADS, [into, values, state.type(ratio), np.int64(packs), np.int64(size)])
                select("numpy").fold(expected, values, ratio, first)
                assert_same_bits(into, expected)


def halfway(dtype: np.dtype[Any]) -> np.ndarray:
    """Exactly between neighbours, where rounding to even shows."""
    every = np.arange(0, 0x7800, dtype=np.uint16)
    low, high = (part.view(dtype).astype(np.float64) for part in (every, every + np.uint16(1)))
    return ((low + high) / 2).astype(np.float32)


@pytest.mark.parametrize("dtype", [F16, BF16], ids=lambda dtype: dtype.name)
def test_sixteen_bits_are_converted_as_everywhere(dtype: np.dtype[Any], others: dict[str, Launch]) -> None:
    patterns = aligned(np.arange(65_536, dtype=np.uint16).view(dtype))
    into = aligned(np.zeros(65_536, np.float32))
    arguments = [into, patterns, np.float32(1), np.int64(65_536 // 8), np.int64(65_536)]
    others[source.fold_name(F32, dtype, True)](16, source.THREADS, arguments)
    assert_same_bits(into, patterns.astype(np.float32))
    bits = np.random.default_rng(0).integers(0, 1 << 32, 200_000, np.uint32).view(np.float32)
    masters = aligned(np.concatenate([bits, into, halfway(dtype), -halfway(dtype)]))
    weights = aligned(np.zeros(len(masters), dtype))
    sizes = [np.int64(len(masters) // 8), np.int64(len(masters))]
    others[source.narrow_name(dtype)](7, source.THREADS, [masters, weights, *sizes])
    with np.errstate(all="ignore"):
        expected = masters.astype(dtype)
    assert_same_bits(weights, expected)
    if dtype == BF16:
        nan = np.isnan(masters)
        assert nan.any()
        assert np.array_equal(weights.view(np.uint16)[nan], np.where(np.signbit(masters[nan]), 0xFFC0, 0x7FC0))


@pytest.mark.parametrize("state", [F32, F64], ids=lambda dtype: dtype.name)
@pytest.mark.parametrize("size", [1, 7, LANES, LANES + 1, 20_001, SEGMENT + 5])
def test_sums_of_squares_give_the_same_bits(size: int, state: np.dtype[Any], others: dict[str, Launch]) -> None:
    values = np.random.default_rng(size).normal(size=size).astype(state)
    for length in (SEGMENT, 8192):
        rows = -(-size // length)
        lanes, sums = np.full((rows, LANES), np.nan), np.full((rows, source.HALVED), np.nan)
        counts = [np.int64(rows), np.int64(length), np.int64(size)]
        others[source.squares_name(state)](3, source.THREADS, [values, lanes, *counts])
        others[source.HALVE](2, source.THREADS, [lanes, sums, np.int64(rows), np.int64(source.HALVED)])
        others[source.HALVE](1, source.THREADS, [sums, lanes, np.int64(rows), np.int64(1)])
        expected = [select("numpy").sum_of_squares(values[begin : begin + length]) for begin in range(0, size, length)]
        assert lanes.reshape(-1)[:rows].tolist() == expected


@pytest.mark.parametrize("dtype", [F32, F64, F16], ids=lambda dtype: dtype.name)
def test_chosen_elements_are_cleared(dtype: np.dtype[Any], others: dict[str, Launch]) -> None:
    values = np.full(1000, np.nan, dtype)
    indices = np.array([0, 999, *range(100, 700)])
    others[source.CLEAR[dtype.itemsize]](1, source.THREADS, [values, indices, np.int64(len(indices))])
    assert np.flatnonzero(values == 0).tolist() == sorted(indices.tolist())


def test_the_comparison_has_teeth(tmp_path: Path) -> None:
    """The same kernel with multiplications and additions contracted has other bits."""
    program = program_of(next(variant for variant in ELEMENTWISE if variant.optimizer == "sgd"))
    text = source.PRELUDE + source.kernel(program, "fused", F32, F32)
    text = re.sub(r"(t_\d+) = p - (t_\d+);", r"\1 = __builtin_fmaf(-s.scalar_lr, g, p);", text)
    assert "fmaf" in text
    p, g = grid(10_000, 0, F32), grid(10_000, 1, F32)
    expected, values = p.copy(), {"lr": 0.1}
    sgd = find("sgd")
    select("numpy").kernel(sgd, sgd.choices(sgd.defaults), F32)(expected, g, (), values, 1.0, None)
    sizes = [np.int64(2500), np.int64(10_000)]
    compiled(text, tmp_path)["fused"](1, source.THREADS, [p, g, structure(program, F32, 1.0, values), *sizes])
    with pytest.raises(AssertionError):
        assert_same_bits(p, expected)

# type: ignore
# ruff: noqa: RET505 - formulas
"""Both backends compute what the language says: every operation, in order, without contraction; NumPy's buffers in place."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from reference import VARIANTS, Variant

from optserve.server.backends import select
from optserve.server.backends.numba import source
from optserve.server.backends.registers import schedule
from optserve.server.formulas import Elementwise, find
from optserve.server.formulas.language import maximum, minimum, sign, specialise, sqrt, where


def everything(p, g, a, b, lr, *, swapped):
    """Each operation of the language, and results that trade places."""
    c = maximum(a, g) - minimum(b, g) * sign(g)
    d = where(abs(p) <= 0.5, -c, sqrt(abs(c)) / (g * g + 0.1))
    e = where(g >= a, d, where(a == b, 0.25, where(g != p, 3, d)))
    if swapped:
        return p - lr * e, b, a
    else:
        return b, p, e


def negative_zero(p, g, a, b, lr, *, swapped):
    """Signs of zero and NaN are decided by the language, not by a backend."""
    return maximum(p, g), minimum(a, g), sign(b) * lr


SPECIAL = np.array([0.0, -0.0, 1.0, -1.0, np.inf, -np.inf, np.nan, 1e-40, -1e-40, 3e38, 0.5], np.float64)


def grid(size: int, seed: int, dtype: Any) -> np.ndarray:
    random = np.random.default_rng(seed)
    chosen = np.where(random.random(size) < 0.5, random.choice(SPECIAL, size), random.normal(size=size))
    with np.errstate(all="ignore"):
        return chosen.astype(dtype)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("swapped", [True, False])
@pytest.mark.parametrize("formula", [everything, negative_zero])
def test_backends_equal_the_formula_run_as_python(formula: Any, swapped: bool, dtype: Any) -> None:
    made = replace(find("adam"), formula=formula, slot_keys=("a", "b"), _programs={})
    size = 40_000
    p, g, a, b = (grid(size, seed, dtype) for seed in range(4))
    with np.errstate(all="ignore"):
        chosen = range(0, size, 7)
        expected = [formula(p[i], g[i], a[i], b[i], dtype(0.1), swapped=swapped) for i in chosen]
    for name in ("numba", "numpy"):
        kernel = select(name).kernel(made, {"swapped": swapped}, np.dtype(dtype))
        masters, slots = p.copy(), [a.copy(), b.copy()]
        kernel(masters, g, slots, {"lr": 0.1}, 1.0, None)
        for got, want in zip((masters, *slots), zip(*expected, strict=True), strict=True):
            ours, theirs = got[::7], np.array([float(w) for w in want]).astype(dtype)
            np.testing.assert_array_equal(ours, theirs)
            numbers = ~np.isnan(ours)
            assert np.array_equal(np.signbit(ours)[numbers], np.signbit(theirs)[numbers])


@pytest.mark.parametrize("variant", [v for v in VARIANTS if isinstance(find(v.optimizer), Elementwise)], ids=str)
def test_no_multiplication_is_fused_with_an_addition(variant: Variant) -> None:
    optimizer = find(variant.optimizer)
    group = {**optimizer.defaults, **variant.options}
    kernel = select("numba").kernel(optimizer, optimizer.choices(group), np.dtype(np.float32))
    assembly = "".join(text for loop in kernel._loops.values() for text in loop.inspect_asm().values())
    assert re.search(r"\bv?mulps\b", assembly) or "fmul" in assembly, "vectorised"
    assert not re.search(r"\bv?fn?m(add|sub|la|ls)", assembly)


def test_a_contracted_multiplication_would_show_in_the_bits() -> None:
    """Teeth of the bitwise comparison of backends: rounding once instead of twice changes elements of plain SGD."""
    random = np.random.default_rng(0)
    p, g = (random.normal(size=10_000).astype(np.float32) for _ in range(2))
    lr = np.float32(0.1)
    fused = (p.astype(np.float64) - lr.astype(np.float64) * g.astype(np.float64)).astype(np.float32)
    assert np.count_nonzero(fused != p - lr * g) > 100


def test_the_schedule_computes_slots_in_place() -> None:
    adam = find("adam")
    plan = schedule(adam.program(adam.choices(adam.defaults)))
    assert "copy" not in {name for name, _, _ in plan.steps}
    assert {"p", "m", "v"} <= {target for _, target, _ in plan.steps}
    assert len(plan.registers) == 2
    assert all(target != "g" for _, target, _ in plan.steps)


def test_the_generated_loop_names_every_array_once() -> None:
    program = specialise(everything, ("A", "B"), {"swapped": True})
    text = source(program, narrows=True)
    assert text.startswith("def kernel(_p, _g, _s_a, _s_b, _w, _scale, lr):")
    assert text.count("_w[_i] = narrow(") == 1

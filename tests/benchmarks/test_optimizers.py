"""benchmarks/optimizers.py writes the table of docs/optimizers.md; the page has every optimizer."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from optserve.server.formulas import OPTIMIZERS

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "optimizers.py"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("optimizers", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_has_every_optimizer(script: ModuleType) -> None:
    page = script.PAGE.read_text()
    assert script.lacking(page) == []
    assert script.lacking(page.replace("| Lion | numba", "| Tiger | numba").replace("| Lion | numpy", "")) == ["Lion"]
    before, _, _ = page.partition(script.BEGIN)
    for optimizer in OPTIMIZERS.values():
        assert optimizer.name in before, f"{optimizer.name} is not described"


def test_only_the_table_is_replaced(script: ModuleType) -> None:
    page = f"before\n{script.BEGIN}\n| old |\n{script.END}\nafter\n"
    assert script.replaced(page, lambda: "new") == "before\nnew\nafter\n"


@pytest.mark.parametrize("name", ["adam", "lion", "sparseadam"])
def test_errors_are_measured_against_torch_or_the_textbook(script: ModuleType, name: str) -> None:
    start = np.random.default_rng(0).normal(size=(6, 5))
    exact = script.theirs(name, start)
    assert np.abs(script.ours(name, "numpy", start) - exact).max() < 1e-12
    assert np.abs(exact - start).max() > 1e-3

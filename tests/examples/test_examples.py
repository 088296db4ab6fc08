"""Every example runs as its reader would run it, and reaches what it is there to show."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from optserve.server.app import App

EXAMPLES = Path(__file__).parents[2] / "examples"
DEADLINE_SECONDS = 110.0


def run(name: str, folder: Path, **environment: str) -> str:
    """What an example prints, run in an empty folder; the test fails with its error otherwise."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith("OPTSERVE_")}
    done = subprocess.run(
        [sys.executable, "-W", "error", str(EXAMPLES / name)],
        env={**kept, **environment},
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=DEADLINE_SECONDS,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr == ""
    assert not list(folder.iterdir())
    return done.stdout


def number(pattern: str, text: str) -> float:
    """The number after a text in the output."""
    found = re.search(pattern + r" (-?[\d.]+(?:e[-+]?\d+)?)", text)
    assert found is not None, text
    return float(found[1])


def test_every_example_is_run_here() -> None:
    source = Path(__file__).read_text()
    assert [path.name for path in sorted(EXAMPLES.glob("*.py")) if f'"{path.name}"' not in source] == []


def test_sparse_embedding_learns_the_topics(tmp_path: Path) -> None:
    text = run("sparse_embedding.py", tmp_path)
    assert number("before: accuracy", text) < 0.05
    assert number(r"after \d+ steps: accuracy", text) > 0.95


def test_lbfgs_reaches_the_optimum(tmp_path: Path) -> None:
    text = run("lbfgs_two_workers.py", tmp_path)
    assert number("distance to the optimum", text) < 1e-7


def test_accumulation_and_clipping_train_the_digits(tmp_path: Path) -> None:
    text = run("accumulate_and_clip.py", tmp_path)
    steps, clipped = re.search(r"(\d+) steps of 4 rounds each, (\d+) of them clipped", text).groups()  # type: ignore[union-attr]
    assert int(steps) == 258
    assert 0 < int(clipped) < int(steps)
    assert number("accuracy", text) > 0.93


def test_the_quickstart_finds_the_line(app: App, tmp_path: Path) -> None:
    """It names the address of a server that its reader has started; here that is another one."""
    source = (EXAMPLES / "numpy_quickstart.py").read_text()
    assert source.count('"localhost:50051"') == 1
    script = tmp_path / "quickstart.py"
    script.write_text(source.replace("localhost:50051", app.address or ""))
    done = subprocess.run(
        [sys.executable, "-W", "error", str(script)], capture_output=True, text=True, timeout=DEADLINE_SECONDS, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("step 300 w [")
    assert [float(entry) for entry in re.findall(r"-?\d+\.\d*", done.stdout)] == pytest.approx([2.0, -1.0, 0.5, 3.0], abs=0.02)


@pytest.mark.parametrize("name", ["accumulate_and_clip.py"])
def test_an_example_uses_the_server_that_the_environment_names(app: App, tmp_path: Path, name: str) -> None:
    assert "accuracy" in run(name, tmp_path, OPTSERVE_SERVER=app.address or "")

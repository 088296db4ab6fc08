"""benchmarks/wire.py and step.py run and report; how fast anything is, is not tested."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parents[2] / "benchmarks"


def run(script: str, file: Path, *arguments: str) -> dict[str, Any]:
    command = [sys.executable, str(FOLDER / script), *arguments, "--json", str(file)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()
    found: dict[str, Any] = json.loads(file.read_text())
    return found


def test_wire_reports_every_way_in_both_directions_beside_the_socket(tmp_path: Path) -> None:
    found = run("wire.py", tmp_path / "wire.json", "--megabytes", "3", "--repetitions", "1", "--pings", "5")
    for direction in ("push", "pull"):
        assert list(found["ratio_to_socket"][direction]) == ["socket", "stream", "optserve", "unary"]
        assert found["ratio_to_socket"][direction]["socket"] == 1
        assert all(rate > 0 for rate in found["gigabytes_per_second"][direction].values())
    assert list(found["microseconds"]) == ["unary", "stream", "push_pull"]
    assert found["megabytes"] == 3


def test_step_reports_every_way_for_every_size(tmp_path: Path) -> None:
    found = run("step.py", tmp_path / "step.json", "--parameters", "1000", "300000", "--repetitions", "1")
    assert list(found["milliseconds"]) == ["1000", "300000"]
    for of in found["milliseconds"].values():
        assert {"embedded", "tcp 1", "tcp 2"} <= of.keys()
        assert all(milliseconds > 0 for milliseconds in of.values())

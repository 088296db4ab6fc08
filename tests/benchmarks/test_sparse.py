"""benchmarks/sparse.py runs and reports; how fast anything is, is not tested."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "sparse.py"


def test_every_way_is_reported_for_every_batch_and_table_and_bytes_follow_the_rows_alone(tmp_path: Path) -> None:
    file = tmp_path / "sparse.json"
    sizes = ["--rows", "2000", "100000", "--touched", "100", "5000", "--dim", "4", "--dense-rows", "2000", "--repetitions", "1"]
    command = [sys.executable, str(SCRIPT), *sizes, "--json", str(file)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=150)
    assert done.returncode == 0, done.stderr
    assert "touched" in done.stdout
    found = json.loads(file.read_text())
    assert {touched: list(of) for touched, of in found["milliseconds"].items()} == {
        "100": ["2000", "100000"],
        "5000": ["100000"],
    }
    assert found["milliseconds"]["100"]["2000"].keys() >= {"optserve", "dense"}
    assert "dense" not in found["milliseconds"]["100"]["100000"]
    assert all(ms > 0 for of in found["milliseconds"].values() for ways in of.values() for ms in ways.values())
    assert found["ratio_to_optserve"]["100"]["2000"]["optserve"] == 1
    assert list(found["largest_to_smallest_table"]) == ["100"]
    assert found["largest_to_smallest_table"]["100"]["optserve"] > 0
    for touched, nbytes in found["bytes"].items():
        rows_both_ways = int(touched) * 2 * (4 * 4 + 8)
        assert all(rows_both_ways < count < 2 * rows_both_ways + 4096 for count in nbytes.values())

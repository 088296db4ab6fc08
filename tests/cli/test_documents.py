"""What the documents show is what happens."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

from optserve.cli import exits
from optserve.client import connect, errors

ROOT = Path(__file__).parents[2]


def _readme_example() -> str:
    (block,) = re.findall(r"^```python\n(.*?)^```$", (ROOT / "README.md").read_text(), re.DOTALL | re.MULTILINE)
    return str(block)


def test_the_readmes_example_is_the_file_in_examples() -> None:
    assert _readme_example() == (ROOT / "examples" / "numpy_quickstart.py").read_text()


def test_the_readmes_example_runs_and_a_second_run_goes_on(address: str, tmp_path: Path) -> None:
    script = tmp_path / "example.py"
    script.write_text(_readme_example().replace("localhost:50051", address))
    environment = {key: value for key, value in os.environ.items() if key not in ("RANK", "OPTSERVE_SERVER")}
    try:
        for steps in (300, 600):
            done = subprocess.run([sys.executable, script], capture_output=True, text=True, env=environment, check=False)
            assert done.returncode == 0, done.stderr
            assert done.stdout == f"step {steps} w [ 2.  -1.   0.5] b [3.]\n"
            assert f"It prints `{done.stdout.strip()}`" in (ROOT / "README.md").read_text() or steps > 300
    finally:
        with connect(address) as server:
            server.job("line").delete()


def test_the_exit_codes_in_the_docs_are_the_programs() -> None:
    text = (ROOT / "docs" / "command-line.md").read_text()
    rows = re.findall(r"^\| (\d+) \| (.+) \|$", text, re.MULTILINE)
    assert {int(code): meaning for code, meaning in rows} == exits.MEANINGS


def test_links_in_the_documents_lead_somewhere() -> None:
    for document in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")):
        for target in re.findall(r"\]\(([^)#]+)\)", document.read_text()):
            assert target.startswith("https://") or (document.parent / target).exists(), f"{document.name}: {target}"


def test_the_errors_in_the_documents_are_there_and_the_examples_are_python() -> None:
    text = (ROOT / "docs" / "concepts.md").read_text()
    (example,) = re.findall(r"^```python\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    compile(example, "concepts.md", "exec")
    names = set(re.findall(r"`(\w+Error)`", text)) | set(re.findall(r"errors\.(\w+Error)", text))
    builtin = {"ValueError", "TimeoutError"}
    assert all(issubclass(getattr(errors, name), errors.OptserveError) for name in names - builtin)
    assert {"RolledBackError", "JobLostError"} <= names


def test_the_accuracy_that_the_documents_promise_is_one() -> None:
    for document in ("docker/compose.yaml", "README.md", "client/optserve/cli/demo/__init__.py"):
        assert "0.97" not in (ROOT / document).read_text(), document

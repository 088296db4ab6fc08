"""job rename-parameter, job replace-parameter and job remove-parameter."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import Result

from optserve.cli import exits
from optserve.client import Job

Command = Callable[..., Result]


def ok(result: Result) -> str:
    assert result.exit_code == exits.OK, result.stderr
    return result.stdout


def test_rename(optserve: Command, job: Job) -> None:
    version = job.position().version
    assert ok(optserve("job", "rename-parameter", "j", "w", "a/w")) == (
        f"renamed 'w' to 'a/w': the job stands at step 1, version {version + 1}\n"
    )
    found = json.loads(ok(optserve("job", "rename-parameter", "j", "a/w", "v", "--json")))
    assert found == {"parameter": "v", "old_name": "a/w", "version": version + 2, "step": 1}
    assert list(job.pull()) == ["v", "b"]
    result = optserve("job", "rename-parameter", "j", "w", "u")
    assert result.exit_code == exits.USAGE
    assert result.stderr == "error: parameter 'w' is not in the job; its parameters are 'v', 'b'\n"


def test_replace(optserve: Command, job: Job, tmp_path: Path) -> None:
    np.save(tmp_path / "w.npy", np.full((2, 5), 0.5))
    text = ok(optserve("job", "replace-parameter", "j", "w", "w.npy"))
    assert text.startswith("replaced 'w' by (2, 5) of float64: the job stands at step 1, version ")
    assert job.pull()["w"].tolist() == [[0.5] * 5] * 2
    assert list(job.state_dict()["state"]) == [1]
    np.save(tmp_path / "b.npy", np.full(4, 3.0, np.float32))
    found = json.loads(ok(optserve("job", "replace-parameter", "j", "b", "b.npy", "--keep-state", "--json")))
    del found["version"]
    assert found == {"parameter": "b", "shape": [4], "dtype": "float32", "kept_state": True, "step": 1}
    assert job.pull()["b"].tolist() == [3.0] * 4
    assert list(job.state_dict()["state"]) == [1]
    result = optserve("job", "replace-parameter", "j", "w", "b.npy", "--keep-state")
    assert result.exit_code == exits.USAGE
    assert "its state can only be kept with the same shape" in result.stderr


def save_object(path: Path) -> None:
    np.save(path, np.array([{"a": 1}], object), allow_pickle=True)


def save_npz(path: Path) -> None:
    with path.open("wb") as file:
        np.savez(file, a=np.ones(2))


def save_torn(path: Path) -> None:
    np.save(path, np.ones(100))
    path.write_bytes(path.read_bytes()[:200])


def save_zip(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("a.txt", "text")


@pytest.mark.parametrize(
    "write", [save_object, save_npz, save_torn, save_zip, Path.touch, lambda path: path.write_text("text")]
)
def test_a_file_that_is_no_array(optserve: Command, job: Job, tmp_path: Path, write: Callable[[Path], Any]) -> None:
    write(tmp_path / "w.npy")
    before = job.position()
    result = optserve("job", "replace-parameter", "j", "w", "w.npy")
    assert (result.exit_code, result.stderr) == (
        exits.USAGE,
        "error: w.npy is not what is allowed: an .npy file of one plain array, as np.save writes it\n",
    )
    assert job.position() == before


def test_remove_parameter(optserve: Command, job: Job) -> None:
    job.add_param_group({"params": {"x": np.ones(2, np.float32), "y": np.ones(3, np.float32)}})
    assert ok(optserve("job", "remove-parameter", "j", "x")).startswith("removed 'x': the job stands at step 1, version ")
    job.add_param_group({"params": {"z": np.ones(2, np.float32), "x": np.ones(3, np.float32)}})
    found = json.loads(ok(optserve("job", "remove-parameter", "j", "x", "--json")))
    assert found == {"parameter": "x", "removed": True, "version": job.position().version, "step": 1}
    assert list(job.pull()) == ["w", "b", "y", "z"]
    result = optserve("job", "remove-parameter", "j", "y")
    assert result.exit_code == exits.USAGE
    assert result.stderr == "error: parameter 'y' is the only one of group 2, and a group keeps at least one\n"

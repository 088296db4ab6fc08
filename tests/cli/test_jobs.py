"""job, group, schedule, checkpoint, health against a real server."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import Result

from optserve.cli import exits
from optserve.client import Job, connect

Command = Callable[..., Result]


def ok(result: Result) -> str:
    assert result.exit_code == exits.OK, result.stderr
    assert "Traceback" not in result.stderr
    return result.stdout


def as_json(result: Result) -> Any:
    return json.loads(ok(result))


def test_health_says_serving(optserve: Command) -> None:
    assert ok(optserve("health")) == "SERVING\n"
    assert as_json(optserve("health", "--json"))["status"] == "SERVING"


def test_an_empty_list_says_so(optserve: Command) -> None:
    assert ok(optserve("job", "list")) == "no jobs\n"
    assert as_json(optserve("job", "list", "--json")) == []


@pytest.mark.usefixtures("job")
def test_list_is_a_table_for_a_person_and_has_stable_keys_for_a_program(optserve: Command) -> None:
    header, row = ok(optserve("job", "list")).splitlines()
    assert header.split() == ["JOB", "OPTIMIZER", "STEP", "WORKERS", "LR", "STATE", "METRICS"]
    assert row.split()[:4] == ["j", "Adam", "1", "0/1"]
    (found,) = as_json(optserve("job", "list", "--json"))
    assert set(found) == {
        *("name", "job_id", "optimizer", "consistency", "workers", "initialized", "version", "step", "durable_version"),
        *("lineage_id", "backend", "state_bytes", "metrics", "groups", "members", "parameters"),
        *("clip_grad_norm", "clip_grad_value", "accumulation", "accumulated"),
    }
    assert (found["name"], found["step"], found["metrics"]) == ("j", 1, {"loss": 2.5})


def test_show_by_name_and_by_id(optserve: Command, job: Job) -> None:
    found = as_json(optserve("job", "show", job.job_id, "--json"))
    assert found["parameters"] == [
        {"name": "w", "shape": [3, 4], "dtype": "float32"},
        {"name": "b", "shape": [4], "dtype": "float32"},
    ]
    assert [group["lr"] for group in found["groups"]] == [0.25, 0.5]
    assert found["schedule"]["name"] is None
    text = ok(optserve("job", "show", "j"))
    assert "step 1" in text
    assert "rank0" in text
    assert "schedule   none\n" in text


def test_show_has_the_schedule_and_the_hyperparameters_of_every_group(optserve: Command, job: Job) -> None:
    job.set_lr_schedule("MultiStepLR", milestones=[10, 20])
    job.update_group(1, weight_decay=0.01, amsgrad=True)
    text = ok(optserve("job", "show", "j"))
    assert "schedule   MultiStepLR(milestones=(10, 20), gamma=0.1), last epoch 0\n" in text
    lines = [line.split() for line in text.splitlines()]
    assert ["0", "0.25", "betas=0.9,0.999", "eps=1e-08", "initial_lr=0.25"] in lines
    assert ["1", "0.5", "betas=0.9,0.999", "eps=1e-08", "weight_decay=0.01", "amsgrad=yes", "initial_lr=0.5"] in lines
    assert all(line == line.rstrip() for line in text.splitlines())
    found = as_json(optserve("job", "show", "j", "--json"))["schedule"]
    assert (found["name"], found["last_epoch"]) == ("MultiStepLR", 0)


@pytest.mark.parametrize(
    "arguments",
    [("job", "show", "nobody"), ("job", "events", "nobody"), ("group", "list", "nobody"), ("checkpoint", "list", "nobody")],
    ids=" ".join,
)
def test_an_unknown_job_is_exit_code_4(optserve: Command, arguments: tuple[str, ...]) -> None:
    result = optserve(*arguments)
    assert result.exit_code == exits.NOT_FOUND
    assert "nobody" in result.stderr
    assert result.stderr.count("\n") == 1


def test_pull_writes_an_npz_that_numpy_reads(optserve: Command, job: Job, tmp_path: Path) -> None:
    assert "2 parameters" in ok(optserve("job", "pull", "j", "--out", "weights.npz"))
    expected = job.pull()
    with np.load(tmp_path / "weights.npz", allow_pickle=False) as file:
        assert set(file.files) == {"w", "b"}
        assert all(np.array_equal(file[name], expected[name]) for name in expected)
    assert [entry.name for entry in tmp_path.iterdir()] == ["weights.npz"]


def test_pull_of_awkward_names_and_bfloat16(optserve: Command, address: str, tmp_path: Path) -> None:
    ml_dtypes = pytest.importorskip("ml_dtypes")
    values = {"file": np.arange(3, dtype=ml_dtypes.bfloat16), "a/b": np.ones(2, np.float16)}
    with connect(address) as server:
        job = server.create_job("odd", values, optimizer="sgd", lr=0.1)
        try:
            ok(optserve("job", "pull", "odd", "--out", "odd.npz"))
        finally:
            job.delete()
    with np.load(tmp_path / "odd.npz", allow_pickle=False) as file:
        assert file["file"].dtype == np.float32
        assert file["file"].tolist() == [0, 1, 2]
        assert file["a/b"].dtype == np.float16


def test_complex_parameters_are_shown_pulled_and_exported(optserve: Command, address: str, tmp_path: Path) -> None:
    values = {"z": np.array([[1 + 2j, 3 - 4j]], np.complex64), "zz": np.array(5j)}
    with connect(address) as server:
        job = server.create_job("complex", values, optimizer="sgd", lr=0.1)
        try:
            found = as_json(optserve("job", "show", "complex", "--json"))["parameters"]
            assert [entry["dtype"] for entry in found] == ["complex64", "complex128"]
            assert ["z", "(1,", "2)", "complex64", "0"] in [
                line.split() for line in ok(optserve("job", "show", "complex")).splitlines()
            ]
            ok(optserve("job", "pull", "complex", "--out", "complex.npz"))
            ok(optserve("job", "export", "complex", "out"))
        finally:
            job.delete()
        again = server.create_job("again", from_checkpoint=tmp_path / "out")
        try:
            exported = again.pull()
        finally:
            again.delete()
    with np.load(tmp_path / "complex.npz", allow_pickle=False) as file:
        for name, value in values.items():
            np.testing.assert_array_equal(file[name], value, strict=True)
            np.testing.assert_array_equal(exported[name], value, strict=True)


def test_export_leaves_files_that_make_the_job_again_and_no_checkpoint(
    optserve: Command, job: Job, address: str, tmp_path: Path
) -> None:
    names = {entry["name"] for entry in as_json(optserve("job", "export", "j", "out", "--json"))["files"]}
    assert "parameters.safetensors" in names
    assert job.checkpoints() == []
    with connect(address) as server:
        again = server.create_job("again", from_checkpoint=tmp_path / "out")
        try:
            assert all(np.array_equal(again.pull()[name], array) for name, array in job.pull().items())
        finally:
            again.delete()


@pytest.mark.parametrize("command", [("job", "export", "j"), ("checkpoint", "download", "j", "c")], ids=" ".join)
@pytest.mark.parametrize(
    ("folder", "message"), [("taken", "taken exists"), ("file/out", "is not a folder")], ids=["exists", "under-a-file"]
)
def test_a_folder_that_cannot_be_made_is_refused_before_the_server_is_asked(
    optserve: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: tuple[str, ...], folder: str, message: str
) -> None:
    (tmp_path / "taken").mkdir()
    (tmp_path / "file").touch()
    monkeypatch.setattr("optserve.cli.options.connected", None)
    result = optserve(*command, folder)
    assert result.exit_code == exits.USAGE
    assert message in result.stderr


def test_pull_into_a_folder_that_is_not_there_is_refused_before_the_server_is_asked(
    optserve: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("optserve.cli.options.connected", None)
    result = optserve("job", "pull", "j", "--out", "no/weights.npz")
    assert (result.exit_code, result.stderr) == (
        exits.USAGE,
        "error: no/weights.npz cannot be written: there is no folder no\n",
    )


def test_events_tell_of_the_step(optserve: Command, job: Job) -> None:
    edited = job.update_group(0, lr=0.125)
    events = [json.loads(line) for line in ok(optserve("job", "events", "j", "--json")).splitlines()]
    kinds = [event["kind"] for event in events]
    assert "joined" in kinds
    assert "round" in kinds
    assert kinds[-1] == "group"
    assert [event["index"] for event in events] == sorted(event["index"] for event in events)
    line = ok(optserve("job", "events", "j")).splitlines()[-1]
    assert f"version {edited.version} " in line
    assert "lr=0.125" in line


def test_events_are_followed_until_ctrl_c(address: str, job: Job) -> None:
    command = [sys.executable, "-m", "optserve.cli", "job", "events", "j", "--follow", "--json", "--server", address]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    with process:
        assert process.stdout is not None
        while json.loads(process.stdout.readline())["kind"] != "left":
            pass
        job.update_group(0, lr=0.125)
        assert json.loads(process.stdout.readline())["message"] == "group 0: lr=0.125"
        process.send_signal(signal.SIGINT)
        assert process.communicate(timeout=20)[1].strip() == "error: interrupted"
    assert process.returncode == exits.INTERRUPTED


def test_delete_asks_or_wants_yes(optserve: Command, job: Job) -> None:
    refused = optserve("job", "delete", "j")
    assert refused.exit_code == exits.USAGE
    assert "--yes" in refused.stderr
    assert job.info().position.step == 1
    ok(optserve("job", "delete", "j", "--yes"))
    assert optserve("job", "show", "j").exit_code == exits.NOT_FOUND


def test_group_list_and_set(optserve: Command, job: Job) -> None:
    assert "lr=0.0001 betas=0.9,0.99 eps=1e-08 amsgrad=yes" in ok(
        optserve("group", "set", "j", 1, "lr=1e-4", "betas=0.9,0.99", "amsgrad=true")
    )
    groups = as_json(optserve("group", "list", "j", "--json"))
    assert (groups[1]["group"], groups[1]["lr"], groups[1]["betas"], groups[1]["params"]) == (1, 1e-4, [0.9, 0.99], ["b"])
    assert groups[0]["lr"] == 0.25
    assert len(ok(optserve("group", "list", "j")).splitlines()) == 3
    assert [group["lr"] for group in job.param_groups] == [0.25, 1e-4]


@pytest.mark.usefixtures("job")
@pytest.mark.parametrize("change", ["lr=-1", "lr=nan", "betas=0.9,1.0", "momentums=0.9"])
def test_a_bad_hyperparameter_is_exit_code_2_and_changes_nothing(optserve: Command, change: str) -> None:
    before = as_json(optserve("group", "list", "j", "--json"))
    assert optserve("group", "set", "j", 0, change).exit_code == exits.USAGE
    assert as_json(optserve("group", "list", "j", "--json")) == before


def test_group_add(optserve: Command, job: Job, tmp_path: Path) -> None:
    np.savez(tmp_path / "head.npz", head=np.full((2, 2), 3, np.float32))
    added = as_json(optserve("group", "add", "j", "head.npz", "lr=0.01", "--json"))
    assert (added["group"], added["params"], added["lr"]) == (2, ["head"], 0.01)
    assert np.array_equal(job.pull(["head"])["head"], np.full((2, 2), 3, np.float32))


@pytest.mark.usefixtures("job")
@pytest.mark.parametrize("kind", ["text", "empty", "torn", "npy", "pickle", "no arrays"])
def test_a_file_that_is_no_npz_is_named_with_what_is_allowed(optserve: Command, tmp_path: Path, kind: str) -> None:
    path = tmp_path / "bad.npz"
    np.savez(path, head=np.ones(4, np.float32))
    if kind == "npy":
        with path.open("wb") as file:
            np.save(file, np.ones(4))
    elif kind == "pickle":
        np.savez(path, head=np.array([{}], object))
    elif kind == "no arrays":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("readme", "nothing")
    else:
        path.write_bytes({"text": b"print(1)", "empty": b"", "torn": path.read_bytes()[:60]}[kind])
    result = optserve("group", "add", "j", "bad.npz")
    assert result.exit_code == exits.USAGE
    assert "bad.npz is not what is allowed: an .npz file" in result.stderr
    assert "pickle" not in result.stderr


def test_a_schedule_is_set_stepped_shown_and_removed(optserve: Command, job: Job) -> None:
    assert ok(optserve("schedule", "show", "j")) == "no schedule\n"
    assert as_json(optserve("schedule", "show", "j", "--json"))["name"] is None
    found = as_json(optserve("schedule", "set", "j", "StepLR", "step_size=1", "gamma=0.5", "--json"))
    assert (found["name"], found["last_epoch"], found["learning_rates"]) == ("StepLR", 0, [0.25, 0.5])
    assert "0.125, 0.25" in ok(optserve("schedule", "step", "j"))
    assert "StepLR(step_size=1, gamma=0.5)" in ok(optserve("schedule", "show", "j"))
    assert ok(optserve("schedule", "remove", "j")) == "no schedule\n"
    assert job.lr_schedule is None
    without = optserve("schedule", "step", "j")
    assert without.exit_code == exits.USAGE
    assert "`optserve schedule set j NAME ...`" in without.stderr
    unknown = optserve("schedule", "set", "j", "StepLr2")
    assert unknown.exit_code == exits.USAGE
    assert "StepLR" in unknown.stderr


@pytest.mark.usefixtures("job")
@pytest.mark.parametrize(("given", "shown"), [("10", "(10,)"), ("10,", "(10,)"), ("10,20", "(10, 20)")])
def test_milestones_are_one_number_or_several(optserve: Command, given: str, shown: str) -> None:
    text = ok(optserve("schedule", "set", "j", "MultiStepLR", f"milestones={given}"))
    assert f"MultiStepLR(milestones={shown}, gamma=0.1)" in text


def test_checkpoints_from_save_to_delete(optserve: Command, job: Job, tmp_path: Path) -> None:
    before = job.pull()
    saved = as_json(optserve("checkpoint", "save", "j", "c1", "--json"))
    assert (saved["name"], saved["step"]) == ("c1", 1)
    job.update_group(0, lr=0.125)
    assert [entry["name"] for entry in as_json(optserve("checkpoint", "list", "j", "--json"))] == ["c1"]
    assert "c1" in ok(optserve("checkpoint", "list", "j"))
    assert "whole 'c1'" in ok(optserve("checkpoint", "verify", "j", "c1"))
    assert optserve("checkpoint", "save", "j", "c1").exit_code == exits.EXISTS
    ok(optserve("checkpoint", "download", "j", "c1"))
    assert (tmp_path / "c1" / "parameters.safetensors").exists()
    assert "step 1" in ok(optserve("checkpoint", "restore", "j", "c1"))
    assert job.info().groups[0]["lr"] == 0.25
    assert all(np.array_equal(before[name], array) for name, array in job.pull().items())
    ok(optserve("checkpoint", "delete", "j", "c1"))
    assert ok(optserve("checkpoint", "list", "j")) == "no checkpoints\n"


@pytest.mark.usefixtures("job")
@pytest.mark.parametrize("command", ["verify", "restore", "download", "delete"])
def test_a_checkpoint_that_is_not_there_is_exit_code_4(optserve: Command, command: str) -> None:
    assert optserve("checkpoint", command, "j", "nothing").exit_code == exits.NOT_FOUND


@pytest.mark.usefixtures("job")
def test_a_checkpoint_name_that_is_a_path_is_exit_code_2(optserve: Command) -> None:
    assert optserve("checkpoint", "save", "j", "../up").exit_code == exits.USAGE


def test_a_corrupt_checkpoint_is_exit_code_5(optserve: Command, job: Job, data_dir: Path) -> None:
    job.save_checkpoint("c1")
    (file,) = data_dir.rglob("c1/parameters.safetensors")
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    for command in ("verify", "restore"):
        result = optserve("checkpoint", command, "j", "c1")
        assert result.exit_code == exits.CORRUPT
        assert result.stderr.count("\n") == 1

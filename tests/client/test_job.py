from __future__ import annotations

import copy
import json
import logging
import pickle
import threading
import time
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from optserve.client import Job, Server
from optserve.wire import errors


def params(**shapes: tuple[int, ...]) -> dict[str, Any]:
    return {name: np.full(shape, 2, np.float32) for name, shape in shapes.items()}


def make(server: Server, name: str | None = None, **arguments: Any) -> Job:
    given = {"optimizer": "sgd", "lr": 0.5, **arguments}
    return server.create_job(name, given.pop("params", params(w=(2, 3), b=(3,))), **given)


def test_a_job_has_the_values_that_it_was_made_with(server: Server) -> None:
    rng = np.random.default_rng(0)
    values = {
        "f": np.asfortranarray(rng.normal(size=(700, 500)).astype(np.float32)),
        "d": rng.normal(size=20)[::2],
        "h": rng.normal(size=(3, 1)).astype(np.float16),
        "s": np.array(3, ml_dtypes.bfloat16),
        "none": np.zeros((0, 4), np.float32),
        "z": np.asfortranarray((rng.normal(size=(70, 50)) * (1 + 2j)).astype(np.complex64)),
        "zz": (rng.normal(size=20) * 1j)[::2],
    }
    job = make(server, params=values)
    pulled = job.pull()
    assert list(pulled) == list(values)
    for name, value in values.items():
        np.testing.assert_array_equal(pulled[name], value)
        assert pulled[name].dtype == value.dtype
    assert list(job.pull(["s", "d"])) == ["s", "d"]
    np.testing.assert_array_equal(job.pull(["z"])["z"], values["z"], strict=True)
    assert job.pull([]) == {}
    again = job.pull(out=pulled)
    assert again is pulled


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({}, errors.InvalidArgumentError, "optimizer got an empty parameter list"),
        ([], errors.InvalidArgumentError, "optimizer got an empty parameter list"),
        ([{"params": {}}], errors.InvalidArgumentError, "param group 0 has no parameters"),
        ({"i": np.zeros(2, np.int32)}, errors.DtypeMismatchError, "parameter 'i' has dtype int32; allowed are float32"),
        ({"w": np.zeros(2, ">f4")}, errors.DtypeMismatchError, "parameter 'w' has dtype >f4"),
        (
            [{"params": params(w=(1,))}, {"params": params(w=(2,))}],
            errors.DuplicateParameterError,
            "'w' appears more than once",
        ),
        ([("w", np.zeros(1)), ("w", np.zeros(1))], errors.DuplicateParameterError, "'w' appears more than once"),
        (np.zeros(3), errors.InvalidArgumentError, "params must be a mapping of names to arrays.*got ndarray"),
        ([{"lr": 0.1}], errors.InvalidArgumentError, r"got one with \['lr'\]"),
        ([{"params": [np.zeros(3)]}], errors.InvalidArgumentError, "name every array"),
        ({3: np.zeros(3)}, errors.InvalidArgumentError, "name every array"),
    ],
)
def test_params_that_cannot_be_a_jobs_are_refused_before_anything_is_sent(
    embedded: Server, given: Any, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        make(embedded, params=given)
    assert embedded.jobs() == []


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"optimizer": "adma"}, errors.UnknownOptimizerError, "(?i)adam"),
        ({"optimizer": dict}, errors.UnknownOptimizerError, "optimizer is <class 'dict'>; it must be the name of one"),
        ({"optimizer": None}, errors.InvalidArgumentError, "needs params and an optimizer"),
        ({"lr": -1.0}, errors.InvalidHyperparameterError, "Invalid learning rate: -1.0"),
        ({"lr": float("nan")}, errors.InvalidHyperparameterError, "learning rate: nan"),
        ({"momentun": 0.9}, errors.UnknownHyperparameterError, "momentum"),
        ({"consistency": "asink"}, errors.InvalidArgumentError, "did you mean 'async'"),
        ({"on_nonfinite": "ignore"}, errors.InvalidArgumentError, "known: reject, skip"),
        ({"on_missing": "x"}, errors.InvalidArgumentError, "known: drop, wait, fail"),
        ({"workers": 0}, errors.InvalidArgumentError, "workers is 0"),
        ({"quorum": 3, "workers": 2}, errors.InvalidArgumentError, "quorum"),
        ({"name": "../x"}, errors.InvalidNameError, "x"),
        ({"name": 3}, errors.InvalidNameError, "a job's name is of type int"),
    ],
)
def test_a_spec_that_is_wrong_creates_nothing(
    server: Server, arguments: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        make(server, **arguments)
    assert server.jobs() == []


def test_named_pairs_are_one_group(embedded: Server) -> None:
    job = make(embedded, params=[("a", np.zeros(1)), ("b", np.zeros(1))])
    assert [group["params"] for group in job.param_groups] == [["a", "b"]]


def test_exist_ok_attaches_and_the_servers_weights_win(server: Server, caplog: pytest.LogCaptureFixture) -> None:
    first = make(server, "user/digits")
    with first.join() as worker:
        worker.push({"w": np.ones((2, 3), np.float32)})
    with pytest.raises(errors.JobExistsError, match="user/digits"):
        make(server, "user/digits")
    with pytest.raises(errors.JobSpecMismatchError):
        make(server, "user/digits", lr=0.25, exist_ok=True)
    with caplog.at_level(logging.INFO, "optserve.client"):
        second = make(
            server, "user/digits", params={"w": np.zeros((2, 3), np.float32), "b": np.zeros(3, np.float32)}, exist_ok=True
        )
    assert f"joined 'user/digits' at version {second.position().version}" in caplog.text
    assert second.pull()["w"].max() == 1.5


def test_param_groups_are_torchs_and_read_only(server: Server) -> None:
    job = make(server, params=[{"params": params(w=(1,), v=(2,))}, {"params": params(b=(1,)), "lr": 0.25, "momentum": 0.9}])
    groups = job.param_groups
    assert list(groups[0])[:4] == ["params", "lr", "momentum", "dampening"]
    assert [(group["params"], group["lr"], group["momentum"]) for group in groups] == [(["w", "v"], 0.5, 0), (["b"], 0.25, 0.9)]
    assert json.loads(json.dumps(groups))[1]["params"] == ["b"]
    for assign in (
        lambda: groups[1].__setitem__("lr", 0.1),
        lambda: groups[1].update(lr=0.1),
        lambda: groups[1].pop("lr"),
        lambda: groups[1].clear(),
        lambda: groups[1].__ior__({"lr": 0.1}),
        lambda: groups[1].setdefault("lr", 0.1),
    ):
        with pytest.raises(errors.ReadOnlyError, match=r"job.update_group\(1, lr="):
            assign()
    for assign in (
        lambda: setattr(job, "param_groups", []),
        lambda: groups.append({}),
        lambda: groups.__setitem__(0, {}),
        lambda: groups.clear(),
        lambda: groups.__iadd__([{}]),
    ):
        with pytest.raises(errors.ReadOnlyError, match=r"job\.add_param_group"):
            assign()
    with pytest.raises(errors.ReadOnlyError, match="add_param_group"):
        groups[0]["params"].append("x")
    for other in (copy.deepcopy(groups), pickle.loads(pickle.dumps(groups))):
        other[0]["lr"] = 1.0
        other[0]["params"].append("x")
    assert job.param_groups == groups


def test_a_group_is_edited_and_one_is_added(server: Server) -> None:
    job = make(server)
    position = job.update_group(0, lr=0.125, momentum=0.5)
    assert position == job.position()
    assert (job.param_groups[0]["lr"], job.param_groups[0]["momentum"]) == (0.125, 0.5)
    job.add_param_group({"params": {"late": np.full((2,), 7.0)}, "lr": 1.0})
    assert job.param_groups[1]["params"] == ["late"]
    assert job.pull()["late"].tolist() == [7, 7]
    for index, values, error in (
        (5, {"lr": 1.0}, errors.UnknownParameterError),
        (-1, {"lr": 1.0}, errors.UnknownParameterError),
        (0, {"lr": -1.0}, errors.InvalidHyperparameterError),
        (0, {"speed": 1.0}, errors.UnknownHyperparameterError),
        (0, {"lr": object()}, errors.InvalidHyperparameterError),
    ):
        before = job.position()
        with pytest.raises(error):
            job.update_group(index, **values)
        assert job.position() == before
    with pytest.raises(errors.DuplicateParameterError):
        job.add_param_group({"params": {"w": np.zeros(1)}})
    job.update_group(0, lr=1.0)


def test_another_clients_group_is_seen(server: Server) -> None:
    make(server, "shared")
    here, there = server.job("shared"), server.job("shared")
    worker = here.join()
    weights = worker.pull()
    there.add_param_group({"params": {"late": np.ones(2)}})
    assert here.pull(["late"])["late"].tolist() == [1, 1]
    assert worker.pull(out=weights)["late"].tolist() == [1, 1]
    there.add_param_group({"params": {"later": np.ones(2)}})
    weights = worker.push_pull({"later": np.ones(2)}, out=weights)
    assert weights["later"].tolist() == [0.5, 0.5]
    there.add_param_group({"params": {"last": np.ones(2)}})
    weights = worker.push_pull({"later": np.ones(2)}, out=weights)
    assert (weights["later"].tolist(), weights["last"].tolist()) == ([0, 0], [1, 1])
    with pytest.raises(errors.UnknownParameterError, match="gradient 'never'"):
        worker.push({"never": np.ones(2)})


def test_a_schedule_is_set_stepped_and_removed(server: Server) -> None:
    job = make(server)
    assert job.lr_schedule is None
    schedule = job.set_lr_schedule("StepLR", step_size=2, gamma=0.5)
    assert schedule is not None
    assert (schedule.name, schedule.arguments["step_size"], schedule.learning_rates) == ("StepLR", 2, (0.5,))
    job.step_schedule()
    stepped = job.step_schedule()
    assert stepped is not None
    assert (stepped.last_epoch, stepped.learning_rates) == (2, (0.25,))
    assert job.lr_schedule == stepped
    assert job.param_groups[0]["lr"] == 0.25
    with pytest.raises(errors.UnknownScheduleError, match="StepLR"):
        job.set_lr_schedule("SteppLR", step_size=2)
    assert job.set_lr_schedule(None) is None
    assert job.lr_schedule is None


def test_a_version_is_waited_for_with_a_deadline(server: Server) -> None:
    job = make(server)
    now = job.position().version
    assert job.wait_for_version(now, 1).version == now
    with pytest.raises(errors.DeadlineExceededError):
        job.wait_for_version(now + 1, timeout_seconds=0.2)
    timer = threading.Timer(0.2, job.update_group, [0], {"lr": 1.0})
    timer.start()
    assert job.wait_for_version(now + 1, timeout_seconds=20).version == now + 1
    timer.join()


def test_checkpoints_are_saved_listed_verified_restored_downloaded_and_deleted(server: Server, tmp_path: Path) -> None:
    job = make(server, "job", optimizer="adam")
    gradients = {"w": np.ones((2, 3), np.float32), "b": np.ones(3, np.float32)}
    with job.join() as worker:
        worker.push(gradients)
        saved = job.save_checkpoint("one")
        assert job.save_checkpoint("one") == saved
        at_one, state = job.pull(), job.state_dict()
        after = worker.push_pull(gradients)
        with pytest.raises(errors.CheckpointExistsError):
            job.save_checkpoint("one")
        position = job.restore_checkpoint("one")
        assert position.step == 1
        assert position.lineage_id != saved.position.lineage_id
        np.testing.assert_array_equal(job.pull()["w"], at_one["w"])
        np.testing.assert_array_equal(worker.push_pull(gradients)["w"], after["w"])
        assert [entry.name for entry in job.checkpoints()] == ["one"]
        assert job.verify_checkpoint("one").size_bytes > 0
        folder = job.download_checkpoint("one", tmp_path / "deep" / "one")
        with pytest.raises(errors.InvalidArgumentError, match="exists"):
            job.download_checkpoint("one", folder)
        with pytest.raises(errors.CheckpointNotFoundError):
            job.download_checkpoint("two", tmp_path / "two")
        assert list(tmp_path.iterdir()) == [tmp_path / "deep"]
    again = server.create_job("again", from_checkpoint=folder)
    np.testing.assert_array_equal(again.pull()["b"], at_one["b"])
    np.testing.assert_array_equal(again.state_dict()["state"][0]["exp_avg"], state["state"][0]["exp_avg"])
    assert server.create_job("again", from_checkpoint=folder, exist_ok=True).job_id == again.job_id
    with pytest.raises(errors.JobExistsError):
        server.create_job("again", from_checkpoint=folder)
    job.delete_checkpoint("one")
    assert job.checkpoints() == []
    for call in (job.restore_checkpoint, job.delete_checkpoint, job.verify_checkpoint):
        with pytest.raises(errors.CheckpointNotFoundError):
            call("one")
    with pytest.raises(errors.InvalidNameError):
        job.save_checkpoint("../one")


def test_a_damaged_download_makes_no_job(server: Server, tmp_path: Path) -> None:
    job = make(server)
    job.save_checkpoint("one")
    folder = job.download_checkpoint("one", tmp_path / "one")
    largest = max(folder.iterdir(), key=lambda path: path.suffix == ".safetensors")
    raw = bytearray(largest.read_bytes())
    raw[-1] ^= 1
    largest.write_bytes(raw)
    with pytest.raises(errors.CheckpointCorruptError):
        server.create_job("again", from_checkpoint=folder)
    with pytest.raises(errors.InvalidArgumentError, match="no folder"):
        server.create_job("again", from_checkpoint=tmp_path / "nowhere")
    with pytest.raises(errors.InvalidArgumentError, match="give only the name"):
        server.create_job("again", params(w=(1,)), from_checkpoint=folder)
    assert [entry.name for entry in server.jobs()] == [""]


def test_info_tells_what_the_job_is(server: Server) -> None:
    job = make(server, "told", workers=2, consistency="async", on_nonfinite="skip", on_missing="wait", lease_seconds=7.0)
    with job.join() as worker:
        worker.push({"w": np.ones((2, 3), np.float32)}, metrics={"loss": 0.5})
        info = server.job(job.job_id).info()
    assert (info.name, info.optimizer.lower(), info.workers) == ("told", "sgd", 2)
    assert (info.consistency, info.on_nonfinite, info.on_missing, info.lease_seconds) == ("async", "skip", "wait", 7.0)
    assert (info.metrics, info.initialized, info.position.step) == ({"loss": 0.5}, True, 1)
    assert [(member.name, member.rank, member.alive) for member in info.members] == [("rank0", 0, True)]
    assert [place.name for place in info.layout.places] == ["w", "b"]
    assert info.groups[0]["params"] == ["w", "b"]


def test_events_are_waited_for(server: Server) -> None:
    job = make(server)
    seen = job.events()
    timer = threading.Timer(0.2, job.update_group, [0], {"lr": 1.0})
    timer.start()
    began = time.monotonic()
    (event,) = job.events(after=seen[-1].index, wait_seconds=20)
    assert time.monotonic() - began < 10
    assert event.kind == "group"
    timer.join()


def test_a_deleted_job_is_not_found_and_deleting_it_again_is_no_error(server: Server) -> None:
    job = make(server, "gone")
    job.delete()
    job.delete()
    for call in (job.info, job.pull, job.join, lambda: job.update_group(0, lr=1.0), lambda: server.job("gone")):
        with pytest.raises(errors.JobNotFoundError, match=r"gone|no job"):
            call()


def test_calls_from_many_threads_are_each_applied_once(server: Server) -> None:
    job = make(server)
    job.set_lr_schedule("ExponentialLR", gamma=0.5)
    threads = [threading.Thread(target=job.step_schedule) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    schedule = job.lr_schedule
    assert schedule is not None
    assert schedule.last_epoch == 8

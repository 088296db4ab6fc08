"""Metrics from the push to the job, its events and its curves."""

from __future__ import annotations

import importlib.util
import math
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from functools import partial
from importlib.machinery import ModuleSpec
from pathlib import Path
from threading import Thread
from typing import Any

import numpy as np
import pytest
from event_files import curves, float32, runs

from optserve.cli import exits
from optserve.client import Event, Job, Server, Worker, connect, errors
from optserve.server.app import App, ServerConfig, start_line
from optserve.wire.metrics import MOST_METRICS

W = {"w": np.zeros(3, np.float32)}
G = {"w": np.array([2.0, 0.0, 0.0], np.float32)}


def all_at_once(*calls: Callable[[], object]) -> None:
    threads = [Thread(target=call) for call in calls]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def rounds(job: Job) -> list[Event]:
    return [event for event in job.events() if event.kind == "round"]


def push(worker: Worker, loss: float, **more: Any) -> None:
    worker.push(G, metrics={"loss": loss}, **more)


# On the job and its events ----------------------------------------------------------------------------------------------------


def test_metrics_are_means_by_weight_whatever_their_names(server: Server) -> None:
    job = server.create_job(None, W, optimizer="sgd", lr=1.0, workers=2)
    names = ("kind", "message", "metrics", "ranks", "numbers", "grad_norm", "skip_reason", "clip_factor", "evaluations")
    with job.join(rank=0) as first, job.join(rank=1) as second:
        all_at_once(
            lambda: first.push(G, weight=3.0, metrics={**dict.fromkeys(names, 1.0), "only": 7.0}),
            lambda: second.push(G, weight=1.0, metrics=dict.fromkeys(names, 5.0)),
        )
        expected = {**dict.fromkeys(names, 2.0), "only": 7.0}
        assert first.last_step is not None
        assert first.last_step.metrics == expected
    (event,) = rounds(job)
    assert event.metrics == expected
    assert (event.fields["ranks"], event.message) == ("[0, 1]", "step 1")
    assert float(event.fields["grad_norm"]) == pytest.approx(2.0)
    assert job.info().metrics == expected
    assert all(entry.metrics == {} for entry in job.events() if entry.kind != "round")


def test_a_round_without_metrics_leaves_the_jobs_and_has_none(server: Server) -> None:
    job = server.create_job(None, W, optimizer="sgd", lr=1.0)
    with job.join() as worker:
        push(worker, 0.5)
        worker.push(G)
    assert [event.metrics for event in rounds(job)] == [{"loss": 0.5}, {}]
    assert job.info().metrics == {"loss": 0.5}


def test_a_nan_loss_is_a_metric_and_goes_through_a_checkpoint(client: Server) -> None:
    job = client.create_job(None, W, optimizer="sgd", lr=1.0)
    with job.join() as worker:
        worker.push(G, metrics={"loss": math.nan, "far": -math.inf})
    job.save_checkpoint("c")
    with job.join() as worker:
        worker.push(G, metrics={"loss": 1.0})
    assert job.info().metrics == {"loss": 1.0}
    job.restore_checkpoint("c")
    found = job.info().metrics
    assert math.isnan(found["loss"])
    assert found["far"] == -math.inf


def test_too_much_is_refused_by_the_client_and_by_the_server(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    job = server.create_job(None, W, optimizer="sgd", lr=1.0)
    bad: list[Mapping[str, float]] = [{str(index): 0.0 for index in range(MOST_METRICS + 1)}, {"x" * 1000: 0.0}, {"": 0.0}]
    with job.join() as worker:
        for metrics in bad:
            with pytest.raises(errors.InvalidArgumentError, match="metric"):
                worker.push(G, metrics=metrics)
        monkeypatch.setattr("optserve.client._options.checked_metrics", dict)
        for metrics in bad:
            with pytest.raises(errors.InvalidArgumentError, match="metric"):
                worker.push(G, metrics=metrics)
        most = {f"{index:0128}": float(index) for index in range(MOST_METRICS)}
        worker.push(G, metrics=most)
    assert job.position().step == 1
    (event,) = rounds(job)
    assert event.metrics == most
    assert event.fields["ranks"] == "[0]"


# As curves --------------------------------------------------------------------------------------------------------------------

StartApp = Callable[..., App]


@pytest.fixture
def start(start_app: StartApp, tmp_path: Path) -> Callable[[], App]:
    """A server that writes TensorBoard files under tmp_path / "data"."""
    return lambda: start_app(data_dir=tmp_path / "data", tensorboard=True)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "data" / "tensorboard"


def test_tensorboard_shows_every_rounds_metrics_norm_and_rates(start: Callable[[], App], root: Path) -> None:
    app = start()
    with connect(app.address) as server, ExitStack() as stack:
        groups = [{"params": W}, {"params": {"b": np.zeros(1, np.float32)}, "lr": 0.5}]
        job = server.create_job("ada/digits", groups, optimizer="sgd", lr=1.0, workers=2, clip_grad_norm=1.0)
        workers = [stack.enter_context(job.join(rank=rank)) for rank in range(2)]
        job.set_lr_schedule("ExponentialLR", gamma=0.5)
        for step in range(1, 11):
            all_at_once(*(partial(push, workers[rank], step + rank, weight=1.0 + 2 * rank) for rank in range(2)))
            job.step_schedule()
    app.stop(1.0)
    assert runs(root) == ["ada/digits"]
    shown = curves(root / "ada/digits")
    steps = range(1, 11)
    assert shown.pop("loss") == [(step, step + 0.75) for step in steps]
    assert shown.pop("optserve/grad_norm") == [(step, 2.0) for step in steps]
    assert shown.pop("optserve/clip_factor") == [(step, float32(1 / (2 + 1e-6))) for step in steps]
    assert shown.pop("optserve/lr/group0") == [(step, 0.5 ** (step - 1)) for step in steps]
    assert shown.pop("optserve/lr/group1") == [(step, 0.5**step) for step in steps]
    assert shown.pop("optserve/skipped") == [(step, 0.0) for step in steps]
    assert shown == {}


def test_a_restore_and_a_restart_leave_no_zigzag(start: Callable[[], App], root: Path) -> None:
    app = start()
    with connect(app.address) as server:
        job = server.create_job("j", W, optimizer="sgd", lr=1.0)
        with job.join() as worker:
            for step in range(1, 7):
                push(worker, step)
                if step == 3:
                    job.save_checkpoint("three")
            job.restore_checkpoint("three")
            for step in range(4, 6):
                push(worker, step + 100)
    app.stop(1.0)
    app = start()
    with connect(app.address) as server:
        job = server.job("j")
        assert job.position().step == 5
        job.restore_checkpoint("three")
        with job.join() as worker:
            push(worker, 1000)
    app.stop(1.0)
    assert curves(root / "j")["loss"] == [(1, 1.0), (2, 2.0), (3, 3.0), (4, 1000.0)]


def test_a_window_is_one_point_and_skipped_rounds_are_counted(start: Callable[[], App], root: Path) -> None:
    app = start()
    with connect(app.address) as server:
        job = server.create_job("j", W, optimizer="sgd", lr=1.0, accumulation=2, on_nonfinite="skip")
        with job.join() as worker:
            for losses in ((1.0, 3.0), (5.0, 6.0)):
                push(worker, losses[0])
                worker.push({"w": np.full(3, np.nan, np.float32)}, metrics={"loss": math.nan})
                push(worker, losses[1])
            worker.skip_round(metrics={"accuracy": 0.75})
    app.stop(1.0)
    shown = curves(root / "j")
    assert shown["loss"] == [(1, 2.0), (2, 5.5)]
    assert shown["optserve/skipped"] == [(1, 1.0), (1, 1.0), (2, 1.0), (2, 1.0)]
    assert shown["accuracy"] == [(2, 0.75)]


def test_an_unnamed_job_is_shown_by_its_id_and_a_new_job_of_an_old_name_begins_anew(
    start: Callable[[], App], root: Path
) -> None:
    app = start()
    with connect(app.address) as server:
        unnamed = server.create_job(None, W, optimizer="sgd", lr=1.0)
        with unnamed.join() as worker:
            push(worker, 1.0)
        for count in (3, 2):
            job = server.create_job("j", W, optimizer="sgd", lr=1.0)
            with job.join() as worker:
                for step in range(count):
                    push(worker, 10.0 * count + step)
            job.delete()
    app.stop(1.0)
    assert runs(root) == sorted([unnamed.job_id, "j"])
    assert curves(root / unnamed.job_id)["loss"] == [(1, 1.0)]
    assert curves(root / "j")["loss"] == [(1, 20.0), (2, 21.0)]


def test_training_goes_on_where_curves_cannot_be_written(
    start: Callable[[], App], root: Path, caplog: pytest.LogCaptureFixture
) -> None:
    app = start()
    root.rmdir()
    root.write_text("no folder")
    with connect(app.address) as server:
        job = server.create_job("j", W, optimizer="sgd", lr=1.0)
        with job.join() as worker:
            for step in range(5):
                push(worker, step)
        assert job.position().step == 5
        assert [event.metrics["loss"] for event in rounds(job)] == [0.0, 1.0, 2.0, 3.0, 4.0]
    app.stop(1.0)
    assert [entry.getMessage() for entry in caplog.records if "TensorBoard" in entry.getMessage()] == [
        f"job 'j': cannot write TensorBoard files to {root / 'j'}: Not a directory; training goes on"
    ]


def test_checkpoints_and_curves_lie_side_by_side(start: Callable[[], App], root: Path) -> None:
    app = start()
    with connect(app.address) as server:
        job = server.create_job("tensorboard", W, optimizer="sgd", lr=1.0)
        with job.join() as worker:
            push(worker, 1.0)
        expected = job.pull()["w"]
    app.stop(1.0)
    app = start()
    with connect(app.address) as server:
        assert [info.name for info in server.jobs()] == ["tensorboard"]
        np.testing.assert_array_equal(server.job("tensorboard").pull()["w"], expected)
    assert f"TensorBoard files in {root}" in start_line(app)


def test_serve_writes_them_when_asked(server_process: Callable[..., Any], tmp_path: Path, root: Path) -> None:
    process = server_process(data_dir=tmp_path / "data", arguments=("--tensorboard",))
    with connect(process.address) as server, server.create_job("j", W, optimizer="sgd", lr=1.0).join() as worker:
        push(worker, 0.5)
    assert process.stop() == 0
    assert curves(root / "j")["loss"] == [(1, 0.5)]


def test_without_a_data_dir_they_are_refused() -> None:
    with pytest.raises(errors.InvalidArgumentError, match="--data-dir"):
        App(ServerConfig(address=None, backend="numpy", tensorboard=True))
    command = [sys.executable, "-m", "optserve.cli", "serve", "--address", "127.0.0.1:0", "--backend", "numpy"]
    settings = {**os.environ, "OPTSERVE_TENSORBOARD": "1"}
    done = subprocess.run(command, env=settings, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (exits.USAGE, "")
    assert done.stderr.startswith("error: TensorBoard files are asked for without a data dir")
    assert done.stderr.count("\n") == 1


def test_without_tensorboardx_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.util.find_spec

    def find(name: str) -> ModuleSpec | None:
        return None if name == "tensorboardX" else real(name)

    monkeypatch.setattr("importlib.util.find_spec", find)
    with pytest.raises(errors.MissingExtraError, match=r'pip install "optserve\[tensorboard\]"') as caught:
        App(ServerConfig(address=None, backend="numpy", data_dir=tmp_path, tensorboard=True))
    assert caught.value.metadata == {"extra": "tensorboard"}


def test_a_server_that_is_not_asked_writes_none(start_app: StartApp, tmp_path: Path) -> None:
    app = start_app(data_dir=tmp_path / "data")
    with connect(app.address) as server, server.create_job("j", W, optimizer="sgd", lr=1.0).join() as worker:
        push(worker, 0.5)
    app.stop(1.0)
    assert not (tmp_path / "data" / "tensorboard").exists()

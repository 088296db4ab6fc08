"""worker.update_group() and worker.param_groups: edits that go with the next push, groups as replies tell them."""

from __future__ import annotations

import copy
import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from optserve.client import Job, Server, Worker, connect
from optserve.client._edits import Edits
from optserve.wire import errors
from optserve.wire.values import to_hyperparameters

NOTHING: frozenset[str] = frozenset()


def job_of(server: Server, name: str | None = None, **arguments: Any) -> Job:
    values = {"w": np.zeros(2, np.float32), "b": np.zeros(2, np.float32)}
    return server.create_job(name, values, **{"optimizer": "sgd", "lr": 1.0, **arguments})


def ones(value: float = 1.0) -> dict[str, Any]:
    return {name: np.full(2, value, np.float32) for name in "wb"}


def b(weights: Any) -> list[float]:
    found: list[float] = weights["b"].tolist()
    return found


def lr(worker: Worker) -> float:
    return float(worker.param_groups[0]["lr"])


PUSHES: dict[str, Any] = {
    "push": lambda worker: worker.push(ones()),
    "push_pull": lambda worker: worker.push_pull(ones()),
    "push_pull_async": lambda worker: worker.push_pull_async(ones()).result(20),
}


def test_an_edit_that_no_push_follows_is_said_to_be_lost(server: Server, caplog: pytest.LogCaptureFixture) -> None:
    job = job_of(server)
    with job.join() as worker:
        worker.update_group(0, lr=0.5)
        worker.push(ones())
        worker.update_group(0, lr=0.25)
    assert job.param_groups[0]["lr"] == 0.5
    worker.leave()
    lost = [entry.getMessage() for entry in caplog.records if entry.levelname == "WARNING"]
    assert lost == ["update_group(group 0: lr) is lost: the worker left before its next push"]


@pytest.mark.parametrize("push", PUSHES)
def test_an_edit_goes_with_the_next_push_and_holds_from_its_step_on(server: Server, push: str) -> None:
    job = job_of(server)
    with job.join() as worker:
        PUSHES[push](worker)
        worker.update_group(0, lr=0.5)
        assert (lr(worker), job.param_groups[0]["lr"]) == (1.0, 1.0), "it is not the job's yet"
        PUSHES[push](worker)
        assert worker.last_step is not None
        assert worker.last_step.lr == (0.5,)
        assert (lr(worker), job.param_groups[0]["lr"]) == (0.5, 0.5)
        assert b(worker.push_pull(ones())) == [-2.0, -2.0]


def test_an_edit_waits_for_a_push_in_a_thread_and_goes_with_the_next_one(embedded: Server) -> None:
    job = job_of(embedded, workers=2)
    with job.join() as worker, job.join() as other, ThreadPoolExecutor(1) as thread:
        waiting = worker.push_pull_async(ones())
        edited = thread.submit(worker.update_group, 0, lr=0.5)
        assert not edited.done()
        assert other.push(ones()).lr == (1.0,)
        edited.result(20)
        assert b(waiting.result(20)) == [-1.0, -1.0]
        waiting = worker.push_pull_async(ones())
        assert other.push(ones()).lr == (0.5,)
        assert b(waiting.result(20)) == [-1.5, -1.5]


def test_an_edit_goes_with_a_round_that_is_sat_out(server: Server) -> None:
    job = job_of(server)
    with job.join() as worker:
        worker.update_group(0, lr=0.5)
        assert b(worker.skip_round()) == [0.0, 0.0]
        assert lr(worker) == 0.5


def test_the_last_of_several_edits_of_one_hyperparameter_counts(server: Server) -> None:
    with job_of(server).join() as worker:
        worker.update_group(0, lr=0.5, momentum=0.9)
        worker.update_group(0, lr=np.float64(0.25))
        worker.update_group(0)
        worker.push(ones())
        group = worker.param_groups[0]
        assert (group["lr"], group["momentum"]) == (0.25, 0.9)


def test_param_groups_of_a_worker_are_those_of_the_job_and_read_only(server: Server) -> None:
    job = server.create_job(
        None, [{"params": {"w": np.zeros(2)}, "lr": 0.5}, {"params": {"b": np.zeros(2, np.float32)}}], optimizer="adam", lr=0.1
    )
    with job.join() as worker:
        groups = worker.param_groups
        assert groups == job.param_groups
        assert list(groups[0]) == list(job.param_groups[0])
        assert json.loads(json.dumps(groups))[1]["params"] == ["b"]
        copy.deepcopy(groups)[0]["lr"] = 3.0
        with pytest.raises(
            errors.ReadOnlyError, match=r"worker\.param_groups is read-only; .* worker\.update_group\(1, lr=0\.1\)"
        ):
            groups[1]["lr"] = 0.1
        for assign in (lambda: groups.append({}), lambda: setattr(worker, "param_groups", [])):
            with pytest.raises(errors.ReadOnlyError, match=r"worker\.update_group\(0, lr=.*job\.add_param_group"):
                assign()
        assert worker.param_groups == job.param_groups


def test_replies_tell_what_others_changed(server: Server) -> None:
    job = job_of(server)
    with job.join() as worker:
        job.update_group(0, lr=0.25)
        assert lr(worker) == 1.0, "no reply has told it yet"
        worker.push(ones())
        assert lr(worker) == 0.25
        job.update_group(0, lr=0.375)
        worker.pull()
        assert lr(worker) == 0.375
        job.update_group(0, lr=0.25)
        job.add_param_group({"params": {"v": np.zeros(3, np.float32)}, "lr": 0.125})
        worker.push(ones())
        assert worker.param_groups == job.param_groups
        job.set_lr_schedule("ExponentialLR", gamma=0.5)
        worker.step_schedule()
        assert worker.param_groups == job.param_groups
        assert [group["lr"] for group in worker.param_groups] == [0.125, 0.0625]


def test_an_edit_of_somebody_else_after_it_is_not_undone(server: Server) -> None:
    job = job_of(server)
    with job.join() as worker:
        worker.update_group(0, lr=0.5)
        worker.push(ones())
        job.update_group(0, lr=0.25)
        worker.push(ones())
        assert lr(worker) == job.param_groups[0]["lr"] == 0.25


def test_a_group_that_was_just_added_can_be_edited(server: Server) -> None:
    job = job_of(server)
    with job.join() as worker:
        job.add_param_group({"params": {"v": np.zeros(2, np.float32)}})
        worker.update_group(1, lr=0.5)
        assert [group["params"] for group in worker.param_groups] == [["w", "b"], ["v"]]
        worker.push({**ones(), "v": np.ones(2, np.float32)})
        assert worker.pull()["v"].tolist() == [-0.5, -0.5]


def test_an_edit_goes_with_a_step_of_the_schedule_that_comes_before_the_next_push(server: Server) -> None:
    job = job_of(server)
    with job.join() as worker:
        worker.update_group(0, lr=0.5)
        with pytest.raises(errors.InvalidArgumentError, match="the job has no schedule"):
            worker.step_schedule()
        job.set_lr_schedule("ReduceLROnPlateau", factor=0.5, patience=0)
        with pytest.raises(errors.InvalidArgumentError, match="metric"):
            worker.step_schedule()
        assert job.param_groups[0]["lr"] == 1.0
        for metric, rate in ((1.0, 0.5), (2.0, 0.25)):
            assert worker.step_schedule(metric).learning_rates == (rate,)
            assert lr(worker) == job.param_groups[0]["lr"] == rate
        assert worker.push(ones()).lr == (0.25,)


def test_an_edit_goes_once_with_a_step_that_calls_functions(server: Server) -> None:
    job = job_of(server)
    job.set_lr_schedule("MultiplicativeLR", lr_lambda=lambda _: 0.5)
    with job.join() as worker:
        job.step_schedule()
        worker.update_group(0, lr=8.0, momentum=0.5)
        assert worker.step_schedule().learning_rates == (4.0,)
        assert worker.param_groups == job.param_groups
        assert worker.push(ones()).lr == (4.0,)


def test_an_edit_that_a_step_of_the_schedule_refuses_is_dropped_and_said_to_be(server: Server) -> None:
    job = job_of(server, workers=2)
    job.set_lr_schedule("ExponentialLR", gamma=0.5)
    with job.join() as worker, job.join() as other:
        worker.update_group(0, lr=-1.0)
        with pytest.raises(errors.InvalidHyperparameterError, match=r"(?s)Invalid learning rate: -1\.0") as caught:
            worker.step_schedule()
        assert "(group 0: lr) is dropped" in caught.value.__notes__[0]
        worker.update_group(0, lr=8.0)
        worker.step_schedule()
        other.update_group(0, lr=4.0)
        with pytest.raises(errors.RanksDisagreeError, match=r"changed to 8\.0, this rank has it changed to 4\.0") as caught:
            other.step_schedule()
        assert "(group 0: lr) is dropped" in caught.value.__notes__[0]
        other.update_group(0, lr=8.0)
        other.step_schedule()
        assert lr(other) == job.param_groups[0]["lr"] == 4.0


@pytest.mark.parametrize(
    ("index", "entries", "error", "message"),
    [
        (1, {"lr": 0.5}, errors.UnknownParameterError, "the job has 1 param groups; there is no group 1"),
        (-1, {"lr": 0.5}, errors.UnknownParameterError, "there is no group -1"),
        ("0", {"lr": 0.5}, TypeError, "integer"),
        (0, {"lr": object()}, errors.InvalidHyperparameterError, "lr is <object"),
        (0, {"betas": (0.9, "x")}, errors.InvalidHyperparameterError, "betas is"),
    ],
)
def test_what_cannot_be_sent_is_refused_at_once(
    embedded: Server, index: Any, entries: Any, error: type[Exception], message: str
) -> None:
    with job_of(embedded).join() as worker:
        with pytest.raises(error, match=message):
            worker.update_group(index, **entries)
        assert worker.push(ones()).lr == (1.0,)


@pytest.mark.parametrize(
    ("entries", "error", "message"),
    [
        ({"lr": -1.0}, errors.InvalidHyperparameterError, r"Invalid learning rate: -1\.0"),
        ({"learning_rate": 0.1}, errors.UnknownHyperparameterError, "no hyperparameter 'learning_rate'"),
        ({"nesterov": True}, errors.InvalidHyperparameterError, "Nesterov momentum requires"),
    ],
)
def test_what_the_server_refuses_is_the_pushs_error_and_is_not_sent_again(
    server: Server, entries: Any, error: type[Exception], message: str
) -> None:
    job = job_of(server)
    with job.join() as worker:
        worker.update_group(0, weight_decay=0.5, **entries)
        before = job.param_groups
        with pytest.raises(error, match=message) as caught:
            worker.push(ones())
        (note,) = caught.value.__notes__
        assert note.startswith(f"What update_group had changed (group 0: weight_decay, {next(iter(entries))}) is dropped")
        assert job.param_groups == before
        assert worker.push(ones()).step == 1
        assert job.param_groups == before


def test_an_edit_outlives_a_push_that_was_refused_for_its_gradients(server: Server) -> None:
    with job_of(server).join() as worker:
        worker.update_group(0, lr=0.5)
        for bad, error in ((ones(np.nan), errors.NonfiniteGradientError), ({"w": np.zeros(3)}, errors.ShapeMismatchError)):
            with pytest.raises(error) as caught:
                worker.push(bad)
            assert not hasattr(caught.value, "__notes__")
        with pytest.raises(errors.NonfiniteGradientError):
            worker.push_pull_async(ones(np.inf)).result(20)
        assert worker.push(ones()).lr == (0.5,)


def test_an_edit_outlives_a_round_that_was_not_completed(embedded: Server) -> None:
    job = job_of(embedded, workers=2, round_timeout_seconds=0.2)
    with job.join() as worker:
        worker.update_group(0, lr=0.5)
        with pytest.raises(errors.RoundTimeoutError):
            worker.push(ones())
        with job.join() as other:
            waiting = other.push_pull_async(ones())
            assert b(worker.push_pull(ones())) == b(waiting.result(20)) == [-0.5, -0.5]
            assert lr(worker) == lr(other) == 0.5


def test_an_edit_from_before_a_restore_is_of_the_state_that_is_gone(server: Server) -> None:
    job = job_of(server)
    job.save_checkpoint("c")
    with job.join() as worker:
        worker.push(ones())
        worker.update_group(0, lr=0.5)
        job.restore_checkpoint("c")
        worker.update_group(0, momentum=0.9)
        assert worker.push(ones()).lr == (1.0,)
        assert worker.param_groups == job.param_groups
        assert worker.param_groups[0]["momentum"] == 0.9


TELLS: dict[str, Any] = {
    "push": lambda worker: worker.push(ones()),
    "pull": lambda worker: worker.pull(),
    "step_schedule": lambda worker: worker.step_schedule(),
    "push_pull_async": lambda worker: worker.push_pull_async(ones()).result(20),
}


@pytest.mark.parametrize("tells", TELLS)
def test_a_restore_by_somebody_else_drops_the_edit_with_the_error_that_tells_of_it(start_server: Any, tells: str) -> None:
    app = start_server()
    with connect(app.address) as one, connect(app.address) as admin:
        job = job_of(one, "j")
        job.save_checkpoint("c")
        with job.join() as worker:
            worker.push(ones())
            worker.update_group(0, lr=0.5)
            admin.job("j").restore_checkpoint("c")
            with pytest.raises(errors.RolledBackError) as caught:
                TELLS[tells](worker)
            assert "(group 0: lr) is dropped" in caught.value.__notes__[0]
            assert worker.push(ones()).lr == (1.0,)
            assert worker.param_groups == job.param_groups


def test_a_worker_goes_on_where_a_group_that_was_added_is_lost(start_server: Any, tmp_path: Path) -> None:
    app = start_server(data_dir=tmp_path / "data")
    with connect(app.address) as server:
        job = job_of(server, "j")
        with job.join() as worker:
            worker.push(ones())
            job.save_checkpoint("c")
            shutil.copytree(tmp_path / "data", tmp_path / "as it was")
            job.add_param_group({"params": {"v": np.zeros(2, np.float32)}, "lr": 0.5})
            worker.push({**ones(), "v": np.ones(2, np.float32)})
            assert [group["lr"] for group in worker.param_groups] == [1.0, 0.5]
            app.stop(1.0)
            start_server(port=int(app.address.rpartition(":")[2]), data_dir=tmp_path / "as it was")
            with pytest.raises(errors.RolledBackError):
                worker.push({**ones(), "v": np.ones(2, np.float32)})
            assert worker.param_groups == job.param_groups
            assert len(worker.param_groups) == 1
            with pytest.raises(errors.UnknownParameterError, match="there is no group 1"):
                worker.update_group(1, lr=0.25)
            assert worker.push(ones()).step == 2
            assert list(worker.pull()) == ["w", "b"]


def test_a_restore_is_told_with_the_next_reply(server: Server) -> None:
    job = job_of(server)
    job.save_checkpoint("c")
    with job.join() as worker:
        worker.update_group(0, lr=0.5)
        worker.push(ones())
        job.restore_checkpoint("c")
        worker.push(ones())
        assert lr(worker) == 1.0


def test_an_edit_waits_for_the_server_to_come_back_and_all_groups_are_told_anew(start_server: Any, tmp_path: Path) -> None:
    app = start_server(data_dir=tmp_path)
    with connect(app.address) as server:
        job = job_of(server, "j")
        with job.join() as worker:
            worker.update_group(0, lr=0.5)
            worker.push(ones())
            worker.update_group(0, momentum=0.9)
            app.stop(1.0)
            start_server(port=int(app.address.rpartition(":")[2]), data_dir=tmp_path)
            job.update_group(0, weight_decay=0.25)
            worker.push(ones())
            assert worker.param_groups == job.param_groups
            group = worker.param_groups[0]
            assert (group["lr"], group["momentum"], group["weight_decay"]) == (0.5, 0.9, 0.25)


def test_a_worker_that_was_closed_takes_no_edits(embedded: Server) -> None:
    worker = job_of(embedded).join()
    worker.leave()
    with pytest.raises(errors.ClosedError, match="it has left"):
        worker.update_group(0, lr=0.5)


def test_edits_are_kept_until_a_push_has_brought_them() -> None:
    edits = Edits()
    edits.note(1, to_hyperparameters({"lr": 0.5}), NOTHING)
    edits.note(0, to_hyperparameters({"lr": 0.25, "eps": 1e-6}), NOTHING)
    assert str(edits) == "group 1: lr; group 0: lr, eps"
    assert edits.to_proto() == edits.to_proto()
    edits.failed(errors.RoundFailedError("a rank was lost"))
    assert [change.group for change in edits.to_proto()] == [1, 0]
    edits.applied()
    error = errors.FencedError("replaced")
    edits.failed(error)
    assert edits.to_proto() == []
    assert not hasattr(error, "__notes__")

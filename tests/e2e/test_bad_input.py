"""The issue's list of bad input: a typed error that names the thing, and nothing changes."""

from __future__ import annotations

import math
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from optserve.client import Job, Server, Worker, connect, errors
from optserve.server.app import App, ServerConfig
from optserve.v1 import jobs_pb2

W = np.arange(12, dtype=np.float32).reshape(3, 4)
B = np.zeros(4, np.float32)
ONES = {"w": np.ones_like(W), "b": np.ones_like(B)}


def test_unknown_job(server: Server, job: Job, refused: Any) -> None:
    with refused(errors.JobNotFoundError, r"no job 'digit'.*digits"):
        server.job("digit")


@pytest.mark.parametrize("name", ["", None, 3, b"digits"])
def test_what_is_no_name_of_a_job_finds_none_and_least_of_all_an_unnamed_one(server: Server, refused: Any, name: Any) -> None:
    server.create_job(None, {"w": W}, optimizer="sgd", lr=0.1)
    with refused(errors.JobNotFoundError, "a job is found by its name or UUID, a str"):
        server.job(name)


def test_the_server_finds_no_unnamed_job_by_its_empty_name(server: Server) -> None:
    server.create_job(None, {"w": W}, optimizer="sgd", lr=0.1)
    with pytest.raises(errors.JobNotFoundError, match="no job ''"):
        server._connection.call(jobs_pb2.GetJobRequest(job=""), jobs_pb2.GetJobResponse)


@pytest.mark.parametrize("names", ["w", 3, b"w"])
def test_names_to_pull_are_a_list(job: Job, refused: Any, names: Any) -> None:
    with refused(errors.InvalidArgumentError, "names is .*; it must be a list of names of parameters"):
        job.pull(names)


VALUES_THAT_ARE_NO_ARRAY = [
    (errors.InvalidArgumentError, [[1.0], [2.0, 3.0]]),
    (errors.InvalidArgumentError, torch.ones(3, requires_grad=True)),
    (errors.DtypeMismatchError, torch.eye(3).to_sparse()),
    (errors.DtypeMismatchError, torch.ones(3, dtype=torch.bfloat16)),
    (errors.DtypeMismatchError, torch.ones(3, device="meta")),
]


@pytest.mark.parametrize(("kind", "value"), VALUES_THAT_ARE_NO_ARRAY, ids=str)
def test_a_value_that_is_no_array(server: Server, job: Job, refused: Any, kind: Any, value: Any) -> None:
    message = "parameter 'w' cannot be made an array"
    with refused(kind, message):
        server.create_job("other", {"w": value}, optimizer="adam")
    with refused(kind, message):
        job.add_param_group({"params": {"w": value}})
    with refused(kind, message):
        job.replace_parameter("w", value)
    assert [entry.name for entry in server.jobs()] == ["digits"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lr": 0.2}, r"job 'digits' exists with another spec: .*lr=0\.1, not 0\.2"),
        ({"optimizer": "sgd"}, r"optimizer is 'Adam', not 'SGD'"),
        ({"workers": 2}, "workers is 1, not 2"),
        ({"consistency": "async"}, "consistency is 'sync', not 'async'"),
        ({"params": {"w": W.T.copy(), "b": B}}, r"'w' \(3, 4\) float32, not 'w' \(4, 3\) float32"),
        ({"params": {"w": W}}, "2 of them, not 1"),
        ({"params": [{"params": {"w": W}}, {"params": {"b": B}}]}, "1 param groups, not 2"),
    ],
    ids=str,
)
def test_job_exists_with_another_spec(server: Server, refused: Any, changes: dict[str, Any], message: str) -> None:
    spec = {"params": {"w": W, "b": B}, "optimizer": "adam", "lr": 0.1, **changes}
    with refused(errors.JobSpecMismatchError, message):
        server.create_job("digits", **spec, exist_ok=True)
    with refused(errors.JobExistsError, "job 'digits' exists"):
        server.create_job("digits", **spec)


def test_an_existing_jobs_values_win(server: Server, job: Job, same: Any) -> None:
    again = server.create_job("digits", {"w": W + 1, "b": B + 1}, optimizer="adam", lr=0.1, exist_ok=True)
    assert again.job_id == job.job_id
    same(again.pull(), {"w": W, "b": B})


@pytest.mark.parametrize(
    ("kind", "arguments", "message"),
    [
        (errors.UnknownOptimizerError, {"optimizer": "adm"}, "unknown optimizer 'adm'; did you mean 'Adam'.*SGD"),
        (errors.UnknownHyperparameterError, {"learning_rate": 1.0}, "no hyperparameter 'learning_rate'"),
        (errors.UnknownHyperparameterError, {"beta": (0.9, 0.99)}, "'beta'; did you mean 'betas'.*weight_decay"),
        (errors.InvalidHyperparameterError, {"lr": -0.1}, "Invalid learning rate: -0.1"),
        (errors.InvalidHyperparameterError, {"betas": (1.0, 0.999)}, "Invalid beta parameter at index 0: 1.0"),
        (errors.InvalidHyperparameterError, {"betas": (0.9, -0.1)}, "Invalid beta parameter at index 1: -0.1"),
        (errors.InvalidHyperparameterError, {"lr": math.nan}, "nan"),
        (errors.InvalidHyperparameterError, {"eps": math.nan}, "nan"),
        (errors.InvalidHyperparameterError, {"betas": (math.nan, 0.9)}, "nan"),
        (errors.InvalidHyperparameterError, {"weight_decay": math.nan}, "nan"),
        (errors.InvalidHyperparameterError, {"lr": "fast"}, "lr is 'fast'"),
        (errors.InvalidHyperparameterError, {"lr": None}, "lr is None"),
        (errors.InvalidHyperparameterError, {"lr": True}, "lr is True"),
        (errors.InvalidHyperparameterError, {"lr": np.ones(3)}, "lr is array"),
        (errors.InvalidHyperparameterError, {"betas": (0.9,)}, "betas has 1"),
        (errors.InvalidHyperparameterError, {"amsgrad": "yes"}, "amsgrad is 'yes'"),
        (errors.InvalidArgumentError, {"params": {}}, "empty parameter list"),
        (errors.InvalidArgumentError, {"params": []}, "empty parameter list"),
        (errors.InvalidArgumentError, {"params": W}, "ndarray"),
        (errors.DtypeMismatchError, {"params": {"w": np.zeros(3, np.int64)}}, "parameter 'w' has dtype int64; allowed are"),
        (errors.DtypeMismatchError, {"params": {"w": "text"}}, "parameter 'w'"),
        (errors.DuplicateParameterError, {"params": [("w", W), ("w", W)]}, "'w' appears more than once"),
        (errors.DuplicateParameterError, {"params": [{"params": {"w": W}}, {"params": {"w": W}}]}, "'w' appears more"),
        (errors.InvalidArgumentError, {"workers": 0}, "workers is 0"),
        (errors.InvalidArgumentError, {"quorum": 2}, "quorum is 2"),
        (errors.InvalidArgumentError, {"accumulation": 0}, "accumulation is 0; it must be a whole number of at least 1"),
        (errors.InvalidArgumentError, {"accumulation": 1 << 40}, r"accumulation is 1099511627776; it must be below 2\^32"),
        (errors.InvalidArgumentError, {"consistency": "syn"}, "did you mean 'sync'"),
        (errors.InvalidArgumentError, {"on_missing": "ignore"}, "drop, wait, fail"),
        (errors.InvalidArgumentError, {"lease_seconds": -1.0}, "lease_seconds is -1"),
        (errors.InvalidArgumentError, {"round_timeout_seconds": math.inf}, "round_timeout_seconds is inf"),
    ],
    ids=lambda entry: str(entry)[:30],
)
def test_a_job_that_cannot_be(server: Server, refused: Any, kind: Any, arguments: dict[str, Any], message: str) -> None:
    spec = {"params": {"w": W, "b": B}, "optimizer": "adam", **arguments}
    with refused(kind, message):
        server.create_job("other", **spec)
    assert [entry.name for entry in server.jobs()] == ["digits"]


@pytest.mark.parametrize("name", ["a b", "../x", "a/b/c", ".a", "/a", "a/", "x" * 129, "ü"])
def test_a_job_name_that_is_not_allowed(server: Server, refused: Any, name: str) -> None:
    with refused(errors.InvalidNameError, "is not allowed"):
        server.create_job(name, {"w": W}, optimizer="adam")


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        (errors.InvalidHyperparameterError, {"lr": -1.0}, "Invalid learning rate: -1.0"),
        (errors.InvalidHyperparameterError, {"lr": math.nan}, "nan"),
        (errors.InvalidHyperparameterError, {"betas": (0.9, 1.0)}, "index 1: 1.0"),
        (errors.UnknownHyperparameterError, {"momentum": 0.9}, "Adam has no hyperparameter 'momentum'"),
        (errors.InvalidHyperparameterError, {"initial_lr": "x"}, "initial_lr"),
        (errors.InvalidHyperparameterError, {"initial_lr": math.nan}, "initial_lr"),
    ],
    ids=str,
)
def test_an_edit_that_is_not_allowed(job: Job, refused: Any, kind: Any, changes: dict[str, Any], message: str) -> None:
    with refused(kind, message):
        job.update_group(0, **changes)


@pytest.mark.parametrize("index", [1, 99, -1])
def test_an_edit_of_no_group(job: Job, refused: Any, index: int) -> None:
    with refused(errors.UnknownParameterError, str(index)):
        job.update_group(index, lr=1.0)


@pytest.mark.parametrize(
    ("kind", "gradients", "message"),
    [
        (errors.ShapeMismatchError, {"w": W.T}, r"gradient 'w' has shape \(4, 3\); the parameter has shape \(3, 4\)"),
        (errors.ShapeMismatchError, {"w": W.reshape(-1)}, r"gradient 'w' has shape \(12,\)"),
        (
            errors.DtypeMismatchError,
            {"w": W.astype(np.complex64)},
            "gradient 'w' has dtype complex64; the parameter has dtype float32",
        ),
        (errors.DtypeMismatchError, {"b": np.zeros(4, int)}, "gradient 'b' has dtype int64"),
        (errors.UnknownParameterError, {"v": W}, "gradient 'v' is not in the job; its parameters are 'w', 'b'"),
        (errors.InvalidArgumentError, [("w", W)], "dict of names to arrays; got list"),
        (errors.NonfiniteGradientError, {"w": np.full_like(W, np.nan)}, "rank 0 'rank0' holds NaN or Inf"),
        (errors.NonfiniteGradientError, {**ONES, "b": np.array([0, 0, np.inf, 0], np.float32)}, "NaN or Inf"),
        (errors.NonfiniteGradientError, {"b": np.array([0, 0, -np.inf, np.inf], np.float32)}, "NaN or Inf"),
    ],
    ids=lambda entry: str(entry)[:40],
)
@pytest.mark.parametrize("call", ["push", "push_pull", "push_pull_async"])
def test_a_gradient_that_does_not_fit(worker: Worker, refused: Any, kind: Any, gradients: Any, message: str, call: str) -> None:
    with refused(kind, message):
        answer = getattr(worker, call)(gradients)
        if call == "push_pull_async":
            answer.result(20)
    assert worker.push(ONES).step == 2


@pytest.mark.parametrize("weight", [-1.0, math.nan, math.inf, "heavy", None])
def test_a_weight_that_is_not_allowed(worker: Worker, refused: Any, weight: Any) -> None:
    with refused(errors.InvalidArgumentError, "weight is "):
        worker.push(ONES, weight=weight)


@pytest.mark.parametrize(
    ("kind", "out", "message"),
    [
        (errors.ShapeMismatchError, {"w": np.zeros((4, 3), np.float32)}, r"out\['w'\] has shape \(4, 3\)"),
        (errors.DtypeMismatchError, {"w": np.zeros((3, 4))}, r"out\['w'\] has dtype float64"),
        (errors.InvalidArgumentError, {"w": [1, 2]}, r"out\['w'\] is a list"),
    ],
    ids=str,
)
def test_an_out_that_does_not_fit(job: Job, worker: Worker, refused: Any, kind: Any, out: Any, message: str) -> None:
    with refused(kind, message):
        worker.push_pull(ONES, out=dict(out))
    with refused(kind, message):
        worker.pull(out=dict(out))
    with refused(kind, message):
        job.pull(out=dict(out))


def test_a_pull_of_an_unknown_name(job: Job, refused: Any) -> None:
    with refused(errors.UnknownParameterError, "'v' is not in the job"):
        job.pull(["w", "v"])


def test_more_workers_than_the_job_has(server: Server, snapshot: Any) -> None:
    job = server.create_job("two", {"w": W}, optimizer="sgd", lr=0.1, workers=2)
    with job.join("a"), job.join("b"):
        before = snapshot(job)
        with pytest.raises(errors.TooManyWorkersError, match="all 2 ranks"):
            job.join("c")
        with pytest.raises(errors.TooManyWorkersError, match="rank 2 is not below the job's 2 workers"):
            job.join("c", rank=2)
        with pytest.raises(errors.InvalidArgumentError, match="rank is -1"):
            job.join("c", rank=-1)
        with pytest.raises(errors.RankHeldError, match="rank 0 is held by worker 'a', which is alive"):
            job.join("c", rank=0)
        assert snapshot(job) == before


def test_a_call_from_a_fenced_worker(job: Job, snapshot: Any) -> None:
    """A notebook cell that is run again: the new worker works, the old one says why it does not."""
    old = job.join()
    old.push(ONES)
    new = job.join()
    before = snapshot(job)
    for call in (lambda: old.push(ONES), lambda: old.pull(), lambda: old.push_pull(ONES), lambda: old.skip_round()):
        with pytest.raises((errors.FencedError, errors.ClosedError), match="replaced by a newer one"):
            call()
    assert snapshot(job) == before
    assert new.push(ONES).step == 2
    old.leave()
    assert new.push(ONES).step == 3
    new.leave()


def test_a_worker_that_has_left(job: Job, snapshot: Any) -> None:
    worker = job.join()
    worker.leave()
    worker.leave()
    before = snapshot(job)
    with pytest.raises(errors.ClosedError, match=r"'rank0'.* has left"):
        worker.push(ONES)
    assert snapshot(job) == before


def test_assigning_into_param_groups(job: Job, refused: Any) -> None:
    def assign(action: Callable[[Any], Any]) -> None:
        with refused(errors.ReadOnlyError, "update_group|add_param_group"):
            action(job.param_groups)

    assign(lambda groups: groups[0].__setitem__("lr", 1.0))
    assign(lambda groups: groups[0].update(lr=1.0))
    assign(lambda groups: groups[0].pop("lr"))
    assign(lambda groups: groups.append({}))
    assign(lambda groups: groups.__setitem__(0, {}))
    assign(lambda groups: groups[0]["params"].append("x"))
    with refused(errors.ReadOnlyError, r"job\.update_group\(0, lr="):
        job.param_groups = []
    with refused(TypeError, r"update_group\(0, lr=0\.5\)"):
        job.param_groups[0]["lr"] = 0.5


@pytest.mark.parametrize(
    ("kind", "group", "message"),
    [
        (errors.DuplicateParameterError, {"params": {"w": W}}, "'w' appears more than once"),
        (errors.InvalidArgumentError, {"params": {}}, "has no parameters|empty"),
        (errors.InvalidArgumentError, {"lr": 1.0}, '"params"'),
        (errors.InvalidHyperparameterError, {"params": {"v": W}, "lr": -1.0}, "Invalid learning rate: -1.0"),
        (errors.UnknownHyperparameterError, {"params": {"v": W}, "momentum": 1.0}, "'momentum'"),
        (errors.DtypeMismatchError, {"params": {"v": np.zeros(2, np.int32)}}, "'v' has dtype int32"),
    ],
    ids=lambda entry: str(entry)[:40],
)
def test_a_group_that_cannot_be_added(job: Job, refused: Any, kind: Any, group: Any, message: str) -> None:
    with refused(kind, message):
        job.add_param_group(group)


@pytest.mark.parametrize(
    "damage",
    [
        lambda d: d.clear(),
        lambda d: d["param_groups"].clear(),
        lambda d: d["param_groups"][0]["params"].pop(),
        lambda d: d["state"].update({7: d["state"][0]}),
        lambda d: d["state"][0].update(exp_avg=np.zeros(5, np.float32)),
        lambda d: d["state"][0].update(step=-1),
        lambda d: d["state"][0].update(step=1.5),
        lambda d: d["state"][0].update(step="x"),
        lambda d: d["state"][0].update(step=math.nan),
        lambda d: d["state"][0].update(step=math.inf),
        lambda d: d["state"][0].update(exp_avg="x"),
        lambda d: d["state"][0].pop("exp_avg_sq"),
        lambda d: d["state"][0].update(momentum_buffer=W),
        lambda d: d["param_groups"][0].update(lr=-1.0),
        lambda d: d["param_groups"][0].update(momentum=1.0),
    ],
    ids=range(15),
)
def test_a_state_dict_that_does_not_fit(job: Job, worker: Worker, refused: Any, damage: Callable[[Any], Any]) -> None:
    state = job.state_dict()
    damage(state)
    with refused(errors.InvalidStateDictError, "."):
        job.load_state_dict(state)


def test_an_address_that_is_in_use(app: App, tmp_path: Path) -> None:
    with pytest.raises(errors.AddressInUseError, match=f"cannot listen on {app.address}"):
        App(ServerConfig(address=app.address, backend="numpy")).start()


def test_an_address_beyond_the_loopback() -> None:
    with pytest.raises(errors.InsecureAddressError, match=r"0\.0\.0\.0:0.*--insecure"):
        App(ServerConfig(address="0.0.0.0:0", backend="numpy"))


def test_a_server_that_is_not_there() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    began = time.monotonic()
    with pytest.raises(errors.ServerUnavailableError, match=rf"no server answered at {address} within 0\.5 s") as caught:
        connect(address, timeout_seconds=0.5)
    assert 0.5 <= time.monotonic() - began < 5
    assert isinstance(caught.value, ConnectionError)


@pytest.mark.parametrize("address", ["localhost", "localhost:", ":50051", "localhost:port", "localhost:70000", ""])
def test_an_address_that_is_none(address: str) -> None:
    with pytest.raises(errors.InvalidArgumentError, match="it must be host:port"):
        connect(address)


def test_a_closed_connection(server: Server, job: Job) -> None:
    worker = job.join()
    server.close()
    server.close()
    for call in (server.jobs, job.pull, lambda: worker.push(ONES), lambda: job.save_checkpoint("c")):
        with pytest.raises(errors.ClosedError, match=r"closed|has left"):
            call()

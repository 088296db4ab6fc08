"""Parameters renamed, replaced and removed while two workers train."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch

from optserve.client import Job, Server, connect, errors
from optserve.server.app import App
from optserve.v1 import parameters_pb2

Arrays = Mapping[str, np.ndarray]

START: dict[str, np.ndarray] = {
    "w": np.linspace(-1, 1, 12, dtype=np.float32).reshape(3, 4),
    "b": np.linspace(0, 1, 5, dtype=np.float32),
    "head": np.full((2, 2), 0.5, np.float32),
}
SECOND: dict[str, np.ndarray] = {"d": np.full((2, 3), 0.5), "x": np.ones(4, np.float32)}


def gradients(shapes: Arrays, *seed: int) -> dict[str, np.ndarray]:
    bits = np.random.default_rng(seed)
    return {name: bits.normal(size=value.shape).astype(value.dtype) for name, value in shapes.items()}


class Torch:
    """An Adam for each parameter by itself, on the mean of two ranks' gradients."""

    def __init__(self) -> None:
        self.parameters: dict[str, torch.nn.Parameter] = {}
        self.optimizers: dict[str, torch.optim.Optimizer] = {}

    def put(self, name: str, value: np.ndarray) -> None:
        parameter = torch.nn.Parameter(torch.from_numpy(value.copy()))
        self.parameters[name], self.optimizers[name] = parameter, torch.optim.Adam([parameter], lr=0.1)

    def rename(self, name: str, new_name: str) -> None:
        for table in (self.parameters, self.optimizers):
            table[new_name] = table.pop(name)

    def remove(self, name: str) -> None:
        del self.parameters[name], self.optimizers[name]

    def step(self, *ranks: Arrays) -> None:
        for name, parameter in self.parameters.items():
            parameter.grad = torch.from_numpy(np.mean([rank[name] for rank in ranks], axis=0, dtype=ranks[0][name].dtype))
            self.optimizers[name].step()

    def compare(self, weights: Arrays) -> None:
        assert set(weights) == set(self.parameters)
        for name, parameter in self.parameters.items():
            np.testing.assert_allclose(weights[name], parameter.detach().numpy(), rtol=2e-6, atol=2e-6, err_msg=name)


def two_groups(server: Server, name: str | None = "j", **options: Any) -> Job:
    settings = {"optimizer": "adam", "lr": 0.1, "workers": 2, **options}
    return server.create_job(name, [{"params": START}, {"params": SECOND}], **settings)


def test_two_workers_train_through_every_edit_as_torch_does(
    server: Server, same: Any, side_by_side: Callable[..., list[Any]]
) -> None:
    job, own, shapes = two_groups(server), Torch(), {**START, **SECOND}
    for name, value in shapes.items():
        own.put(name, value)
    wider, narrower = np.full((7, 2), 0.25, np.float32), np.full((2, 3), 0.75, np.float32)
    edits: list[Callable[[], None]] = [
        lambda: (job.rename_parameter("w", "layer.w"), own.rename("w", "layer.w")),
        lambda: (job.replace_parameter("b", wider), own.put("b", wider)),
        lambda: (job.remove_parameter("head"), own.remove("head")),
        lambda: (job.replace_parameter("d", narrower), own.put("d", narrower)),
        lambda: (job.rename_parameter("x", "w"), own.rename("x", "w")),
    ]
    with job.join(rank=0) as first, job.join(rank=1) as second:
        for turn in range(12):
            if turn % 2 and edits:
                edits.pop(0)()
            shapes = {name: value.detach().numpy() for name, value in own.parameters.items()}
            ranks = gradients(shapes, turn, 0), gradients(shapes, turn, 1)
            works = [lambda: first.push_pull(ranks[0]), lambda: second.push_pull(ranks[1])]  # noqa: B023 - called at once
            one, other = side_by_side(works)
            own.step(*ranks)
            same(one, other)
            own.compare(one)
        assert [group["params"] for group in first.param_groups] == [["layer.w", "b"], ["d", "w"]]
    assert [group["params"] for group in job.param_groups] == [["layer.w", "b"], ["d", "w"]]
    assert {key: entry["step"] for key, entry in job.state_dict()["state"].items()} == {0: 12, 1: 9, 2: 5, 3: 12}


def test_a_job_after_edits_is_the_one_that_began_so(server: Server, same: Any) -> None:
    """Weights, state and every later step, bit for bit."""
    edited = two_groups(server, workers=1)
    value = np.full((40, 3), 0.25, ml_dtypes.bfloat16)
    edited.replace_parameter("b", value)
    edited.remove_parameter("w")
    edited.rename_parameter("d", "e")
    groups = [{"params": {"b": value, "head": START["head"]}}, {"params": {"e": SECOND["d"], "x": SECOND["x"]}}]
    plain = server.create_job("plain", groups, optimizer="adam", lr=0.1)
    assert edited.info().layout.places == plain.info().layout.places
    assert edited.info().layout.arrays == plain.info().layout.arrays
    found = []
    for job in (edited, plain):
        with job.join() as worker:
            for turn in range(3):
                worker.push(gradients(plain.pull(), turn))
        found.append(job.pull())
    same(*found)


def test_a_push_by_the_old_name_is_refused_and_the_worker_goes_on(server: Server) -> None:
    job = server.create_job("j", START, optimizer="adam", lr=0.1)
    with job.join() as worker:
        worker.push(gradients(START, 1))
        before = job.rename_parameter("w", "v")
        with pytest.raises(errors.UnknownParameterError, match="gradient 'w' is not in the job; its parameters are 'v', 'b'"):
            worker.push(gradients(START, 2))
        assert job.position() == before
        value = np.ones(9, np.float32)
        job.replace_parameter("b", value)
        renamed = {"v": START["w"], "b": START["b"], "head": START["head"]}
        with pytest.raises(errors.ShapeMismatchError, match=r"'b' has shape \(5,\); the parameter has shape \(9,\)"):
            worker.push(gradients(renamed, 2))
        job.remove_parameter("head")
        found = worker.push_pull(gradients({"v": START["w"], "b": value}, 2))
        assert list(found) == ["v", "b"]
        assert worker.last_step is not None
        assert worker.last_step.step == 2


def test_a_push_that_waits_in_its_round_is_sent_again_if_it_still_fits(
    server: Server, side_by_side: Callable[..., list[Any]]
) -> None:
    """The edit comes when rank 0 has pushed and rank 1 has not: neither waits for ever, and both are in one step."""
    job = two_groups(server)
    with job.join(rank=0) as first, job.join(rank=1) as second:
        parts = [gradients({"w": START["w"]}, rank) for rank in (0, 1)]

        def late() -> None:
            time.sleep(0.5)
            job.rename_parameter("b", "bias")
            job.replace_parameter("head", np.ones((30, 3), np.float32))
            job.remove_parameter("x")
            second.push(parts[1])

        side_by_side([lambda: first.push(parts[0]), late])
        assert job.position().step == 1
        assert first.last_step is not None
        assert first.last_step.ranks == (0, 1)
    own = Torch()
    own.put("w", START["w"])
    own.step(*parts)
    np.testing.assert_allclose(job.pull(["w"])["w"], own.parameters["w"].detach().numpy(), rtol=2e-6, atol=2e-6)


def test_a_push_that_waits_and_fits_no_more_hears_why(server: Server, side_by_side: Callable[..., list[Any]]) -> None:
    job = two_groups(server)
    with job.join(rank=0) as first, job.join(rank=1) as second:

        def push() -> None:
            with pytest.raises(errors.UnknownParameterError, match="gradient 'w' is not in the job"):
                first.push(gradients(START, 0))

        def edit() -> None:
            time.sleep(0.5)
            job.rename_parameter("w", "v")

        side_by_side([push, edit])
        good = gradients({"v": START["w"]}, 1)
        side_by_side([lambda: first.push(good), lambda: second.push(good)])
    assert job.position().step == 1


REFUSALS: list[tuple[Callable[[Job], object], type[errors.OptserveError], str]] = [
    (lambda job: job.rename_parameter("v", "u"), errors.UnknownParameterError, "'v' is not in the job; its parameters are"),
    (lambda job: job.rename_parameter("w", "b"), errors.DuplicateParameterError, "the job has a parameter 'b' already"),
    (lambda job: job.rename_parameter("w", "w"), errors.DuplicateParameterError, "the job has a parameter 'w' already"),
    (lambda job: job.rename_parameter("w", ""), errors.InvalidArgumentError, "'w' cannot have an empty name"),
    (lambda job: job.rename_parameter("w", "__metadata__"), errors.InvalidNameError, "safetensors files reserve that name"),
    (lambda job: job.rename_parameter("w", "n" * (1 << 20)), errors.InvalidArgumentError, "more than a message can describe"),
    (lambda job: job.rename_parameter("w", 3), errors.InvalidArgumentError, "new_name is of type int"),  # type: ignore[arg-type]
    (lambda job: job.remove_parameter(None), errors.UnknownParameterError, "NoneType"),  # type: ignore[arg-type]
    (lambda job: job.remove_parameter("v"), errors.UnknownParameterError, "'v' is not in the job"),
    (lambda job: job.replace_parameter("v", [1.0]), errors.UnknownParameterError, "'v' is not in the job"),
    (lambda job: job.replace_parameter("w", [1, 2]), errors.DtypeMismatchError, "the value of parameter 'w' has dtype int64"),
    (
        lambda job: job.replace_parameter("w", np.ones((4, 3), np.float32), keep_state=True),
        errors.ShapeMismatchError,
        r"has shape \(4, 3\), the parameter \(3, 4\); its state can only be kept with the same shape",
    ),
    (
        lambda job: job.replace_parameter("w", np.ones((3, 4)), keep_state=True),
        errors.DtypeMismatchError,
        "has dtype float64, the parameter float32; its state can only be kept with the same dtype",
    ),
]


@pytest.mark.parametrize(("edit", "kind", "message"), REFUSALS)
def test_what_may_not_be_edited_changes_nothing(
    job: Job, worker: Any, refused: Any, edit: Callable[[Job], object], kind: type[errors.OptserveError], message: str
) -> None:
    with refused(kind, message):
        edit(job)
    worker.push({"w": np.ones((3, 4), np.float32)})


def test_the_last_parameter_of_a_group_stays(job: Job, refused: Any) -> None:
    job.remove_parameter("b")
    with refused(errors.InvalidArgumentError, "parameter 'w' is the only one of group 0, and a group keeps at least one"):
        job.remove_parameter("w")


def test_a_shape_that_the_optimizer_does_not_take_is_refused_with_torchs_message(server: Server) -> None:
    job = server.create_job("j", {"w": np.ones((3, 4), np.float32)}, optimizer="muon", lr=0.1)
    with pytest.raises(errors.UnsupportedParameterError, match="Muon only supports 2D parameters"):
        job.replace_parameter("w", np.ones(3, np.float32))
    assert job.pull()["w"].shape == (3, 4)


@pytest.mark.parametrize(
    "edit",
    [
        lambda job: job.rename_parameter("w", "v"),
        lambda job: job.replace_parameter("w", START["w"], keep_state=True),
        lambda job: job.remove_parameter("w"),
    ],
    ids=["rename", "replace", "remove"],
)
def test_no_edit_in_the_middle_of_a_window(server: Server, snapshot: Any, edit: Callable[[Job], object]) -> None:
    job = two_groups(server, workers=1, accumulation=3)
    with job.join() as worker:
        worker.push(gradients({**START, **SECOND}, 0))
        before = snapshot(job)
        with pytest.raises(errors.InvalidArgumentError, match="in the middle of a window: 1 of 3 rounds are summed up"):
            edit(job)
        assert snapshot(job) == before
        for turn in range(2):
            worker.push(gradients({**START, **SECOND}, turn))
        edit(job)


def test_a_vector_of_all_parameters_keeps_them(server: Server) -> None:
    job = server.create_job("j", START, optimizer="lbfgs", lr=0.1)
    for edit in (lambda: job.remove_parameter("b"), lambda: job.replace_parameter("b", START["b"])):
        with pytest.raises(errors.InvalidArgumentError, match="its state is of all of them as one vector"):
            edit()
    job.rename_parameter("b", "bias")
    assert list(job.pull()) == ["w", "bias", "head"]


def test_events_say_what_was_done(server: Server) -> None:
    job = two_groups(server)
    job.rename_parameter("w", "v")
    job.replace_parameter("v", np.ones((2, 2)))
    job.replace_parameter("b", START["b"], keep_state=True)
    job.remove_parameter("head")
    found = [(event.kind, event.message) for event in job.events() if event.kind == "parameter"]
    assert [message for _, message in found] == [
        "parameter 'w' is called 'v' now",
        "parameter 'v' replaced by (2, 2) of float64; its state begins again",
        "parameter 'b' replaced by (5,) of float32; its state stays",
        "parameter 'head' removed",
    ]


def test_another_client_pulls_by_the_new_names(app: App, same: Any) -> None:
    with connect(app.address) as one, connect(app.address) as other:
        job = two_groups(one)
        reader = other.job("j")
        reader.pull()
        job.rename_parameter("w", "v")
        job.replace_parameter("b", np.ones(500_000, np.float32))
        same(reader.pull(["v"]), {"v": START["w"]})
        with pytest.raises(errors.UnknownParameterError, match="'w' is not in the job"):
            reader.pull(["w"])
        job.remove_parameter("v")
        same(reader.pull(), {"b": np.ones(500_000, np.float32), "head": START["head"], **SECOND})


def test_a_script_that_runs_again_finds_its_job_by_the_old_names_or_the_new(server: Server) -> None:
    two_groups(server).rename_parameter("w", "v")
    old = two_groups(server, exist_ok=True)
    assert list(old.pull()) == ["v", "b", "head", "d", "x"]
    with old.join(rank=0) as worker, pytest.raises(errors.UnknownParameterError, match="gradient 'w' is not in the job"):
        worker.push({"w": START["w"]})
    groups = [{"params": {"v": START["w"], "b": START["b"], "head": START["head"]}}, {"params": SECOND}]
    new = server.create_job("j", groups, optimizer="adam", lr=0.1, workers=2, exist_ok=True)
    assert new.job_id == old.job_id
    groups[0] = {"params": {"u": START["w"], "b": START["b"], "head": START["head"]}}
    with pytest.raises(errors.JobSpecMismatchError, match=r"group 0 has other parameters: 'w' \(3, 4\) float32, not 'u'"):
        server.create_job("j", groups, optimizer="adam", lr=0.1, workers=2, exist_ok=True)


def edited_and_trained(job: Job) -> None:
    with job.join() as worker:
        worker.push(gradients({**START, **SECOND}, 0))
        job.rename_parameter("w", "v")
        job.replace_parameter("b", np.full((3, 3), 0.5))
        job.remove_parameter("head")
        job.replace_parameter("x", np.zeros(4, np.float32), keep_state=True)
        worker.push(gradients(job.pull(), 1))


def test_a_checkpoint_after_edits_continues_a_server_and_makes_a_job(
    start_app: Callable[..., App], tmp_path: Path, snapshot: Any, same: Any
) -> None:
    app = start_app(data_dir=tmp_path / "data")
    with connect(app.address) as server:
        job = two_groups(server, workers=1)
        edited_and_trained(job)
        weights, groups, layout = job.pull(), job.param_groups, job.info().layout
        job.save_checkpoint("edited")
        job.download_checkpoint("edited", tmp_path / "files")
    app.stop()
    app = start_app(data_dir=tmp_path / "data")
    with connect(app.address) as server:
        job, made = server.job("j"), server.create_job("k", from_checkpoint=tmp_path / "files")
        assert job.info().layout == layout
        for found in (job, made):
            same(found.pull(), weights)
            assert found.param_groups == groups
            assert found.info().layout.arrays == layout.arrays
        assert snapshot(made)["state"] == snapshot(job)["state"]
        for found in (job, made):
            with found.join() as worker:
                worker.push(gradients(weights, 2))
        same(made.pull(), job.pull())
        job.restore_checkpoint("edited")
        same(job.pull(), weights)


def test_a_checkpoint_from_before_an_edit_is_refused(server: Server, snapshot: Any) -> None:
    job = two_groups(server)
    job.save_checkpoint("before")
    for edit, message in (
        (lambda: job.rename_parameter("w", "v"), "they differ in v, w"),
        (lambda: job.rename_parameter("v", "w") and job.replace_parameter("w", np.ones(3, np.float32)), r"has shape \(3, 4\)"),
        (lambda: job.remove_parameter("w"), "5 parameters in 2 groups, the job 4 in 2; they differ in w"),
    ):
        edit()
        before = snapshot(job)
        with pytest.raises(errors.CheckpointMismatchError, match=message):
            job.restore_checkpoint("before")
        assert snapshot(job) == before


def test_a_repeated_edit_is_applied_once(app: App) -> None:
    """The same call, as a client repeats it whose answer was lost; the seq of another content is refused."""
    with connect(app.address) as server:
        job = two_groups(server)
        identity = job._caller.session.identity()
        first = job.remove_parameter("w")
        request = parameters_pb2.RemoveParameterRequest(call=identity, parameter="w")
        again = job._connection.call(request, parameters_pb2.RemoveParameterResponse)
        assert again.position.version == first.version == job.position().version
        request.parameter = "b"
        with pytest.raises(errors.SequenceConflictError):
            job._connection.call(request, parameters_pb2.RemoveParameterResponse)


def test_an_edit_that_is_lost_in_a_kill_is_reported_and_the_worker_goes_on(
    server_process: Callable[..., Any], tmp_path: Path
) -> None:
    """Another edit is made after the restart, so that the lost layout and the new one have the same version."""
    process = server_process(tmp_path / "data")
    with connect(process.address, retry_timeout_seconds=60) as server:
        job = two_groups(server, workers=1)
        job.save_checkpoint("c")
        with job.join() as worker:
            job.replace_parameter("b", np.ones((2, 2), np.float32))
            worker.push(gradients({"w": START["w"], "b": np.ones((2, 2), np.float32)}, 0))
            process.kill()
            process.start()
            with connect(process.address) as other:
                other.job("j").replace_parameter("b", np.ones(9, np.float32))
            with pytest.raises(errors.RolledBackError):
                worker.push(gradients({"w": START["w"]}, 1))
            found = worker.push_pull(gradients({"w": START["w"], "b": np.ones(9, np.float32)}, 1))
            assert found["b"].shape == (9,)
            assert job.pull()["b"].shape == (9,)
            assert worker.last_step is not None
            assert worker.last_step.step == 1

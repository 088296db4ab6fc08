"""Checkpoints hold the rules and the running sum: in the middle of a window, restored equals uninterrupted, bit for bit."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from optserve.client import Job, Server, SparseGradient, Worker, connect, errors
from optserve.server.app import App
from optserve.server.durability.manifest import Manifest

VALUES: dict[str, np.ndarray] = {
    "w": np.linspace(-1, 1, 12, dtype=np.float32).reshape(3, 4),
    "half": np.linspace(0, 1, 10, dtype=np.float32).reshape(5, 2).astype(ml_dtypes.bfloat16),
    "wide": np.linspace(1, 2, 6).reshape(2, 3),
    "late": np.ones(3, np.float32),
    "z": np.full((2, 2), 1 + 2j, np.complex64),
}
EMBEDDING = {"emb": np.linspace(-1, 1, 4000, dtype=np.float32).reshape(1000, 4)}


REAL = {name: value for name, value in VALUES.items() if name != "z"}
"""What can be clipped by value."""


def dense(turn: int, values: Mapping[str, np.ndarray] = VALUES) -> dict[str, Any]:
    """`late` has no gradient but in every fifth round."""
    bits = np.random.default_rng((3, turn))
    found: dict[str, Any] = {name: bits.normal(size=value.shape).astype(value.dtype) for name, value in values.items()}
    return found if turn % 5 == 4 else {**found, "late": None}


def sparse(turn: int) -> dict[str, Any]:
    bits = np.random.default_rng((4, turn))
    ids = bits.integers(0, 1000, size=20)
    return {"emb": SparseGradient(ids, bits.normal(size=(20, 4)).astype(np.float32))}


CASES: dict[str, tuple[Mapping[str, np.ndarray], Callable[[int], Any], dict[str, Any]]] = {
    "adam": (VALUES, dense, {"optimizer": "adam", "lr": 0.1, "clip_grad_norm": 1.5}),
    "sgd momentum": (
        REAL,
        partial(dense, values=REAL),
        {"optimizer": "sgd", "lr": 0.1, "momentum": 0.9, "clip_grad_value": 0.5},
    ),
    "sparse adam": (EMBEDDING, sparse, {"optimizer": "sparseadam", "lr": 0.1, "clip_grad_norm": 2.0}),
}


@pytest.fixture(params=CASES, ids=str)
def case(request: pytest.FixtureRequest) -> Any:
    return CASES[request.param]


def create(server: Server, name: str, case: Any) -> Job:
    values, _, options = case
    return server.create_job(name, values, accumulation=4, **options)


def train(worker: Worker, case: Any, turns: range) -> list[tuple[int, int, float]]:
    found = []
    for turn in turns:
        worker.push(case[1](turn))
        assert worker.last_step is not None
        found.append((worker.last_step.step, worker.last_step.accumulated, worker.last_step.grad_norm))
    return found


def state_of(job: Job) -> Any:
    found = job.state_dict()
    tensors = {
        (key, slot): np.asarray(value).tobytes() for key, entry in found["state"].items() for slot, value in entry.items()
    }
    weights = {name: array.tobytes() for name, array in job.pull().items()}
    return weights, tensors, found["param_groups"], job.position().step


@pytest.mark.parametrize("rounds", [2, 3, 4, 6])
def test_a_restored_window_goes_on_as_the_uninterrupted_one(server: Server, case: Any, rounds: int) -> None:
    job = create(server, "j", case)
    with job.join() as worker:
        train(worker, case, range(rounds))
        job.save_checkpoint("c")
        wanted = train(worker, case, range(rounds, 11)), state_of(job)
        assert [accumulated for _, accumulated, _ in wanted[0]] == [turn % 4 for turn in range(rounds + 1, 12)]
        for _ in range(2):
            job.restore_checkpoint("c")
            assert job.info().accumulated == rounds % 4
            assert (train(worker, case, range(rounds, 11)), state_of(job)) == wanted


def test_a_server_that_stops_in_mid_window_goes_on_with_it(start_app: Callable[..., App], tmp_path: Path, case: Any) -> None:
    app = start_app(data_dir=tmp_path / "data")
    with connect(app.address) as server:
        job, plain = create(server, "j", case), create(server, "plain", case)
        for each, turns in ((job, range(6)), (plain, range(11))):
            with each.join() as worker:
                train(worker, case, turns)
        wanted = state_of(plain)
        job.save_checkpoint("c")
        job.download_checkpoint("c", tmp_path / "files")
    app.stop()
    app = start_app(data_dir=tmp_path / "data")
    with connect(app.address) as server:
        for each in (server.job("j"), server.create_job("made", from_checkpoint=tmp_path / "files")):
            assert each.info().accumulated == 2
            with each.join() as worker:
                train(worker, case, range(6, 11))
            assert state_of(each) == wanted


def test_a_restore_brings_the_rules_back(server: Server) -> None:
    job = server.create_job("j", {"w": VALUES["w"]}, optimizer="sgd", lr=1.0, clip_grad_norm=1.0)
    job.save_checkpoint("clipped")
    job.update_rules(clip_grad_norm=None, accumulation=2)
    with job.join() as worker:
        worker.push({"w": np.full((3, 4), 3.0, np.float32)})
        assert worker.last_step is not None
        assert (worker.last_step.clip_factor, worker.last_step.accumulated) == (1.0, 1)
        job.restore_checkpoint("clipped")
        info = job.info()
        assert (info.clip_grad_norm, info.accumulation, info.accumulated) == (1.0, 1, 0)
        worker.push({"w": np.full((3, 4), 3.0, np.float32)})
        assert worker.last_step.step == 1
        assert worker.last_step.clip_factor < 0.1
    np.testing.assert_allclose(job.pull()["w"], VALUES["w"] - 1 / np.sqrt(12), rtol=1e-5)


def rewritten(folder: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    """The checkpoint with another document, its hashes right."""
    path = folder / "manifest.json"
    found = Manifest.decode(path.read_bytes(), "it")
    document = json.loads(json.dumps(found.document))
    change(document)
    path.write_bytes(Manifest(document, found.files, found.time_seconds).encode())
    return folder


def test_a_checkpoint_of_an_earlier_version_loads(client: Server, tmp_path: Path) -> None:
    """Its document says nothing of rules, windows and layouts."""
    job = client.create_job("j", {"w": VALUES["w"], "half": VALUES["half"]}, optimizer="adam", lr=0.1)
    with job.join() as worker:
        worker.push({"w": VALUES["w"], "half": VALUES["half"]})
    job.save_checkpoint("c")
    job.download_checkpoint("c", tmp_path / "files")

    def older(document: dict[str, Any]) -> None:
        for name in ("rules", "window_rounds", "layout"):
            del document[name]
        del document["spec"]["rules"]

    made = client.create_job("made", from_checkpoint=rewritten(tmp_path / "files", older))
    assert state_of(made) == state_of(job)
    info = made.info()
    assert (info.clip_grad_norm, info.clip_grad_value, info.accumulation, info.accumulated) == (None, None, 1, 0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rules": {"accumulation": 0}}, "'rules' is not as it must be: .*accumulation is 0"),
        ({"rules": {"accumulation": True}}, "'rules' is not as it must be: .*accumulation is True"),
        ({"rules": {"clip_grad_norm": 1.0, "clip_grad_value": 1.0}}, "'rules' is not as it must be: .*give one of them"),
        ({"rules": {"clip": 1.0}}, "'rules' is not as it must be: .*there is no rule 'clip'"),
        ({"rules": 3}, "'rules' is not as it must be"),
        ({"window_rounds": 4}, "'window_rounds' is not as it must be: .*4 rounds are summed up; a window has 4"),
        ({"window_rounds": 0}, "a running sum of no rounds has sum/w"),
        ({"window_rounds": -1}, "'window_rounds' is not as it must be"),
        ({"window_rounds": "2"}, "'window_rounds' is not as it must be"),
        ({"layout": {"version": 1}}, "'layout' is not as it must be"),
        ({"layout": {"version": 1, "base_version": 2}}, "'layout' is not as it must be: .*base version 2 is beyond"),
    ],
)
def test_what_does_not_fit_is_refused(client: Server, tmp_path: Path, change: dict[str, Any], message: str) -> None:
    job = client.create_job("j", {"w": VALUES["w"]}, optimizer="adam", lr=0.1, accumulation=4)
    with job.join() as worker:
        worker.push({"w": VALUES["w"]})
    job.save_checkpoint("c")
    job.download_checkpoint("c", tmp_path / "files")
    folder = rewritten(tmp_path / "files", lambda document: document.update(change))
    with pytest.raises(errors.CheckpointMismatchError, match=message):
        client.create_job("made", from_checkpoint=folder)
    assert [found.name for found in client.jobs()] == ["j"]

"""A state_dict of another optimizer or shape, parameters and hyperparameters that an optimizer does not take: refused, and the
job is as it was."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
from oracle import NAMES

from optserve.client import Job, Server, SparseGradient, errors
from optserve.server.formulas import OPTIMIZERS, Searching, find

W = np.arange(1, 13, dtype=np.float32).reshape(3, 4)
ALIKE = {("Adam", "AdamW"), ("AdamW", "Adam"), ("RAdam", "Adam"), ("RAdam", "AdamW")}
"""Whose state_dicts no key tells apart: torch's of the first fits the second, whose other hyperparameters stay as they are."""
OPTIONS: dict[str, dict[str, Any]] = {"SGD": {"momentum": 0.9}, "RMSprop": {"centered": True, "momentum": 0.5}}


def trained(server: Server, name: str) -> Job:
    job = server.create_job(name, {"w": W, "m": W.T.copy()}, optimizer=name, **OPTIONS.get(name, {}))
    slopes: dict[str, Any] = {"w": np.sin(W), "m": np.cos(W.T)}
    if find(name).no_dense:
        slopes = {key: SparseGradient(np.arange(len(slope)), slope) for key, slope in slopes.items()}
    with job.join() as worker:
        for _ in range(2):
            if isinstance(find(name), Searching):
                worker.step(lambda _: (1.0, slopes))
            else:
                worker.push(slopes)
    return job


@pytest.fixture
def unchanged(snapshot: Callable[[Job], Any]) -> Any:
    """unchanged(job, error, pattern, call): the call is refused so, and the job is as it was."""

    def check(job: Job, error: type[Exception], pattern: str, call: Callable[[], object]) -> None:
        before = snapshot(job)
        with pytest.raises(error, match=pattern):
            call()
        assert snapshot(job) == before

    return check


def test_a_state_dict_of_another_optimizer(embedded: Server, unchanged: Any) -> None:
    jobs = {name: trained(embedded, name) for name in NAMES}
    taken = set()
    for name, job in jobs.items():
        own = job.state_dict()
        for other in NAMES:
            foreign = jobs[other].state_dict()
            if other == name:
                continue
            if (other, name) in ALIKE:
                job.load_state_dict(foreign)
                taken.add((other, name))
                job.load_state_dict(own)
            else:
                load = partial(job.load_state_dict, foreign)
                unchanged(job, errors.InvalidStateDictError, "no hyperparameter|is not .*'s; allowed|'w' has .* but no", load)
    assert taken == ALIKE


@pytest.mark.parametrize("name", [entry.name for entry in OPTIMIZERS.values() if not isinstance(entry, Searching)])
def test_state_of_other_shapes_or_incomplete(embedded: Server, name: str, unchanged: Any) -> None:
    job, optimizer = trained(embedded, name), find(name)
    slots = job.state_dict()["state"].get(0, {}).keys() - {"step"}
    assert slots

    def refused(pattern: str, **changes: Any) -> None:
        """With these entries in the state of 'w'; None: left out."""
        found = job.state_dict()
        entry = {**found["state"][0], **changes}
        found["state"][0] = {slot: value for slot, value in entry.items() if value is not None}
        unchanged(job, errors.InvalidStateDictError, pattern, partial(job.load_state_dict, found))

    for slot in slots:
        for wrong in (np.zeros((2, 5), np.float32), np.zeros(0, np.float32), np.zeros((1, 1), np.float32)):
            refused(f"'{slot}' of 'w' has shape", **{slot: wrong})
        if optimizer.counts_steps:
            refused(f"'w' has .* but no {slot}|'w' has the state|'m' has the state", **{slot: None})
    refused(f"'unheard_of' of 'w' is not {name}'s", unheard_of=W)
    if optimizer.counts_steps:
        refused("'w' has .* but no step", step=None)
        for wrong in (-1.0, 0.5, float("nan"), float("inf")):
            refused("the step of 'w' is", step=wrong)


@pytest.mark.parametrize("name", [entry.name for entry in OPTIMIZERS.values()])
def test_a_hyperparameter_that_the_optimizer_does_not_have(embedded: Server, name: str, unchanged: Any) -> None:
    job = trained(embedded, name)
    others = {key for entry in OPTIMIZERS.values() for key in entry.defaults} - find(name).defaults.keys()
    for unknown in ("learning_rate", *sorted(others)):
        message = f"{name} has no hyperparameter '{unknown}'.*known: lr"
        unchanged(
            job, errors.UnknownHyperparameterError, message, lambda unknown=unknown: job.update_group(0, **{unknown: 0.5})
        )
        with pytest.raises(errors.UnknownHyperparameterError, match=message):
            embedded.create_job("other", {"w": W}, optimizer=name, **{unknown: 0.5})
    found = job.state_dict()
    found["param_groups"][0]["learning_rate"] = 0.5
    unchanged(job, errors.InvalidStateDictError, "no hyperparameter 'learning_rate'", lambda: job.load_state_dict(found))
    assert [entry.name for entry in embedded.jobs()] == [name]


@pytest.mark.parametrize("penalty", [-0.1, float("nan"), float("inf"), "1", True, None])
def test_a_penalty_that_is_not_allowed(embedded: Server, penalty: Any, unchanged: Any) -> None:
    job = trained(embedded, "SGD")
    unchanged(job, errors.InvalidHyperparameterError, "l1 is", lambda: job.update_group(0, l1=penalty))
    with pytest.raises(errors.InvalidHyperparameterError, match="l1 is"):
        embedded.create_job("other", {"w": W}, optimizer="adam", l1=penalty)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("Muon", W[0], r"parameter 'v': Muon only supports 2D parameters whereas we found .* with size: torch.Size\(\[4\]\)"),
        ("Muon", W[:, :, None], r"torch.Size\(\[3, 4, 1\]\)"),
        ("Muon", W[0, 0], r"torch.Size\(\[\]\)"),
        ("Muon", W.astype(np.complex64), "parameter 'v': Muon does not support complex parameters"),
        ("Adafactor", W.astype(np.complex64), "parameter 'v': Adafactor does not support complex parameters"),
    ],
)  # fmt: skip
def test_a_parameter_that_the_optimizer_does_not_take(
    embedded: Server, name: str, value: Any, message: str, unchanged: Any
) -> None:
    job = trained(embedded, name)
    for error in (errors.UnsupportedParameterError, ValueError, RuntimeError):
        unchanged(job, error, message, lambda: job.add_param_group({"params": {"v": value}}))
        with pytest.raises(error, match=message):
            embedded.create_job("other", {"w": W, "v": value}, optimizer=name)
    assert [entry.name for entry in embedded.jobs()] == [name]

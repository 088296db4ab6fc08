"""What a job's spec may hold: parameters that its optimizer takes, wherever they come from."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from optserve.server.backends import select
from optserve.server.jobs import Job
from optserve.server.jobs import spec as specs
from optserve.v1 import jobs_pb2, types_pb2
from optserve.wire import dtypes, errors
from optserve.wire.values import to_hyperparameters

VALUE = np.ones((2, 3), np.float32)


def spec(optimizer: str, value: Any = VALUE, **hyperparameters: Any) -> jobs_pb2.JobSpec:
    parameter = types_pb2.Parameter(name="w", shape=value.shape, dtype=dtypes.to_wire(value.dtype))
    group = jobs_pb2.GroupSpec(parameters=[parameter], hyperparameters=to_hyperparameters(hyperparameters))
    return jobs_pb2.JobSpec(name="j", optimizer=optimizer, groups=[group], workers=1, quorum=1)


@pytest.mark.parametrize("dtype", [np.complex64, np.complex128])
def test_complex_parameters_are_another_job_than_their_reals(dtype: Any) -> None:
    found, wanted = specs.plan(spec("adam", VALUE.astype(dtype))), specs.plan(spec("adam", VALUE))
    (difference,) = specs.differences(found, wanted)
    assert f"'w' (2, 3) {np.dtype(dtype)}, not 'w' (2, 3) float32" in difference


@pytest.mark.parametrize(
    ("found", "wanted", "difference"),
    [
        ({"l1": 0.1}, {}, "group 0 has l1=0.1, not (none)"),
        ({}, {"l1": 0.1}, "group 0 has l1=(none), not 0.1"),
        ({"l1": 0.1}, {"l1": 0.2}, "group 0 has l1=0.1, not 0.2"),
        ({"lr": 0.5, "initial_lr": 0.5}, {"lr": 0.5}, "group 0 has initial_lr=0.5, not (none)"),
    ],
)
def test_what_only_one_of_two_specs_gives_its_group_is_a_difference(
    found: dict[str, Any], wanted: dict[str, Any], difference: str
) -> None:
    plans = [specs.plan(spec("sgd", **given)) for given in (found, wanted)]
    assert specs.differences(*plans) == [difference]
    assert specs.differences(plans[0], plans[0]) == []


@pytest.mark.parametrize("name", ["adafactor", "adam", "muon", "sgd"])
def test_a_rate_is_finite(name: str) -> None:
    optimizer = specs.find_optimizer(name)
    for layers in ([{"lr": math.inf}], [{"lr": 0.1}, {"lr": math.inf}]):
        with pytest.raises(errors.InvalidHyperparameterError, match="lr is inf; it must be a finite number"):
            specs.hyperparameters(optimizer, *layers)
    assert specs.hyperparameters(optimizer, {"lr": 1e300})["lr"] == 1e300


@pytest.mark.parametrize("late", [np.ones(3, np.float32), np.ones((2, 3), np.complex64)], ids=["1-D", "complex"])
def test_a_checkpoint_with_a_later_group_that_its_optimizer_cannot_take_is_refused(late: Any) -> None:
    job = Job("id", specs.plan(spec("muon")), select("numpy"), "first")
    document = job.to_document({})
    document["groups"] = document["groups"] * 2
    document["group_parameters"] = [["w"], ["late"]]
    fits = Job.from_document("id", None, document, {"w": VALUE, "late": VALUE}, {}, select("numpy"), "next")
    assert fits.group_names(1) == ["late"]
    with pytest.raises(errors.CheckpointMismatchError, match="'late': Muon"):
        Job.from_document("id", None, document, {"w": VALUE, "late": late}, {}, select("numpy"), "next")

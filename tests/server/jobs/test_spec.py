"""What a job's spec may hold: parameters that its optimizer takes, wherever they come from."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from optserve.server.backends import select
from optserve.server.jobs import Job
from optserve.server.jobs import spec as specs
from optserve.v1 import jobs_pb2, types_pb2
from optserve.wire import dtypes, errors

VALUE = np.ones((2, 3), np.float32)


def spec(optimizer: str, value: Any = VALUE) -> jobs_pb2.JobSpec:
    parameter = types_pb2.Parameter(name="w", shape=value.shape, dtype=dtypes.to_wire(value.dtype))
    return jobs_pb2.JobSpec(
        name="j", optimizer=optimizer, groups=[jobs_pb2.GroupSpec(parameters=[parameter])], workers=1, quorum=1
    )


@pytest.mark.parametrize("dtype", [np.complex64, np.complex128])
def test_complex_parameters_are_another_job_than_their_reals(dtype: Any) -> None:
    found, wanted = specs.plan(spec("adam", VALUE.astype(dtype))), specs.plan(spec("adam", VALUE))
    (difference,) = specs.differences(found, wanted)
    assert f"'w' (2, 3) {np.dtype(dtype)}, not 'w' (2, 3) float32" in difference


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

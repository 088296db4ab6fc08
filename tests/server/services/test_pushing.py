"""The head of a push: what is refused of it, and what makes it the same call again."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from optserve.server.services import pushing
from optserve.v1 import data_pb2, types_pb2
from optserve.wire import errors
from optserve.wire.values import to_hyperparameters

W = {"w": np.ones(3, np.float32), "v": np.ones((2, 2), np.float32)}
SKIP, ABANDON = data_pb2.CONTRIBUTION_SKIP, data_pb2.CONTRIBUTION_ABANDON
ROWS = [types_pb2.RowsEntry(parameter=1, count=1, dtype=types_pb2.DATA_TYPE_FLOAT32)]
HALF = types_pb2.DATA_TYPE_FLOAT16


def head(**fields: Any) -> data_pb2.PushBegin:
    call = types_pb2.CallIdentity(job_id="j", session_id="s", epoch=1, seq=1)
    given = {"call": call, "contribution": data_pb2.CONTRIBUTION_GRADIENT, "weight": 1.0, "parameter_count": 2, **fields}
    return data_pb2.PushBegin(**given)


BAD: dict[str, tuple[dict[str, Any], type[errors.OptserveError], str]] = {
    "no contribution": ({"contribution": 0}, errors.InvalidArgumentError, "one of GRADIENT, SKIP, NONFINITE, ABANDON"),
    "unknown contribution": ({"contribution": 77}, errors.InvalidArgumentError, "contribution is 77"),
    "weight": ({"weight": math.nan}, errors.InvalidArgumentError, "weight is nan"),
    "absent": ({"absent": [2]}, errors.UnknownParameterError, "parameter 2 is absent, but only 2"),
    "rows that come twice": (
        {"sparse": [*ROWS, *ROWS]},
        errors.InvalidArgumentError,
        "rows of one parameter are announced twice",
    ),
    "scale of 0": ({"loss_scale": 0.0}, errors.InvalidArgumentError, "loss_scale is 0.0; it must be finite and above 0"),
    "negative scale": ({"loss_scale": -2.0}, errors.InvalidArgumentError, "loss_scale is -2.0"),
    "scale of NaN": ({"loss_scale": math.nan}, errors.InvalidArgumentError, "loss_scale is nan"),
    "infinite scale": ({"loss_scale": math.inf}, errors.InvalidArgumentError, "loss_scale is inf"),
    "clip norm of 0": ({"clip_grad_norm": 0.0}, errors.InvalidArgumentError, "clip_grad_norm is 0.0; it must be a number"),
    "clip norm of NaN": ({"clip_grad_norm": math.nan}, errors.InvalidArgumentError, "clip_grad_norm is nan"),
    "negative clip value": ({"clip_grad_value": -1.0}, errors.InvalidArgumentError, "clip_grad_value is -1.0"),
    "both clips": ({"clip_grad_norm": 1.0, "clip_grad_value": 1.0}, errors.InvalidArgumentError, "give one of them"),
    "loss of NaN": ({"loss": math.nan}, errors.InvalidArgumentError, "loss is NaN"),
    "complex chunks": (
        {"dtypes": {0: types_pb2.DATA_TYPE_COMPLEX64}},
        errors.DtypeMismatchError,
        "array 0 is announced as complex64; chunks hold reals",
    ),
    "unknown dtype": ({"dtypes": {3: 99}}, errors.DtypeMismatchError, "the gradient of array 3 has the unknown data type 99"),
    "no dtype": ({"dtypes": {3: 0}}, errors.DtypeMismatchError, "unknown data type 0"),
    "evaluation without a closure": ({"evaluation": 1}, errors.InvalidArgumentError, "evaluation is 1, but closure is 0"),
    "nothing to abandon": ({"contribution": ABANDON, "closure": 5}, errors.InvalidArgumentError, "evaluation is 0"),
    "abandon without a closure": ({"contribution": ABANDON}, errors.InvalidArgumentError, "evaluation is 0"),
    "a metric without a name": ({"metrics": {"": 1.0}}, errors.InvalidArgumentError, "metric"),
    "no identity": ({"call": types_pb2.CallIdentity(session_id="s")}, errors.InvalidArgumentError, "call.seq is 0"),
}


@pytest.mark.parametrize("case", BAD, ids=str)
def test_a_head_that_is_not_well_formed_is_refused(case: str) -> None:
    fields, error, message = BAD[case]
    with pytest.raises(error, match=message):
        pushing.push(head(**fields))


@pytest.mark.parametrize("case", [name for name, (fields, *_) in BAD.items() if "call" not in fields], ids=str)
def test_a_refused_head_leaves_the_stream_and_the_job_as_they_were(
    foreign: Any, open_stream: Callable[..., Any], case: str
) -> None:
    fields, error, message = BAD[case]
    foreign.ready(W)
    stream = open_stream(foreign)
    stream.receive("opened")
    stream.push(foreign, W, **fields)  # its chunks and end come too, and are passed over
    found = stream.receive("error")
    assert (found.reason, message in found.message) == (error.reason, True)
    assert foreign.position().step == 0
    stream.push(foreign, W)
    assert stream.receive("pushed").position.step == 1


def test_what_a_head_says_arrives() -> None:
    found = pushing.push(
        head(
            dtypes={0: HALF},
            sparse=ROWS,
            loss_scale=1024.0,
            clip_grad_norm=math.inf,
            loss=math.inf,
            closure=7,
            evaluation=3,
            layout_version=4,
            metrics={"loss": math.nan},
        )
    )
    assert (found.dtypes, found.sparse) == ({0: np.dtype(np.float16)}, tuple(ROWS))
    assert (found.loss_scale, found.clip_grad_norm, found.clip_grad_value, found.loss) == (1024.0, math.inf, None, math.inf)
    assert (found.evaluation, found.layout_version, list(found.metrics)) == (3, 4, ["loss"])
    bare = pushing.push(head())
    assert (bare.loss_scale, bare.clip_grad_norm, bare.clip_grad_value, bare.loss) == (None,) * 4


@pytest.mark.parametrize("kind", [SKIP, ABANDON], ids=["skip", "abandon"])
def test_what_has_no_gradient_has_no_weight_and_no_rows(kind: Any) -> None:
    found = pushing.push(head(contribution=kind, weight=3.0, sparse=ROWS, dtypes={0: HALF}, closure=9, evaluation=1))
    assert (found.weight, found.sparse, found.dtypes, found.loss) == (0.0, (), {}, None)


CONTENT: dict[str, dict[str, Any]] = {
    "contribution": {"contribution": SKIP},
    "weight": {"weight": 2.0},
    "parameter_count": {"parameter_count": 1},
    "absent": {"absent": [0]},
    "content": {"content_fingerprint": 3},
    "changes": {"changes": [types_pb2.GroupChange(group=0, hyperparameters=to_hyperparameters({"lr": 0.5}))]},
    "dtypes": {"dtypes": {0: HALF}},
    "sparse": {"sparse": ROWS},
    "loss_scale": {"loss_scale": 1.0},
    "clip_grad_norm": {"clip_grad_norm": 1.0},
    "clip_grad_value": {"clip_grad_value": 1.0},
    "loss": {"loss": 0.0},
}
OTHER: dict[str, dict[str, Any]] = {
    "metrics": {"metrics": {"loss": 1.0}},
    "layout_version": {"layout_version": 2},
    "want_rows": {"want_weights": True, "want_rows": [types_pb2.Rows(parameter=1, deltas=[0])]},
    "groups_version": {"groups_version": 2},
    "inline": {"inline": types_pb2.InlineChunks()},
}


def fingerprint(**fields: Any) -> str:
    return pushing.push(head(**fields)).caller.fingerprint


@pytest.mark.parametrize("name", CONTENT, ids=str)
def test_other_content_is_another_call(name: str) -> None:
    assert fingerprint(**CONTENT[name]) != fingerprint()


def test_each_content_is_a_call_of_its_own() -> None:
    assert len({fingerprint(**fields) for fields in CONTENT.values()}) == len(CONTENT)


@pytest.mark.parametrize("name", OTHER, ids=str)
def test_what_is_asked_for_and_told_does_not_make_another_call(name: str) -> None:
    assert fingerprint(**OTHER[name]) == fingerprint()


def test_all_pushes_of_a_step_with_a_closure_are_one_call() -> None:
    same = {fingerprint(closure=9, **fields) for fields in [*CONTENT.values(), *OTHER.values(), {"evaluation": 4}]}
    assert same == {fingerprint(closure=9)}
    assert fingerprint(closure=8) not in same | {fingerprint()}


def test_a_one_off_push_takes_no_closure(foreign: Any, failed: Any) -> None:
    foreign.ready(W)
    found = failed(lambda: foreign.push(W, closure=5, loss=1.0))
    assert (found.reason, "needs a worker's stream" in found.message) == ("INVALID_ARGUMENT", True)
    assert foreign.push(W).position.step == 1


def test_an_optimizer_that_searches_takes_no_one_off_push(foreign: Any, failed: Any) -> None:
    foreign.ready(W, optimizer="lbfgs")
    found = failed(lambda: foreign.push(W, loss=1.0))
    assert (found.reason, "needs a worker's stream" in found.message) == ("INVALID_ARGUMENT", True)
    assert foreign.position().step == 0

"""Rules of a job: given when it is made, edited while it runs, told by info()."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from optserve.client import JobInfo, Server, errors

W = {"w": np.zeros(2, np.float32)}


def rules(info: JobInfo) -> tuple[float | None, float | None, int, int]:
    return info.clip_grad_norm, info.clip_grad_value, info.accumulation, info.accumulated


def test_a_job_has_no_rules_unless_it_is_given_some(server: Server) -> None:
    assert rules(server.create_job(None, W, optimizer="sgd", lr=1.0).info()) == (None, None, 1, 0)


def test_rules_are_given_at_creation_and_edited(server: Server) -> None:
    job = server.create_job(None, W, optimizer="sgd", lr=1.0, clip_grad_norm=np.float32(0.5), accumulation=np.int64(3))
    assert rules(job.info()) == (0.5, None, 3, 0)
    before = job.position()
    edited = job.update_rules(clip_grad_norm=None, clip_grad_value=2)
    assert edited.version == before.version + 1
    assert rules(job.info()) == (None, 2.0, 3, 0)
    job.update_rules(accumulation=1)
    assert rules(job.info()) == (None, 2.0, 1, 0)
    assert [event.message for event in job.events() if event.kind == "rules"] == [
        "rules: clip_grad_norm=None, clip_grad_value=2",
        "rules: accumulation=1",
    ]


def test_the_list_of_jobs_has_them_too(server: Server) -> None:
    server.create_job("ruled", W, optimizer="sgd", lr=1.0, clip_grad_value=0.25).info()
    try:
        (info,) = [entry for entry in server.jobs() if entry.name == "ruled"]
        assert rules(info) == (None, 0.25, 1, 0)
    finally:
        server.job("ruled").delete()


BAD: list[tuple[dict[str, Any], str]] = [
    ({"clip_grad_norm": 0}, "clip_grad_norm is 0"),
    ({"clip_grad_norm": -1.0}, "clip_grad_norm is -1"),
    ({"clip_grad_norm": float("nan")}, "clip_grad_norm is nan"),
    ({"clip_grad_norm": True}, "clip_grad_norm is True"),
    ({"clip_grad_value": "1"}, "clip_grad_value is '1'"),
    ({"clip_grad_value": 10**400}, "clip_grad_value is "),
    ({"clip_grad_norm": 1.0, "clip_grad_value": 1.0}, "give one of them"),
    ({"accumulation": 0}, "accumulation is 0"),
    ({"accumulation": 2.5}, "accumulation is 2.5"),
    ({"accumulation": None}, "accumulation is None"),
    ({"accumulation": True}, "accumulation is True"),
    ({"accumulation": 1 << 40}, f"accumulation is {1 << 40}"),
]


@pytest.mark.parametrize(("bad", "message"), BAD, ids=[repr(bad)[:40] for bad, _ in BAD])
def test_bad_rules_are_refused_by_name(client: Server, bad: dict[str, Any], message: str) -> None:
    with pytest.raises(errors.InvalidArgumentError, match=message):
        client.create_job("bad", W, optimizer="sgd", lr=1.0, **bad)
    assert client.jobs() == []
    job = client.create_job(None, W, optimizer="sgd", lr=1.0)
    before = job.position()
    with pytest.raises(errors.InvalidArgumentError, match=r"clip_grad_value is|" + message):
        job.update_rules(**bad)
    assert job.position() == before
    assert rules(job.info()) == (None, None, 1, 0)


def test_an_unknown_rule_is_refused_with_the_nearest_name(client: Server) -> None:
    job = client.create_job(None, W, optimizer="sgd", lr=1.0)
    with pytest.raises(errors.InvalidArgumentError, match="there is no rule 'clip_norm'"):
        job.update_rules(clip_norm=1.0)
    with pytest.raises(errors.InvalidArgumentError, match=r"clip_grad_norm is .* of type object"):
        job.update_rules(clip_grad_norm=object())


def test_exist_ok_compares_the_rules_of_creation(client: Server) -> None:
    job = client.create_job("ruled", W, optimizer="sgd", lr=1.0, clip_grad_norm=1.0, accumulation=2)
    job.update_rules(clip_grad_norm=5.0)
    client.create_job("ruled", W, optimizer="sgd", lr=1.0, clip_grad_norm=1.0, accumulation=2, exist_ok=True)
    with pytest.raises(errors.JobSpecMismatchError, match=r"clip_grad_norm is 1.0, not None; accumulation is 2, not 1"):
        client.create_job("ruled", W, optimizer="sgd", lr=1.0, exist_ok=True)


def test_rules_beside_a_checkpoint_are_refused(client: Server, tmp_path: Any) -> None:
    for given in ({"clip_grad_norm": 1.0}, {"clip_grad_value": 1.0}, {"accumulation": 2}):
        with pytest.raises(errors.InvalidArgumentError, match="rules; give only the name"):
            client.create_job("again", from_checkpoint=tmp_path, **given)

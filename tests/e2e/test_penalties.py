"""l1, an option of every optimizer that torch does not have: given, edited, saved, restored and loaded like the others."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from optserve.client import Job, Server

W = np.array([3.0, -2.0, 0.0], np.float32)
NOTHING = {"w": np.zeros(3, np.float32), "v": np.zeros(3, np.float32)}


@pytest.fixture
def job(server: Server) -> Job:
    """SGD of rate 1 whose second group has a penalty."""
    return server.create_job("j", [{"params": {"w": W}}, {"params": {"v": W}, "l1": 0.5}], optimizer="sgd", lr=1.0)


def step(job: Job) -> dict[str, list[float]]:
    """A step of zero gradients, which shows the penalty alone: what it took from each parameter."""
    with job.join() as worker:
        before = worker.pull()
        after = worker.push_pull(NOTHING)
    return {name: (before[name] - after[name]).tolist() for name in before}


def test_a_penalty_is_of_its_group_and_stands_only_where_it_was_given(job: Job) -> None:
    assert [group.get("l1") for group in job.param_groups] == [None, 0.5]
    assert step(job) == {"w": [0, 0, 0], "v": [0.5, -0.5, 0]}


def test_an_edited_penalty_acts_from_the_next_step(job: Job) -> None:
    job.update_group(0, l1=0.25)
    job.update_group(1, l1=0.0)
    assert step(job) == {"w": [0.25, -0.25, 0], "v": [0, 0, 0]}
    job.update_group(0, maximize=True)
    assert step(job) == {"w": [0.25, -0.25, 0], "v": [0, 0, 0]}


def test_a_penalty_comes_back_with_a_checkpoint(job: Job, server: Server, tmp_path: Path) -> None:
    job.save_checkpoint("c")
    job.update_group(0, l1=0.25)
    job.restore_checkpoint("c")
    found = server.create_job("again", from_checkpoint=job.download_checkpoint("c", tmp_path / "c"))
    for entry in (job, found):
        assert [group.get("l1") for group in entry.param_groups] == [None, 0.5]
        assert step(entry) == {"w": [0, 0, 0], "v": [0.5, -0.5, 0]}


def test_a_loaded_state_dict_brings_its_penalties_and_no_others(job: Job) -> None:
    saved: dict[str, Any] = job.state_dict()
    job.update_group(0, l1=0.25)
    job.update_group(1, l1=0.125)
    job.load_state_dict(saved)
    assert [group.get("l1") for group in job.param_groups] == [None, 0.5]
    assert step(job) == {"w": [0, 0, 0], "v": [0.5, -0.5, 0]}

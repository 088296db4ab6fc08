"""What a user may rely on: the names of optserve.client, and no others."""

from __future__ import annotations

from pathlib import Path

import pytest

import optserve.client

PUBLIC = [
    "Checkpoint",
    "Event",
    "Job",
    "JobInfo",
    "Loaded",
    "Member",
    "OptserveError",
    "Position",
    "Schedule",
    "Server",
    "ServerInfo",
    "SparseGradient",
    "StepInfo",
    "Worker",
    "connect",
    "errors",
]


def test_all_is_the_list_that_users_were_promised() -> None:
    assert optserve.client.__all__ == PUBLIC


def test_all_is_sorted() -> None:
    assert sorted(optserve.client.__all__) == list(optserve.client.__all__)


@pytest.mark.parametrize("name", PUBLIC)
def test_public_name_exists_and_says_what_it_is(name: str) -> None:
    assert getattr(optserve.client, name).__doc__


def test_every_other_module_of_the_client_is_private() -> None:
    folder = Path(optserve.client.__file__ or "").parent
    modules = {path.stem for path in folder.iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()}
    assert [name for name in sorted(modules) if not name.startswith("_")] == []

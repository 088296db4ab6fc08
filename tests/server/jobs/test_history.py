"""Which versions still count: RolledBack."""

from __future__ import annotations

import pytest

from optserve.server.jobs.history import History
from optserve.server.records import Position
from optserve.wire import errors


def rolled_back(history: History, lineage: str, version: int, now: int) -> tuple[str, str] | None:
    try:
        history.check(lineage, version, Position(history.lineage_id, now, now))
    except errors.RolledBackError as error:
        return error.metadata["from"], error.metadata["to"]
    return None


def test_a_client_that_saw_nothing_or_what_is_there_goes_on() -> None:
    history = History("a")
    assert rolled_back(history, "", 0, 5) is None
    assert rolled_back(history, "a", 5, 5) is None
    assert rolled_back(history, "a", 3, 5) is None


def test_a_client_that_saw_a_later_version_of_the_same_lineage() -> None:
    assert rolled_back(History("a"), "a", 6, 5) == ("6", "5")


def test_after_a_restart_what_came_after_the_checkpoint_is_gone() -> None:
    history = History("a")
    history.branch("b", 10)
    assert rolled_back(history, "a", 10, 12) is None
    assert rolled_back(history, "a", 11, 12) == ("11", "10")
    assert rolled_back(history, "b", 12, 12) is None


def test_a_restore_before_an_earlier_branch_takes_back_from_all() -> None:
    history = History("a")
    history.branch("b", 10)
    history.branch("c", 4)
    assert rolled_back(history, "a", 4, 4) is None
    assert rolled_back(history, "a", 5, 4) == ("5", "4")
    assert rolled_back(history, "b", 8, 4) == ("8", "4")


def test_a_restore_after_a_branch_keeps_what_both_share() -> None:
    history = History("a")
    history.branch("b", 10)
    history.branch("c", 20)
    assert rolled_back(history, "a", 10, 25) is None
    assert rolled_back(history, "a", 11, 25) == ("11", "10")
    assert rolled_back(history, "b", 20, 25) is None
    assert rolled_back(history, "b", 21, 25) == ("21", "20")


def test_a_lineage_that_is_not_known_is_reported_as_lost() -> None:
    """kill -9: the lineage of the lost start was never written down, so nobody knows what of it is still there."""
    history = History.from_document(History("a").to_document())
    history.branch("c", 10)
    assert rolled_back(history, "lost", 9, 12) == ("9", "10")
    assert rolled_back(history, "lost", 11, 12) == ("11", "10")
    assert rolled_back(history, "lost", 0, 12) is None


def test_a_history_comes_back_from_its_document() -> None:
    history = History("a")
    history.branch("b", 10)
    again = History.from_document(history.to_document())
    again.branch("c", 15)
    assert again.lineage_id == "c"
    assert again.ended == {"a": 10, "b": 15}
    assert again.began_at == 15


def test_the_error_names_both_versions_and_where_the_job_is() -> None:
    history = History("a")
    history.branch("b", 10)
    with pytest.raises(errors.RolledBackError, match="version 11 is gone, it went back to version 10 and is at version 12"):
        history.check("a", 11, Position("b", 12, 7), schedule_steps=3)

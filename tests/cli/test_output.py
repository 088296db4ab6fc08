"""Tables in terminals and pipes."""

from __future__ import annotations

import click
import pytest

from optserve.cli.output import print_table, text

COLUMNS = ["JOB", "LR", "METRICS"]
ROWS: list[list[object]] = [["a/long/name/of/a/job", (0.001, 0.0005), "loss=7.661e-14 accuracy=0.9812"], ["j", 0.1, ""]]


def test_a_piped_table_has_no_space_at_the_end_of_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    print_table(COLUMNS, ROWS)
    assert capsys.readouterr().out.splitlines() == [
        "JOB                   LR             METRICS",
        "a/long/name/of/a/job  0.001, 0.0005  loss=7.661e-14 accuracy=0.9812",
        "j                     0.1",
    ]


@pytest.mark.parametrize("width", [20, 40, 60])
def test_no_word_is_broken_in_a_narrow_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, width: int
) -> None:
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", str(width))
    print_table(COLUMNS, ROWS)
    out = click.unstyle(capsys.readouterr().out)
    assert {"a/long/name/of/a/job", "loss=7.661e-14", "accuracy=0.9812", "0.0005"} <= {word.strip(",") for word in out.split()}
    assert len(out.splitlines()) == 4


def test_none_in_a_list_is_the_word_that_the_command_line_takes() -> None:
    assert text((None, 1e-3)) == "none, 0.001"
    assert text(None) == "-", "of a cell"


@pytest.mark.parametrize(("name", "shown"), [("a\nb", r"'a\nb'"), ("\x1b[2J", r"'\x1b[2J'"), ("ä b", "ä b")])
def test_a_name_cannot_break_the_table_or_talk_to_the_terminal(
    capsys: pytest.CaptureFixture[str], name: str, shown: str
) -> None:
    print_table(["NAME"], [[name]])
    assert capsys.readouterr().out == f"NAME\n{shown}\n"

"""What holds for every command: help with an example, one line for an error, exit codes."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
from collections.abc import Iterator

import click
import pytest
from click.testing import CliRunner

from optserve.cli import exits, main
from optserve.wire import errors


def _commands(command: click.Command, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    yield path
    if isinstance(command, click.Group):
        for name, child in command.commands.items():
            yield from _commands(child, (*path, name))


COMMANDS = list(_commands(main))


@pytest.mark.parametrize("path", COMMANDS, ids=" ".join)
def test_the_help_shows_an_example_that_names_the_command(path: tuple[str, ...]) -> None:
    result = CliRunner().invoke(main, [*path, "--help"], prog_name="optserve")
    assert result.exit_code == exits.OK
    _, _, examples = result.stdout.partition("Example")
    assert "optserve " + " ".join(path) in examples


def test_all_commands_are_there() -> None:
    expected = ["serve", "demo", "doctor", "health", "job", "group", "schedule", "checkpoint"]
    expected += [f"job {name}" for name in ["list", "show", "set", "pull", "export", "delete", "events"]]
    expected += [f"job {name}" for name in ["rename-parameter", "replace-parameter", "remove-parameter"]]
    expected += [f"group {name}" for name in ["list", "set", "add"]]
    expected += [f"schedule {name}" for name in ["show", "set", "step", "remove"]]
    expected += [f"checkpoint {name}" for name in ["save", "list", "verify", "restore", "download", "delete"]]
    assert {" ".join(path) for path in COMMANDS if path} == set(expected)


@pytest.mark.parametrize(
    "arguments",
    [
        ["nothing"],
        ["job", "show"],
        ["group", "set", "j", "0", "lr"],
        ["group", "set", "j", "0", "lr=1", "lr=2"],
        ["serve", "--backend", "x"],
        ["serve", "--address-file", "/nonexistent/address"],
    ],
    ids=" ".join,
)
def test_wrong_usage_is_one_line_and_exit_code_2(arguments: list[str]) -> None:
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == exits.USAGE
    assert result.stdout == ""
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize("path", ["", "job", "group", "schedule", "checkpoint"])
def test_a_bare_command_prints_its_help_and_is_exit_code_2(path: str) -> None:
    result = CliRunner().invoke(main, path.split(), prog_name="optserve")
    help_text = CliRunner().invoke(main, [*path.split(), "--help"], prog_name="optserve").stdout
    assert (result.exit_code, result.stdout, result.stderr) == (exits.USAGE, "", help_text)


def test_an_address_file_that_cannot_be_written_is_a_sentence() -> None:
    result = CliRunner().invoke(main, ["serve", "--address-file", "/nonexistent/address"])
    assert result.stderr == "error: /nonexistent/address cannot be written: there is no folder /nonexistent\n"


def test_the_help_shows_what_a_plateau_steps_on() -> None:
    text = CliRunner().invoke(main, ["schedule", "step", "--help"]).stdout
    assert re.search(r"--metric FLOAT +What ReduceLROnPlateau steps on\.", text)
    assert "optserve schedule step digits --metric 0.31" in text


def test_the_help_shows_how_schedules_in_schedules_are_written() -> None:
    text = CliRunner().invoke(main, ["schedule", "set", "--help"]).stdout
    assert "schedulers='LinearLR(total_iters=5), CosineAnnealingLR(T_max=20)'" in text


@pytest.mark.parametrize("path", ["group set", "schedule set"])
def test_the_help_shows_how_a_list_is_written(path: str) -> None:
    assert "A list is numbers with commas between them" in CliRunner().invoke(main, [*path.split(), "--help"]).stdout


def test_a_server_that_is_not_there_is_named_with_the_time_waited(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("optserve.cli.options.CONNECT_SECONDS", 0.3)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
        for arguments in (["health"], ["job", "list", "--json"]):
            result = CliRunner().invoke(main, [*arguments, "--server", address])
            assert result.exit_code == exits.UNREACHABLE
            assert result.stdout == ""
            assert result.stderr.startswith("error: ")
            assert result.stderr.count("\n") == 1
            assert address in result.stderr


@pytest.fixture
def broken(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(server: str) -> None:
        raise {
            "typed": errors.CheckpointCorruptError("torn\nin two"),
            "bug": KeyError("x"),
            "file": PermissionError(13, "no", "f"),
        }[server]

    monkeypatch.setattr("optserve.cli.health.connected", fail)


@pytest.mark.parametrize(
    ("kind", "code", "text"),
    [
        ("typed", exits.CORRUPT, "error: torn in two\n"),
        ("bug", exits.FAILED, "error: KeyError: 'x' (`optserve --debug ...` shows where)\n"),
        ("file", exits.FAILED, "error: [Errno 13] no: 'f'\n"),
    ],
)
@pytest.mark.usefixtures("broken")
def test_an_error_is_one_line_and_debug_shows_where(kind: str, code: int, text: str) -> None:
    result = CliRunner().invoke(main, ["health", "--server", kind])
    assert (result.exit_code, result.stderr) == (code, text)
    assert isinstance(CliRunner().invoke(main, ["--debug", "health", "--server", kind]).exception, Exception)


def test_help_and_usage_errors_load_neither_grpc_nor_numpy_nor_rich() -> None:
    code = """
import sys
from optserve.cli import main
main(["--help"], standalone_mode=False)
heavy = {"grpc", "numpy", "rich", "numba", "sklearn", "matplotlib"} & set(sys.modules)
sys.exit(f"loaded: {heavy}" if heavy else 0)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=dict(os.environ), check=False)
    assert done.returncode == 0, done.stderr

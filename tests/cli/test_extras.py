"""Commands whose extra is missing name it."""

from __future__ import annotations

import importlib.util
from importlib.machinery import ModuleSpec

import pytest
from click.testing import CliRunner

from optserve.cli import exits, main


@pytest.fixture
def without(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """The modules of the parameter look as if they were not installed."""
    real = importlib.util.find_spec

    def find(name: str) -> ModuleSpec | None:
        return None if name in request.param else real(name)

    monkeypatch.setattr("optserve.cli.extras.find_spec", find)


@pytest.mark.parametrize(
    ("without", "arguments", "names"),
    [
        (["grpc_health"], ["serve"], ["grpc_health", 'pip install "optserve[server]"']),
        (["sklearn"], ["demo"], ["sklearn", 'pip install "optserve[demo]"']),
        (["matplotlib"], ["demo"], ["matplotlib", 'pip install "optserve[demo]"']),
        (["sklearn"], ["demo", "--connect", "127.0.0.1:1"], ["sklearn", 'pip install "optserve[demo]"']),
    ],
    indirect=["without"],
)
@pytest.mark.usefixtures("without")
def test_a_missing_extra_is_named_with_the_pip_command(arguments: list[str], names: list[str]) -> None:
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == exits.MISSING_EXTRA
    assert all(name in result.stderr for name in names)
    assert result.stderr.count("\n") == 1

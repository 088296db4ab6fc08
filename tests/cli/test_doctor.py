"""`optserve doctor`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from optserve.cli import doctor, exits, main
from optserve.cli.doctor import Finding

KEYS = {*doctor.LOOKS}


@pytest.fixture(autouse=True)
def no_server(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPTSERVE_SERVER", raising=False)


def test_a_machine_that_passes_these_tests_is_ready() -> None:
    result = CliRunner().invoke(main, ["doctor"])
    assert result.exit_code == exits.OK
    assert result.stdout.endswith("ready: a server can run here\n")
    assert all(line == line.rstrip() for line in result.stdout.splitlines())


def test_json_has_every_finding() -> None:
    found = json.loads(CliRunner().invoke(main, ["doctor", "--json"]).stdout)
    assert found["ready"] is True
    assert set(found["findings"]) == KEYS
    assert all(set(finding) == {"state", "value", "note"} for finding in found["findings"].values())


def test_without_numba_numpy_is_chosen_loudly(monkeypatch: pytest.MonkeyPatch) -> None:
    class NumpyOnly:
        name = "numpy"

    monkeypatch.setattr("optserve.server.backends.select", lambda _name: NumpyOnly())
    monkeypatch.setattr("optserve.cli.doctor.missing", lambda modules: [name for name in modules if name == "numba"])
    result = CliRunner().invoke(main, ["doctor"])
    assert result.exit_code == exits.OK
    assert "NUMBA IS MISSING" in result.stdout
    assert 'pip install "optserve[server]"' in result.stdout


def test_a_numba_that_does_not_work_is_bad_and_its_last_words_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("numba")
    monkeypatch.setattr("optserve.cli.doctor._NUMBA_PROBE", "raise ImportError('libllvm is of another world')")
    result = CliRunner().invoke(main, ["doctor", "--json"])
    assert result.exit_code == exits.FAILED
    finding = json.loads(result.stdout)["findings"]["numba"]
    assert (finding["state"], finding["note"]) == ("bad", "ImportError: libllvm is of another world")


def findings(monkeypatch: pytest.MonkeyPatch, probe: str) -> dict[str, dict[str, str]]:
    """With CuPy installed, and a probe that ends so."""
    missing = doctor.missing
    monkeypatch.setattr("optserve.cli.doctor.missing", lambda modules: [] if modules == ["cupy"] else missing(modules))
    monkeypatch.setattr("optserve.cli.doctor._GPU_PROBE", probe)
    found: dict[str, dict[str, str]] = json.loads(CliRunner().invoke(main, ["doctor", "--json"]).stdout)["findings"]
    return found


def test_a_gpu_that_is_used_is_the_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    found = findings(monkeypatch, "print('cupy on NVIDIA H200')")
    assert (found["gpu"]["state"], found["gpu"]["value"]) == ("ok", "cupy on NVIDIA H200")
    assert (found["backend"]["state"], found["backend"]["value"]) == ("ok", "cupy")


def test_a_gpu_that_is_not_used_has_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    found = findings(monkeypatch, "print('no GPU: there is a driver, but no NVIDIA device')")
    assert found["gpu"] == {"state": "note", "value": "not used", "note": "there is a driver, but no NVIDIA device"}
    assert found["backend"]["value"] in ("numba", "numpy")


def test_a_gpu_that_does_not_work_is_bad_since_a_server_would_take_it(monkeypatch: pytest.MonkeyPatch) -> None:
    found = findings(monkeypatch, "import sys; sys.exit('the device H200 cannot be used: all of them are busy')")
    said = "the device H200 cannot be used: all of them are busy; without it: optserve serve --backend numba"
    assert found["gpu"] == {"state": "bad", "value": "does not work", "note": said}
    assert found["backend"] == {"state": "bad", "value": "cupy", "note": said}


def test_without_cupy_and_driver_nothing_is_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    missing = doctor.missing
    monkeypatch.setattr("optserve.cli.doctor.missing", lambda modules: modules if modules == ["cupy"] else missing(modules))
    monkeypatch.setattr("optserve.cli.doctor._GPU_PROBE", "print('cupy on NVIDIA H200')")
    for tool, said in ((None, "there is no NVIDIA driver on this machine, and no CuPy"), ("/bin/nvidia-smi", doctor._USED)):
        monkeypatch.setattr("optserve.cli.doctor.shutil.which", lambda _, tool=tool: tool)
        doctor._gpu.cache_clear()
        assert doctor._gpu().note == said


def test_the_probe_tells_what_is_in_the_way_of_a_gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "cupy.py").write_text("raise ImportError('libcuda is of another world')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    found = findings(monkeypatch, doctor._GPU_PROBE)
    assert found["gpu"]["note"] == "CuPy cannot be imported: libcuda is of another world"


def test_a_look_that_breaks_is_a_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> Finding:
        raise OSError("the disk is on fire")

    monkeypatch.setitem(doctor.LOOKS, "memory", broken)
    result = CliRunner().invoke(main, ["doctor"])
    assert result.exit_code == exits.FAILED
    assert "the disk is on fire" in result.stdout


def test_a_server_that_does_not_answer_is_bad_and_one_that_does_is_described(
    address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("optserve.cli.options.CONNECT_SECONDS", 0.3)
    assert CliRunner().invoke(main, ["doctor", "--server", "127.0.0.1:1"]).exit_code == exits.FAILED
    found = json.loads(CliRunner().invoke(main, ["doctor", "--json", "--server", address]).stdout)["findings"]["server"]
    assert (found["state"], found["value"]) == ("ok", "reachable")
    assert "backend numpy" in found["note"]


def test_the_server_of_the_environment_is_asked_too(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPTSERVE_SERVER", address)
    found = json.loads(CliRunner().invoke(main, ["doctor", "--json"]).stdout)["findings"]["server"]
    assert found["state"] == "ok"
    assert address in found["note"]

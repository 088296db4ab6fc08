"""A job's life on a server whose state lies on a device: the bits of a server on a CPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from every_backend import GPU, backend_named
from host_kernels import needs_compiler

from optserve.client import Job, connect
from optserve.server import backends
from optserve.server.app import App


@pytest.fixture(params=[pytest.param("cupy-on-host", marks=needs_compiler), GPU])
def device_app(request: pytest.FixtureRequest, start_app: Callable[..., App], monkeypatch: pytest.MonkeyPatch) -> App:
    """A server that was started with `--backend cupy`."""
    found = backend_named(request.param)
    monkeypatch.setattr(backends, "_cupy", lambda _: found)
    app = start_app(backend="cupy")
    assert app.backend is found
    return app


def live(address: str, model: Any) -> list[dict[str, Any]]:
    """What a user sees after each of the calls that change a job's arrays."""
    seen: list[dict[str, Any]] = []

    def look(job: Job) -> None:
        state = job.state_dict()["state"]
        plain = {(index, key): np.asarray(entry).tobytes() for index, slots in state.items() for key, entry in slots.items()}
        seen.append(plain | {name: value.tobytes() for name, value in job.pull().items()} | {"at": job.position().step})

    with connect(address, timeout_seconds=20) as server:
        job = server.create_job("j", model.groups(lr=0.1), optimizer="adam", lr=0.01, l1=0.01, workers=1)
        look(job)
        with job.join(rank=0) as worker:
            for number in range(3):
                worker.push_pull(model.draw(1, number))
            look(job)
            job.save_checkpoint("c")
            kept = job.state_dict()
            job.update_group(0, amsgrad=True, weight_decay=0.1)
            worker.push_pull(model.draw(1, 3))
            look(job)
        job.restore_checkpoint("c")
        look(job)
        with job.join(rank=0) as worker:
            worker.push_pull(model.draw(1, 4))
            look(job)
            job.load_state_dict(kept)
            worker.push_pull(model.draw(1, 5))
            look(job)
            job.add_param_group({"params": {"late": np.arange(40, dtype=np.float32)}, "lr": 0.5})
            worker.push_pull({"late": np.ones(40, np.float32)})
            look(job)
        assert job.info().backend in ("cupy", "numpy")
    return seen


def test_a_jobs_life_has_the_bits_of_a_cpu(device_app: App, app: App, mixed: Any) -> None:
    ours, theirs = live(device_app.address, mixed), live(app.address, mixed)
    assert len(ours) == 7
    for index, (found, expected) in enumerate(zip(ours, theirs, strict=True)):
        assert found.keys() == expected.keys(), index
        assert [name for name in found if found[name] != expected[name]] == [], index

"""A server's parts wired together, its start and its stop."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata
from typing import Any

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from optserve.server import backends, interceptors
from optserve.server.app.config import ServerConfig, check_address
from optserve.server.app.files import lock, write_whole
from optserve.server.durability.archive import SHUTDOWN, Archive
from optserve.server.durability.checkpoints import Checkpoints
from optserve.server.durability.journal import NullJournal
from optserve.server.records import new_id
from optserve.server.rounds.registry import Registry
from optserve.server.services.checkpoints import CheckpointService
from optserve.server.services.data import DataService
from optserve.server.services.jobs import JobService
from optserve.server.services.optimizer import OptimizerService
from optserve.server.services.server import ServerService
from optserve.server.services.state import StateService
from optserve.server.services.workers import WorkerService
from optserve.server.storage import DiskStorage, MemoryStorage
from optserve.wire import errors
from optserve.wire.chunks import MAX_MESSAGE_BYTES
from optserve.wire.methods import METHODS

logger = logging.getLogger("optserve.server")

Handlers = Mapping[str, Callable[[Any, Any], Any]]

_STOP_GRACE_SECONDS = 10.0
OPTIONS = (
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.so_reuseport", 0),  # two servers on one port must be an error
    ("grpc.http2.bdp_probe", 0),  # with a bounded window: 32 workers take 784 MiB instead of 2,632
    ("grpc.http2.lookahead_bytes", 4 << 20),
    ("grpc.keepalive_time_ms", 5_000),
    ("grpc.keepalive_timeout_ms", 5_000),
    ("grpc.http2.ping_timeout_ms", 5_000),  # without it a stopped peer is noticed after 60 s only
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.http2.min_ping_interval_without_data_ms", 1_000),
)
_WAITING = {"Join", "GetJob", "WaitForVersion", "ListEvents", "Push"}
_BULK = {"InitializeJob", "CreateJobFromCheckpoint", "Pull", "AddGroup", "GetState", "LoadState"}


class App:
    """A server in this process. `handlers` are its RPCs by path, for calls in process."""

    def __init__(self, config: ServerConfig) -> None:
        """Recovers the jobs of the data dir. InsecureAddressError, StorageError, MissingExtraError."""
        check_address(config)
        self.config = config
        self.backend = backends.select(config.backend)
        self._lock_file = None if config.data_dir is None else lock(config.data_dir)
        storage = MemoryStorage() if config.data_dir is None else DiskStorage(config.data_dir)
        self._archive = Archive(Checkpoints(storage))
        self.registry = Registry(self.backend, lambda _: NullJournal())
        for job in self._archive.recover(self.backend):
            self.registry.adopt(job)
        self._data = DataService(self.registry, config.max_streams)
        self.handlers = self._handlers()
        self.address: str | None = None
        self._server: grpc.Server | None = None
        self._pools: list[ThreadPoolExecutor] = []
        self._health: health.HealthServicer | None = None

    def _handlers(self) -> Handlers:
        services = {
            "JobService": JobService(self.registry, self._archive),
            "WorkerService": WorkerService(self.registry),
            "DataService": self._data,
            "OptimizerService": OptimizerService(self.registry),
            "StateService": StateService(self.registry),
            "CheckpointService": CheckpointService(self.registry, self._archive),
            "ServerService": ServerService(
                self.registry,
                metadata.version("optserve"),
                new_id(),
                self.config.data_dir is not None,
                lambda: (len(self._data.streams), self.config.max_streams),
            ),
        }
        return {path: getattr(services[method.service.rpartition(".")[2]], method.name) for path, method in METHODS.items()}

    def start(self) -> str:
        """Listens; the address with its real port. AddressInUseError if it is taken."""
        if self.config.address is None:
            raise errors.InvalidArgumentError("this server has no address to listen on")
        pools = {
            "stream": self._pool("stream", self.config.max_streams + 8),
            "bulk": self._pool("bulk", 16),
            "waiting": self._pool("waiting", 256),
            "control": self._pool("control", 8),
        }
        self._server = grpc.server(pools["control"], options=OPTIONS)
        self._server.add_generic_rpc_handlers(interceptors.handlers(self.handlers, lambda path: pools[_pool_of(path)]))
        self._health = health.HealthServicer(experimental_non_blocking=True, experimental_thread_pool=self._pool("health", 2))
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        names = sorted({method.service for method in METHODS.values()})
        reflection.enable_server_reflection([*names, health.SERVICE_NAME, reflection.SERVICE_NAME], self._server)
        try:
            port = self._server.add_insecure_port(self.config.address)
        except RuntimeError as error:
            raise errors.AddressInUseError(
                f"cannot listen on {self.config.address}: it is in use, or not an address of this machine"
            ) from error
        self._server.start()
        for name in ("", *names):
            self._health.set(name, health_pb2.HealthCheckResponse.SERVING)
        self.address = f"{self.config.address.rpartition(':')[0]}:{port}"
        if self.config.address_file is not None:
            write_whole(self.config.address_file, self.address)
        return self.address

    def housekeeping(self) -> None:
        """Deletes unnamed jobs whose creator is gone. Called every second while the server runs."""
        for job_id in self.registry.expired():
            logger.info("unnamed job %s: its session ended", job_id)
            self.registry.delete(job_id)
            self._archive.checkpoints.delete_folder(job_id)

    def stop(self, grace_seconds: float = _STOP_GRACE_SECONDS) -> None:
        """Refuses new calls, ends waits with ServerStoppingError, lets what is being applied finish, then saves. Idempotent."""
        if self._health is not None:
            self._health.enter_graceful_shutdown()
        running = self.registry.close(errors.ServerStoppingError("the server is stopping"))
        self._data.streams.hang_up()
        if self._server is not None:
            self._server.stop(grace_seconds).wait(grace_seconds + 5)
            self._server = None
        if self.config.data_dir is not None:
            self._save_all([entry.host.job.job_id for entry in running if entry.job.initialized and entry.job.name])
        for pool in self._pools:
            pool.shutdown(wait=True, cancel_futures=True)
        self._pools.clear()
        if self.config.address_file is not None:
            self.config.address_file.unlink(missing_ok=True)
        if self._lock_file is not None:
            os.close(self._lock_file)
            self._lock_file = None

    def _save_all(self, job_ids: list[str]) -> None:
        for running in self.registry.all():
            if running.job.job_id not in job_ids:
                continue
            document, tensors = running.host.capture()
            info = self._archive.save(running.job.job_id, SHUTDOWN, document, tensors, replace=True)
            logger.info("job %r: saved at version %d, %d bytes", running.job.name, running.job.position.version, info.size)

    def _pool(self, name: str, size: int) -> ThreadPoolExecutor:
        pool = ThreadPoolExecutor(size, thread_name_prefix=f"optserve-{name}")
        self._pools.append(pool)
        return pool


def _pool_of(path: str) -> str:
    name = path.rpartition("/")[2]
    if name == "Stream":
        return "stream"
    if name in _WAITING:
        return "waiting"
    return "bulk" if name in _BULK or "Checkpoint" in name else "control"

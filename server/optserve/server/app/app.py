"""A server's parts wired together, its start and its stop."""

from __future__ import annotations

import importlib.util
import logging
import os
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from importlib import metadata
from typing import Any

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from optserve.server import backends, interceptors
from optserve.server.app.config import ServerConfig, check_address
from optserve.server.app.files import lock, write_whole
from optserve.server.app.listening import check_free
from optserve.server.durability.archive import SHUTDOWN, Archive
from optserve.server.durability.checkpoints import Checkpoints
from optserve.server.durability.journal import NullJournal
from optserve.server.records import new_id
from optserve.server.rounds.host import JobHost
from optserve.server.rounds.registry import Registry
from optserve.server.services.checkpoints import CheckpointService
from optserve.server.services.data import DataService
from optserve.server.services.folders import Folders
from optserve.server.services.jobs import JobService
from optserve.server.services.optimizer import OptimizerService
from optserve.server.services.parameters import ParameterService
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
_BULK = {"InitializeJob", "CreateJobFromCheckpoint", "Pull", "AddGroup", "ReplaceParameter", "GetState", "LoadState"}


class App:
    """A server in this process. `handlers` are its RPCs by path, for calls in process."""

    def __init__(self, config: ServerConfig) -> None:
        """Recovers the jobs of the data dir. InsecureAddressError, InvalidArgumentError, StorageError, MissingExtraError."""
        check_address(config)
        self._check_curves(config)
        self.config = config
        self.backend = backends.select(config.backend, config.owns_process)
        self._held = ExitStack()  # closed last to first: the address file, the pools, the data dir
        try:
            self._lock_data_dir()
            self.registry = Registry(self.backend, lambda _: NullJournal(), watch=self._watch())
            self._archive = self._recovered()
        except BaseException:
            self._held.close()
            raise
        self._folders = Folders(self.registry, self._archive)
        self._data = DataService(self.registry, config.max_streams)
        self.handlers = self._handlers()
        self.address: str | None = None
        self._server: grpc.Server | None = None
        self._health: health.HealthServicer | None = None
        self._stopped = False

    @staticmethod
    def _check_curves(config: ServerConfig) -> None:
        if config.curves_folder is not None and importlib.util.find_spec("tensorboardX") is None:
            raise errors.MissingExtraError(
                'TensorBoard files need tensorboardX: pip install "optserve[tensorboard]"', extra="tensorboard"
            )

    def _lock_data_dir(self) -> None:
        if self.config.data_dir is not None and (descriptor := lock(self.config.data_dir)) is not None:
            self._held.callback(os.close, descriptor)

    def _watch(self) -> Callable[[JobHost], None]:
        """Who hears of every job's rounds."""
        folder = self.config.curves_folder
        if folder is None:
            return lambda _: None
        from optserve.server.metrics import Curves  # tensorboardX is an extra, and imports torch where that is

        curves = Curves(folder)
        self._held.callback(curves.close)
        return curves.watch

    def _recovered(self) -> Archive:
        """The archive, once its jobs are in the registry."""
        storage = MemoryStorage() if self.config.data_dir is None else DiskStorage(self.config.data_dir)
        archive = Archive(Checkpoints(storage))
        for job in archive.recover(self.backend):
            try:
                self.registry.adopt(job)
            except errors.JobExistsError as error:
                logger.error("job %s does not continue, its checkpoints stay where they are: %s", job.job_id, error)
        return archive

    def _handlers(self) -> Handlers:
        services = {
            "JobService": JobService(self.registry, self._archive, self._folders),
            "WorkerService": WorkerService(self.registry, self._folders),
            "DataService": self._data,
            "OptimizerService": OptimizerService(self.registry),
            "ParameterService": ParameterService(self.registry),
            "StateService": StateService(self.registry),
            "CheckpointService": CheckpointService(self.registry, self._archive, self._folders),
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
        check_free(self.config.address)
        pools = {
            "stream": self._pool("stream", self.config.max_streams + 8),
            "bulk": self._pool("bulk", 16),
            "waiting": self._pool("waiting", 256),
            "control": self._pool("control", 8),
            "heartbeat": self._pool("heartbeat", 4),
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
            raise errors.AddressInUseError(f"cannot listen on {self.config.address}: gRPC refused it") from error
        self._server.start()
        for name in ("", *names):
            self._health.set(name, health_pb2.HealthCheckResponse.SERVING)
        self.address = f"{self.config.address.rpartition(':')[0]}:{port}"
        if self.config.address_file is not None:
            self._held.callback(self.config.address_file.unlink, missing_ok=True)
            write_whole(self.config.address_file, self.address)
        return self.address

    def housekeeping(self) -> None:
        """Deletes unnamed jobs whose creator is gone. Called every second while the server runs."""
        for job_id in self.registry.expired():
            logger.info("unnamed job %s: its session ended", job_id)
            try:
                self._folders.delete(job_id)
            except errors.OptserveError as error:
                logger.error("unnamed job %s: its checkpoints stay until the next start: %s", job_id, error)

    def stop(self, grace_seconds: float = _STOP_GRACE_SECONDS) -> None:
        """Refuses new calls, ends waits with ServerStoppingError, lets what is being applied finish, then saves. Idempotent.

        Everything is let go even if a job cannot be saved; the first error is then raised.
        """
        if self._stopped:
            return
        self._stopped = True
        with self._held:
            self._end_calls(grace_seconds)
            if self.config.data_dir is not None:
                self._save_all()

    def _end_calls(self, grace_seconds: float) -> None:
        if self._health is not None:
            self._health.enter_graceful_shutdown()
        self.registry.close(errors.ServerStoppingError("the server is stopping"))
        self._data.streams.hang_up()
        if self._server is not None:
            self._server.stop(grace_seconds).wait(grace_seconds + 5)
            self._server = None

    def _save_all(self) -> None:
        first: Exception | None = None
        for running in self.registry.all():
            job = running.job
            if not (job.initialized and job.name):
                continue
            try:
                info = self._folders.save(running.host, SHUTDOWN, replace=True)
                logger.info("job %r: saved at version %d, %d bytes", job.name, job.position.version, info.size)
            except Exception as error:
                logger.error("job %r: not saved at version %d: %s", job.name, job.position.version, error)
                first = first or error
        if first is not None:
            raise first

    def _pool(self, name: str, size: int) -> ThreadPoolExecutor:
        pool = ThreadPoolExecutor(size, thread_name_prefix=f"optserve-{name}")
        self._held.callback(pool.shutdown, wait=True, cancel_futures=True)
        return pool


def _pool_of(path: str) -> str:
    name = path.rpartition("/")[2]
    if name == "Stream":
        return "stream"
    if name in _WAITING:
        return "waiting"
    if name == "Heartbeat":
        return "heartbeat"
    return "bulk" if name in _BULK or "Checkpoint" in name else "control"

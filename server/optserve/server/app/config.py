"""How a server runs: one frozen object, built at the edge."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass
from pathlib import Path

from optserve.wire import errors


@dataclass(frozen=True)
class ServerConfig:
    """How a server runs. `address` None: in process only, nothing listens. `host:0` takes a free port.

    `owns_process`: there is nothing else in the process, which may end with a GPU that breaks. `tensorboard`: event files of
    the jobs' rounds are written under the data dir.
    """

    address: str | None = "127.0.0.1:50051"
    address_file: Path | None = None
    backend: str = "auto"
    data_dir: Path | None = None
    max_streams: int = 256
    insecure: bool = False
    owns_process: bool = False
    tensorboard: bool = False

    @property
    def curves_folder(self) -> Path | None:
        """Where TensorBoard files go, None: nowhere. InvalidArgumentError without a data dir."""
        if not self.tensorboard:
            return None
        if self.data_dir is None:
            raise errors.InvalidArgumentError("TensorBoard files are asked for without a data dir to lie in: say --data-dir")
        return self.data_dir / "tensorboard"


def check_address(config: ServerConfig) -> None:
    """InvalidArgumentError, or InsecureAddressError for one that others can reach."""
    if config.address is None:
        return
    host, colon, port = config.address.rpartition(":")
    if not colon or not port.isdigit() or int(port) > 65535:
        raise errors.InvalidArgumentError(f"address {config.address!r} is not host:port")
    host = host.strip("[]")
    try:
        loopback = ipaddress.ip_address(host).is_loopback
    except ValueError:
        loopback = host == "localhost"
    if not loopback and not config.insecure:
        raise errors.InsecureAddressError(
            f"{config.address} can be reached from other machines, and nothing is encrypted or authenticated yet; "
            "say --insecure if that network is yours"
        )

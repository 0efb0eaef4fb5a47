"""The Ray cluster of a command, and the command's signals."""

from __future__ import annotations

import logging
import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import ray

from raybilevel._cluster.resources import nodes_alive
from raybilevel.errors import ConfigError

CONNECT_TIMEOUT_S = 10


@contextmanager
def cluster(
    address: str | None, cpus: int | None = None, say: Callable[[str], None] = lambda line: None
) -> Iterator[bool]:
    """Connect to a cluster: the one that this process has already joined, the one at `address`, or a new local one.

    Yields whether it is local, so that no other machine will join it.

    cpus: of a local cluster; by default all.
    say:  hears which cluster was joined.

    Raises:
        ConfigError: there is no cluster at `address`, or `address` is one of Ray Client.
    """
    # A cluster that the caller has joined is not to be left here.
    if ray.is_initialized():
        yield False
        return
    if address is not None and address.startswith("ray://"):
        raise ConfigError(
            f"--address {address}: over Ray Client the search runs in a process that this command does not see; "
            "submit the command to the cluster by `ray job submit`"
        )
    if address is not None:
        with said_of(address):
            check_reachable(address)
    # Tune's own output would be printed over the view of the progress.
    os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")
    logging.getLogger("ray").setLevel(logging.WARNING)
    logging.getLogger("ray.tune").setLevel(logging.ERROR)  # its advice after Ctrl-C is for scripts
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.WARNING}
    if address is None:
        # "local", so that no cluster is joined that happens to run here.
        ray.init(address="local", num_cpus=cpus, include_dashboard=False, **options)
    else:
        with said_of(address):
            ray.init(address=address, **options)
        say(joined())
    try:
        with sigterm_as_ctrl_c():
            yield address is None
    finally:
        ray.shutdown()


@contextmanager
def said_of(address: str) -> Iterator[None]:
    """A failure to connect is the user's mistake, in one line."""
    try:
        yield
    except ConnectionError as error:
        raise ConfigError(f"--address {address}: {str(error).splitlines()[0]}") from error


def check_reachable(address: str) -> None:
    """Try a connection to a host and a port. Ray itself tries for minutes, and says so in lines of its own.

    Raises:
        ConnectionError: nothing answers there.
    """
    host, colon, port = address.rpartition(":")
    if not colon:  # a word of Ray's, such as auto
        return
    try:
        socket.create_connection((host, int(port)), CONNECT_TIMEOUT_S).close()
    except (OSError, ValueError, OverflowError) as error:
        raise ConnectionError(f"nothing answers there ({error}); is it HOST:PORT of a running cluster?") from error


def joined() -> str:
    """The cluster that this process has joined, in words."""
    has, nodes = ray.cluster_resources(), len(nodes_alive())
    gpus = f", {has['GPU']:g} GPUs" if has.get("GPU") else ""
    where = ray.get_runtime_context().gcs_address
    return (
        f"joined the Ray cluster at {where}: {nodes} node{'s' if nodes != 1 else ''}, {has.get('CPU', 0):g} CPUs{gpus}"
    )


@contextmanager
def sigterm_as_ctrl_c() -> Iterator[None]:
    """Turn SIGTERM into SIGINT. Cluster schedulers send SIGTERM, and Tune saves the experiment on SIGINT only."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, lambda number, frame: signal.raise_signal(signal.SIGINT))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)

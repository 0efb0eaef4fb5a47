"""Machines on this machine: each with a network address, a process tree, a host name and a disk of its own.

Each is a network namespace, cabled to a switch in a namespace of its own, so that no firewall rule of this machine is
in the way. In it `unshare` runs an init with new process, mount and host name namespaces. The same path is another disk
on every host, and each knows all of them by name. Python and this repository, which nobody writes, are the image that
they share.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

MEMORY = "512m"

START = """
mount -t tmpfs -o size={memory} tmpfs {disk}
mount -t tmpfs -o size={memory} tmpfs /dev/shm
mount --bind {names} /etc/hosts
hostname {name}
cd {disk}
"$@"
"""


def cannot() -> str | None:
    """Why hosts cannot be made here."""
    if not sys.platform.startswith("linux") or os.geteuid() != 0:
        return "separate hosts are network namespaces: they need root on Linux"
    missing = [command for command in ("ip", "unshare", "mount", "hostname") if shutil.which(command) is None]
    return f"separate hosts need the commands {', '.join(missing)}" if missing else None


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True)


def host_name(number: int) -> str:
    return f"host{number}"


class Host:
    """A machine that runs one command; when that ends, or it is lost, nothing of it is left."""

    def __init__(
        self, network: Network, number: int, command: list[str], environment: dict[str, str], log: Path
    ) -> None:
        self.address, self.cable = network.address(number), f"{network.name}c{number}"
        self.name = host_name(number)
        namespace = f"{network.name}-{number}"
        ip("netns", "add", namespace)
        ip(
            "link",
            "add",
            self.cable,
            "netns",
            network.switch,
            "type",
            "veth",
            "peer",
            "name",
            "eth0",
            "netns",
            namespace,
        )
        ip("-n", network.switch, "link", "set", self.cable, "master", "switch", "up")
        ip("-n", namespace, "address", "add", f"{self.address}/24", "dev", "eth0")
        for device in ("lo", "eth0"):
            ip("-n", namespace, "link", "set", device, "up")
        self._namespace, self._switch, self.log = namespace, network.switch, log
        script = START.format(memory=MEMORY, disk=network.disk, names=network.names, name=self.name)
        new = ["unshare", "--pid", "--fork", "--kill-child", "--mount", "--mount-proc", "--uts"]
        with open(log, "w") as file:
            self.process = subprocess.Popen(
                ["ip", "netns", "exec", namespace, *new, "sh", "-ec", script, "init", *command],
                stdin=subprocess.DEVNULL, stdout=file, stderr=file, env={**environment, "HOME": str(network.disk)},
            )  # fmt: skip

    def lose(self) -> None:
        """All its processes end at once, and its disk is gone."""
        self.process.kill()
        self.process.wait()

    def cut(self) -> None:
        """Its processes go on, but nobody hears of it."""
        ip("-n", self._switch, "link", "set", self.cable, "down")

    def remove(self) -> None:
        self.lose()
        ip("netns", "delete", self._namespace)


class Network:
    """A switch with hosts; this machine is at its last address.

    disk: where each host finds its own disk.
    """

    def __init__(self, folder: Path) -> None:
        self.name = f"rb{os.getpid()}"
        self.switch = f"{self.name}-switch"
        self.folder, self.disk, self.names = folder, folder / "disk", folder / "names"
        self.hosts: list[Host] = []

    def __enter__(self) -> Network:
        self.disk.mkdir()
        hosts = [f"{self.address(number)} {host_name(number)}" for number in range(1, 20)]
        self.names.write_text("\n".join(["127.0.0.1 localhost", *hosts, ""]))
        ip("netns", "add", self.switch)
        ip("-n", self.switch, "link", "add", "switch", "type", "bridge")
        ip("-n", self.switch, "link", "set", "switch", "up")
        ip("link", "add", self.name, "type", "veth", "peer", "name", "uplink", "netns", self.switch)
        ip("-n", self.switch, "link", "set", "uplink", "master", "switch", "up")
        ip("address", "add", f"{self.address(254)}/24", "dev", self.name)
        ip("link", "set", self.name, "up")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for host in self.hosts:
            host.remove()
        ip("netns", "delete", self.switch)  # and with it this machine's cable

    def address(self, number: int) -> str:
        """In a range that is set aside for tests of networks (RFC 2544)."""
        return f"198.18.{os.getpid() % 256}.{number}"

    def add(self, command: list[str], environment: dict[str, str]) -> Host:
        number = len(self.hosts) + 1
        host = Host(self, number, command, environment, self.folder / f"host{number}.log")
        self.hosts.append(host)
        return host


def until(happened: Callable[[], bool], what: str, log: Path, seconds: float = 300) -> None:
    deadline = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < deadline, f"{what}: not within {seconds:.0f} s\n{log.read_text()[-3000:]}"
        time.sleep(0.5)

"""A network laboratory: hosts as network namespaces, NATs by nftables, links that can be slow, lossy or cut.

    with Lab() as lab:
        server = lab.host("server")                        # public, on the lab's internet
        home = lab.host("home", Nat.PORT_RESTRICTED)       # behind a router of its own
        home.run("ping", "-c1", server.address)

Needs root, `ip` and `nft`. Everything is gone when the block ends. The lab's internet uses 11.0.0.0/8, which
counts as public, and reaches nothing outside.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Self

PORT = 4517  # of daemons in the lab; NATs that forward or shift ports know it
SHIFT = 20_000  # of the port by a NAT that does not preserve ports
LINK = Path(__file__).with_name("link.py")


class Nat(Enum):
    """What a router does with connections from inside (RFC 4787 and 5382 name them so)."""

    FULL_CONE = "endpoint-independent, port-preserving"
    PORT_RESTRICTED = "port-restricted, port-preserving"
    SHIFTED = "endpoint-independent mapping to another port, port-restricted"
    SYMMETRIC = "a random port for each connection"


def why_not() -> str:
    """What this machine lacks to run a lab; empty if nothing."""
    if os.getuid() != 0:
        return "network namespaces need root"
    missing = [tool for tool in ("ip", "nft") if shutil.which(tool) is None]
    if missing:
        return f"needs {' and '.join(missing)}: apt-get install iproute2 nftables"
    return "" if Path("/dev/net/tun").exists() else "needs /dev/net/tun"


@dataclass(frozen=True)
class Quality:
    """Of a link, each way. loss: share of packets."""

    delay_s: float = 0.0
    bytes_per_s: float = 0.0  # 0 is no limit
    loss: float = 0.0


@dataclass(frozen=True)
class Host:
    """One machine of the lab. address: its own; public_address: as the internet sees it.

    gateway: address of its router, if it has one; router: namespace of that one.
    """

    namespace: str
    address: str
    public_address: str
    gateway: str = ""
    router: str = ""

    def command(self, *command: str) -> list[str]:
        """A command line that runs inside."""
        return ["ip", "netns", "exec", self.namespace, *command]

    def run(self, *command: str) -> str:
        """Run a command inside; what it printed. Raises CalledProcessError."""
        return subprocess.run(self.command(*command), check=True, capture_output=True, text=True).stdout

    def cut(self) -> None:
        """Pull the cable."""
        self.run("ip", "link", "set", "eth0", "down")

    def heal(self) -> None:
        """Put it back."""
        self.run("ip", "link", "set", "eth0", "up")
        if self.gateway:
            self.run("ip", "route", "replace", "default", "via", self.gateway)


class Lab:
    """Hosts around one internet. Use it as a context manager."""

    def __init__(self) -> None:
        self._prefix = f"cl{os.getpid() % 100_000}"
        self._internet = f"{self._prefix}-net"
        self._num_public = 1
        self._num_private = 0
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        self._namespace(self._internet)
        _ip("-n", self._internet, "link", "add", "wire", "type", "bridge")
        _ip("-n", self._internet, "link", "set", "wire", "up")
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def host(self, name: str, *nats: Nat, quality: Quality | None = None) -> Host:
        """A host on the internet, or behind one NAT, or behind two in a row (the outer one first)."""
        namespace = f"{self._prefix}-{name}"
        self._namespace(namespace)
        if not nats:
            address = self._public()
            host = Host(namespace, address, address)
            self._plug_in(host, quality)
            return host
        outer = f"{namespace}-r0"
        self._namespace(outer)
        public = self._public()
        self._plug_in(Host(outer, public, public), quality)
        inside = self._inside()
        _translate(outer, nats[0], inside)
        for number, nat in enumerate(nats[1:], 1):
            inner = f"{namespace}-r{number}"
            self._namespace(inner)
            self._connect(inner, outer, inside)
            outer, inside = inner, self._inside()
            _translate(inner, nat, inside)
        self._connect(namespace, outer, inside)
        return Host(namespace, f"{inside}.2", public, f"{inside}.1", outer)

    def beside(self, host: Host, name: str) -> Host:
        """Another host behind the same router, in another network of the house: multicast does not go there."""
        namespace, inside = f"{self._prefix}-{name}", self._inside()
        self._namespace(namespace)
        self._connect(namespace, host.router, inside, port="eth2")
        return Host(namespace, f"{inside}.2", host.public_address, f"{inside}.1", host.router)

    # building

    def _namespace(self, name: str) -> None:
        _ip("netns", "add", name)
        self._stack.callback(_remove_namespace, name)
        _ip("-n", name, "link", "set", "lo", "up")

    def _public(self) -> str:
        self._num_public += 1
        return f"11.0.{self._num_public // 250}.{self._num_public % 250 + 1}"

    def _inside(self) -> str:
        """A network for the inner side of a router, `a.b.c`."""
        self._num_private += 1
        return f"192.168.{self._num_private}"

    def _plug_in(self, host: Host, quality: Quality | None) -> None:
        """Connect to the internet, directly or over a link of some quality."""
        port = f"p{self._num_public}"
        if quality is None:
            _ip(
                "link",
                "add",
                port,
                "netns",
                self._internet,
                "type",
                "veth",
                "peer",
                "eth0",
                "netns",
                host.namespace,
            )
        else:
            self._stack.enter_context(_link(self._internet, port, host.namespace, "eth0", quality))
        _ip("-n", self._internet, "link", "set", port, "master", "wire")
        _ip("-n", self._internet, "link", "set", port, "up")
        _ip("-n", host.namespace, "addr", "add", f"{host.address}/8", "dev", "eth0")
        _ip("-n", host.namespace, "link", "set", "eth0", "up")
        # What goes to others' private networks gets lost without a word, as it does at a provider.
        _ip("-n", host.namespace, "route", "add", "blackhole", "192.168.0.0/16")

    def _connect(self, inner: str, router: str, inside: str, port: str = "eth1") -> None:
        """Connect a host to a router's inner side."""
        _ip("link", "add", port, "netns", router, "type", "veth", "peer", "eth0", "netns", inner)
        _ip("-n", router, "addr", "add", f"{inside}.1/24", "dev", port)
        _ip("-n", router, "link", "set", port, "up")
        _ip("-n", inner, "addr", "add", f"{inside}.2/24", "dev", "eth0")
        _ip("-n", inner, "link", "set", "eth0", "up")
        _ip("-n", inner, "route", "add", "default", "via", f"{inside}.1")


def _translate(router: str, nat: Nat, inside: str) -> None:
    """Make a namespace a router with this kind of NAT; strangers' packets are dropped, as at home."""
    inner = f"{inside}.2"
    rules = {
        Nat.FULL_CONE: f"""
            chain out {{ type nat hook postrouting priority srcnat; oifname "eth0" masquerade; }}
            chain come {{ type nat hook prerouting priority dstnat; iifname "eth0" dnat to {inner}; }}""",
        Nat.PORT_RESTRICTED: """
            chain out { type nat hook postrouting priority srcnat; oifname "eth0" masquerade; }""",
        Nat.SHIFTED: f"""
            chain out {{ type nat hook postrouting priority srcnat;
                oifname "eth0" tcp sport {PORT} masquerade to :{PORT + SHIFT};
                oifname "eth0" masquerade random; }}""",
        Nat.SYMMETRIC: """
            chain out { type nat hook postrouting priority srcnat; oifname "eth0" masquerade fully-random; }""",
    }[nat]
    table = f"""table ip lab {{
        {rules}
        chain mine {{ type filter hook input priority filter; iifname "eth0" ct state new drop; }}
        chain through {{ type filter hook forward priority filter;
            iifname "eth0" ct status dnat accept; iifname "eth0" ct state new drop; }}
    }}"""
    inside_router = ["ip", "netns", "exec", router]
    subprocess.run([*inside_router, "nft", "-f", "-"], input=table, text=True, check=True)
    subprocess.run([*inside_router, "sh", "-c", "echo 1 > /proc/sys/net/ipv4/ip_forward"], check=True)


@contextmanager
def _link(one: str, one_name: str, two: str, two_name: str, quality: Quality) -> Iterator[None]:
    """Two ends of a slow link, in two namespaces: this kernel need not have netem."""
    command = [sys.executable, str(LINK), one, one_name, two, two_name]
    command += [str(quality.delay_s), str(quality.bytes_per_s), str(quality.loss)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        if process.stdout is None or process.stdout.readline().strip() != "ready":
            raise RuntimeError(f"the link {one_name} did not come up")
        yield
    finally:
        process.kill()
        process.wait()
        if process.stdout is not None:
            process.stdout.close()


def _ip(*arguments: str) -> None:
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"ip {' '.join(arguments)}: {done.stderr.strip()}")


def _remove_namespace(name: str) -> None:
    pids = subprocess.run(["ip", "netns", "pids", name], capture_output=True, text=True, check=False).stdout
    for pid in pids.split():
        try:
            os.kill(int(pid), 9)
        except ProcessLookupError:
            continue
    deadline = time.monotonic() + 5
    while subprocess.run(["ip", "netns", "pids", name], capture_output=True, check=False).stdout.strip():
        if time.monotonic() > deadline:
            break
        time.sleep(0.05)
    subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True)

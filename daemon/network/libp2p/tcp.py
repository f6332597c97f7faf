"""A TCP socket as the library's connection, with both ends known, also of IPv6.

The library's own knows no far end of an IPv6 socket, whose address has four parts instead of two.
"""

from __future__ import annotations

import socket
from collections.abc import Sequence

import trio
from libp2p.abc import IRawConnection
from libp2p.io.abc import ReadWriteCloser
from libp2p.network.connection.raw_connection import RawConnection


class TcpConnection(RawConnection):
    """See `RawConnection`. local_port: of our end; None if it is no socket."""

    def __init__(self, stream: ReadWriteCloser, *, is_initiator: bool) -> None:
        super().__init__(stream, is_initiator)
        self._remote: tuple[str, int] | None = None
        self.local_port: int | None = None
        inner = getattr(stream, "stream", None)
        if isinstance(inner, trio.SocketStream):
            try:
                self._remote = _endpoint(inner.socket.getpeername())
                self.local_port = _endpoint(inner.socket.getsockname())[1]
            except OSError:  # it is closed already: whoever reads will see
                self._remote = None

    def get_remote_address(self) -> tuple[str, int] | None:
        return self._remote


def with_ends(raw: IRawConnection) -> IRawConnection:
    """What the library dialled, with both ends known."""
    return TcpConnection(raw.stream, is_initiator=True) if isinstance(raw, RawConnection) else raw


def local_port(raw: IRawConnection) -> int | None:
    """Of a socket of ours; None of anything else."""
    return raw.local_port if isinstance(raw, TcpConnection) else None


def listenable(addresses: Sequence[str]) -> tuple[str, ...]:
    """Those addresses that this machine can listen on: without IPv6's wildcard where it has no IPv6."""
    if _has_ipv6():
        return tuple(addresses)
    return tuple(address for address in addresses if not address.startswith("/ip6/::/"))


def _has_ipv6() -> bool:
    try:
        with socket.socket(socket.AF_INET6, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            probe.bind(("::", 0))
    except OSError:
        return False
    return True


def _endpoint(name: tuple[str, int] | tuple[str, int, int, int]) -> tuple[str, int]:
    """Of a socket's name: without the zone, and as IPv4 what came in by IPv4 on an IPv6 socket."""
    ip = name[0].partition("%")[0]
    return ip.removeprefix("::ffff:") if ip.startswith("::ffff:") and "." in ip else ip, name[1]

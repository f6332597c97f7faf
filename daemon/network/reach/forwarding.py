"""A port that our router forwards to us because we ask it to, by UPnP.

It owns the forwarding: asks for it, renews it before it runs out, takes it back at the end. Whether it leads
anywhere, others' dial-backs show. The library `miniupnpc` blocks, so it is called in threads; nothing waits for it.
Source: UPnP Forum, WANIPConnection:2 (2010), AddPortMapping.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Final, Protocol

import miniupnpc
import structlog
import trio
from anyio import to_thread

from ....protocol.errors import Code, CorollaError, error
from ..dialling import Reach, reach_of

SEARCH_MS: Final = 2000  # for a router to answer
LEASE_S: Final = 3600  # a daemon that dies leaves the door open no longer
RENEW_AFTER_S: Final = LEASE_S / 3  # so that two renewals may fail
AGAIN_S: Final = 900.0  # after no router answered, or it refused: it may be a laptop that has moved
NUM_PORTS: Final = 4  # tried on the outside: ours, and those above, if another machine has it
CLOSE_S: Final = 2.0  # for taking it back
_WHAT: Final = "Corolla"  # in the router's list

_log = structlog.get_logger("corolla.forwarding")


class Gateway(Protocol):
    """A router. Its methods block, and raise `UNSUPPORTED` with the router's reason."""

    def external_ip(self) -> str:
        """Its address outside."""

    def forward(self, outside: int, inside: int) -> None:
        """Forward a TCP port to one of ours, for `LEASE_S` or until it is taken back."""

    def withdraw(self, outside: int) -> None:
        """Forward it no longer."""


class Forwarding:
    """Of one network. port: on which we listen; None is none. is_wanted: whether we need it.

    changed: called when `addresses` are others. find: gives the router; blocks.
    """

    def __init__(
        self,
        port: Callable[[], int | None],
        is_wanted: Callable[[], bool],
        changed: Callable[[], None],
        find: Callable[[], Gateway] | None = None,
    ) -> None:
        self._port = port
        self._is_wanted = is_wanted
        self._changed = changed
        self._find = find or find_gateway
        self._addresses: tuple[str, ...] = ()
        self._stirred = trio.Event()

    @property
    def addresses(self) -> tuple[str, ...]:
        """Where the router takes calls for us."""
        return self._addresses

    def stir(self) -> None:
        """Look at once whether it is wanted."""
        self._stirred.set()

    async def run(self) -> None:
        """Keep a port forwarded while it is wanted, until cancelled."""
        while True:
            self._stirred = trio.Event()
            port = self._port()
            if port is None or not self._is_wanted():
                await self._stirred.wait()
                continue
            try:
                gateway = await to_thread.run_sync(self._find, abandon_on_cancel=True)
                await self._keep(gateway, port)
            except CorollaError as problem:
                _log.info("not_forwarded", port=port, reason=problem.message)
            self._set(())
            await trio.sleep(AGAIN_S)

    async def _keep(self, gateway: Gateway, port: int) -> None:
        """Raises `UNSUPPORTED` once the router refuses."""
        outside = 0
        try:
            while True:
                ask = partial(_forward, gateway, port, outside or port)
                outside, ip = await to_thread.run_sync(ask, abandon_on_cancel=True)
                self._set((f"/ip4/{ip}/tcp/{outside}",))
                await trio.sleep(RENEW_AFTER_S)
        finally:
            if outside:
                with trio.CancelScope(shield=True, deadline=trio.current_time() + CLOSE_S):
                    await to_thread.run_sync(_withdraw, gateway, outside, abandon_on_cancel=True)

    def _set(self, addresses: tuple[str, ...]) -> None:
        if addresses != self._addresses:
            _log.info("forwarded", addresses=addresses)
            self._addresses = addresses
            self._changed()


def _forward(gateway: Gateway, inside: int, first: int) -> tuple[int, str]:
    """Port and address outside. Raises `UNSUPPORTED`."""
    ip = gateway.external_ip()
    if reach_of(f"/ip4/{ip}/tcp/{first}") is not Reach.PUBLIC:
        raise error(
            Code.UNSUPPORTED, f"the router's own address {ip} is not public: there is another NAT outside"
        )
    for outside in range(first, min(first + NUM_PORTS, 65536)):
        try:
            gateway.forward(outside, inside)
        except CorollaError as problem:
            failure = problem
        else:
            return outside, ip
    raise failure


def _withdraw(gateway: Gateway, outside: int) -> None:
    try:
        gateway.withdraw(outside)
    except CorollaError as problem:
        _log.info("still_forwarded", port=outside, reason=problem.message)  # the lease ends it


def find_gateway(interface: str = "", search_ms: int = SEARCH_MS) -> Gateway:
    """The router of this network; blocks. interface: IP address of the one to ask on; "" is the system's choice.

    Raises `UNSUPPORTED` if there is none that forwards ports.
    """
    options = {"multicastif": interface} if interface else {}
    return _Upnp(miniupnpc.UPnP(discoverdelay=search_ms, **options))


class _Upnp:
    """A router that speaks UPnP; see `Gateway`."""

    def __init__(self, library: miniupnpc.UPnP) -> None:
        self._library = library
        if not self._ask("no router answers by UPnP", library.discover):
            raise error(Code.UNSUPPORTED, "no router answers by UPnP")
        self._ask("no router that forwards ports", library.selectigd)

    def external_ip(self) -> str:
        return str(self._ask("the router does not tell its address", self._library.externalipaddress))

    def forward(self, outside: int, inside: int) -> None:
        ask = partial(self._library.addportmapping, outside, "TCP", self._library.lanaddr, inside, _WHAT, "")
        what = f"the router does not forward port {outside}"
        try:
            self._ask(what, partial(ask, LEASE_S))
        except CorollaError as problem:
            if "PermanentLease" not in problem.message.replace(" ", ""):  # error 725 of the specification
                raise
            self._ask(what, partial(ask, 0))

    def withdraw(self, outside: int) -> None:
        ask = partial(self._library.deleteportmapping, outside, "TCP")
        self._ask(f"the router goes on to forward port {outside}", ask)

    def _ask(self, what: str, call: Callable[[], object]) -> object:
        try:
            return call()
        except Exception as problem:  # the library raises no other type
            raise error(Code.UNSUPPORTED, f"{what}: {str(problem) or type(problem).__name__}") from problem

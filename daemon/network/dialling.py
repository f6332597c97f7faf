"""Where a peer may be reached: which addresses we know, in which order to try them, and trying them.

The order is a pure function; the trying waits, one address at a time and each for a bounded time. A dead
address therefore costs its time once: afterwards it is tried last. It knows no transport.
"""

from __future__ import annotations

import ipaddress
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Mapping, Sequence
from enum import IntEnum, StrEnum
from typing import Final, Generic, TypeVar

import trio

from ...protocol.errors import Code, CorollaError, error
from ...protocol.limits import CONNECT_TIMEOUT_S, MAX_ADDRESSES, MAX_NAME_CHARS

T = TypeVar("T")

AVOID_FAILED_S: Final = 60.0  # an address that failed so recently is tried last
AVOID_ABROAD_S: Final = 3600.0  # likewise one of a private network, which most likely is not ours
MAX_PEERS: Final = 4096  # of whom we remember addresses; the ones not heard of for longest are forgotten
_MAX_TOLD: Final = 4  # addresses in an error message; details hold all of them


class Reachability(StrEnum):
    """Whether others can dial us, as the owner says."""

    AUTO = "auto"  # find out
    PUBLIC = "public"
    PRIVATE = "private"  # behind a NAT or a firewall: others come through relays


class Reach(IntEnum):
    """How far away an address is; nearer ones are tried first."""

    NEAR = 0  # this machine or this network
    PUBLIC = 1
    RELAYED = 2


def reach_of(address: str) -> Reach:
    """How far away a multiaddress is. A name that is yet to be resolved counts as public."""
    if "/p2p-circuit" in address:
        return Reach.RELAYED
    parts = address.split("/")
    if parts[1:2] == ["ip6zone"]:
        return Reach.NEAR
    if len(parts) > 2 and parts[1] in ("ip4", "ip6"):
        try:
            ip = ipaddress.ip_address(parts[2])
        except ValueError:
            return Reach.PUBLIC
        if not ip.is_global:
            return Reach.NEAR
    return Reach.PUBLIC


def network_of(ip: ipaddress.IPv4Address | ipaddress.IPv6Address) -> str | None:
    """The /24 or /48 of an address of the world: likely one owner's. None for any other address."""
    if not ip.is_global:
        return None
    return str(ipaddress.ip_network((ip, 24 if ip.version == 4 else 48), strict=False))


def order(addresses: Sequence[str], failed_at: Mapping[str, float], now: float) -> tuple[str, ...]:
    """The addresses, best first: those that failed lately last, nearer ones first, otherwise as given.

    failed_at: when an address last failed, on the clock of `now`, in seconds.
    """

    def rank(address: str) -> tuple[bool, Reach]:
        return _is_avoided(address, failed_at, now), reach_of(address)

    return tuple(sorted(dict.fromkeys(addresses), key=rank))


def _is_avoided(address: str, failed_at: Mapping[str, float], now: float) -> bool:
    avoid_s = AVOID_ABROAD_S if reach_of(address) is Reach.NEAR else AVOID_FAILED_S
    return now - failed_at.get(address, float("-inf")) < avoid_s


def split_peer(address: str) -> tuple[str, str | None]:
    """A multiaddress without its last `/p2p/…`, and that peer id; None if it names none.

    Raises `BAD_REQUEST` for what is no multiaddress.
    """
    if not address.startswith("/") or len(address) > 2 * MAX_NAME_CHARS:
        raise error(
            Code.BAD_REQUEST,
            f"{address[:MAX_NAME_CHARS]!r} is no multiaddress",
            "write it like /ip4/192.0.2.7/tcp/4001/p2p/12D3Koo…",
        )
    head, separator, peer = address.rpartition("/p2p/")
    if not separator or "/" in peer:
        return address, None
    return head, peer


class AddressBook:
    """What we know of where peers are: bounded, newest first."""

    def __init__(self, *, max_peers: int = MAX_PEERS, max_addresses: int = MAX_ADDRESSES) -> None:
        self._max_peers = max_peers
        self._max_addresses = max_addresses
        self._peers: OrderedDict[str, tuple[str, ...]] = OrderedDict()
        self._failed_at: OrderedDict[str, float] = OrderedDict()

    def learn(self, peer: str, addresses: Sequence[str]) -> None:
        """Remember `addresses` (without `/p2p/…` or with this peer's), the first of them as the newest."""
        bare = []
        for address in addresses:
            head, named = split_peer(address)
            if named in (None, peer) and len(head) <= MAX_NAME_CHARS:
                bare.append(head)
        if not bare:
            return
        merged = dict.fromkeys((*bare, *self._peers.get(peer, ())))
        self._peers[peer] = tuple(merged)[: self._max_addresses]
        self._peers.move_to_end(peer)
        if len(self._peers) > self._max_peers:
            self._peers.popitem(last=False)

    def known(self, peer: str) -> tuple[str, ...]:
        """The addresses of a peer, newest first."""
        return self._peers.get(peer, ())

    def failed(self, address: str, now: float) -> None:
        """Note that nobody, or somebody else, answered there."""
        self._failed_at[address] = now
        self._failed_at.move_to_end(address)
        if len(self._failed_at) > self._max_peers:
            self._failed_at.popitem(last=False)

    def worked(self, peer: str, address: str) -> None:
        """Note that the peer answered there."""
        self._failed_at.pop(address, None)
        self.learn(peer, (address,))

    def best(self, addresses: Sequence[str], now: float) -> tuple[str, ...]:
        """`addresses` in the order in which to try them."""
        return order(addresses, self._failed_at, now)

    def looks_dead(self, address: str, now: float) -> bool:
        """Whether the address failed lately."""
        return _is_avoided(address, self._failed_at, now)


class Dials(Generic[T]):
    """Dials under way, each for all who want the same peer."""

    def __init__(self) -> None:
        self._dials: dict[str, _Dial] = {}

    async def share(self, peer: str, live: Callable[[], T | None], dial: Callable[[], Awaitable[T]]) -> T:
        """What is live, or what `dial()` gives, one of them at a time. Raises what it raises, to all who wait."""
        while True:
            found = live()
            if found is not None:
                return found
            under_way = self._dials.get(peer)
            if under_way is None:
                break
            await under_way.done.wait()
            if under_way.failure is not None:
                failure = under_way.failure
                raise error(failure.code, failure.message, failure.remedy, **failure.details)
        under_way = self._dials[peer] = _Dial()
        try:
            return await dial()
        except CorollaError as failure:
            under_way.failure = failure
            raise
        finally:
            del self._dials[peer]
            under_way.done.set()


class _Dial:
    """A dial under way."""

    def __init__(self) -> None:
        self.done = trio.Event()
        self.failure: CorollaError | None = None


async def try_each(
    peer: str,
    addresses: Sequence[str],
    attempt: Callable[[str], Awaitable[T]],
    book: AddressBook,
    *,
    each_s: float = CONNECT_TIMEOUT_S,
) -> T:
    """What `attempt(address)` gives for the first address that works, tried in the book's order.

    attempt raises `PEER_LOST` with a reason when nobody answers. The whole should run under the caller's
    timeout. Raises `PEER_LOST`, with every address and its reason, when all failed or none is known.
    """
    reasons: dict[str, str] = {}
    for address in book.best(addresses, trio.current_time()):
        reason = f"no answer in {each_s:g} s"
        with trio.move_on_after(each_s):
            try:
                result = await attempt(address)
            except CorollaError as failure:
                reason = failure.message
            else:
                book.worked(peer, address)
                return result
        reasons[address] = reason
        book.failed(address, trio.current_time())
    raise unreachable(peer, reasons)


def unreachable(peer: str, reasons: Mapping[str, str]) -> CorollaError:
    """The error that says where a peer was looked for. reasons: of each address tried."""
    if not reasons:
        return error(
            Code.PEER_LOST,
            f"peer {peer} cannot be reached: no address of it is known",
            "wait until a member of the swarm tells one, or connect to its full multiaddress",
        )
    told = [f"{address}: {reason}" for address, reason in list(reasons.items())[:_MAX_TOLD]]
    if len(reasons) > _MAX_TOLD:
        told.append(f"and {len(reasons) - _MAX_TOLD} more")
    return error(
        Code.PEER_LOST,
        f"peer {peer} cannot be reached at any of {len(reasons)} addresses: {'; '.join(told)}",
        "check that it runs and that its port is open",
        tried=list(reasons),
    )

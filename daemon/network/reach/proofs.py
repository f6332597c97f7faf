"""What it proves that others dialled us back, and whom to ask next. Pure.

A success is proved by its nonce; a failure is another's word alone. So a failure never outweighs as many
successes, and an address that we know only from others counts when others at several places reached it.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple

from .observations import QUORUM, Sighting, endpoint_of

FRESH_S: Final = 600.0  # before the same is asked again
LASTING_S: Final = 1800.0  # what was found holds so long, if it cannot be asked again
ENOUGH: Final = 3  # places that dialled an address: the third decides between two that differ


@dataclass(frozen=True, slots=True)
class Proof:
    """One peer dialled us back, or tried to. at: on the clock of `now`, in seconds."""

    place: str
    address: str
    reached: bool
    at: float


@dataclass(frozen=True, slots=True)
class Verdict:
    """Whether others can dial us, at which addresses they did, and at which in vain. None: not known."""

    is_public: bool | None = None
    proven: tuple[str, ...] = ()
    vain: tuple[str, ...] = ()


class Question(NamedTuple):
    """Ask this peer to dial us there."""

    peer: str
    place: str
    address: str


def judge(proofs: Iterable[Proof], own: Collection[str], seen: Collection[str], now: float) -> Verdict:
    """What the proofs come to.

    own: addresses that we know ourselves, of our interfaces or from our router. seen: those that connected peers
    tell; where nobody sees us any longer we are no more. One who can be dialled by IPv6 alone is not public while
    others know it by IPv4: not everybody has both.
    """
    last = {(one.place, one.address): one.reached for one in proofs if now - one.at < LASTING_S}
    known = dict.fromkeys((*own, *seen))
    proven, vain, is_open_case = [], [], False
    for address in known:
        found = [reached for (_, where), reached in last.items() if where == address]
        num_reached = sum(found)
        if 2 * num_reached < len(found):
            vain.append(address)
        elif (address in own and found) or num_reached >= QUORUM:
            proven.append(address)
        elif found:
            is_open_case = True
    is_public: bool | None = None
    if any("/ip4/" in address for address in proven) or not any("/ip4/" in address for address in known):
        is_public = True if proven else None
    if is_public is None and vain and not is_open_case:
        is_public = False
    return Verdict(is_public, tuple(proven), tuple(vain))


def questions(
    sightings: Mapping[str, Sighting], own: Sequence[str], proofs: Iterable[Proof], now: float
) -> list[Question]:
    """What should be asked now: of each peer the addresses at the IP that it sees, until enough have dialled them.

    sightings: by connected peer. One at a place is enough.
    """
    fresh = {(one.place, one.address) for one in proofs if now - one.at < FRESH_S}
    wanted: list[Question] = []
    for peer, sighting in sightings.items():
        endpoint = endpoint_of(sighting.address)
        if not sighting.place or endpoint is None:
            continue
        for address in dict.fromkeys((*own, sighting.address)):
            ours = endpoint_of(address)
            if ours is None or ours[0] != endpoint[0] or (sighting.place, address) in fresh:
                continue
            places = {place for place, where in fresh if where == address}
            places.update(question.place for question in wanted if question.address == address)
            if sighting.place not in places and len(places) < ENOUGH:
                wanted.append(Question(peer, sighting.place, address))
    return wanted

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
    """Whether others can dial us, and at which addresses they did. None: not known."""

    is_public: bool | None = None
    proven: tuple[str, ...] = ()


class Question(NamedTuple):
    """Ask this peer to dial us there."""

    peer: str
    place: str
    address: str


def judge(proofs: Iterable[Proof], own: Collection[str], seen: Collection[str], now: float) -> Verdict:
    """What the proofs come to.

    own: addresses that we know ourselves, of our interfaces or from our router. seen: those that connected peers
    tell; where nobody sees us any longer we are no more.
    """
    last = {(one.place, one.address): one for one in proofs if now - one.at < LASTING_S}
    proven, is_open_case = [], False
    for address in dict.fromkeys((*own, *seen)):
        found = [proof.reached for (_, where), proof in last.items() if where == address]
        num_reached = sum(found)
        if not num_reached or 2 * num_reached < len(found):
            continue
        if address in own or num_reached >= QUORUM:
            proven.append(address)
        else:
            is_open_case = True
    if proven:
        return Verdict(True, tuple(proven))
    known = {*own, *seen}
    asked = any(where in known for _, where in last)
    return Verdict(None if is_open_case or not asked else False)


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

"""What a session says to its hops: the messages of `protocol/steps.py`, filled in. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from ...protocol.messages import Message
from ...protocol.steps import Chain, KeepPages, LinkHop, OpenSession, Replay, Step
from .history import Part as HistoryPart
from .pipeline import Part
from .replays import ReplayPlan
from .roster import Roster, Terms
from .wiring import RouteHop


def opening(terms: Terms, place: RouteHop) -> OpenSession:
    """The first word on a wire."""
    return OpenSession(
        terms.session,
        terms.fingerprint,
        place.hop.worker,
        place.start,
        place.end,
        terms.encoding,
        terms.max_rows,
        terms.max_tokens,
        terms.parts_of(place.start, place.end),
        terms.prefix.names,
        terms.prefix.rows,
    )


def keeping(terms: Terms, epoch: int, committed: int, rows: tuple[Chain, ...]) -> KeepPages:
    """What a hop may keep of the rows after the last step."""
    return KeepPages(terms.session, epoch, committed, rows)


def lacking(terms: Terms, place: RouteHop, missing: frozenset[str]) -> tuple[tuple[int, bytes], ...]:
    """Blocks, and the names of the adapter's parts for them, that a hop says (in hex) it does not hold."""
    names = terms.parts_of(place.start, place.end)
    return tuple((block, name) for block, name in enumerate(names, place.start) if name.hex() in missing)


def links(
    terms: Terms, roster: Roster, epoch: int, base_step: int, lengths: tuple[int, ...]
) -> list[tuple[int, LinkHop]]:
    """Each hop's place in a wiring, by wire."""
    letters = []
    for index, member in enumerate(roster):
        upstream, downstream = roster.link_of(index)
        relays = roster.is_bridged(index - 1), roster.is_bridged(index)
        link = LinkHop(terms.session, epoch, upstream, downstream, base_step, lengths, *relays)
        letters.append((member.wire, link))
    return letters


def step(terms: Terms, epoch: int, committed: int, part: Part) -> Step:
    """One part of a user's step."""
    return Step(terms.session, epoch, part.step_id, part.rows, committed, part.reply, payload=part.payload)


def replay(terms: Terms, epoch: int, base_step: int, plan: ReplayPlan, lengths: tuple[int, ...]) -> Replay:
    """Tells a hop to send its history."""
    return Replay(terms.session, epoch, base_step, plan.starts, lengths, plan.num_hops)


def replayed(
    terms: Terms, epoch: int, base_step: int, num_hops: int, parts: Iterable[HistoryPart]
) -> Iterator[Message]:
    """The client's own history. Taken one by one while the stream accepts them, whatever happens meanwhile."""
    for part in parts:
        yield Step(
            terms.session,
            epoch,
            base_step,
            part.rows,
            committed=base_step,
            replay_hops=num_hops,
            final=part.final,
            payload=part.payload,
        )

"""Who is guilty of wrong values, when one hop accuses another. Pure.

An accusation charges nobody yet: the accuser may lie, or half precision may have overflowed. First the accused
is replaced. If the same accuser accuses the replacement too, the accused is restored and the accuser replaced.
Whoever's replacement let the step through is guilty (DESIGN, blame).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from ...protocol.steps import Hop
from .wiring import RouteHop

MAX_TRIALS: Final = 16  # of one step; then the values themselves must be at fault


@dataclass(frozen=True, slots=True)
class Replace:
    """Take `remove` off the route, and put `restore` back if it is given."""

    remove: RouteHop
    restore: RouteHop | None = None


@dataclass(frozen=True, slots=True)
class _Trial:
    """accuser: None is the client itself. swapped: the accuser has been replaced, the accused is back.

    second: who took the place of the accused, and was accused of the same.
    """

    accused: RouteHop | None
    accuser: RouteHop | None
    step_id: int
    swapped: bool = False
    second: Hop | None = None

    @property
    def away(self) -> RouteHop | None:
        """Whose absence is being tried."""
        return self.accuser if self.swapped else self.accused

    @property
    def witness(self) -> RouteHop | None:
        """Who must stay for the trial to prove anything."""
        return self.accused if self.swapped else self.accuser


class Suspicion:
    """The trial of one session, at most one at a time, and who may not come back."""

    def __init__(self) -> None:
        self._trial: _Trial | None = None
        self._num_trials = 0
        self._banned: set[Hop] = set()
        self._guilty: set[Hop] = set()
        self._accusers: dict[Hop, set[Hop | None]] = {}  # of each hop, since the last forgiveness
        self._accusers_leave = True  # at the next forgiveness; every second time

    @property
    def banned(self) -> frozenset[Hop]:
        """Hops that are guilty, or under suspicion."""
        discredited = {hop for hop in self._accusers if self._is_discredited(hop)}
        return frozenset(self._banned | self._guilty | discredited)

    def accuse(self, accuser: RouteHop | None, accused: RouteHop | None, step_id: int) -> Replace | None:
        """What to do about an accusation; None to give up. None for a party is the client."""
        trial = self._trial
        if accused is not None:
            self._accusers.setdefault(accused.hop, set()).add(_hop(accuser))
        repeats = accuser is not None and trial is not None and _hop(trial.accuser) == accuser.hop
        if trial is not None and repeats and not trial.swapped:  # the client, who cannot be swapped, tries on
            restorable = trial.accused is None or not self._is_discredited(trial.accused.hop)
            if restorable:
                return self._swap(trial, _hop(accused))
        self._num_trials += 1
        if self._num_trials > MAX_TRIALS:
            return None
        if accused is None:  # the client cannot be replaced, so its accuser is
            if accuser is None or (trial is not None and trial.swapped and trial.accused is None):
                return None
            return self._try(_Trial(None, accuser, step_id, swapped=True))
        if trial is not None and trial.swapped and _hop(trial.accused) == accused.hop:
            self._believe(trial)  # two who know nothing of each other say the same
        return self._try(_Trial(accused, accuser, step_id))

    def nobody_replaces(self) -> Replace | None:
        """No replacement exists for the one who is away: try it the other way round, if that is left."""
        trial = self._trial
        if trial is None or trial.accused is None or trial.accuser is None:
            return None
        if not trial.swapped:
            return None if self._is_discredited(trial.accused.hop) else self._swap(trial, None)
        if trial.second is None:
            return None
        self._believe(trial)  # it has to do with the accuser, then; perhaps without those it accused
        self._banned.add(trial.accused.hop)
        self._trial = None
        return Replace(trial.accused, restore=trial.accuser)

    def committed(self, step_id: int) -> RouteHop | None:
        """The route let a step through: the guilty one, if a trial of it is decided by that."""
        trial = self._trial
        if trial is None or step_id < trial.step_id:
            return None
        self._trial = None
        self._num_trials = 0
        if trial.away is not None:
            self._guilty.add(trial.away.hop)
        return trial.away

    def left(self, place: RouteHop) -> None:
        """A hop left the route for another reason; a trial that needs it proves nothing any more."""
        if self._trial is not None and _hop(self._trial.witness) == place.hop:
            self._trial = None

    def forgive(self) -> None:
        """There is nobody else: those against whom nothing is proved may come back.

        Every second time only the accused do: several accusers that cover for each other, so that one is
        always on the route while another is tried, show only when all of them are away.
        """
        accusers = {hop for hops in self._accusers.values() for hop in hops if hop is not None}
        self._trial = None
        self._banned = accusers if self._accusers_leave else set()
        self._accusers_leave = not (self._accusers_leave and accusers)
        self._accusers.clear()

    def _is_discredited(self, hop: Hop) -> bool:
        """Two who need know nothing of each other accused it: it is not restored to try them."""
        return len(self._accusers.get(hop, ())) > 1

    def _try(self, trial: _Trial) -> Replace | None:
        self._trial = trial
        if trial.away is None:
            return None
        self._banned.add(trial.away.hop)
        return Replace(trial.away)

    def _swap(self, trial: _Trial, second: Hop | None) -> Replace | None:
        if trial.accuser is None or trial.accused is None:
            return None
        self._banned.discard(trial.accused.hop)
        self._banned.add(trial.accuser.hop)
        self._trial = _Trial(trial.accused, trial.accuser, trial.step_id, True, second)
        return Replace(trial.accuser, restore=trial.accused)

    def _believe(self, trial: _Trial) -> None:
        """The accuser may come back, and whoever it accused second may not."""
        if trial.accuser is not None:
            self._banned.discard(trial.accuser.hop)
        if trial.second is not None:
            self._banned.add(trial.second)


def _hop(place: RouteHop | None) -> Hop | None:
    return place.hop if place is not None else None

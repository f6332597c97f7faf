"""Where a member begins: addresses from a token or remembered, which never are forgotten. No I/O.

It owns what came of dialling them, and when to do so again: ever more rarely while nobody answers.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

from ....protocol.errors import Code, CorollaError
from .acquaintances import REDIAL_FIRST_S, REDIAL_MAX_S


class Bootstrap:
    """Of one member. rng: spreads dials, so that many do not call one at once; clock: in seconds."""

    def __init__(self, addresses: Sequence[str], rng: random.Random, clock: Callable[[], float]) -> None:
        self._problems: dict[str, CorollaError | None] = dict.fromkeys(addresses)
        self._rng = rng
        self._clock = clock
        self._backoff_s = REDIAL_FIRST_S
        self._due_at = clock()

    @property
    def addresses(self) -> tuple[str, ...]:
        """All of them."""
        return tuple(self._problems)

    def tried(self, address: str, problem: CorollaError | None) -> None:
        """What came of dialling one; None is a member."""
        self._problems[address] = problem

    def unreached(self) -> tuple[tuple[str, str], ...]:
        """Those that did not answer when last dialled, and why."""
        return tuple((a, problem.message) for a, problem in self._problems.items() if problem is not None)

    def is_refused(self) -> bool:
        """Whether every address has been tried, and somebody there would not have us."""
        problems = self._problems.values()
        return None not in problems and any(p is not None and p.code is Code.NOT_INVITED for p in problems)

    def __str__(self) -> str:
        """Each with what came of it."""
        told = (
            f"{a}: {problem.message if problem else 'no answer'}" for a, problem in self._problems.items()
        )
        return "; ".join(told) or "none known"

    def due_at(self) -> float:
        """When to dial them, if nobody else is there; inf without any."""
        return self._due_at if self._problems else float("inf")

    def dialled(self) -> None:
        """They were, just now: the next time after a longer while."""
        self._due_at = self._clock() + self._backoff_s * self._rng.uniform(0.8, 1.2)
        self._backoff_s = min(2 * self._backoff_s, REDIAL_MAX_S)

    def rest(self) -> None:
        """Members are there: once they are not, these are dialled at once."""
        self._backoff_s, self._due_at = REDIAL_FIRST_S, self._clock()

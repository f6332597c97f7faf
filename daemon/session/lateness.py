"""When silence is late: from how long the hops of a session were silent before. Pure, its clock an argument.

It is silence that is judged, not how long a step takes: a hop that has a step shows at once that it has it, and each
second that it computes. So it is late that no hop shows anything for several times as long as is usual with steps of
that size, on this route, these links, and machines as busy as they are. It knows no hop, and blames nobody. The idea
of asking a second one when the first is slow: Dean and Barroso 2013, The Tail at Scale, section on hedged requests.
"""

from __future__ import annotations

from collections import defaultdict, deque
from typing import Final

LATE: Final = (
    4  # times what all but a twentieth of the silences stayed below: a queue twice as long is no reason
)
SHARE: Final = 0.95
LEAST_S: Final = 1.25  # nobody is late before: by then any daemon has shown that it has a step
UNKNOWN_S: Final = 2.5  # before enough is known, and without the time that what is on its way may take
SLOW_LINK: Final = 125_000  # bytes a second; a link so slow is no reason either
OPENING_S: Final = 2.0  # opening a session is a round trip and an allocation
SHOWN_S: Final = 2.4  # a worker's beats are a second apart, and a hop tells of its work each second
ANSWER_S: Final = 0.8  # a live daemon answers "where is it" at once, a busy machine's somewhat later
HURRIES_S: Final = 60.0  # each time that somebody was late in so long doubles the patience
MIN_SAMPLES: Final = 4
_SAMPLES: Final = 64  # the last ones of each kind


class Lateness:
    """Of one session. least_s: as `LEAST_S`; with infinity nobody is ever late."""

    def __init__(self, least_s: float = LEAST_S) -> None:
        self._least_s = least_s
        self._silences: defaultdict[int, deque[float]] = defaultdict(lambda: deque(maxlen=_SAMPLES))
        self._hurries: deque[float] = deque(maxlen=8)  # when somebody was late

    def note(self, num_tokens: int, silence_s: float) -> None:
        """The longest silence amid a step of so many tokens, which has been answered."""
        self._silences[_kind(num_tokens)].append(silence_s)

    def note_hurry(self, now_s: float) -> None:
        """Somebody was late: where that happens again and again, it may be the rule here."""
        self._hurries.append(now_s)

    def patience_s(self, num_tokens: int, num_bytes: int, now_s: float) -> float:
        """How long silence is not late. num_bytes: that are on their way with the step."""
        known = sorted(self._silences[_kind(num_tokens)])
        if len(known) < MIN_SAMPLES:
            usual_s = UNKNOWN_S + num_bytes / SLOW_LINK
        else:
            usual_s = LATE * known[min(len(known) - 1, int(SHARE * len(known)))]
        return max(self._least_s, usual_s) * self._caution(now_s)

    def linking_s(self, num_bytes: int, now_s: float) -> float:
        """Likewise until all hops are linked. num_bytes: that may still be on their way before."""
        return max(self._least_s, UNKNOWN_S + num_bytes / SLOW_LINK) * self._caution(now_s)

    def opening_s(self, now_s: float) -> float:
        """Likewise until a hop has opened the session."""
        return max(self._least_s, OPENING_S) * self._caution(now_s)

    def _caution(self, now_s: float) -> float:
        return 2.0 ** sum(now_s - at < HURRIES_S for at in self._hurries)


def answer_s(patience_s: float) -> float:
    """How long to wait for the answer of a live daemon, where silence has been as long as that."""
    return max(ANSWER_S, patience_s / 2)


def _kind(num_tokens: int) -> int:
    """Steps of about the same size: a token or few, a line, a page, a long prompt."""
    return num_tokens.bit_length() // 3

"""How large a stream's receive window should be: arithmetic, for `muxing.py`, which owns the windows."""

from __future__ import annotations

from typing import Final

from ....protocol.limits import INITIAL_WINDOW_BYTES, MAX_WINDOW_BYTES, MIB

# Credit for what was read is given in batches of half a window, at most of this: small beside the largest
# window, so that a sender far away hears of it while it still has some left.
MAX_CREDIT_BYTES: Final = MIB
WINDOW_RTTS: Final = 4  # a window holds what its reader takes in so many round trips
MIN_HORIZON_S: Final = 0.005  # and at least in so long, lest a loopback's window never grow
MIN_PACE_S: Final = 0.001  # what was read at once says little of the pace; it counts as read in this


def wanted_window_bytes(consumed_bytes: int, elapsed_s: float, rtt_s: float) -> int:
    """The window for a reader that took so much in so long: what it would read in `WINDOW_RTTS` round trips.

    A reader held up by its window reads one window in a round trip, so its window grows as many times; a
    burst that came through an open one shows the pace of the wire, and the window follows it at once.
    """
    pace = consumed_bytes / max(elapsed_s, MIN_PACE_S)
    return min(int(pace * max(WINDOW_RTTS * rtt_s, MIN_HORIZON_S)), MAX_WINDOW_BYTES)


def fair_window_bytes(window_bytes: int, left_bytes: int) -> int:
    """The largest window of a stream that claims no more of the budget than it leaves to later ones.

    window_bytes: as it is; what exceeds `INITIAL_WINDOW_BYTES` is claimed. left_bytes: claimed by nobody.
    """
    return INITIAL_WINDOW_BYTES + (window_bytes - INITIAL_WINDOW_BYTES + left_bytes) // 2


def is_long_wait(waited_s: float, rtt_s: float) -> bool:
    """Whether what a reader got after so long is a new burst, rather than the next piece of the last one."""
    return waited_s > max(rtt_s / 2, MIN_HORIZON_S)

"""How long a session waits for what. Data only; every default's reason is in `protocol/limits.py`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from ...protocol.limits import (
    MAX_STEP_TOKENS,
    MIB,
    OPEN_TIMEOUT_S,
    REPLACEMENT_WAIT_S,
    STEP_HARD_TIMEOUT_S,
    STEP_TIMEOUT_S,
    WHERE_TIMEOUT_S,
)
from .lateness import LEAST_S

RESUME_TIMEOUT_S: Final = 2.0  # a live peer takes a stream at once; a dead one should not hold up the repair
ROUTE_RETRY_S: Final = 1.0  # records are refreshed every 20 s, but new ones may come at any moment
ROUTE_TIMEOUT_S: Final = 15.0  # asking the registry, however many holders have to be tried
CLIENT_HISTORY_BYTES: Final = 1024 * MIB  # of one session's inputs: the last resort of every repair


@dataclass(frozen=True, slots=True)
class Settings:
    """Times in seconds.

    open_wait_s: how long the opening waits for blocks that nobody serves; replacement_wait_s: the same in a
    repair. history_bytes: budget of the client's own history. part_tokens: larger steps are cut. least_late_s: of
    silence, before which no hop is late; infinity waits for the deadlines alone.
    """

    open_wait_s: float = 0.0
    replacement_wait_s: float = REPLACEMENT_WAIT_S
    route_retry_s: float = ROUTE_RETRY_S
    route_timeout_s: float = ROUTE_TIMEOUT_S
    open_timeout_s: float = OPEN_TIMEOUT_S
    resume_timeout_s: float = RESUME_TIMEOUT_S
    step_timeout_s: float = STEP_TIMEOUT_S
    step_hard_timeout_s: float = STEP_HARD_TIMEOUT_S
    where_timeout_s: float = WHERE_TIMEOUT_S
    least_late_s: float = LEAST_S
    history_bytes: int = CLIENT_HISTORY_BYTES
    part_tokens: int = MAX_STEP_TOKENS

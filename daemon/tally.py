"""What this daemon has done since it started, in numbers that only grow. Whoever does something counts it here."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field


@dataclass(slots=True)
class Tally:
    """steps, tokens, block_tokens (tokens times blocks) computed for other members' sessions.

    training_tokens: of others, that went back through our blocks. generated_tokens: of texts for our own users.
    session_events: of our own users' sessions by kind, such as `repaired`.
    """

    steps: int = 0
    tokens: int = 0
    block_tokens: int = 0
    training_tokens: int = 0
    generated_tokens: int = 0
    session_events: Counter[str] = field(default_factory=Counter)

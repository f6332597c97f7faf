"""Random steps of a user: prompts, single tokens, forks, dropped rows, rollbacks."""

from __future__ import annotations

import random

from corolla.protocol.steps import NEW_ROW, Row


def random_rows(
    rng: random.Random, lengths: tuple[int, ...], max_tokens: int, *, first: bool
) -> tuple[Row, ...]:
    """The rows of a step after which no row is longer than `max_tokens`. lengths: of the rows before it."""
    if first or rng.random() < 0.05:
        return tuple(Row(NEW_ROW, 0, rng.randint(0, 8)) for _ in range(rng.randint(1, 3)))
    kind = rng.random()
    parents = list(range(len(lengths)))
    if kind < 0.1:
        parents = [rng.choice(parents) for _ in range(rng.randint(1, 3))]
    rows = []
    for parent in parents:
        held = lengths[parent]
        position = rng.randint(0, held) if 0.1 <= kind < 0.2 else held
        rows.append(Row(parent, position, min(rng.choice((1, 1, 1, 0, 6)), max_tokens - position)))
    return tuple(rows)

"""How fast the swarm writes for this machine: texts of chance tokens, one alone and several side by side.

The prompts are new each time, since the swarm remembers those it has computed. What is measured is what a user
would see: the network, the queue of every hop, and this machine's own ends are in it.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from ..protocol.errors import Code, error

if TYPE_CHECKING:
    from .client import Model

_IDS: Final = range(32, 96)  # of tokens that every vocabulary has, and that end no text


@dataclass(frozen=True, slots=True)
class Writing:
    """One text. Seconds on one clock: asked for, first token, last token."""

    asked_s: float
    first_s: float
    last_s: float
    num_tokens: int


@dataclass(frozen=True, slots=True)
class Figure:
    """One result; beside: what ran next to it in the same run, ratio: the two together. 0 if there is none."""

    name: str
    value: float
    unit: str
    beside: float = 0.0
    ratio: float = 0.0


def bench(model: Model, *, prompt_tokens: int, new_tokens: int, num_texts: int) -> tuple[Figure, ...]:
    """Measure: a first text to warm up, one alone, then `num_texts` side by side.

    Raises `BAD_REQUEST` for counts that measure nothing, and what `Model.generate` raises.
    """
    if prompt_tokens < 1 or new_tokens < 2 or num_texts < 1:
        counts = f"{prompt_tokens} tokens of prompt, {new_tokens} new ones, {num_texts} texts"
        raise error(Code.BAD_REQUEST, f"a measurement of {counts}", "give at least 1, 2 and 1")
    write(model, prompt(1), 2)
    alone = write(model, prompt(prompt_tokens), new_tokens)
    with ThreadPoolExecutor(num_texts) as pool:
        asked = [pool.submit(write, model, prompt(prompt_tokens), new_tokens) for _ in range(num_texts)]
        together = [future.result() for future in asked]
    return figures(prompt_tokens, alone, together)


def prompt(num_tokens: int) -> list[int]:
    """Tokens that nobody has written before."""
    return random.choices(_IDS, k=num_tokens)  # noqa: S311 - it only has to be another one each time


def write(
    model: Model, tokens: Sequence[int], num_tokens: int, clock: Callable[[], float] = time.perf_counter
) -> Writing:
    """One text of just so many tokens."""
    asked_s = clock()
    times = [
        clock()
        for _ in model.generate(
            tokens=[list(tokens)], max_new_tokens=num_tokens, stream=True, ignore_eos=True, temperature=0.0
        )
    ]
    return Writing(asked_s, times[0], times[-1], len(times))


def figures(prompt_tokens: int, alone: Writing, together: Iterable[Writing]) -> tuple[Figure, ...]:
    """What these texts show."""
    texts = list(together)
    to_first = alone.first_s - alone.asked_s
    single = (alone.num_tokens - 1) / max(alone.last_s - alone.first_s, 1e-9)
    took_s = max(text.last_s for text in texts) - min(text.first_s for text in texts)
    several = sum(text.num_tokens - 1 for text in texts) / max(took_s, 1e-9)
    slowest = max(text.first_s - text.asked_s for text in texts)
    return (
        Figure("first_token", to_first, "s"),
        Figure("prompt", prompt_tokens / max(to_first, 1e-9), "tokens/s"),
        Figure("one_text", single, "tokens/s"),
        Figure(f"{len(texts)}_texts", several, "tokens/s", single, several / single),
        Figure(
            f"{len(texts)}_texts_slowest_first_token", slowest, "s", to_first, slowest / max(to_first, 1e-9)
        ),
    )

"""Where a silent step is stuck, from what each hop says of it. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum
from typing import NamedTuple

from ...protocol.steps import Stage


class Trouble(Enum):
    """What is wrong with the hop named."""

    WORKER = "its worker is stuck"
    SLOW = "it works, without a sign of progress"
    LINK = "the step was sent to it and never came"
    ANSWER = "it sent the step on, and nobody received it"


class Finding(NamedTuple):
    """A trouble, and the place in the chain of the hop that has it."""

    trouble: Trouble
    place: int


def find_stuck(stages: Sequence[Stage]) -> Finding:
    """The trouble of a step that was sent down a chain of hops; stages: of each, in order, at least one."""
    for index, stage in enumerate(stages):
        if stage is Stage.UNKNOWN:
            return Finding(Trouble.LINK, index)
        if stage is Stage.RECEIVED:
            return Finding(Trouble.WORKER, index)
        if stage is Stage.WORKING:
            return Finding(Trouble.SLOW, index)
    return Finding(Trouble.ANSWER, len(stages) - 1)

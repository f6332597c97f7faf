"""Where in a run the masks of LoRA's dropout are: they follow from numbers alone, so a run can be told again.

Owns the count of samples within an optimizer step. The masks themselves are computed on the hops, from what
`protocol.training` says.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable

from ..protocol.training import Dropout


class DropoutCount:
    """Seed, optimizer step, and how many samples of the step have passed.

    version: of the parameters; a step ends when it changes, as an optimizer changes it, so that the micro-batches of
    gradient accumulation are samples of one step. Set `step` to go on with a run that was interrupted.
    """

    def __init__(self, seed: int = 0, version: Callable[[], Hashable] = int) -> None:
        self.seed = seed
        self._step = 0
        self._now = version
        self._samples: Counter[Hashable] = Counter()
        self._version: Hashable = None

    @property
    def step(self) -> int:
        """The optimizer step of the last samples."""
        return self._step

    @step.setter
    def step(self, step: int) -> None:
        self._step = step
        self._version = None
        self._samples.clear()

    @property
    def has_begun(self) -> bool:
        """Whether any sample was told its masks, or a step was set."""
        return self._version is not None or self._step > 0

    @property
    def next_step(self) -> int:
        """The step that a run goes on with which is taken up now; one that was not finished begins anew."""
        is_over = self._version is not None and self._now() != self._version
        return self._step + is_over

    def take(self, num_samples: int, lane: Hashable) -> Dropout:
        """What the masks of the next samples depend on; `sample` is the first one's number.

        lane: samples are counted apart for each, such as for parts of the model that one batch passes in turn.
        """
        self._step = self.next_step
        version = self._now()
        if version != self._version:
            self._version = version
            self._samples.clear()
        first = self._samples[lane]
        self._samples[lane] += num_samples
        return Dropout(self.seed, self._step, first)

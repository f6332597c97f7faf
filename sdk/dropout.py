"""Where in a run the masks of LoRA's dropout are: they follow from numbers alone, so a run can be told again.

Owns the count of samples within an optimizer step. The masks themselves are computed on the hops, from what
`protocol.training` says.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable

from ..protocol.training import Dropout


class DropoutCount:
    """Seed, optimizer step, and how many samples of the step have passed.

    A step ends when the adapter's parameters change, as an optimizer changes them, so that the micro-batches of
    gradient accumulation are samples of one step. Set `step` to go on with a run that was interrupted.
    """

    def __init__(self, seed: int = 0) -> None:
        self.seed = seed
        self.step = 0
        self._samples: Counter[Hashable] = Counter()
        self._version: Hashable = None

    def take(self, num_samples: int, lane: Hashable, version: Hashable) -> Dropout:
        """What the masks of the next samples depend on; `sample` is the first one's number.

        lane: samples are counted apart for each, such as for parts of the model that one batch passes in turn.
        version: of the parameters; it differs after each optimizer step.
        """
        if version != self._version:
            self.step += self._version is not None
            self._version = version
            self._samples.clear()
        first = self._samples[lane]
        self._samples[lane] += num_samples
        return Dropout(self.seed, self.step, first)

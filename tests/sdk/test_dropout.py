"""Where a run is, as the masks of dropout count it."""

from __future__ import annotations

from corolla.protocol.training import Dropout
from corolla.sdk.dropout import DropoutCount

ALL = (0, 4)


class Parameters:
    """What an optimizer changes."""

    def __init__(self) -> None:
        self.version = 1

    def count(self, seed: int = 0) -> DropoutCount:
        return DropoutCount(seed, lambda: self.version)


def test_samples_count_up_until_an_optimizer_changed_the_parameters() -> None:
    parameters = Parameters()
    count = parameters.count(seed=7)
    assert count.take(3, ALL) == Dropout(7, 0, 0)
    assert count.take(2, ALL) == Dropout(7, 0, 3)
    parameters.version = 14
    assert count.take(3, ALL) == Dropout(7, 1, 0)


def test_parts_of_the_model_that_a_batch_passes_in_turn_see_the_same_samples() -> None:
    count = DropoutCount()
    first = [count.take(2, lane) for lane in ((0, 2), (2, 4))]
    second = [count.take(2, lane) for lane in ((0, 2), (2, 4))]
    assert first == [Dropout(0, 0, 0)] * 2
    assert second == [Dropout(0, 0, 2)] * 2


def test_a_run_that_goes_on_has_the_masks_that_it_would_have_had() -> None:
    parameters = Parameters()
    whole, resumed = parameters.count(3), parameters.count(3)
    for _ in range(4):
        whole.take(4, ALL)
        parameters.version += 1
    resumed.step = whole.next_step
    assert resumed.take(4, ALL) == whole.take(4, ALL) == Dropout(3, 4, 0)


def test_a_step_that_was_not_finished_begins_anew() -> None:
    parameters = Parameters()
    count = parameters.count()
    count.take(4, ALL)
    parameters.version += 1
    interrupted = count.take(4, ALL)
    count.step = count.next_step
    assert count.take(4, ALL) == interrupted

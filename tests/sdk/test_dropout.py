"""Where a run is, as the masks of dropout count it."""

from __future__ import annotations

from corolla.protocol.training import Dropout
from corolla.sdk.dropout import DropoutCount

ALL = (0, 4)


def test_samples_count_up_until_an_optimizer_changed_the_parameters() -> None:
    count = DropoutCount(seed=7)
    assert count.take(3, ALL, version=10) == Dropout(7, 0, 0)
    assert count.take(2, ALL, version=10) == Dropout(7, 0, 3)
    assert count.take(3, ALL, version=14) == Dropout(7, 1, 0)


def test_parts_of_the_model_that_a_batch_passes_in_turn_see_the_same_samples() -> None:
    count = DropoutCount()
    first = [count.take(2, lane, version=1) for lane in ((0, 2), (2, 4))]
    second = [count.take(2, lane, version=1) for lane in ((0, 2), (2, 4))]
    assert first == [Dropout(0, 0, 0)] * 2
    assert second == [Dropout(0, 0, 2)] * 2


def test_a_run_that_goes_on_has_the_masks_that_it_would_have_had() -> None:
    whole, resumed = DropoutCount(3), DropoutCount(3)
    for version in range(5):
        last = whole.take(4, ALL, version)
    resumed.step = 4
    assert resumed.take(4, ALL, version=99) == last

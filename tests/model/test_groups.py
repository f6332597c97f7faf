"""Which blocks share a table."""

from __future__ import annotations

from corolla.model.groups import Grouping, grouped


def alike(windows: dict[int, int | None]) -> Grouping:
    return grouped(windows, dict.fromkeys(windows, "shape"))


def test_blocks_that_look_equally_far_back_are_one_group() -> None:
    assert alike({3: None, 4: None}) == Grouping((None,), {3: (0, 0), 4: (0, 1)}, 2)
    assert alike({0: 8, 1: 8}).windows == (8,)
    assert alike({}).num_groups == 1


def test_blocks_that_alternate_make_two_groups_of_the_same_size() -> None:
    grouping = alike({0: 8, 1: None, 2: 8, 3: None})
    assert grouping.windows == (None, 8)
    assert grouping.places == {1: (0, 0), 3: (0, 1), 0: (1, 0), 2: (1, 1)}
    assert grouping.size == 2


def test_the_more_frequent_kind_makes_several_groups() -> None:
    grouping = alike({block: None if block % 6 == 5 else 512 for block in range(18)})
    assert grouping.windows == (None, 512, 512, 512, 512, 512)
    assert len(set(grouping.places.values())) == 18
    assert all(place < grouping.size == 3 for _, place in grouping.places.values())


def test_shapes_that_differ_or_groups_that_would_waste_much_share_one_table_that_keeps_everything() -> None:
    windows = {0: 8, 1: None}
    assert grouped(windows, {0: "small", 1: "large"}).windows == (None,)
    uneven = alike({block: None if block == 0 else 8 for block in range(12)})
    assert uneven.windows == (None,)
    assert len(uneven.places) == 12


def test_a_row_comes_to_hold_its_window_and_no_more_where_there_is_one() -> None:
    grouping = alike({0: 128, 1: None})
    assert grouping.num_most(64, 64, 576) == 2
    assert grouping.num_most(6400, 64, 576) == 100 + 12

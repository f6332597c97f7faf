"""The table of bounds names what there is, once, with a value of its unit and a reason."""

from __future__ import annotations

from corolla.protocol.bounds import BOUNDS


def test_every_row_says_whom_it_bounds_and_why() -> None:
    for bound in BOUNDS:
        assert bound.name
        assert bound.of
        assert len(bound.reason) > 10
        assert bound.unit in ("", "s", "bytes", "bytes/s", "1/s")
        assert bound.value > 0


def test_no_row_is_there_twice() -> None:
    assert len({(bound.name, bound.unit, bound.of) for bound in BOUNDS}) == len(BOUNDS)


def test_a_stranger_may_less_than_a_member() -> None:
    of = {(bound.name, bound.unit, bound.of): bound.value for bound in BOUNDS}
    for name, unit in (("bytes", "bytes/s"), ("frames", "1/s"), ("streams", ""), ("new streams", "1/s")):
        assert of[name, unit, "a stranger"] < of[name, unit, "a member"]

"""Errors keep their meaning over a wire, and each code has its type and exit code."""

from __future__ import annotations

import copy

import pytest

from corolla.protocol.errors import Code, CorollaError, Exit, Fault, error, error_from_wire, exit_code


@pytest.mark.parametrize("code", list(Code))
def test_every_code_survives_the_wire_with_its_type(code: Code) -> None:
    problem = error(code, "what happened", "what to do", count=3)
    back = error_from_wire(problem.to_wire())
    assert type(back) is type(problem)
    assert (back.code, back.message, back.remedy, back.details) == (
        code,
        "what happened",
        "what to do",
        {"count": 3},
    )
    assert Exit.OK < exit_code(code) <= Exit.DEGRADED


def test_the_type_tells_whose_fault_it_is() -> None:
    assert error(Code.BAD_SHAPE, "").fault is Fault.USER
    assert error(Code.BAD_ANSWER, "").fault is Fault.PEER
    assert error(Code.DISK_FULL, "").fault is Fault.SELF
    assert error(Code.HISTORY_GAP, "").fault is Fault.NOBODY


def test_a_code_of_a_later_version_becomes_internal_and_keeps_its_text() -> None:
    back = error_from_wire({"code": "from_the_future", "message": "news"})
    assert back.code is Code.INTERNAL
    assert "from_the_future" in back.message
    assert "news" in back.message


@pytest.mark.parametrize("wire", [None, 3, [], {}, {"code": 7, "message": 8, "details": 9}])
def test_a_malformed_error_is_still_an_error(wire: object) -> None:
    assert isinstance(error_from_wire(wire), CorollaError)


def test_details_cannot_take_the_place_of_the_message() -> None:
    wire = {"code": "busy", "message": "m", "details": {"message": "x", "code": 1, "remedy": 2, "queue": 5}}
    assert error_from_wire(wire).details == {"queue": 5}


def test_the_line_shown_names_the_remedy() -> None:
    assert (
        str(error(Code.NO_SWARM, "not in a swarm", "daemonctl join TOKEN"))
        == "not in a swarm (daemonctl join TOKEN)"
    )


def test_an_error_can_be_copied() -> None:
    problem = error(Code.BUSY, "later", queue=2)
    assert copy.copy(problem).to_wire() == problem.to_wire()

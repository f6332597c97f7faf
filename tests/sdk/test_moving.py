"""`daemonctl rebalance`, `drain`, `pause` and `resume`, and the methods behind them, against a daemon in miniature."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from corolla.protocol.control import Pause, Rebalance
from corolla.protocol.errors import Code, CorollaError, Exit
from corolla.protocol.messages import from_plain
from corolla.protocol.views import Rebalanced
from corolla.sdk.cli import main
from corolla.sdk.client import connect

from .fake import FakeDaemon

Ctl = Callable[..., tuple[object, str, str]]


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeDaemon]:
    monkeypatch.setenv("COROLLA_SOCKET", str(tmp_path / "control.sock"))
    with FakeDaemon(tmp_path / "control.sock") as daemon:
        for method in ("drain", "pause", "resume"):
            daemon.handlers[method] = lambda connection, call: None
        answer = Rebalanced(0, "tiny", 0, 2, 2, 4, True, (5.0, 7.5), (1, 0), (0, 2))
        daemon.handlers["rebalance"] = lambda connection, call: [answer]
        yield daemon


@pytest.fixture
def ctl(capsys: pytest.CaptureFixture[str]) -> Ctl:
    def run(*words: str) -> tuple[object, str, str]:
        with pytest.raises(SystemExit) as ended:
            main(list(words))
        captured = capsys.readouterr()
        return ended.value.code, captured.out, captured.err

    return run


def test_a_dry_run_says_what_moving_would_gain(ctl: Ctl, fake: FakeDaemon) -> None:
    code, out, _ = ctl("rebalance", "--dry-run")
    assert code == 0
    assert "worker 0, blocks 0:2 of tiny: would move to 2:4" in out
    assert "tokens/s 5 → 7.5, blocks served by nobody 1 → 0, by one 0 → 2" in out
    assert from_plain(Rebalance, fake.calls[-1].arguments) == Rebalance(dry_run=True)


def test_blocks_and_worker_are_passed_on_and_the_answer_comes_as_json(ctl: Ctl, fake: FakeDaemon) -> None:
    code, out, _ = ctl("rebalance", "--to", "2:4", "--worker", "3", "--json")
    assert code == 0
    assert json.loads(out)["version"] == 1
    assert json.loads(out)["spans"][0]["to_start"] == 2
    assert from_plain(Rebalance, fake.calls[-1].arguments) == Rebalance(False, 2, 4, 3)


def test_a_span_that_stays_is_told_so(ctl: Ctl, fake: FakeDaemon) -> None:
    stays = Rebalanced(0, "tiny", 0, 2, 0, 2, False, (5.0, 5.0), (0, 0), (0, 0))
    fake.handlers["rebalance"] = lambda connection, call: [stays]
    assert "stays" in ctl("rebalance")[1]


@pytest.mark.parametrize(
    ("words", "seconds"), [((), 0.0), (("90s",), 90.0), (("30m",), 1800.0), (("2h",), 7200.0), (("5",), 5.0)]
)
def test_pauses_take_times_as_people_write_them(
    ctl: Ctl, fake: FakeDaemon, words: tuple[str, ...], seconds: float
) -> None:
    options = ("--for", *words) if words else ()
    assert ctl("pause", *options)[0] == 0
    assert from_plain(Pause, fake.calls[-1].arguments) == Pause(seconds)


@pytest.mark.parametrize(
    "words",
    [
        ("pause", "--for", "soon"),
        ("pause", "--for", "-1h"),
        ("rebalance", "--to", "4:2"),
        ("rebalance", "--to", "x"),
    ],
    ids=str,
)
def test_what_is_no_time_and_no_run_of_blocks_is_a_usage_error(
    ctl: Ctl, fake: FakeDaemon, words: tuple[str, ...]
) -> None:
    code, _, err = ctl(*words)
    assert code == Exit.USAGE
    assert "write it like" in err
    assert fake.calls == []


@pytest.mark.parametrize("word", ["drain", "pause", "resume"])
def test_each_answers_in_words_and_in_an_envelope(ctl: Ctl, fake: FakeDaemon, word: str) -> None:
    code, out, err = ctl(word)
    assert (code, out) == (0, "")
    assert err
    assert json.loads(ctl(word, "--json")[1])["version"] == 1


def test_the_library_checks_blocks_before_it_asks(fake: FakeDaemon) -> None:
    with connect() as daemon:
        assert daemon.rebalance(dry_run=True)[0].tokens_per_s == (5.0, 7.5)
        daemon.drain()
        daemon.pause(for_s=3.0)
        daemon.resume()
        with pytest.raises(CorollaError) as caught:
            daemon.rebalance(to=(3, 3))
        assert caught.value.code is Code.BAD_REQUEST

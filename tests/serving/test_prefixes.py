"""What a hop keeps of the prefixes that it sent."""

from __future__ import annotations

from dataclasses import replace

from corolla.daemon.serving.prefixes import SentPrefixes, SessionPrefix
from corolla.daemon.session.history import History
from corolla.protocol.steps import NEW_ROW, OpenSession, Row
from corolla.protocol.tensors import Encoding

NAMES = tuple(bytes([number]) * 16 for number in range(3))
OPENED = OpenSession(b"s" * 16, "model", 0, 0, 2, Encoding.FLOAT32, 1, 512, prefix=NAMES)
ROWS = (Row(NEW_ROW, 0, 200),)
SENT = bytes(number % 251 for number in range(200))


def history(num_tokens: int, budget_bytes: int = 1 << 20) -> History:
    kept = History(1, budget_bytes)
    kept.apply(1, 0, (Row(NEW_ROW, 0, num_tokens),), SENT[:num_tokens])
    return kept


def session(
    sent: SentPrefixes, client: str = "client", opened: OpenSession = OPENED, *, keeps: bool = True
) -> SessionPrefix:
    return SessionPrefix(sent, client, opened, keeps=keeps)


def test_full_pages_are_kept_as_they_are_sent_and_found_by_the_next_session() -> None:
    sent = SentPrefixes()
    first = session(sent)
    first.note(history(100), ROWS)
    assert session(sent).beginning((192,)) == ((64,), SENT[:64])
    first.note(history(200), ROWS)
    assert session(sent).beginning((192,)) == ((192,), SENT[:192])
    assert session(sent).beginning((130,)) == ((128,), SENT[:128])
    assert sent.size_bytes == 192


def test_the_last_hop_keeps_nothing_and_begins_with_what_its_worker_holds() -> None:
    sent = SentPrefixes()
    last = session(sent, keeps=False)
    last.note(history(200), ROWS)
    assert (sent.size_bytes, last.beginning((128,))) == (0, ((128,), b""))


def test_names_are_the_clients_own_and_of_just_these_blocks() -> None:
    sent = SentPrefixes()
    session(sent).note(history(200), ROWS)
    others = [
        session(sent, "another"),
        session(sent, opened=replace(OPENED, end=3)),
        session(sent, opened=replace(OPENED, worker=1)),
        session(sent, opened=replace(OPENED, encoding=Encoding.BFLOAT16)),
        session(sent, opened=replace(OPENED, parts=(b"p" * 32, b"q" * 32))),
    ]
    assert [other.beginning((192,)) for other in others] == [((0,), b"")] * 5
    names = [name for other in (session(sent), *others) for row in other.rows for name in row]
    assert len(set(names)) == 6 * len(NAMES)
    assert not set(names) & set(NAMES)
    assert session(sent, opened=replace(OPENED, max_rows=2)).rows == ()


def test_those_used_longest_ago_go_when_the_budget_is_spent() -> None:
    sent = SentPrefixes(budget_bytes=128)
    session(sent).note(history(128), ROWS)
    assert session(sent).beginning((192,))[0] == (128,)
    session(sent, "another").note(history(64), ROWS)
    assert session(sent).beginning((192,)) == ((64,), SENT[:64])
    assert sent.size_bytes == 128


def test_what_history_dropped_cannot_be_kept() -> None:
    sent = SentPrefixes()
    short = history(200, budget_bytes=64)
    assert short.first_positions()[0] > 0
    session(sent).note(short, ROWS)
    assert sent.size_bytes == 0


def test_each_of_several_rows_has_its_own_as_long_as_they_keep_their_order() -> None:
    opened = replace(OPENED, max_rows=2, prefix_rows=(2, 1))
    kept = History(1, 1 << 20)
    rows = (Row(NEW_ROW, 0, 130), Row(NEW_ROW, 0, 70))
    kept.apply(1, 0, rows, SENT)
    sent = SentPrefixes()
    session(sent, opened=opened).note(kept, (Row(1, 0, 130), Row(0, 0, 70)))
    assert sent.size_bytes == 0
    session(sent, opened=opened).note(kept, rows)
    assert session(sent, opened=opened).beginning((128, 64)) == ((128, 64), SENT[:128] + SENT[130:194])
    assert session(sent, opened=opened).beginning((64, 0)) == ((64, 0), SENT[:64])
    assert session(sent, opened=opened).beginning(()) == ((0, 0), b"")

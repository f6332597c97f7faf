"""The demo: spans, the picture, the verdict, and the whole story with a tiny model."""

from __future__ import annotations

import json
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest

from corolla.protocol.errors import Code, CorollaError
from corolla.sdk.cli import main
from corolla.sdk.cli.demo import LiveView, PlainView, drawing
from corolla.sdk.demo import Outcome, Story, split
from corolla.sdk.demo_swarm import DemoSwarm, Member
from corolla.sdk.output import Output
from corolla.sdk.picture import gaps

from .fake import FakeDaemon

OUTCOME = Outcome("tiny", "why", " so", " so", (1, 2), (1, 2), 10.0, 5.0, 1.5, "middle")


def test_spans_cover_all_blocks_evenly() -> None:
    assert split(30, 3) == [(0, 10), (10, 20), (20, 30)]
    assert split(5, 2) == [(0, 2), (2, 5)]
    for num_blocks in range(1, 12):
        for hops in range(1, num_blocks + 1):
            spans = split(num_blocks, hops)
            assert gaps(num_blocks, spans) == []
            assert len(spans) == hops
            assert all(start < end for start, end in spans)


@pytest.mark.parametrize("hops", [0, 5])
def test_more_hops_than_blocks_are_refused(hops: int) -> None:
    with pytest.raises(CorollaError, match=f"--hops {hops}") as caught:
        split(4, hops)
    assert caught.value.code is Code.BAD_REQUEST


def test_the_picture_shows_the_gap_from_the_kill_to_the_repair() -> None:
    folder = Path("/nowhere")
    members = [
        Member("first", (0, 2), folder, is_ready=True, in_use=True),
        Member("middle", (2, 4), folder, is_ready=True, in_use=True),
        Member("last", (4, 6), folder, is_ready=True, in_use=True),
        Member("spare", (2, 4), folder, is_ready=True),
    ]
    middle, spare = members[1], members[3]
    client = Member("client", None, folder)

    def lines() -> list[str]:
        return [line for line, _ in drawing(6, [*members, client])]

    assert not any("nobody" in line for line in lines())
    assert any("spare" in line and "ready" in line for line in lines())
    middle.is_killed, middle.in_use = True, False
    assert any("2:4" in line and "nobody" in line for line in lines())
    assert any("middle" in line and "killed" in line for line in lines())
    spare.in_use = True
    assert not any("nobody" in line for line in lines())
    assert not any("client" in line for line in lines())


def test_both_views_show_the_whole_story(capsys: pytest.CaptureFixture[str]) -> None:
    members = [Member("first", (0, 3), Path("/nowhere"), is_killed=True)]
    for view in (LiveView("why?"), PlainView(Output())):
        with view if isinstance(view, LiveView) else nullcontext():
            view.stage("writing")
            view.text("so it ")
            view.text("is")
            view.swarm(6, members)
        shown = "".join(capsys.readouterr())
        assert "writing" in shown
        assert "so it is" in shown
        assert "killed" in shown


@pytest.mark.timeout(
    900
)  # four daemons and two programs with torch start, on a machine that has other things to do
def test_the_demo_kills_a_daemon_and_writes_the_same_tokens(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("torch")
    from ..model.test_ends import TEMPLATE, save_tokenizer
    from ..model.tiny import save_tiny

    folder = tmp_path / "tiny"
    save_tiny(folder, "llama", eos_token_id=None)
    save_tokenizer(folder, TEMPLATE)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with pytest.raises(SystemExit) as ended:
        main(
            ["demo", "--model", str(folder), "--prompt", "hello world", "-n", "200", "--hops", "2", "--json"]
        )
    captured = capsys.readouterr()
    answer = json.loads(captured.out)
    assert ended.value.code == 0, captured.err
    assert answer["equal"] is True
    assert answer["killed"] in ("last", "spare")  # whichever of the two the route went through
    assert answer["repair_s"] > 0
    assert "nobody" in captured.err  # the picture had the gap


def test_a_text_that_ends_before_a_daemon_is_missed_proves_nothing() -> None:
    with DemoSwarm("fake") as swarm:
        client = Member("client", None, swarm.folder / "client")
        swarm.members = [Member("spare", (0, 1), swarm.folder / "spare"), client]
        client.folder.mkdir()
        with FakeDaemon(client.socket), pytest.raises(CorollaError, match="ask for a longer one") as caught:
            Story(swarm, 1, PlainView(Output()), 30).write("fake", "why?", chat=False)
    assert caught.value.code is Code.BAD_REQUEST


def test_the_verdict_is_about_tokens() -> None:
    assert OUTCOME.equal
    assert OUTCOME.envelope()["results"][1]["ratio"] == 2.0
    different = replace(OUTCOME, local_tokens=(1, 3))
    assert not different.equal
    assert different.envelope()["results"][0]["holds"] is False


def test_a_daemon_that_ends_early_is_reported_with_its_log_and_nothing_is_left(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("sys.executable", "/bin/false")  # a daemon that ends at once
    with DemoSwarm("m") as swarm:
        with pytest.raises(CorollaError, match="'first' ended with exit code 1") as caught:
            swarm.start([("first", (0, 1))], lambda: None)
        assert swarm.folder.exists()
    assert caught.value.code is Code.NOT_READY
    assert not swarm.folder.exists()

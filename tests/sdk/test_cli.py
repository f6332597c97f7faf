"""`daemonctl`: data on stdout, talk on stderr, JSON, exit codes; against the daemon in miniature."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, NamedTuple

import click
import pytest

from corolla.protocol.control import PRIVACY, Call, Item, Return
from corolla.protocol.errors import Code, Exit, error
from corolla.protocol.messages import from_plain, to_plain
from corolla.protocol.settings import Applied
from corolla.protocol.tensors import DType
from corolla.protocol.views import DaemonEvent, LineView, SpanView, SwarmView, WorkerStatus
from corolla.protocol.work import Sampling, TokenBias
from corolla.sdk.cli import main
from corolla.sdk.cli.program import COMMANDS, daemonctl
from corolla.sdk.generation import GenerateOptions

from .fake import MODEL, Connection, FakeDaemon


class Said(NamedTuple):
    code: object
    out: str
    err: str

    @property
    def json(self) -> dict[str, Any]:
        answer: dict[str, Any] = json.loads(self.out)
        return answer


Ctl = Callable[..., Said]


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeDaemon]:
    monkeypatch.setenv("COROLLA_SOCKET", str(tmp_path / "control.sock"))
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    with FakeDaemon(tmp_path / "control.sock") as daemon:
        yield daemon


@pytest.fixture
def ctl(capsys: pytest.CaptureFixture[str]) -> Ctl:
    def run(*words: str) -> Said:
        with pytest.raises(SystemExit) as ended:
            main(list(words))
        captured = capsys.readouterr()
        return Said(ended.value.code, captured.out, captured.err)

    return run


def test_help_lists_every_command_in_its_group(ctl: Ctl) -> None:
    said = ctl("--help")
    assert said.code == 0
    for row in COMMANDS:
        assert f"  {row.name}" in said.out
        assert ctl(row.name, "--help").code == 0
    assert said.out.index("See:") < said.out.index("Use:") < said.out.index("Belong:")


def test_every_command_takes_json() -> None:
    context = click.Context(daemonctl)
    without = set()

    def look(name: str, command: click.Command) -> None:
        if isinstance(command, click.Group):
            for part, row in command.commands.items():
                look(f"{name} {part}", row)
        is_run = not isinstance(command, click.Group) or command.invoke_without_command
        if is_run and not any("--json" in option.opts for option in command.params):
            without.add(name)

    for row in COMMANDS:
        command = daemonctl.get_command(context, row.name)
        assert command is not None
        look(row.name, command)
    assert without == {"completion"}  # a script for a shell


def test_status_prints_the_line_to_paste_on_another_machine(ctl: Ctl, fake: FakeDaemon) -> None:
    said = ctl("status")
    assert said.code == 0
    assert "  daemonctl join token-of-home\n" in said.out
    assert str(fake.path) in said.out
    assert ctl("status", "--json").json["status"]["num_peers"] == 1


@pytest.mark.parametrize(
    ("words", "field"),
    [
        (("status",), "status"),
        (("swarm",), "swarm"),
        (("swarm", "create", "home"), "swarm"),
        (("model", "list"), "models"),
        (("peers",), "peers"),
        (("config",), "config"),
        (("config", "set", "blocks", "none"), "key"),
        (("join", "abc"), "swarm"),
        (("leave",), "left"),
        (("stop",), "stopping"),
        (("generate", "one", "-n", "2"), "generation"),
    ],
    ids=str,
)
def test_every_command_answers_in_a_versioned_envelope(
    ctl: Ctl, fake: FakeDaemon, words: tuple[str, ...], field: str
) -> None:
    said = ctl(*words, "--json")
    assert said.code == 0
    assert said.json["version"] == 1
    assert field in said.json
    assert ctl(*words).code == 0  # and in words


def test_swarm_shows_who_serves_what_and_what_nobody_serves(ctl: Ctl, fake: FakeDaemon) -> None:
    def span(peer: str, start: int, end: int, state: str) -> SpanView:
        return SpanView(peer, 0, "tiny", MODEL.fingerprint, start, end, state, DType.FLOAT32, None, 9.0, 50.0)

    spans = (span("12D3KooWaaaaaaaaaabbbbbb", 0, 2, "online"), span("short", 3, 4, "loading"))
    fake.handlers["swarm"] = lambda connection, call: SwarmView("home", "ab", (MODEL,), spans)
    out = ctl("swarm").out
    assert "12D3…bbbbbb" in out
    assert "0:2     online" in out
    assert "2:4     nobody" in out


def test_generate_streams_text_to_stdout_and_events_to_stderr(ctl: Ctl, fake: FakeDaemon) -> None:
    said = ctl("generate", "one", "--max-new-tokens", "3", "--seed", "5")
    assert said.out == " 0 1 2\n"
    assert "repairing" in said.err
    assert fake.calls[-1].arguments["prompts"] == ["one"]
    assert fake.calls[-1].arguments["model"] == "tiny"


def test_every_option_of_sampling_can_be_given_in_words(ctl: Ctl, fake: FakeDaemon) -> None:
    words = (
        "-t 0.7 --top-p 0.9 --top-k 40 --min-p 0.05 --repetition-penalty 1.1 --presence-penalty 0.5 --seed 3"
        " --stop END --stop . --stop-token 2 --stop-token 7 --ignore-eos --logprobs 2"
        " --logit-bias 5=-100 --logit-bias 6=1.5"
    )
    said = ctl("generate", "one", "-n", "2", "--json", *words.split())
    assert from_plain(Sampling, fake.calls[-1].arguments["sampling"]) == Sampling(
        temperature=0.7, top_p=0.9, top_k=40, min_p=0.05, repetition_penalty=1.1, presence_penalty=0.5, seed=3,
        stop=("END", "."), stop_token_ids=(2, 7), ignore_eos=True, top_logprobs=2,
        logit_bias=(TokenBias(5, -100.0), TokenBias(6, 1.5)),
    )  # fmt: skip
    written = said.json["generation"]
    assert written["logprobs"] == [[-0.5, -0.5]]
    assert written["top_logprobs"][0][1] == [{"token": 1, "logprob": -0.5}, {"token": 2, "logprob": -1.5}]
    assert {field.name for field in fields(Sampling)} <= {*GenerateOptions.__annotations__}


def test_a_bias_that_is_none_is_a_mistake_in_usage(ctl: Ctl) -> None:
    said = ctl("generate", "one", "--logit-bias", "never")
    assert said.code == Exit.USAGE
    assert "TOKEN=NUMBER" in said.err


def test_generate_reads_a_pipe(ctl: Ctl, fake: FakeDaemon, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("from a pipe"))
    assert ctl("generate", "-n", "1").out == " 0\n"
    assert fake.calls[-1].arguments["prompts"] == ["from a pipe"]


def test_chat_keeps_the_turns(ctl: Ctl, fake: FakeDaemon, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("hello\n\nagain\n"))
    said = ctl("chat", "-n", "2", "--system", "Be brief.")
    assert said.out == " 0 1\n 0 1\n"
    assert [turn["role"] for turn in fake.calls[-1].arguments["messages"]] == [
        "system",
        "user",
        "assistant",
        "user",
    ]


def test_privacy_is_told_at_the_first_generate_and_at_each_join(ctl: Ctl, fake: FakeDaemon) -> None:
    assert PRIVACY in ctl("generate", "one", "-n", "1").err
    assert PRIVACY not in ctl("generate", "one", "-n", "1").err
    assert PRIVACY in ctl("join", "abc").err
    assert PRIVACY in ctl("join", "abc").err


def test_joining_names_the_switch_of_relaying(ctl: Ctl, fake: FakeDaemon) -> None:
    assert "config set relay false" in ctl("join", "abc").err


def test_several_models_want_a_choice(ctl: Ctl, fake: FakeDaemon) -> None:
    other = MODEL.__class__("large", "ef" * 32, "LlamaForCausalLM", 4, 8, None, None, (1, 1, 1, 1))
    fake.handlers["models"] = lambda connection, call: [MODEL, other]
    said = ctl("generate", "one")
    assert said.code == Exit.ERROR
    assert "tiny, large" in said.err


@pytest.mark.parametrize("as_json", [False, True])
def test_no_daemon_is_one_line_with_the_remedy_and_exit_code_3(
    ctl: Ctl, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, as_json: bool
) -> None:
    monkeypatch.setenv("COROLLA_SOCKET", str(tmp_path / "none"))
    said = ctl("status", *(["--json"] if as_json else []))
    assert said.code == Exit.NO_DAEMON
    if as_json:
        assert said.json["error"]["code"] == "no_daemon"
    else:
        assert said.err.count("\n") == 1
        assert "corollad" in said.err


@pytest.mark.parametrize(
    ("code", "exit_code"),
    [
        (Code.PERMISSION_DENIED, Exit.PERMISSION),
        (Code.TIMEOUT, Exit.TIMEOUT),
        (Code.NO_SWARM, Exit.NOT_READY),
        (Code.BAD_TOKEN, Exit.USAGE),
        (Code.INTERNAL, Exit.ERROR),
    ],
)
def test_an_error_of_the_daemon_sets_the_exit_code(
    ctl: Ctl, fake: FakeDaemon, code: Code, exit_code: int
) -> None:
    def refuse(connection: Connection, call: Call) -> None:
        raise error(code, "it did not work", "do this")

    fake.handlers["peers"] = refuse
    said = ctl("peers")
    assert said.code == exit_code
    assert said.err == "error: it did not work (do this)\n"


def test_wrong_usage_is_exit_code_2(ctl: Ctl, fake: FakeDaemon) -> None:
    assert ctl("nonsense").code == Exit.USAGE
    assert ctl("join").code == Exit.USAGE


def test_no_model_and_no_swarm_are_told_apart(ctl: Ctl, fake: FakeDaemon) -> None:
    fake.handlers["models"] = lambda connection, call: []
    assert "serves no model" in ctl("generate", "one").err


def test_events_are_lines(ctl: Ctl, fake: FakeDaemon) -> None:
    def events(connection: Connection, call: Call) -> Return:
        for text in ("one", "two"):
            connection.send(Item(call.id, to_plain(DaemonEvent("joined", 0.0, text))))
        return Return(call.id)

    fake.handlers["events"] = events
    assert [line.split()[-2:] for line in ctl("events").out.splitlines()] == [
        ["joined", "one"],
        ["joined", "two"],
    ]
    lines = ctl("events", "--json").out.splitlines()
    assert [json.loads(line)["event"]["text"] for line in lines] == ["one", "two"]


def test_pull_prints_the_folder(ctl: Ctl, fake: FakeDaemon) -> None:
    def pull(connection: Connection, call: Call) -> Any:
        connection.send(Item(call.id, {"stage": "fetching", "done_bytes": 5, "total_bytes": 10}))
        return {"folder": "/models/tiny"}

    fake.handlers["model.pull"] = pull
    said = ctl("model", "pull", "someone/tiny")
    assert said.out == "/models/tiny\n"
    assert "fetching 5 B of 10 B" in said.err


@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_completion_prints_a_script(ctl: Ctl, shell: str) -> None:
    assert "_DAEMONCTL_COMPLETE" in ctl("completion", shell).out


def test_asking_for_status_imports_neither_rich_nor_an_event_loop(fake: FakeDaemon) -> None:
    program = (
        "import sys, corolla.sdk.cli as cli\n"
        "try: cli.main(['status', '--json'])\n"
        "except SystemExit as ended: code = ended.code\n"
        "heavy = {'rich', 'asyncio', 'anyio', 'trio', 'numpy', 'torch', 'cryptography'} & set(sys.modules)\n"
        "print(sorted(heavy)); sys.exit(code)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_metrics_are_a_text_for_prometheus_and_a_map_for_programs(ctl: Ctl, fake: FakeDaemon) -> None:
    said = ctl("metrics")
    assert said.out == '# TYPE x gauge\nx{a="b c"} 2.5\ny_total 1.0\n'
    values = json.loads(ctl("metrics", "--json").out)["metrics"]
    assert values == {'x{a="b c"}': 2.5, "y_total": 1.0}


def test_setting_a_value_says_when_it_counts(ctl: Ctl, fake: FakeDaemon) -> None:
    fake.handlers["config.set"] = lambda c, call: Applied(workers=("threads",))
    assert "workers move their sessions" in ctl("config", "set", "threads", "3").err
    fake.handlers["config.set"] = lambda c, call: Applied(daemon=("listen",))
    assert "started again" in ctl("config", "set", "listen", "[]").err
    fake.handlers["config.set"] = lambda c, call: Applied(now=("hours",), overridden=True)
    assert "wins" in ctl("config", "set", "hours", "1:00-2:00").err
    answer = json.loads(ctl("config", "set", "hours", "1:00-2:00", "--json").out)
    assert answer["applied"]["now"] == ["hours"]


def test_status_says_in_one_screen_how_it_is_and_whom_it_serves(ctl: Ctl, fake: FakeDaemon) -> None:
    worker = WorkerStatus(
        0, "online", "tiny", 0, 4, DType.FLOAT32, sessions=3, tokens_per_s=20.0, now_tokens_per_s=45.0
    )
    view = replace(fake.status(), workers=(worker,), num_users_served=2, reach="private: through 2 relays")
    fake.handlers["status"] = lambda c, call: view
    said = ctl("status").out
    for words in (
        "health        well",
        "reach         private: through 2 relays",
        "yes, to 2 other users now",
        "3 sessions, 45 tokens/s now, 20 for one alone",
    ):
        assert words in said
    fake.handlers["status"] = lambda c, call: replace(view, health=("no room on the disk", "a wrong clock"))
    said = ctl("status").out
    assert "health        no room on the disk\n                a wrong clock\n" in said


def test_status_says_what_a_worker_is_doing_until_it_serves(ctl: Ctl, fake: FakeDaemon) -> None:
    loading = WorkerStatus(0, "loading", "tiny", 0, 4, progress=0.25, stage="installing torch")
    fake.handlers["status"] = lambda c, call: replace(
        fake.status(), workers=(loading,), lending="outside hours", line=LineView(2e6, 0.0, 1e6, 5, 6)
    )
    said = ctl("status").out
    assert "loading (installing torch) 25%" in said
    assert "outside hours" in said
    assert "leave" in said

"""What the owner wants: sources in their order, and one clear line for whatever is wrong."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any

import click.testing
import pytest

from corolla.daemon import __main__ as program
from corolla.daemon.config import KEYS, Config, check_setting, check_value, load_config
from corolla.protocol.errors import Code, CorollaError, Exit


def write(folder: Path, text: str) -> Path:
    path = folder / "config.toml"
    path.write_text(text)
    return path


def refused(*sources: Any) -> CorollaError:
    with pytest.raises(CorollaError) as caught:
        load_config(*sources)
    assert caught.value.code is Code.BAD_CONFIG
    return caught.value


def test_later_sources_win(tmp_path: Path) -> None:
    path = write(tmp_path, 'model = "file"\ndtype = "float32"\nthreads = 1\nlog_level = "error"\n')
    settings = {"dtype": "float16", "threads": 2, "log_level": "warning"}
    environment = {"COROLLA_THREADS": "3", "COROLLA_LOG_LEVEL": "info", "HOME": "/nowhere"}
    config = load_config(path, environment, {"log_level": "debug"}, settings)
    assert (config.model, config.dtype, config.threads, config.log_level) == ("file", "float16", 3, "debug")


def test_lists_come_from_a_file_one_word_and_commas(tmp_path: Path) -> None:
    path = write(tmp_path, 'listen = ["/ip4/1.2.3.4/tcp/1", "/ip6/::/tcp/2"]\noperators = "ada"\n')
    config = load_config(path, {"COROLLA_DEVICE": "cpu,cuda:0"}, {"announce": ("/dns4/x/tcp/1",)})
    assert config.listen == ("/ip4/1.2.3.4/tcp/1", "/ip6/::/tcp/2")
    assert config.operators == ("ada",)
    assert config.device == ("cpu", "cuda:0")
    assert config.announce == ("/dns4/x/tcp/1",)
    assert check_value("models", "") == ()


def test_an_unknown_key_is_named_with_its_file_and_the_closest_known_one(tmp_path: Path) -> None:
    path = write(tmp_path, 'modle = "x"\n')
    problem = refused(path, {}, {})
    assert "'modle'" in problem.message
    assert str(path) in problem.message
    assert problem.remedy == "did you mean model?"


def test_a_key_like_no_other_gets_the_list(tmp_path: Path) -> None:
    assert "cache_tokens" in refused(write(tmp_path, "zzzzzz = 1\n"), {}, {}).remedy


@pytest.mark.parametrize(
    ("line", "named"),
    [
        ("threads = true", "threads is True"),
        ("threads = 1.5", "threads is 1.5"),
        ("threads = -1", "threads is -1"),
        ('threads = "2"', "threads is '2'"),
        ("model = 1", "model is 1"),
        ("listen = [1]", "listen is [1]"),
        ("device = []", "device is []"),
        ('dtype = "float8"', "dtype is 'float8'"),
        ('blocks = "5:2"', "blocks is '5:2'"),
        ('blocks = "all"', "blocks is 'all'"),
        ('log_level = "loud"', "log_level is 'loud'"),
        ('log_format = "xml"', "log_format is 'xml'"),
        ('quantization = "int9"', "quantization is 'int9'"),
        ("replacement_wait_s = nan", "replacement_wait_s is nan"),
        ("session_grace_s = inf", "session_grace_s is inf"),
        ('hours = "22-7"', "hours is '22-7'"),
        ('hours = "08:00-08:00"', "hours is '08:00-08:00'"),
        ("idle_minutes = -1", "idle_minutes is -1.0"),
        ("disk_bytes = -1", "disk_bytes is -1"),
        ("upload_bytes_per_s = 1.5", "upload_bytes_per_s is 1.5"),
        ("models = [1]", "models is [1]"),
    ],
)
def test_a_wrong_value_is_named_with_its_key(tmp_path: Path, line: str, named: str) -> None:
    problem = refused(write(tmp_path, line), {}, {})
    assert problem.message.startswith(f"{named}, expected ")


def test_a_wrong_variable_is_named() -> None:
    assert "COROLLA_THREADS is 'many'" in refused(None, {"COROLLA_THREADS": "many"}, {}).message


def test_a_file_that_is_no_toml_says_where(tmp_path: Path) -> None:
    problem = refused(write(tmp_path, "model = \n"), {}, {})
    assert "config.toml" in problem.message
    assert "line 1" in problem.message


def test_a_file_that_is_not_there_is_unreadable(tmp_path: Path) -> None:
    with pytest.raises(CorollaError) as caught:
        load_config(tmp_path / "none.toml", {}, {})
    assert caught.value.code is Code.UNREADABLE
    assert "none.toml" in caught.value.message


@pytest.mark.parametrize(("blocks", "span"), [("auto", None), ("none", (0, 0)), ("3:15", (3, 15))])
def test_blocks_are_a_span(blocks: str, span: tuple[int, int] | None) -> None:
    assert Config(blocks=blocks).span() == span


def test_the_state_folder_is_no_setting_kept_in_itself() -> None:
    with pytest.raises(CorollaError) as caught:
        check_setting("state_dir", "/elsewhere")
    assert "--state-dir" in caught.value.remedy
    assert check_setting("threads", 2) == 2


# the program


def invoke(*arguments: str, **environment: str) -> click.testing.Result:
    return click.testing.CliRunner().invoke(program.main, arguments, env=environment)


def test_each_flag_is_a_key_and_each_key_but_the_fine_ones_a_flag() -> None:
    flags = {parameter.name for parameter in program.main.params} - {
        "config",
        "check_config",
        "version",
        "help",
    }
    assert flags <= set(KEYS)
    fine = {
        "operators",
        "session_grace_s",
        "yield_gpu",
        "models",
        "disk_bytes",
        "low_priority",
        "metrics_port",
    }
    assert set(KEYS) - flags == fine


def test_help_names_the_sources_and_every_flag() -> None:
    shown = invoke("--help").output
    assert "COROLLA_NAME" in shown
    for flag in ("--blocks", "--join", "--state-dir", "--log-format", "--quantization"):
        assert flag in shown


def test_a_wrong_configuration_ends_the_program_with_one_line_and_its_code(tmp_path: Path) -> None:
    ended = invoke("--config", str(write(tmp_path, 'modle = "x"\n')), "--state-dir", str(tmp_path / "state"))
    assert ended.exit_code == Exit.USAGE
    (line,) = ended.output.splitlines()
    assert line.startswith("corollad: unknown key 'modle'")
    assert "did you mean model?" in line
    assert not (tmp_path / "state").exists()


def test_the_places_can_be_set_in_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[Path, Path, Path]] = []

    async def live(config: Config, store: Any, socket: Path, cache_folder: Path, sources: Any) -> None:
        seen.append((store.folder, socket, cache_folder))

    monkeypatch.setattr(program, "_live", live)
    monkeypatch.setattr("corolla.daemon.log.set_up_logging", lambda level, form: None)
    path = write(
        tmp_path, f'state_dir = "{tmp_path}/state"\nsocket = "{tmp_path}/s"\ncache_dir = "{tmp_path}/c"\n'
    )
    assert invoke(COROLLA_CONFIG=str(path), COROLLA_SOCKET=f"{tmp_path}/other").exit_code == Exit.OK
    assert seen == [(tmp_path / "state", tmp_path / "other", tmp_path / "c")]


def test_the_packaged_configuration_tells_each_default_as_it_is() -> None:
    text = (Path(__file__).parents[2] / "packaging" / "service" / "config.toml").read_text()
    lines = [line.removeprefix("#") for line in text.splitlines() if re.match(r"#\w+ = ", line)]
    told = tomllib.loads("\n".join(lines))
    for key, value in told.items():
        assert check_setting(key, value) == getattr(Config(), key), key
    limits = {
        "upload_bytes_per_s",
        "hours",
        "idle_minutes",
        "yield_gpu",
        "models",
        "disk_bytes",
        "low_priority",
    }
    assert limits | {"threads", "memory_bytes"} <= set(told)

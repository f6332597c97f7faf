"""`adapter=` in both clients and in `daemonctl`: parts go to a daemon that lacks them, once, and to no other."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest

import corolla
from corolla.protocol.control import Call, Generate, Generated, OpenModelSession, SessionOpened
from corolla.protocol.errors import Code, CorollaError, Exit, error
from corolla.protocol.messages import from_plain
from corolla.protocol.passes import PutAdapterPart
from corolla.protocol.training import NO_PART
from corolla.sdk.cli import main
from corolla.sdk.parts import CONFIG_FILE, WEIGHTS_FILE, Weights, part_file, read_adapter

from .fake import Connection, FakeDaemon


class Keeper(FakeDaemon):
    """A daemon that refuses what uses parts it was not given. keeps: whether it keeps them at all."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.parts: dict[bytes, bytes] = {}
        self.keeps = True
        self.handlers["adapter.put"] = self.put
        self.handlers["generate"] = self.check_and_generate
        self.handlers["session.open"] = self.check_and_open

    def put(self, connection: Connection, call: Call) -> None:
        asked = from_plain(PutAdapterPart, call.arguments)
        assert asked.adapter == "mine"
        if self.keeps:
            self.parts[asked.part] = call.payload

    def check(self, names: tuple[bytes, ...], soft: bytes) -> None:
        missing = [name.hex() for name in (*names, soft) if name != NO_PART and name not in self.parts]
        if missing:
            raise error(Code.ADAPTER_MISSING, "put them here", missing=missing)

    def check_and_generate(self, connection: Connection, call: Call) -> Generated:
        asked = from_plain(Generate, call.arguments)
        self.check(asked.parts, asked.soft)
        return self.generate(connection, call)

    def check_and_open(self, connection: Connection, call: Call) -> SessionOpened:
        asked = from_plain(OpenModelSession, call.arguments)
        self.check(asked.parts, asked.soft)
        return self.open_session(connection, call)

    def asked(self) -> list[str]:
        return [call.method for call in self.calls]


@pytest.fixture
def keeper(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Keeper]:
    monkeypatch.setenv("COROLLA_SOCKET", str(tmp_path / "control.sock"))
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    with Keeper(tmp_path / "control.sock") as daemon:
        yield daemon


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """LoRA on blocks 1 and 2."""
    tensors = {}
    for block in (1, 2):
        layer = f"base_model.model.model.layers.{block}.self_attn.q_proj"
        tensors[f"{layer}.lora_A.weight"] = Weights((1, 3), struct.pack("<3f", 1.0, 2.0, block))
        tensors[f"{layer}.lora_B.weight"] = Weights((2, 1), struct.pack("<2f", 3.0, 4.0))
    path = tmp_path / "mine"
    path.mkdir()
    (path / WEIGHTS_FILE).write_bytes(part_file(tensors, {}).data)
    (path / CONFIG_FILE).write_text(json.dumps({"peft_type": "LORA", "r": 1, "lora_alpha": 2}))
    return path


def test_a_text_with_an_adapter_puts_what_the_daemon_lacks_once(keeper: Keeper, folder: Path) -> None:
    files = read_adapter(folder).files
    assert [bool(file.name) for file in files] == [False, True, True]
    with corolla.connect() as daemon:
        model = daemon.model("tiny")
        assert model.generate("one", max_new_tokens=2, adapter=folder).text == " 0 1"
        assert keeper.parts == {file.name: file.data for file in files if file.name}
        assert keeper.asked() == ["generate", "adapter.put", "adapter.put", "generate"]
        with model.session(max_length=8, adapter=folder):
            assert keeper.opened[0].parts == tuple(file.name for file in files)
    assert keeper.asked()[4:] == ["session.open", "session.close"]


@pytest.mark.anyio
@pytest.mark.parametrize("anyio_backend", ["asyncio"])
@pytest.mark.parametrize(("kind", "num_parts"), [("PROMPT_TUNING", 1), ("DEEP_PROMPT", 3)])
async def test_prompts_are_brought_like_lora(
    keeper: Keeper, tmp_path: Path, kind: str, num_parts: int
) -> None:
    path = tmp_path / "mine"
    path.mkdir()
    tensors = {"prompt_embeddings": Weights((1, 2), struct.pack("<2f", 1.0, 2.0))}
    if num_parts > 1:
        tensors["block_prompts"] = Weights((2, 1, 2), struct.pack("<4f", 3.0, 4.0, 5.0, 6.0))
    (path / WEIGHTS_FILE).write_bytes(part_file(tensors, {}).data)
    (path / CONFIG_FILE).write_text(json.dumps({"peft_type": kind, "num_virtual_tokens": 1}))
    adapter = read_adapter(path)
    with corolla.connect() as daemon:
        assert daemon.model("tiny").generate("one", max_new_tokens=2, adapter=path).text == " 0 1"
    assert len(keeper.parts) == num_parts
    assert keeper.parts[adapter.soft.name] == adapter.soft.data
    keeper.parts.clear()
    async with await corolla.aconnect() as other, await other.model("tiny").session(adapter=path):
        assert len(keeper.parts) == num_parts
        assert keeper.opened[-1].soft == adapter.soft.name
    (path / WEIGHTS_FILE).write_bytes(part_file({"other": tensors["prompt_embeddings"]}, {}).data)
    with pytest.raises(CorollaError, match="expected prompt_embeddings") as caught:
        read_adapter(path)
    assert caught.value.code is Code.BAD_SHAPE


@pytest.mark.anyio
@pytest.mark.parametrize("anyio_backend", ["asyncio", "trio"])
async def test_the_asynchronous_client_does_so_too(keeper: Keeper, folder: Path) -> None:
    async with await corolla.aconnect() as daemon:
        model = daemon.model("tiny")
        async with await model.session(max_length=8, adapter=folder):
            assert keeper.asked() == ["session.open", "adapter.put", "adapter.put", "session.open"]
        keeper.parts.clear()
        answer = await model.generate("one", max_new_tokens=2, adapter=str(folder))
        assert answer.text == " 0 1"
        async with model.stream("one", max_new_tokens=2, adapter=read_adapter(folder)) as pieces:
            assert [piece.text async for piece in pieces] == [" 0", " 1"]


def test_a_daemon_that_keeps_no_parts_is_asked_twice_and_no_more(keeper: Keeper, folder: Path) -> None:
    keeper.keeps = False
    with corolla.connect() as daemon:
        model = daemon.model("tiny")
        with pytest.raises(CorollaError, match="put them here"):
            model.generate("one", adapter=folder)
        with pytest.raises(CorollaError, match="put them here"):
            model.session(adapter=folder)
    assert keeper.asked().count("generate") == 2
    assert keeper.asked().count("session.open") == 2


@pytest.mark.parametrize(("words", "code"), [(["--adapter", "mine"], Exit.OK), (["--adapter", "none"], 2)])
def test_daemonctl_generate_takes_a_folder(
    keeper: Keeper, folder: Path, monkeypatch: pytest.MonkeyPatch, words: list[str], code: int
) -> None:
    monkeypatch.chdir(folder.parent)
    with pytest.raises(SystemExit) as ended:
        main(["generate", "one", "-n", "2", *words])
    assert ended.value.code == code
    assert bool(keeper.parts) == (code == Exit.OK)

"""A worker program without a model, for tests of whoever supervises workers. Its habit is its model's name."""

from __future__ import annotations

import os
import socket
import sys
import threading
import time
from pathlib import Path

from corolla.protocol.errors import Code, error
from corolla.protocol.framing import FrameParser
from corolla.protocol.limits import MAX_LOCAL_PAYLOAD_BYTES
from corolla.protocol.messages import Message, encode
from corolla.protocol.tensors import DType
from corolla.protocol.work import (
    TO_WORKER,
    Beat,
    CloseCache,
    Compute,
    Configure,
    Done,
    Failed,
    Loading,
    ModelFacts,
    OpenCache,
    Ready,
    Restored,
)

FACTS = ModelFacts("fake", "f" * 64, "Fake", 4, 8, 256, 1024, {})


def main() -> None:
    connection = socket.socket(fileno=int(sys.argv[-1]))
    parser = FrameParser(max_payload_bytes=MAX_LOCAL_PAYLOAD_BYTES)
    waiting: list[Compute] = []
    habit = ""
    while data := heard(connection):
        parser.feed(data)
        for frame in parser.frames():
            message = TO_WORKER.decode(frame)
            if isinstance(message, Configure):
                habit = message.source.location
                begin(connection, habit, message.device)
            else:
                answer(connection, message, habit, waiting)
    if habit in ("stays", "is stuck"):
        time.sleep(60)


def heard(connection: socket.socket) -> bytes:
    """What the daemon says next; nothing once it is gone, also where it left beats unread."""
    try:
        return connection.recv(1 << 20)
    except ConnectionResetError:
        return b""


def begin(connection: socket.socket, habit: str, device: str) -> None:
    has_gpu = Path(habit).is_absolute() and not Path(habit).exists()
    if habit.startswith("gone") or (device.startswith("cuda") and not has_gpu):
        say(connection, Failed.of(0, error(Code.DEVICE_LOST, "torch sees 0 GPUs here")))
        sys.exit(1)
    if habit == "unknown":
        say(connection, Failed.of(0, error(Code.UNKNOWN_MODEL, "no model is called so", "call it otherwise")))
        sys.exit(1)
    if habit == "stumbles":
        print("first I say this,", file=sys.stderr)
        print("then I stumble", file=sys.stderr)
        sys.exit(3)
    if habit == "installs":
        say(connection, Loading("installing torch", 5, 20))
        return
    say(connection, Loading("loading", 1, 2))
    say(connection, Ready(FACTS, 0, 4, DType.FLOAT32, None, "cuda:0" if has_gpu else "cpu", 100, 1000))
    if habit != "silent":
        threading.Thread(target=beat, args=(connection, habit), daemon=True).start()


def beat(connection: socket.socket, habit: str) -> None:
    progress = 0
    while True:
        progress += habit not in ("stuck", "is stuck")
        say(connection, Beat(progress, 0, 900))
        time.sleep(0.02)


def answer(connection: socket.socket, message: Message, habit: str, waiting: list[Compute]) -> None:
    if isinstance(message, OpenCache):
        say(connection, Done(message.request))
    elif isinstance(message, CloseCache):
        for compute in reversed(waiting):  # in another order than asked
            say(connection, Done(compute.request, compute.payload[::-1]))
        waiting.clear()
    elif isinstance(message, Compute):
        if habit == "dies":
            os._exit(9)
        if Path(habit).is_absolute():
            Path(habit).touch()  # the device is gone, and stays so until this is
            say(connection, Failed.of(0, error(Code.DEVICE_LOST, "the device is lost")))
            sys.exit(1)
        if habit == "babbles":
            connection.sendall(b"\x00\x00\x00\x04\x00\x00\x00\x00oops")
        if habit == "boasts":
            connection.sendall(b"\xff" * 8)
        if habit == "confused":
            say(connection, Restored(message.request, (1,)))
        elif message.step_id == 13:
            say(connection, Failed.of(message.request, error(Code.NOT_FINITE, "an unlucky step")))
        else:
            waiting.append(message)


def say(connection: socket.socket, message: Message) -> None:
    with SAYING:
        connection.sendall(encode(message))


SAYING = threading.Lock()

if __name__ == "__main__":
    main()

"""The worker program: `python -m corolla.model --fd N`, started by the daemon.

Its life is the inherited socket's: it loads what the first message says, serves, and exits when the socket
closes, whatever it is doing then. That is also how it dies with the daemon, in every way the daemon can
die. (The kernel's parent-death signal would not do: it watches the thread that forked, and the daemon
forks from short-lived threads.)

Three threads. The main one owns the device. The reader turns bytes into requests, and ends the process at
the end of the stream. The beater tells each second how far the main one has come.
"""

from __future__ import annotations

import argparse
import gc
import logging
import os
import queue
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Final, NoReturn

from ..protocol.errors import CorollaError
from ..protocol.framing import FrameParser
from ..protocol.limits import MAX_LOCAL_HEADER_BYTES, MAX_LOCAL_PAYLOAD_BYTES
from ..protocol.messages import Message, encode
from ..protocol.work import TO_WORKER, Configure, Failed, Loading, Ready

if TYPE_CHECKING:
    from .engine import Engine
    from .profile import Watch

logger = logging.getLogger("corolla.worker")

BEAT_S: Final = 1.0
_IDLE_ROUND_S: Final = 0.5  # an idle worker's progress grows too, faster than it is told
_LOADING_EVERY_S: Final = 0.1  # progress of loading is for people to look at
_READ_BYTES: Final = 1 << 20

_COMPILED: Final = Path(__file__).parent / "compiled"

# Set before torch is imported; whoever started us with other values is obeyed. GOMP_SPINCOUNT: how many turns
# an idle thread of torch's libgomp makes before it sleeps, on a core that other workers may need.
# Between two products Python takes a few tenths of a millisecond; a thread that sleeps by then is woken too late.
# A whole worker of 16 blocks of 1024 × 2816 in float32 on two quiet cores, tokens/s of one client and of eight, and
# through two and four daemons of the same machine, whose workers take turns:
#     3000     18.2    98    16.2 / 13.8
#     10000                  18.3 / 16.0
#     30000    20.7   117    16.7 / 15.8   (one and eight clients: mean of three runs)
#     60000    21.5   113
#     100000   22.0    79                  (likewise, of two)
#     300000   23.9    85
# Above 60000 the clients' own process waits for the core that an idle thread turns on. With more busy programs than
# cores fewer turns are better: bare products took 23 ms a token with none, 27 with 3000, 41 with 20000; and training
# through two daemons on two cores, forward and backward, went at 112 tokens/s with 3000, 92 with 10000, 73 with 30000.
# THP_MEM_ALLOC_ENABLE: torch asks the kernel for pages of 2 MB. A pass reads all weights once, and so, with pages of
# 4 KB, looks up the place of each anew. ms of a processor's time without and with them, in float32, 16 blocks of
# 1024 × 2816: 80 and 57 for one row at 128 tokens, 88 and 70 at 1024, 121 and 105 at 4096; 114 and 92 for 8 rows at
# 128; the head 11 and 6. The cache does without: see `cache`.
# TORCHINDUCTOR_COMPILE_THREADS: a few small pieces are compiled for a GPU; torch would start a process for each core.
_ENVIRONMENT: Final = {
    "GOMP_SPINCOUNT": "30000",
    "THP_MEM_ALLOC_ENABLE": "1",
    "TORCHINDUCTOR_COMPILE_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "TRANSFORMERS_VERBOSITY": "error",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
}


def main() -> None:
    """Load what the daemon says, and serve until its socket closes."""
    arguments = argparse.ArgumentParser(prog="python -m corolla.model", description="A worker of corollad.")
    arguments.add_argument("--fd", type=int, required=True, help="inherited socket to the daemon")
    connection = Connection(socket.socket(fileno=arguments.parse_args().fd))
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the daemon decides
    logging.basicConfig(stream=sys.stderr, level=logging.INFO, format="worker: %(levelname)s: %(message)s")
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    inbox: Inbox = queue.SimpleQueue()
    threading.Thread(target=read, args=(connection, inbox), name="reader", daemon=True).start()

    configure = inbox.get()
    if not isinstance(configure, Configure):
        leave(1, f"the first message was {configure.KIND!r}, expected {Configure.KIND!r}")
    engine = load(configure, connection)
    threading.Thread(target=beat, args=(connection, engine, inbox), name="beater", daemon=True).start()
    while True:
        for message in waiting(inbox, for_s=_IDLE_ROUND_S if engine.is_idle else engine.blocked_s):
            engine.handle(message)
        while grace_s := engine.grace_s:
            for message in waiting(inbox, for_s=grace_s):
                engine.handle(message)
        engine.run()
        if engine.lost is not None:
            connection.send(Failed.of(0, engine.lost))
            leave(1, str(engine.lost))


Inbox = queue.SimpleQueue[Message]


def load(configure: Configure, connection: Connection) -> Engine:
    """The engine, with its parts loaded and reported as `Ready`; or `Failed`, and the process ends."""
    connection.report("loading", 0, 0)  # a first sign of life: the imports take seconds
    gc.disable()  # they leave no garbage, and looking for it takes a sixth of their time
    compiled = Path(configure.cache_folder) / "compiled"
    if not os.access(_COMPILED, os.W_OK):  # numba keeps what it has compiled beside the source, where it can
        os.environ.setdefault("NUMBA_CACHE_DIR", str(compiled))
    # What is compiled for a GPU goes to the home folder or a temporary one, unless told: a service has neither to keep.
    os.environ.setdefault("TRITON_CACHE_DIR", str(compiled / "triton"))
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(compiled / "inductor"))
    import torch  # here, because it reads the environment

    from .batch import Policy
    from .engine import Engine
    from .failures import explain
    from .generation import Generations
    from .loading import load as load_parts
    from .profile import Watch

    gc.freeze()  # and so it would later on, amid a text
    gc.enable()
    if configure.threads:
        torch.set_num_threads(configure.threads)
    try:
        loaded = load_parts(configure, connection.report)
    except Exception as problem:
        explained = explain(problem)
        if explained is not problem:
            logger.error("a defect while loading", exc_info=problem)
        connection.send(Failed.of(0, explained))
        leave(1, f"loading failed: {explained}")
    generations = Generations(loaded.ends, loaded.end_tokens) if loaded.ends is not None else None
    ready = loaded.ready()
    policy = Policy.of(loaded.speed.decode_tokens_per_s, loaded.speed.prefill_tokens_per_s)
    engine = Engine(
        loaded.span,
        generations,
        loaded.capacity,
        connection.send,
        policy,
        loaded.room,
        on_decode=partial(report_drift, Watch(ready.decode_tokens_per_s), ready, connection),
    )
    connection.send(ready)
    return engine


def report_drift(watch: Watch, ready: Ready, connection: Connection, took_s: float, context: int) -> None:
    """Say `Ready` again once the device computes much faster or slower than was told."""
    now = watch.note(took_s, context)
    if now is not None:
        connection.send(replace(ready, decode_tokens_per_s=now))


def waiting(inbox: Inbox, *, for_s: float) -> Iterator[Message]:
    """What has arrived; if nothing has, what arrives within `for_s`."""
    try:
        yield inbox.get(timeout=for_s) if for_s else inbox.get_nowait()
        while True:
            yield inbox.get_nowait()
    except queue.Empty:
        return


def read(connection: Connection, inbox: Inbox) -> None:
    """The reader: requests into the inbox, until the socket closes."""
    parser = FrameParser(max_header_bytes=MAX_LOCAL_HEADER_BYTES, max_payload_bytes=MAX_LOCAL_PAYLOAD_BYTES)
    try:
        while True:
            parser.feed(connection.receive())
            for frame in parser.frames():
                inbox.put(TO_WORKER.decode(frame))
    except CorollaError as problem:
        # A daemon of the same version does not say such a thing, and what came after it would be guesswork.
        leave(1, f"unreadable message from the daemon: {problem}")
    except Exception as problem:
        logger.error("a defect in the reader", exc_info=problem)
        leave(1, "the reader failed")


def beat(connection: Connection, engine: Engine, inbox: Inbox) -> None:
    """The beater: each second, how far the main thread has come."""
    while True:
        connection.send(engine.beat(inbox.qsize()))
        time.sleep(BEAT_S)


class Connection:
    """The inherited socket. Either way of using it ends the process when the far side is gone."""

    def __init__(self, inherited: socket.socket) -> None:
        self._socket = inherited
        self._socket.setblocking(True)
        self._sending = threading.Lock()
        self._last_report = 0.0

    def receive(self) -> bytes:
        """What has arrived; at least a byte."""
        try:
            data = self._socket.recv(_READ_BYTES)
        except OSError:
            data = b""
        if not data:
            leave(0)
        return data

    def send(self, message: Message) -> None:
        """Send one message, from any thread."""
        frame = encode(message)
        with self._sending:
            try:
                self._socket.sendall(frame)
            except OSError:
                leave(0)

    def report(self, stage: str, done: int, total: int) -> None:
        """Send progress of loading, not too often; the end of a stage always."""
        now = time.monotonic()
        if done >= total or now - self._last_report >= _LOADING_EVERY_S:
            self._last_report = now
            self.send(Loading(stage, done, total))


def leave(status: int, reason: str = "") -> NoReturn:
    """End the process now, from any thread, whatever the others are doing."""
    if reason:
        logger.error(reason)
    os._exit(status)


if __name__ == "__main__":
    main()

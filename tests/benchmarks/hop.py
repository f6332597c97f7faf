"""What one more hop costs a step, in ms, and which part of it: the daemon, the socket to the worker, the wire.

Measured on sessions of hidden states over tiny random models whose computing is next to nothing, at hidden
sizes 576 and 8192: a step through two hops against one through one hop, each in a process of its own. The worker's
part is an echo of as many bytes over a socketpair to another process; the wire's part an echo over a stream
of two daemons' networks. The rest is the daemons'.
"""

from __future__ import annotations

import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import anyio

sys.path.insert(0, str(Path(__file__).parents[2]))

from tests.benchmarks.report import Measured, Report, arguments, median
from tests.benchmarks.stacks import ECHO, Far, dial_ours, far_side
from tests.benchmarks.wire import echo_ms
from tests.processes import local_swarm

_ECHO = """
import socket, sys
s = socket.socket(fileno=int(sys.argv[1])); n = int(sys.argv[2])
while True:
    got = bytearray()
    while len(got) < n:
        part = s.recv(n - len(got))
        if not part: sys.exit()
        got += part
    s.sendall(got)
"""

_MAKE = """
import sys, torch
from transformers import LlamaConfig, LlamaForCausalLM
torch.manual_seed(0)
hidden = int(sys.argv[2])
LlamaForCausalLM(LlamaConfig(num_hidden_layers=2, hidden_size=hidden, intermediate_size=32, num_attention_heads=1,
    num_key_value_heads=1, head_dim=32, vocab_size=64, max_position_embeddings=4096, dtype="float32")
).save_pretrained(sys.argv[1])
"""


def timed(action: Callable[[], object], repeats: int) -> float:
    """Median ms of an action."""
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        action()
        times.append((time.perf_counter() - began) * 1000)
    return median(times)


def socketpair_ms(num_bytes: int, repeats: int) -> float:
    """There and back to another process over a socketpair."""
    ours, theirs = socket.socketpair()
    with theirs:
        echo = subprocess.Popen(
            [sys.executable, "-c", _ECHO, str(theirs.fileno()), str(num_bytes)], pass_fds=(theirs.fileno(),)
        )
    data = bytes(num_bytes)

    def there_and_back() -> None:
        ours.sendall(data)
        left = num_bytes
        while left:
            left -= len(ours.recv(left))

    there_and_back()
    try:
        return timed(there_and_back, repeats)
    finally:
        ours.close()
        echo.wait()


def step_ms(folder: Path, spans: list[tuple[int, int]], hidden_size: int, repeats: int) -> float:
    """A step of one token through these hops, as a user's program sees it."""
    import numpy as np

    with local_swarm(folder, "--dtype", "float32", "--threads", "1") as swarm:
        client = swarm.found()
        for start, end in spans:
            swarm.serve(f"hop{start}", start, end).wait_online()
        swarm.wait_covered(client, [int(block < spans[-1][1]) for block in range(2)])
        with client.connect() as daemon:
            name = daemon.models()[0].name
            with daemon.model(name).session(max_length=repeats + 40, blocks=(0, spans[-1][1])) as session:
                hidden = np.zeros((1, 1, hidden_size), np.float32) + 0.1
                for _ in range(20):
                    session.step(hidden)
                return timed(lambda: session.step(hidden), repeats)


def wire_ms(num_bytes: int, repeats: int) -> float:
    """There and back between two networks of ours, in two processes."""

    async def measured(far: Far) -> list[float]:
        async with dial_ours(far.port, far.peer) as dial:
            pipe = await dial(ECHO)
            await echo_ms(pipe, num_bytes, 20)
            return await echo_ms(pipe, num_bytes, repeats)

    with far_side("ours") as far:
        return median(anyio.run(measured, far, backend="trio"))


def main() -> None:
    options = arguments(__doc__).parse_args()
    repeats = 100 if options.quick else 400
    report = Report()
    for hidden_size in (576, 8192):
        num_bytes = hidden_size * 4
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch) / "model"
            subprocess.run([sys.executable, "-c", _MAKE, str(folder), str(hidden_size)], check=True)
            one = step_ms(folder, [(0, 1)], hidden_size, repeats)
            two = step_ms(folder, [(0, 1), (1, 2)], hidden_size, repeats)
        hop = two - one
        pair = socketpair_ms(num_bytes, repeats)
        one_way = wire_ms(num_bytes, repeats) / 2
        report.add(Measured(f"step of one hop, hidden {hidden_size}", one, "ms"))
        report.add(Measured(f"one more hop, hidden {hidden_size}", hop, "ms", one))
        report.add(Measured(f"  of it: socket to the worker, hidden {hidden_size}", pair, "ms", hop))
        report.add(Measured(f"  of it: the wire, one way, hidden {hidden_size}", one_way, "ms", hop))
        report.add(
            Measured(f"  of it: daemon and worker, hidden {hidden_size}", hop - pair - one_way, "ms", hop)
        )
    report.finish(options.json)


if __name__ == "__main__":
    main()

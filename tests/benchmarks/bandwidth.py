"""The speed at which this machine's processors together read memory: no decode passes it.

Every token reads all weights, and the keys and values of its own context, once. Run as a program (`bandwidth.py 2`)
it prints bytes a second, so that it shares no process with what is held against it.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time

READ_BYTES = 1 << 30  # many times what any cache holds
REPEATS = 10


def measure(threads: int) -> float:
    """Bytes a second, the best of several readings with so many threads, out of huge pages where there are any."""
    command = [sys.executable, __file__, str(threads)]
    environment = {**os.environ, "THP_MEM_ALLOC_ENABLE": "1"}
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
    return float(done.stdout)


def _measure(threads: int) -> float:
    import torch

    torch.set_num_threads(threads)
    numbers = torch.ones(READ_BYTES // 8, dtype=torch.int64)
    fastest = float("inf")
    for _ in range(REPEATS):
        began = time.perf_counter()
        numbers.max()
        fastest = min(fastest, time.perf_counter() - began)
    return READ_BYTES / fastest


if __name__ == "__main__":
    print(_measure(int(sys.argv[1])))

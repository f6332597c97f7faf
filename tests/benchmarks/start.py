"""How soon things start and how much they hold: `import corolla`, `daemonctl status`, a daemon without a worker.

Beside each stands the same Python doing nothing, since its own start is part of every figure.
"""

from __future__ import annotations

import re
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from tests.benchmarks.report import Measured, Report, arguments, median
from tests.processes import local_swarm


def seconds(command: list[str], repeats: int) -> float:
    """Median wall time of a command."""
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        times.append(time.perf_counter() - began)
    return median(times)


def import_s(program: str, repeats: int) -> float:
    """Seconds that a program's imports of ours take, as Python's own -X importtime tells."""
    times = []
    for _ in range(repeats):
        done = subprocess.run(
            [sys.executable, "-X", "importtime", "-c", program],
            check=True,
            capture_output=True,
            text=True,
        )
        whole = re.findall(r"\|\s+(\d+) \| corolla\S*$", done.stderr, re.MULTILINE)
        times.append(sum(map(int, whole)) / 1e6)
    return median(times)


def resident_mb(pid: int) -> float:
    """Resident memory of a process, MiB."""
    status = Path(f"/proc/{pid}/status").read_text()
    found = re.search(r"VmRSS:\s+(\d+) kB", status)
    return int(found[1]) / 1024 if found else 0.0


def main() -> None:
    options = arguments(__doc__).parse_args()
    repeats = 5 if options.quick else 15
    report = Report()
    python_s = seconds([sys.executable, "-c", "pass"], repeats)
    bare = "import corolla"
    report.add(Measured(bare, import_s(bare, repeats), "s", target=0.06, at_most=True))
    report.add(
        Measured("and its first use, corolla.connect", import_s(f"{bare}; corolla.connect", repeats), "s")
    )
    times, resident, status_s = [], 0.0, 0.0
    for _ in range(max(3, repeats // 3)):
        with local_swarm(None) as swarm:
            began = time.perf_counter()
            idle = swarm.add("idle", "--blocks", "none")
            idle.wait_ready()
            times.append(time.perf_counter() - began)
            resident = resident_mb(idle.pid)
            command = [str(Path(sys.executable).parent / "daemonctl"), "status", "--socket", str(idle.socket)]
            status_s = seconds(command, repeats)
    report.add(Measured("daemonctl status", status_s, "s", target=0.4, at_most=True))
    report.add(Measured("python -c pass", python_s, "s"))
    report.add(Measured("daemon without a worker: ready", median(times), "s", target=2.0, at_most=True))
    report.add(Measured("daemon without a worker: resident", resident, "MiB", target=120, at_most=True))
    report.finish(options.json)


if __name__ == "__main__":
    main()

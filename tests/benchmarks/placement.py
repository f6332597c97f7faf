"""Placement in a simulated swarm of 10 to 10,000 machines: the published rule beside ours.

Under churn: throughput as a share of the linear-programming bound, and moves. Under churn with an outage that takes
all replicas of a block away at once: how soon the gap is closed, and by how many moves. In both, sessions lost and
the real time of one decision. `tests/simulation` has the simulator; it runs the daemon's own placement and routing.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from tests.benchmarks.report import Measured, Report, arguments
from tests.simulation.swarm_run import Run, simulate
from tests.simulation.swarm_world import Settings

SWARMS = (  # machines, blocks, seconds watched
    (10, 16, 7200.0),
    (100, 32, 3600.0),
    (1000, 48, 1800.0),
    (10_000, 80, 300.0),
)
QUICK = ((10, 16, 3600.0), (100, 32, 1800.0), (1000, 48, 600.0))
WIDTH, HEIGHT, MARGIN = 640, 160, 40


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--plot", type=Path, metavar="PATH", help="also draw throughput over time, as SVG")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--machines", type=int, help="only the swarm of so many")
    options = parser.parse_args()
    report = Report()
    plots: list[tuple[str, Run, Run]] = []
    for num_machines, num_blocks, duration_s in QUICK if options.quick else SWARMS:
        if options.machines not in (None, num_machines):
            continue
        plots += _compare(report, num_machines, num_blocks, duration_s, options.seed)
    if options.plot is not None:
        options.plot.write_text(_svg(plots))
    report.finish(options.json)


def _compare(
    report: Report, num_machines: int, num_blocks: int, duration_s: float, seed: int
) -> list[tuple[str, Run, Run]]:
    """One size of swarm: both policies under churn, then both with an outage."""
    began = time.perf_counter()
    quiet = Settings(num_machines, num_blocks, seed=seed, duration_s=duration_s, outage=False)
    hit = Settings(num_machines, num_blocks, seed=seed, duration_s=min(600.0, duration_s))
    pairs = [
        (f"{num_machines} machines, {name}", simulate(settings, "published"), simulate(settings, "ours"))
        for name, settings in (("churn", quiet), ("outage", hit))
    ]
    for name, published, ours in pairs:
        _tell(report, name, published, ours)
    seconds = time.perf_counter() - began
    print(
        f"  ({seconds:.0f} s for {2 * (duration_s + hit.duration_s) / 60:.0f} minutes of {num_machines} machines)"
    )
    return pairs


def _tell(report: Report, name: str, published: Run, ours: Run) -> None:
    has_outage = ours.settings.outage
    target = None if has_outage else 0.97
    report.add(
        Measured(
            f"{name}: share of the bound, beside published",
            ours.figures.share,
            "",
            published.figures.share,
        )
    )
    if not has_outage:
        report.add(Measured(f"{name}: share of the bound", ours.figures.share, "", target=target))
    moves = (ours.figures.moves_per_machine_hour, published.figures.moves_per_machine_hour)
    report.add(Measured(f"{name}: moves/machine/h, beside published", moves[0], "", moves[1] or None))
    report.add(
        Measured(f"{name}: moves fewer than published", moves[0] - moves[1], "", target=0.0, at_most=True)
    )
    for who, run in (("published", published), ("ours", ours)):
        figures, load = run.figures, run.outcome
        if has_outage:
            worst, known = max(figures.gaps_s, default=0.0), max(figures.gaps_known_s, default=0.0)
            target = 60.0 if who == "ours" else None
            report.add(Measured(f"{name}, {who}: gap open for", worst, "s", target=target, at_most=True))
            report.add(Measured(f"{name}, {who}: since records told of it", known, "s"))
        blocks = 100 / figures.seconds / run.settings.num_blocks
        report.add(
            Measured(f"{name}, {who}: blocks unserved", figures.unserved_block_s * blocks, "% of time")
        )
        report.add(Measured(f"{name}, {who}: served by one", figures.single_block_s * blocks, "% of time"))
        report.add(Measured(f"{name}, {who}: sessions lost of {load.num_opened}", load.num_lost, ""))
        report.add(Measured(f"{name}, {who}: moved ahead of time", load.num_moved, ""))
    report.add(Measured(f"{name}: slowest decision", ours.slowest_s, "s", target=1.0, at_most=True))


def _svg(plots: list[tuple[str, Run, Run]]) -> str:
    """Throughput over time as a share of the mean bound, one chart a swarm."""
    parts = []
    for row, (name, published, ours) in enumerate(plots):
        top = row * (HEIGHT + MARGIN) + MARGIN
        parts.append(f'<text x="{MARGIN}" y="{top - 8}">{name}: grey published, green ours</text>')
        parts.append(
            f'<rect x="{MARGIN}" y="{top}" width="{WIDTH}" height="{HEIGHT}" fill="none" stroke="#ccc"/>'
        )
        for run, colour in ((published, "#999"), (ours, "#2a7")):
            points = " ".join(f"{x:.1f},{top + y:.1f}" for x, y in _points(run))
            parts.append(f'<polyline points="{points}" fill="none" stroke="{colour}"/>')
    size = f'width="{WIDTH + 2 * MARGIN}" height="{len(plots) * (HEIGHT + MARGIN) + MARGIN}"'
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="sans-serif" font-size="13">\n'
        + "\n".join(parts)
        + "\n</svg>\n"
    )


def _points(run: Run) -> list[tuple[float, float]]:
    bound = run.figures.bound_tokens_per_s
    mean = sum(bound) / len(bound)
    begin, length = run.settings.warm_up_s, run.settings.duration_s
    every = max(1, len(run.speeds) // 2000)
    return [
        (MARGIN + WIDTH * (at - begin) / length, HEIGHT * (1 - min(1.0, speed / mean)))
        for at, speed in run.speeds[::every]
        if at >= begin
    ]


if __name__ == "__main__":
    main()

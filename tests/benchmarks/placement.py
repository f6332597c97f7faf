"""Placement in a simulated swarm of 10 to 10,000 machines: the published rule beside ours.

Under churn: throughput as a share of the linear-programming bound, by two measures: what is carried if routes share the
work out, and the slowest block if all routes take whole spans (the published one); for a few machines also the best
placement of whole machines that a search finds. Besides, moves. Under churn with an outage that takes
all replicas of a block away at once: how soon the gap is closed, and by how many moves. In both, sessions lost. Figures
are means over seeds, with the least and the most. Besides, the real time of one decision. `tests/simulation` has the
simulator; it runs the daemon's own placement and routing.
"""

from __future__ import annotations

import random
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from corolla.daemon.swarm.placement import choose_span, plan_moves
from corolla.daemon.swarm.view import Span, SwarmView
from corolla.protocol.records import SpanState
from corolla.protocol.tensors import DType
from tests.benchmarks.report import Measured, Report, arguments
from tests.simulation.swarm_run import Run, simulate
from tests.simulation.swarm_world import Settings


@dataclass(frozen=True)
class Swarm:
    """What is simulated: its size, how long it is watched after all have joined, and how often anew.

    outage_s: how long it is watched if an outage comes half way.
    """

    num_machines: int
    num_blocks: int
    watched_s: float
    outage_s: float
    num_seeds: int
    warm_up_s: float = 600.0


SWARMS = (  # all four in about ten minutes of one core
    Swarm(10, 16, 7200.0, 600.0, 6),
    Swarm(100, 32, 1200.0, 400.0, 1, warm_up_s=300.0),
    Swarm(1000, 48, 300.0, 240.0, 1, warm_up_s=180.0),
    Swarm(10_000, 80, 60.0, 180.0, 1, warm_up_s=120.0),
)
QUICK = (Swarm(10, 16, 3600.0, 600.0, 3), *SWARMS[1:3])
FIRST_SEED = 6  # thresholds of placement were chosen on those before
WIDTH, HEIGHT, MARGIN = 640, 160, 40

Pairs = Sequence[tuple[Run, Run]]  # published, ours: one pair a seed


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--plot", type=Path, metavar="PATH", help="also draw throughput over time, as SVG")
    parser.add_argument("--seed", type=int, default=FIRST_SEED, help="the first one")
    parser.add_argument("--seeds", type=int, help="how many")
    parser.add_argument(
        "--machines", type=int, help="only the swarm of so many; 0: only the time of a decision"
    )
    options = parser.parse_args()
    report = Report()
    plots: list[tuple[str, Run, Run]] = []
    if options.machines in (None, 0):
        _decide(report)
    for swarm in QUICK if options.quick else SWARMS:
        if options.machines in (None, swarm.num_machines):
            seeds = range(options.seed, options.seed + (options.seeds or swarm.num_seeds))
            plots += _compare(report, swarm, seeds)
    if options.plot is not None:
        options.plot.write_text(_svg(plots))
    report.finish(options.json)


def _compare(report: Report, swarm: Swarm, seeds: range) -> list[tuple[str, Run, Run]]:
    """Both policies under churn, then both with an outage. The plots are those of the first."""
    plots = []
    for name, has_outage in (("churn", False), ("outage", True)):
        pairs = []
        began = time.process_time()
        for seed in seeds:
            settings = Settings(
                swarm.num_machines,
                swarm.num_blocks,
                seed=seed,
                warm_up_s=swarm.warm_up_s,
                duration_s=swarm.outage_s if has_outage else swarm.watched_s,
                outage=has_outage,
            )
            published = simulate(settings, "published")
            pairs.append((published, simulate(settings, "ours", asks_reachable=not has_outage)))
        title = f"{swarm.num_machines} machines, {name}"
        (_tell_outage if has_outage else _tell_churn)(report, title, pairs)
        _tell_sessions(report, title, pairs)
        simulated = sum(2 * (run.settings.warm_up_s + run.settings.duration_s) for run, _ in pairs)
        faster = simulated / (time.process_time() - began)
        report.add(Measured(f"{title}: simulated seconds in one of a core", faster, ""))
        plots.append((title, *pairs[0]))
    return plots


def _tell_churn(report: Report, name: str, pairs: Pairs) -> None:
    ours, published = _by_policy(pairs, lambda run: run.figures.share)
    report.add(Measured(f"{name}: share of the bound, published", _mean(published), ""))
    said = f"{name}: share of the bound ({min(ours):.3f} to {max(ours):.3f})"
    report.add(Measured(said, _mean(ours), "", target=0.97))
    whole, before = _by_policy(pairs, lambda run: run.figures.whole_share)
    report.add(
        Measured(f"{name}: the same by whole spans, beside published", _mean(whole), "", _mean(before))
    )
    samples = [sample for _, run in pairs for sample in run.reachable]
    if samples:
        best = _mean(samples)
        report.add(Measured(f"{name}: the best placement found with two replicas", best, ""))
        report.add(Measured(f"{name}: ours of that", _mean(ours) / best, "", target=0.97))
    moves, before = _by_policy(pairs, lambda run: run.figures.moves_per_machine_hour)
    report.add(Measured(f"{name}: moves/machine/h, published", _mean(before), ""))
    report.add(Measured(f"{name}: moves/machine/h ({min(moves):.2f} to {max(moves):.2f})", _mean(moves), ""))
    more = _mean(moves) - _mean(before)
    report.add(Measured(f"{name}: moves more than published", more, "", target=0.0, at_most=True))


def _tell_outage(report: Report, name: str, pairs: Pairs) -> None:
    for who, side, target in (("published", 0, None), ("ours", 1, 60.0)):
        runs = [pair[side].figures for pair in pairs]
        worst = max((gap for figures in runs for gap in figures.gaps_s), default=0.0)
        known = max((gap for figures in runs for gap in figures.gaps_known_s), default=0.0)
        report.add(Measured(f"{name}, {who}: longest gap", worst, "s", target=target, at_most=True))
        report.add(Measured(f"{name}, {who}: since records told of it", known, "s"))


def _tell_sessions(report: Report, name: str, pairs: Pairs) -> None:
    for who, side in (("published", 0), ("ours", 1)):
        runs = [pair[side] for pair in pairs]
        times = [100 / run.figures.seconds / run.settings.num_blocks for run in runs]
        unserved = [time * run.figures.unserved_block_s for time, run in zip(times, runs, strict=True)]
        single = [time * run.figures.single_block_s for time, run in zip(times, runs, strict=True)]
        report.add(Measured(f"{name}, {who}: blocks unserved", _mean(unserved), "% of time"))
        report.add(Measured(f"{name}, {who}: served by one", _mean(single), "% of time"))
        opened, lost = (
            sum(n) for n in zip(*((r.outcome.num_opened, r.outcome.num_lost) for r in runs), strict=True)
        )
        report.add(Measured(f"{name}, {who}: sessions lost of {opened}", lost, ""))
        moved = sum(run.outcome.num_moved for run in runs)
        report.add(Measured(f"{name}, {who}: moved ahead of time", moved, ""))


def _by_policy(pairs: Pairs, figure: Callable[[Run], float]) -> tuple[list[float], list[float]]:
    """A figure of ours and of the published rule, seed by seed."""
    return [figure(ours) for _, ours in pairs], [figure(published) for published, _ in pairs]


def _mean(values: Sequence[float]) -> float:
    return statistics.fmean(values)


def _decide(report: Report) -> None:
    """The real time of one decision among 10,000: in a swarm at rest, and in one that has lost a stretch."""
    num_blocks = 80
    for name, spared in (("at rest", range(0)), ("with a gap", range(40, 44))):
        rng = random.Random(name)
        spans: list[Span] = []
        while len(spans) < 10_000:
            length = rng.randint(10, 40)
            start = rng.randint(0, num_blocks - length)
            if all(not start <= block < start + length for block in spared):
                speed = rng.lognormvariate(5.5, 0.9) / length
                place = (f"m{len(spans)}", 0, start, start + length, SpanState.ONLINE, DType.FLOAT32)
                spans.append(Span(*place, tokens_per_s=speed, movable=True))
        view = SwarmView("f", num_blocks, tuple(spans))
        for what, decide in (
            ("where to begin", lambda view=view: choose_span(view, 25, 10.0)),
            ("who moves", lambda view=view: plan_moves(view)),
        ):
            times = []
            for _ in range(5):
                began = time.perf_counter()
                decide()
                times.append(time.perf_counter() - began)
            report.add(Measured(f"10000 machines {name}: {what}", min(times), "s", target=1.0, at_most=True))


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

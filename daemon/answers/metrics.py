"""The daemon in numbers, as Prometheus reads them. It asks the node, and keeps nothing.

Source: https://prometheus.io/docs/practices/naming/ and the text format of prometheus_client.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Final

from prometheus_client import CollectorRegistry, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from ...protocol.views import Status, WorkerStatus
from ..schedule import Lends
from ..serving.workers import WorkerState

if TYPE_CHECKING:
    from ..node import Node

CONTENT_TYPE: Final = "text/plain; version=0.0.4; charset=utf-8"


class Metrics:
    """Of one node."""

    def __init__(self, node: Node) -> None:
        self._registry = CollectorRegistry()
        self._registry.register(_NodeCollector(node))
        ProcessCollector(registry=self._registry)  # memory, processor time, open files of this process

    def text(self) -> bytes:
        """All of them, as they are now."""
        return generate_latest(self._registry)


class _NodeCollector(Collector):
    def __init__(self, node: Node) -> None:
        self._node = node

    def describe(self) -> Iterator[Metric]:
        """Nothing beforehand: the node may not have started yet."""
        return iter(())

    def collect(self) -> Iterator[Metric]:
        """Everything, of one moment."""
        status = self._node.status()
        yield from _daemon(status)
        yield from _line(self._node, status)
        yield from _hops(self._node)
        yield from _done(self._node, status)
        yield from _workers(status.workers)


def _daemon(status: Status) -> Iterator[Metric]:
    info = GaugeMetricFamily("corolla_build_info", "Always 1.", labels=["version"])
    info.add_metric([status.version], 1)
    yield info
    yield GaugeMetricFamily("corolla_uptime_seconds", "Since the daemon started.", status.uptime_s)
    yield GaugeMetricFamily("corolla_in_swarm", "1 in a swarm, else 0.", status.swarm is not None)
    yield GaugeMetricFamily("corolla_peers", "Members that are connected.", status.num_peers)
    yield GaugeMetricFamily("corolla_user_sessions", "Of this machine's users.", status.num_sessions)
    lending = GaugeMetricFamily(
        "corolla_lending", "1 for what is so, or why nothing is lent.", labels=["state"]
    )
    for state in Lends:
        lending.add_metric([state.value], status.lending == state)
    yield lending


def _line(node: Node, status: Status) -> Iterator[Metric]:
    traffic, line = node.traffic, status.line
    yield _count("corolla_sent_bytes", "To other machines.", traffic.sent_bytes)
    yield _count("corolla_received_bytes", "From other machines.", traffic.received_bytes)
    yield _count(
        "corolla_relayed_bytes", "Carried for others; those sent include them.", traffic.relayed_bytes
    )
    if line is not None:
        for name, text, value in (
            ("uplink", "Measured; 0 while unknown.", line.up_bytes_per_s),
            ("downlink", "The most that was seen.", line.down_bytes_per_s),
            ("upload_limit", "What may leave; 0 is no limit.", line.limit_bytes_per_s),
        ):
            yield GaugeMetricFamily(f"corolla_{name}_bytes_per_second", text, value)
    yield GaugeMetricFamily(
        "corolla_weights_disk_bytes", "Of weights in the cache folder.", node.weights.size_bytes
    )


def _hops(node: Node) -> Iterator[Metric]:
    """What is held for others now."""
    if node.belonging is None:
        return
    held = node.belonging.hops.statistics()
    yield GaugeMetricFamily("corolla_steps_under_way", "Of sessions on our workers.", held.num_steps)
    yield GaugeMetricFamily(
        "corolla_history_bytes", "Kept so that lost hops can be replayed.", held.history_bytes
    )
    connections = GaugeMetricFamily("corolla_connections", "With peers.", labels=["relayed"])
    peers = node.belonging.network.peers()
    for relayed in (False, True):
        connections.add_metric([str(relayed).lower()], sum(peer.relayed is relayed for peer in peers))
    yield connections


def _done(node: Node, status: Status) -> Iterator[Metric]:
    """What was done since the start, and in all runs."""
    tally, events = node.tally, node.events.counts
    yield _count("corolla_steps", "Computed for other members.", tally.steps)
    yield _count("corolla_tokens", "Computed for other members.", tally.tokens)
    yield _count("corolla_block_tokens", "The same, times blocks.", tally.block_tokens)
    yield _count("corolla_training_tokens", "Of others, back through our blocks.", tally.training_tokens)
    yield _count("corolla_generated_tokens", "Of texts for this machine's users.", tally.generated_tokens)
    yield _count("corolla_repairs", "Of sessions of this machine's users.", tally.session_events["repaired"])
    yield _count("corolla_charges", "Of peers, for what they did wrong.", events["charged"])
    by_kind = CounterMetricFamily("corolla_events", "As `daemonctl events` tells them.", labels=["kind"])
    for kind, count in sorted(events.items()):
        by_kind.add_metric([kind], count)
    yield by_kind
    if (sums := status.contribution) is not None:
        yield _count("corolla_contribution_block_tokens", "For others, in all runs.", sums.block_tokens)
        yield _count("corolla_contribution_training_tokens", "For others, in all runs.", sums.training_tokens)
        yield _count("corolla_contribution_relayed_bytes", "For others, in all runs.", sums.relayed_bytes)
        yield _count("corolla_contribution_lending_seconds", "In all runs.", sums.lending_s)


def _workers(workers: tuple[WorkerStatus, ...]) -> Iterator[Metric]:
    labels = ["worker", "model", "device"]
    up = GaugeMetricFamily("corolla_worker_state", "1 for the state it is in.", labels=[*labels, "state"])
    for worker in workers:
        for state in WorkerState:
            up.add_metric([*_labels(worker), state.value], worker.state == state)
    yield up
    for name, text, field in (
        ("sessions", "Open on it.", "sessions"),
        ("queue", "Requests under way.", "queue"),
        ("blocks_start", "First block of its span.", "start"),
        ("blocks_end", "Block after its span.", "end"),
        ("cache_tokens", "Slots of its cache.", "cache_tokens"),
        ("cache_free_tokens", "Slots that nobody uses.", "free_tokens"),
        ("weight_bytes", "On its device.", "weight_bytes"),
        ("decode_tokens_per_second", "As it measured itself, one row.", "tokens_per_s"),
    ):
        gauge = GaugeMetricFamily(f"corolla_worker_{name}", text, labels=labels)
        for worker in workers:
            gauge.add_metric(_labels(worker), getattr(worker, field))
        yield gauge
    restarts = CounterMetricFamily("corolla_worker_restarts", "Of its process.", labels=labels)
    for worker in workers:
        restarts.add_metric(_labels(worker), worker.restarts)
    yield restarts


def _labels(worker: WorkerStatus) -> list[str]:
    return [str(worker.worker), worker.model, worker.device]


def _count(name: str, text: str, value: float) -> CounterMetricFamily:
    return CounterMetricFamily(name, text, value)

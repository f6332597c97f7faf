"""What trains through this daemon: counts for people who look at `status`. Pure, its clock an argument.

A job is one model that a program of this machine trains. It is told of each micro-batch that went back, and of the
peers that computed; what is older than a minute counts no more.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import Final

from ...protocol.views import TrainingView

WINDOW_S: Final = 60.0  # rates are taken over so long, and a job that did nothing meanwhile is over


@dataclass(slots=True)
class _Job:
    began: float
    num_tokens: int = 0
    batches: deque[float] = field(default_factory=deque)  # when each of the window went back
    peers: dict[str, float] = field(default_factory=dict)  # when each last computed


class Jobs:
    """By model."""

    def __init__(self) -> None:
        self._jobs: dict[str, _Job] = {}

    def note_peer(self, model: str, peer: str, now_s: float) -> None:
        """A peer computed some blocks of a micro-batch."""
        self._job(model, now_s).peers[peer] = now_s

    def note_batch(self, model: str, num_tokens: int, now_s: float) -> None:
        """A micro-batch went back."""
        job = self._job(model, now_s)
        job.num_tokens += num_tokens
        job.batches.append(now_s)

    def views(self, now_s: float) -> tuple[TrainingView, ...]:
        """Those that went back within the last minute."""
        self._forget(now_s)
        return tuple(
            TrainingView(
                model=model,
                micro_batches_per_s=len(job.batches) / max(1.0, min(WINDOW_S, now_s - job.began)),
                num_tokens=job.num_tokens,
                peers=tuple(sorted(job.peers)),
            )
            for model, job in self._jobs.items()
            if job.batches
        )

    def _job(self, model: str, now_s: float) -> _Job:
        self._forget(now_s)
        return self._jobs.setdefault(model, _Job(now_s))

    def _forget(self, now_s: float) -> None:
        for model, job in tuple(self._jobs.items()):
            while job.batches and job.batches[0] <= now_s - WINDOW_S:
                job.batches.popleft()
            job.peers = {peer: at for peer, at in job.peers.items() if at > now_s - WINDOW_S}
            if not job.batches and not job.peers:
                del self._jobs[model]

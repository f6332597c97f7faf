"""In a few words: what is wrong with this daemon, and how others reach it. Pure; what is so, others tell it."""

from __future__ import annotations

from collections.abc import Iterable

from ..protocol.views import ReachView, WorkerStatus


def wrong_with(workers: Iterable[WorkerStatus], problems: Iterable[str]) -> tuple[str, ...]:
    """Each thing that is wrong, once: of workers, then the rest. Nothing if all is well."""
    found = []
    for worker in workers:
        error = worker.error if isinstance(worker.error, dict) else None
        if worker.state == "failed":
            found.append(f"worker {worker.worker} failed: {_words(error)}")
        elif error is not None:
            found.append(f"worker {worker.worker} is started again: {_words(error)}")
    return tuple(dict.fromkeys([*found, *problems]))


def _words(error: dict[str, object] | None) -> str:
    if error is None:
        return "it says not why"
    remedy = f" ({error['remedy']})" if error.get("remedy") else ""
    return f"{error.get('message')}{remedy}"


def reach_words(reach: ReachView) -> str:
    """How others come to us."""
    relays = f"{len(reach.relays)} relay{'' if len(reach.relays) == 1 else 's'}"
    match reach.reachability:
        case "public":
            how = "others can dial it" + (", as they have proved" if reach.proven else "")
        case "private":
            how = f"through {relays}" if reach.relays else "through no relay yet"
        case _:
            how = "not known yet" + (f", meanwhile through {relays}" if reach.relays else "")
    told = " by its configuration" if reach.configured else ""
    return f"{reach.reachability}{told}: {how}"

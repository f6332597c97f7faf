"""Commands that only look: status, swarm, events."""

from __future__ import annotations

import time

import click

from ...protocol.control import privacy_words
from ...protocol.errors import Exit
from ...protocol.views import ModelView, SpanView, Status, TrainingView, WorkerStatus
from ..client import Daemon, connect
from ..output import Output, duration, num_bytes, state
from ..picture import Bar, gaps, picture, replica_runs, short_peer
from .options import asking


@click.command()
@asking
def status(daemon: Daemon, output: Output) -> int:
    """This machine's daemon in one screen. Exits with 7 if a worker has failed for good."""
    view = daemon.status()
    if output.as_json:
        output.envelope(status=view)
    else:
        _show_status(view, output)
    return Exit.DEGRADED if any(worker.state == "failed" for worker in view.workers) else Exit.OK


def _show_status(view: Status, output: Output) -> None:
    where = f"in swarm {view.swarm}" if view.swarm else "in no swarm"
    output.heading(f"corollad {view.version}: {state(view.state)}, {where}")
    output.facts(
        [
            ("peer", view.peer),
            ("socket", view.socket),
            ("state folder", view.state_folder),
            ("health", "well" if not view.health else view.health[0]),
            *(("", problem) for problem in view.health[1:]),
            ("addresses", ", ".join(view.addresses) or "none"),
            ("reach", view.reach or "in no swarm"),
            ("peers", str(view.num_peers)),
            ("sessions", str(view.num_sessions)),
            ("lending", f"{view.lending}, to {_users(view.num_users_served)} now"),
            ("for others", _contribution(view)),
            ("line", _line(view)),
            ("running", f"{duration(view.uptime_s)}, {num_bytes(view.resident_bytes)}, pid {view.pid}"),
        ]
    )
    for worker in view.workers:
        output.line(f"worker {worker.worker}: {_worker(worker)}")
    for job in view.training:
        output.line(f"training {_training(job)}")
    if view.join_command:
        output.line("to let another machine join, paste there:")
        output.line(f"  {view.join_command}")
    elif view.owner:
        output.say("to let another machine join: daemonctl invite")
    elif view.invited:
        output.say("to let another machine join, ask the swarm's owner: daemonctl invite")
    if view.hint:
        output.say(f"hint: {view.hint}")


def _users(count: int) -> str:
    return f"{count or 'no'} other user{'' if count == 1 else 's'}"


def _contribution(view: Status) -> str:
    done = view.contribution
    if done is None:
        return "nothing yet"
    parts = [f"{done.block_tokens:,} block-tokens in {duration(done.lending_s)}"]
    if done.training_tokens:
        parts.append(f"{done.training_tokens:,} training tokens")
    if done.relayed_bytes:
        parts.append(f"{num_bytes(done.relayed_bytes)} relayed")
    return ", ".join(parts)


def _training(job: TrainingView) -> str:
    peers = f"{len(job.peers)} peers" if len(job.peers) != 1 else "1 peer"
    return f"{job.model}: {job.micro_batches_per_s:.1f} micro-batches/s, {job.num_tokens:,} tokens so far, {peers}"


def _line(view: Status) -> str:
    line = view.line
    if line is None:
        return "unknown"
    up = f"{num_bytes(int(line.up_bytes_per_s))}/s up" if line.up_bytes_per_s else "not measured yet"
    down = f", at least {num_bytes(int(line.down_bytes_per_s))}/s down" if line.down_bytes_per_s else ""
    limit = f"; at most {num_bytes(int(line.limit_bytes_per_s))}/s leave" if line.limit_bytes_per_s else ""
    return f"{up}{down}{limit}; {num_bytes(line.sent_bytes)} sent, {num_bytes(line.received_bytes)} received"


def _worker(worker: WorkerStatus) -> str:
    what = f"blocks {worker.start}:{worker.end}" if worker.end > worker.start else "no blocks"
    parts = [
        f"{worker.model} {what}" + (" and the ends" if worker.ends else ""),
        state(worker.state) + (_loading(worker) if worker.state == "loading" else ""),
        " ".join(filter(None, [worker.dtype, worker.quantization, worker.device])),
    ]
    if worker.state == "online":
        parts.append(f"{worker.sessions} sessions")
        if worker.tokens_per_s:
            parts.append(
                f"{worker.now_tokens_per_s:.0f} tokens/s now, {worker.tokens_per_s:.0f} for one alone"
            )
        if worker.cache_tokens:
            parts.append(f"room for {worker.free_tokens} of {worker.cache_tokens} tokens")
        parts.append(num_bytes(worker.weight_bytes) + " of weights")
    if worker.restarts:
        parts.append(f"restarted {worker.restarts} times")
    if isinstance(worker.error, dict):
        remedy = worker.error.get("remedy")
        parts.append(f"{worker.error.get('message')}" + (f" ({remedy})" if remedy else ""))
    return ", ".join(filter(None, parts))


def _loading(worker: WorkerStatus) -> str:
    """What a worker that does not serve yet is doing, and how far it is."""
    stage = "" if worker.stage in ("", "loading") else f" ({worker.stage})"
    return f"{stage} {worker.progress:.0%}"


@click.group(invoke_without_command=True)
@click.pass_context
@click.option(
    "--socket", metavar="PATH", envvar="COROLLA_SOCKET", help="The daemon's socket, if not the usual."
)
@click.option("--json", "as_json", is_flag=True, help="Answer as JSON, for programs.")
def swarm(context: click.Context, socket: str | None, as_json: bool) -> None:
    """Who serves which blocks of which model."""
    if context.invoked_subcommand is not None:
        return
    output = Output(as_json)
    with connect(socket) as daemon:
        view = daemon.swarm()
    if as_json:
        output.envelope(swarm=view)
        return
    if view.swarm_id is None:
        output.say("not in a swarm: daemonctl join TOKEN, or daemonctl swarm create NAME")
        return
    output.heading(f"swarm {view.name} ({view.swarm_id[:16]})")
    if not view.models:
        output.say("no model is served yet: corollad --model MODEL")
    for model in view.models:
        _show_model(output, model, view.spans)


def _show_model(output: Output, model: ModelView, spans: tuple[SpanView, ...]) -> None:
    output.line()
    output.heading(f"{model.name}  {model.num_blocks} blocks, fingerprint {model.fingerprint[:12]}")
    bars = [
        Bar(
            ("this daemon" if span.mine else short_peer(span.peer))
            + (f"/{span.worker}" if span.worker else ""),
            span.start,
            span.end,
            span.state,
            f"{span.quantization or span.dtype} {span.tokens_per_s:.0f} tokens/s",
        )
        for span in spans
        if span.fingerprint == model.fingerprint
    ]
    served = [(bar.start, bar.end) for bar in bars if bar.state == "online"]
    for line, kind in picture(model.num_blocks, bars, gaps(model.num_blocks, served)):
        colour = {"online": "green", "loading": "yellow", "nobody": "red"}.get(kind)
        output.line("  " + click.style(line, fg=colour, dim=not kind))
    if model.replicas:
        speeds = [0.0] * model.num_blocks
        for bar, span in zip(bars, [s for s in spans if s.fingerprint == model.fingerprint], strict=True):
            for block in range(bar.start, min(bar.end, model.num_blocks) if bar.state == "online" else 0):
                speeds[block] += span.tokens_per_s
        runs = ", ".join(f"{start}:{end} ×{count}" for start, end, count in replica_runs(model.replicas))
        output.line(f"  replicas {runs}; slowest block {min(speeds):.0f} tokens/s")


@swarm.command()
@click.argument("name")
@click.option("--invited", is_flag=True, help="Others enter it by `daemonctl invite`'s tokens alone.")
@asking
def create(daemon: Daemon, output: Output, name: str, invited: bool) -> None:
    """Found a swarm called NAME and enter it."""
    joined = daemon.create_swarm(name, invited=invited)
    if output.as_json:
        output.envelope(swarm=joined)
        return
    output.say(joined.notice or privacy_words(invited))
    if invited:
        output.say(f"founded swarm {joined.name}; daemonctl invite makes a token for each machine")
        return
    output.say(f"founded swarm {joined.name}; on other machines paste:")
    output.line(f"daemonctl join {joined.token}")


@click.command()
@click.option("--follow", "-f", is_flag=True, help="Do not end; print what happens from now on.")
@asking
def events(daemon: Daemon, output: Output, follow: bool) -> None:
    """What happened since the daemon started, oldest first."""
    for event in daemon.events(follow=follow):
        if output.as_json:
            output.envelope(event=event)
        else:
            clock = time.strftime("%H:%M:%S", time.localtime(event.unix_s))
            output.line(f"{clock}  {event.kind:<18}  {event.text}".rstrip())

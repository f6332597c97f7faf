"""Which model a name means, among those that the swarm announces. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable

from ...protocol.errors import Code, error
from ...protocol.records import ManifestRecord
from ...protocol.work import ModelFacts

MAX_LISTED = 12  # models named in an error
MIN_PREFIX = 6  # characters that tell a fingerprint from others, and from a short name


def known_models(manifests: Iterable[ManifestRecord]) -> tuple[ModelFacts, ...]:
    """Each model once, by name. Where peers tell different facts of one fingerprint, most voices win."""
    voices: dict[str, Counter[str]] = {}
    facts: dict[str, ModelFacts] = {}
    for manifest in manifests:
        told = repr(manifest.facts)
        facts[told] = manifest.facts
        voices.setdefault(manifest.facts.fingerprint, Counter())[told] += 1
    chosen = [facts[min(count, key=lambda told: (-count[told], told))] for count in voices.values()]
    return tuple(sorted(chosen, key=lambda model: (model.name.casefold(), model.fingerprint)))


def resolve_model(name: str, manifests: Iterable[ManifestRecord]) -> ModelFacts:
    """The model that a user calls `name`: its name, its hub id, or either with `@` and a fingerprint's start.

    Case does not matter. Raises `UNKNOWN_MODEL` listing what there is, and `AMBIGUOUS_MODEL` listing every
    fingerprint that goes by this name.
    """
    models = known_models(manifests)
    wanted, _, prefix = name.strip().partition("@")
    matches = [
        model
        for model in models
        if _is_called(model, wanted) and model.fingerprint.casefold().startswith(prefix.casefold())
    ]
    if not matches:
        listed = ", ".join(describe(model) for model in models[:MAX_LISTED])
        more = f" and {len(models) - MAX_LISTED} more" if len(models) > MAX_LISTED else ""
        raise error(
            Code.UNKNOWN_MODEL,
            f"nobody serves a model called {name!r}; the swarm serves {listed or 'none yet'}{more}",
            "choose one of these, or serve it yourself: corollad --model " + (wanted or "MODEL"),
            models=[model.name for model in models[:MAX_LISTED]],
        )
    if len(matches) > 1:
        raise error(
            Code.AMBIGUOUS_MODEL,
            f"{name!r} means {len(matches)} different models: "
            + ", ".join(describe(model) for model in matches[:MAX_LISTED]),
            f"choose one, as {wanted}@{_short(matches[0], matches)}",
            fingerprints=[model.fingerprint for model in matches[:MAX_LISTED]],
        )
    return matches[0]


def is_allowed(model: ModelFacts, allowed: Collection[str]) -> bool:
    """Whether one of these means this model: a name, a hub id, or a fingerprint's beginning. None allow any."""
    return not allowed or any(
        _is_called(model, wanted)
        or (len(wanted) >= MIN_PREFIX and model.fingerprint.casefold().startswith(wanted.casefold()))
        for wanted in allowed
    )


def describe(model: ModelFacts) -> str:
    """A model in a few words, with enough of its fingerprint to name it."""
    source = f", {model.hub_id}" if model.hub_id and model.hub_id != model.name else ""
    return f"{model.name}@{model.fingerprint[:8]} ({model.num_blocks} blocks{source})"


def _is_called(model: ModelFacts, wanted: str) -> bool:
    names = {model.name.casefold()}
    if model.hub_id:
        names |= {model.hub_id.casefold(), model.hub_id.rpartition("/")[2].casefold()}
    return wanted.casefold() in names


def _short(model: ModelFacts, others: Iterable[ModelFacts]) -> str:
    """The shortest start of 8 characters or more that tells this fingerprint from the others."""
    rivals = [other.fingerprint for other in others if other.fingerprint != model.fingerprint]
    length = 8
    while any(rival.startswith(model.fingerprint[:length]) for rival in rivals):
        length += 4
    return model.fingerprint[:length]

"""The frozen view of a model in the swarm: replicas, gaps, coverage; and which model a name means."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from corolla.daemon.swarm.models import known_models, resolve_model
from corolla.daemon.swarm.view import DEFAULT_RTT_S, Span, SwarmView
from corolla.protocol.errors import Code, CorollaError
from corolla.protocol.records import ManifestRecord, SpanState
from corolla.protocol.tensors import DType
from corolla.protocol.work import ModelFacts


def span(peer: str, start: int, end: int, state: SpanState = SpanState.ONLINE, **more: Any) -> Span:
    return dataclasses.replace(Span(peer, 0, start, end, state, DType.FLOAT32), **more)


def test_replicas_count_only_spans_that_take_sessions() -> None:
    view = SwarmView(
        "f",
        4,
        (
            span("a", 0, 2),
            span("b", 1, 3),
            span("c", 0, 4, SpanState.LOADING),
            span("d", 0, 4, SpanState.DRAINING),
            span("e", 0, 4, suspect=True),
        ),
    )
    assert view.replicas() == (1, 2, 1, 0)
    assert view.gaps() == ((3, 4),)
    assert view.coverage() == 0.75


def test_gaps_are_maximal_and_clipped() -> None:
    view = SwarmView("f", 10, (span("a", 2, 4), span("b", 6, 7)))
    assert view.gaps() == ((0, 2), (4, 6), (7, 10))
    assert view.gaps(3, 9) == ((4, 6), (7, 9))
    assert view.gaps(2, 4) == ()


def test_an_unmeasured_peer_is_taken_to_be_far_and_ourselves_near() -> None:
    view = SwarmView("f", 2, (span("a", 0, 2), span("b", 0, 2, rtt_s=0.01)))
    assert view.rtt_s("a") == DEFAULT_RTT_S
    assert view.rtt_s("b") == 0.01
    assert view.rtt_s(None) == 0.0
    assert view.rtt_s("unheard of") == DEFAULT_RTT_S


def manifest(name: str, fingerprint: str, hub_id: str | None = None, peer: str = "p") -> ManifestRecord:
    facts = ModelFacts(name, fingerprint, "LlamaForCausalLM", 30, 576, 49152, 8192, {}, hub_id)
    return ManifestRecord(peer, 1, 0.0, 60.0, facts)


SMOL = manifest("SmolLM2-135M-Instruct", "aaaa1111bbbb", "HuggingFaceTB/SmolLM2-135M-Instruct")
QWEN = manifest("qwen", "cccc2222dddd")


@pytest.mark.parametrize(
    "name",
    [
        "SmolLM2-135M-Instruct",
        "smollm2-135m-instruct",
        " SmolLM2-135M-Instruct ",
        "HuggingFaceTB/SmolLM2-135M-Instruct",
        "SmolLM2-135M-Instruct@aaaa",
        "HuggingFaceTB/SmolLM2-135M-Instruct@AAAA1",
    ],
)
def test_a_model_is_found_by_name_hub_id_and_prefix(name: str) -> None:
    assert resolve_model(name, [QWEN, SMOL]) == SMOL.facts


@pytest.mark.parametrize("name", ["Smol", "SmolLM2-135M-Instruct@bbbb", "", "qwen@aaaa"])
def test_an_unknown_model_lists_what_there_is(name: str) -> None:
    with pytest.raises(CorollaError) as caught:
        resolve_model(name, [SMOL, QWEN])
    assert caught.value.code is Code.UNKNOWN_MODEL
    assert "SmolLM2-135M-Instruct@aaaa1111" in caught.value.message
    assert "qwen@cccc2222" in caught.value.message


def test_an_empty_swarm_says_so() -> None:
    with pytest.raises(CorollaError, match="none yet"):
        resolve_model("qwen", [])


def test_a_name_with_two_fingerprints_is_refused_with_both() -> None:
    twin = manifest("qwen", "cccc2222eeee")
    with pytest.raises(CorollaError) as caught:
        resolve_model("qwen", [QWEN, twin])
    assert caught.value.code is Code.AMBIGUOUS_MODEL
    assert caught.value.details["fingerprints"] == ["cccc2222dddd", "cccc2222eeee"]
    assert resolve_model("qwen@cccc2222e", [QWEN, twin]) == twin.facts
    suggested = caught.value.remedy.rpartition(" ")[2]
    assert resolve_model(suggested, [QWEN, twin]) == QWEN.facts


def test_many_announcers_are_one_model_and_most_voices_win() -> None:
    liar = manifest("a lie", QWEN.facts.fingerprint, peer="liar")
    others = [manifest("qwen", QWEN.facts.fingerprint, peer=f"p{i}") for i in range(2)]
    assert known_models([liar, *others]) == (QWEN.facts,)

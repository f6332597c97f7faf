"""What is remembered of a machine's speed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from corolla.daemon.lending.profiles import DEFAULT_LOAD_S, MAX_PROFILES, Profile, Profiles
from corolla.daemon.store import PROFILES_FILE, open_store
from corolla.protocol.tensors import DType
from corolla.protocol.work import Ready

from ..serving.fake_worker import FACTS

READY = Ready(FACTS, 0, 4, DType.FLOAT32, None, "cpu", 100, 1000, 10.0, 200.0)


def silent(kind: str, text: str) -> None:
    raise AssertionError(f"{kind}: {text}")


def test_measurements_are_kept_by_block_over_restarts(tmp_path: Path) -> None:
    with open_store(tmp_path) as store:
        profiles = Profiles(store, "1", silent)
        assert profiles.of(READY) == Profile()
        assert profiles.of(READY).load_time_s(3) == 3 * DEFAULT_LOAD_S
        assert profiles.note(READY, 6.0) == Profile(40.0, 800.0, 1.5)
    with open_store(tmp_path) as store:
        profile = Profiles(store, "1", silent).of(replace(READY, start=1, end=3))
        assert profile.speed_of(2) == 20.0
        assert profile.load_time_s(2) == 3.0


@pytest.mark.parametrize(
    "other",
    [
        replace(READY, device="cuda:0"),
        replace(READY, dtype=DType.BFLOAT16),
        replace(READY, quantization="int8"),
        replace(READY, facts=replace(FACTS, fingerprint="e" * 64)),
    ],
    ids=["device", "dtype", "quantization", "model"],
)
def test_another_device_precision_or_model_is_another_profile(tmp_path: Path, other: Ready) -> None:
    with open_store(tmp_path) as store:
        profiles = Profiles(store, "1", silent)
        profiles.note(READY, 6.0)
        assert profiles.of(other) == Profile()


def test_another_version_measures_anew(tmp_path: Path) -> None:
    with open_store(tmp_path) as store:
        Profiles(store, "1", silent).note(READY, 6.0)
        assert Profiles(store, "2", silent).of(READY) == Profile()


def test_what_was_not_measured_now_stays_as_it_was(tmp_path: Path) -> None:
    with open_store(tmp_path) as store:
        profiles = Profiles(store, "1", silent)
        profiles.note(READY, 6.0)
        assert profiles.note(replace(READY, decode_tokens_per_s=0.0), 0.0) == Profile(40.0, 800.0, 1.5)


def test_a_drift_is_told_and_replaces_what_was_remembered(tmp_path: Path) -> None:
    told: list[str] = []
    with open_store(tmp_path) as store:
        profiles = Profiles(store, "1", lambda kind, text: told.append(f"{kind}: {text}"))
        profiles.note(READY, 6.0)
        profiles.note(replace(READY, decode_tokens_per_s=9.0), 6.0)
        assert told == []
        profiles.note(replace(READY, decode_tokens_per_s=3.0), 6.0)
        assert told == ["profile_drifted: cpu decodes 12 tokens/s a block now, 36 before"]
        assert profiles.of(READY).decode_tokens_per_s == 12.0


def test_speed_under_load_and_the_hosts_pace_are_kept_too(tmp_path: Path) -> None:
    with open_store(tmp_path) as store:
        measured = replace(READY, loaded_tokens_per_s=50.0, launches_per_s=1e5)
        Profiles(store, "1", silent).note(measured, 6.0)
        assert Profiles(store, "1", silent).of(READY) == Profile(40.0, 800.0, 1.5, 200.0, 1e5)


def test_the_oldest_profiles_are_forgotten(tmp_path: Path) -> None:
    with open_store(tmp_path) as store:
        profiles = Profiles(store, "1", silent)
        for number in range(MAX_PROFILES + 1):
            profiles.note(replace(READY, device=f"cuda:{number}"), 6.0)
        assert profiles.of(replace(READY, device="cuda:0")) == Profile()
        assert profiles.of(replace(READY, device="cuda:1")) != Profile()


@pytest.mark.parametrize("content", ["", "[]", '{"a": 3}', '{"cpu": ["x", 1, 2]}', '{"cpu": [1, 2]}'])
def test_a_damaged_file_is_measured_anew(tmp_path: Path, content: str) -> None:
    (tmp_path / PROFILES_FILE).write_text(content)
    with open_store(tmp_path) as store:
        assert Profiles(store, "1", silent).of(READY) == Profile()

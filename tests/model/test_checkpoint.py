"""Just these tensors, from a folder, the hub or a GGUF file; and what is said when they are not there."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gguf as gguf_format
import huggingface_hub
import numpy as np
import pytest
import torch
from huggingface_hub import errors as hub_errors
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PreTrainedModel

from corolla.model import gguf
from corolla.model.attention import Batch
from corolla.model.checkpoint import Checkpoint, fingerprint, hash_files, open_checkpoint
from corolla.model.ends import Ends
from corolla.model.span import Span
from corolla.protocol.errors import Code, CorollaError
from corolla.protocol.work import ModelSource, SourceKind

from .tiny import NUM_BLOCKS, VOCAB_SIZE, save_tiny

CPU = torch.device("cpu")
# The HTTP library under huggingface_hub, which differs between its versions.
http: Any = sys.modules[hub_errors.HfHubHTTPError.__bases__[0].__module__.partition(".")[0]]


def at(folder: Path) -> Checkpoint:
    return open_checkpoint(ModelSource(SourceKind.FOLDER, str(folder)), folder / "cache")


def refused(code: Code, attempt: Any, *arguments: Any) -> CorollaError:
    with pytest.raises(CorollaError) as caught:
        attempt(*arguments)
    assert caught.value.code is code, caught.value
    return caught.value


def largest_error(model: Checkpoint, whole: PreTrainedModel) -> float:
    tokens = torch.arange(3, 17)
    ends = Ends.load(model, torch.float32, CPU)
    span = Span.load(model, 0, NUM_BLOCKS, torch.float32, CPU)
    logits = ends.head(span.forward(ends.embed(tokens), Batch.stateless((14,))))
    with torch.inference_mode():
        return float((logits - whole(tokens[None], use_cache=False).logits[0]).abs().max())


# folders


def test_a_model_in_several_files_equals_the_same_in_one(tmp_path: Path) -> None:
    whole = save_tiny(tmp_path)
    whole.save_pretrained(tmp_path / "sharded", max_shard_size="100KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 2
    assert largest_error(at(tmp_path / "sharded"), whole) < 1e-5


def test_facts_tell_what_everyone_has_to_agree_on(tmp_path: Path) -> None:
    save_tiny(tmp_path / "Tiny")
    (tmp_path / "Tiny" / "README.md").write_text("---\nlicense: apache-2.0\n---\n# Tiny\n")
    facts = at(tmp_path / "Tiny").facts()
    assert (facts.name, facts.architecture, facts.licence) == ("Tiny", "LlamaForCausalLM", "apache-2.0")
    assert (facts.num_blocks, facts.hidden_size, facts.vocab_size) == (NUM_BLOCKS, 64, VOCAB_SIZE)
    assert facts.max_position == 256
    assert list(facts.files) == ["model.safetensors"]
    assert len(facts.fingerprint) == 64


def test_a_folder_that_is_not_there_is_an_unknown_model(tmp_path: Path) -> None:
    assert "nowhere" in refused(Code.UNKNOWN_MODEL, at, tmp_path / "nowhere").message
    (tmp_path / "empty").mkdir()
    assert "config.json" in refused(Code.UNKNOWN_MODEL, at, tmp_path / "empty").message


def test_a_folder_without_safetensors_is_refused(tmp_path: Path) -> None:
    save_tiny(tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    assert "pickled" in refused(Code.UNREADABLE, at, tmp_path).remedy


def test_an_unreadable_folder_says_who_must_read_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_tiny(tmp_path)

    def closed(path: object) -> list[str]:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(os, "listdir", closed)
    problem = refused(Code.UNREADABLE, at, tmp_path)
    assert str(tmp_path) in problem.message
    assert "daemon's user" in problem.remedy


def test_weights_that_may_not_be_read_are_not_called_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_tiny(tmp_path)
    readable = Path.open

    def closed(path: Path, mode: str = "r") -> object:
        if path.suffix == ".safetensors":
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return readable(path, mode)

    monkeypatch.setattr(Path, "open", closed)
    problem = refused(Code.UNREADABLE, at, tmp_path)
    assert str(tmp_path / "model.safetensors") in problem.message
    assert "daemon's user" in problem.remedy


@pytest.mark.parametrize("text", ["{", "[]"])
def test_a_damaged_configuration_is_no_crash(tmp_path: Path, text: str) -> None:
    save_tiny(tmp_path)
    (tmp_path / "config.json").write_text(text)
    refused(Code.DAMAGED_WEIGHTS, at, tmp_path)


def test_a_family_that_transformers_does_not_know_is_refused(tmp_path: Path) -> None:
    save_tiny(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "tomorrow", "auto_map": {"AutoConfig": "x.Y"}}')
    assert "tomorrow" in refused(Code.UNSUPPORTED_FAMILY, at, tmp_path).message


@pytest.mark.parametrize("num_bytes", [4, 2000, -1])
def test_a_truncated_weight_file_is_named(tmp_path: Path, num_bytes: int) -> None:
    save_tiny(tmp_path)
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:num_bytes])
    assert "model.safetensors" in refused(Code.DAMAGED_WEIGHTS, at, tmp_path).message


def test_a_truncated_shard_is_found_when_it_is_needed_and_leaves_the_rest(tmp_path: Path) -> None:
    save_tiny(tmp_path).save_pretrained(tmp_path / "sharded", max_shard_size="100KB")
    model = at(tmp_path / "sharded")
    key = "model.layers.3.mlp.up_proj.weight"
    shard = tmp_path / "sharded" / model.tensors[key]
    shard.write_bytes(shard.read_bytes()[:-100])
    problem = refused(Code.DAMAGED_WEIGHTS, Span.load, model, 3, 4, torch.float32, CPU)
    assert shard.name in problem.message
    assert Span.load(model, 0, 1, torch.float32, CPU).bytes
    shard.unlink()
    assert shard.name in refused(Code.DAMAGED_WEIGHTS, Span.load, model, 3, 4, torch.float32, CPU).message


def test_missing_and_misshapen_tensors_are_named(tmp_path: Path) -> None:
    save_tiny(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    up, down = "model.layers.2.mlp.up_proj.weight", "model.layers.1.mlp.down_proj.weight"
    del tensors[up]
    tensors[down] = tensors[down][:, :-1].contiguous()
    save_file(tensors, file, metadata={"format": "pt"})
    model = at(tmp_path)
    assert up in refused(Code.DAMAGED_WEIGHTS, Span.load, model, 2, 3, torch.float32, CPU).message
    problem = refused(Code.DAMAGED_WEIGHTS, Span.load, model, 0, 2, torch.float32, CPU)
    assert down in problem.message
    assert "(64, 127)" in problem.message
    assert Span.load(model, 3, 4, torch.float32, CPU).bytes


def test_loading_tells_its_progress(tmp_path: Path) -> None:
    save_tiny(tmp_path)
    told: list[tuple[int, int]] = []
    span = Span.load(at(tmp_path), 1, 4, torch.float32, CPU, report=lambda *bytes_: told.append(bytes_))
    assert told == [(span.bytes * i // 3, span.bytes) for i in (1, 2, 3)]


# fingerprints


def test_a_fingerprint_follows_weights_and_configuration_and_nothing_else(tmp_path: Path) -> None:
    config = {"model_type": "llama", "hidden_size": 64, "dtype": "float32", "transformers_version": "5"}
    hashes = {"a.safetensors": "01", "b.safetensors": "02"}
    mine = fingerprint(config, hashes)
    assert mine == fingerprint(dict(reversed(config.items())), {"y": "02", "x": "01"})
    assert mine == fingerprint({**config, "dtype": "bfloat16", "transformers_version": "6"}, hashes)
    assert mine != fingerprint({**config, "hidden_size": 65}, hashes)
    assert mine != fingerprint(config, {**hashes, "b.safetensors": "03"})
    save_tiny(tmp_path / "one")
    save_tiny(tmp_path / "same")
    save_tiny(tmp_path / "other", seed=1)
    one, same, other = (at(tmp_path / name).facts().fingerprint for name in ("one", "same", "other"))
    assert one == same != other


def test_the_fingerprint_of_a_folder_stays_what_it_is() -> None:
    """A golden value: if it changes, no swarm of before agrees with one of after."""
    assert fingerprint({"model_type": "llama", "vocab_size": 5}, {"x": "ab"}) == (
        "526b82af1926db1136706a092b7ddf1f8258f6e05d5a0b34080b626a07c36898"
    )


def test_a_file_is_hashed_again_only_when_it_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "weights"
    file.write_bytes(b"one")
    told: list[tuple[str, int, int]] = []
    (first,) = hash_files([file], tmp_path, lambda *report: told.append(report))
    assert told == [("hashing", 3, 3)]
    told.clear()
    assert hash_files([file], tmp_path, lambda *report: told.append(report)) == [first]
    assert told == []
    file.write_bytes(b"four")
    (second,) = hash_files([file], tmp_path)
    assert second != first
    (tmp_path / "hashes.json").write_text("no json")
    assert hash_files([file], tmp_path) == [second]


# memory

MEASURE = """
import re, sys
from pathlib import Path
import torch
from corolla.model.checkpoint import open_checkpoint
from corolla.model.span import Span
from corolla.protocol.work import ModelSource, SourceKind

def peak_bytes():
    return 1024 * int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])

folder, start, end = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
model = open_checkpoint(ModelSource(SourceKind.FOLDER, str(folder)), folder / "cache")
Span.load(model, start, start + 1, torch.float32, torch.device("cpu"))
before = peak_bytes()
span = Span.load(model, start, end, torch.float32, torch.device("cpu"))
print(peak_bytes() - before, span.bytes)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="peak memory is read from /proc")
def test_loading_a_quarter_of_the_blocks_takes_little_more_than_their_weights(tmp_path: Path) -> None:
    save_tiny(
        tmp_path,
        hidden_size=512,
        intermediate_size=2048,
        num_attention_heads=8,
        num_key_value_heads=8,
        num_hidden_layers=16,
    )
    whole_bytes = (tmp_path / "model.safetensors").stat().st_size
    assert whole_bytes > 200e6
    answer = subprocess.run(
        [sys.executable, "-c", MEASURE, str(tmp_path), "4", "8"],
        check=True,
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    grown, weights = map(int, answer.stdout.split())
    assert 50e6 < weights < whole_bytes / 3
    one_block = weights // 4
    # The weights, one block's file pages, and one tensor before it is packed.
    assert weights - 2 * one_block < grown < weights + 2 * one_block


# GGUF


def write_gguf(path: Path, whole: PreTrainedModel, quantized: bool = False, strange: str = "") -> None:
    """The whole model as llama.cpp would store it: rotary rows of each head interleaved, a word-level vocabulary."""
    config = whole.config
    writer = gguf_format.GGUFWriter(path, "llama")
    writer.add_name("tiny")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(["t", "1", "t1", *(f"x{i}" for i in range(config.vocab_size - 3))])
    writer.add_token_types([1] * config.vocab_size)
    writer.add_token_merges(["t 1"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_chat_template("{{ messages[0]['content'] }}")
    names = gguf_format.get_tensor_name_map(gguf_format.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, tensor in whole.state_dict().items():
        numbers = tensor.numpy()
        if "q_proj" in name or "k_proj" in name:
            heads = config.num_attention_heads if "q_proj" in name else config.num_key_value_heads
            halves = numbers.reshape(heads, 2, -1, numbers.shape[1])
            numbers = np.ascontiguousarray(halves.swapaxes(1, 2).reshape(numbers.shape))
        stored = str(names.get_name(name, try_suffixes=(".weight",)))
        if quantized and numbers.ndim == 2:
            kind = gguf_format.GGMLQuantizationType.Q8_0
            writer.add_tensor(stored, gguf_format.quantize(numbers, kind), raw_dtype=kind)
        else:
            writer.add_tensor(stored, numbers)
    if strange:
        writer.add_tensor(strange, np.zeros(4, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def of_gguf(path: Path) -> Checkpoint:
    return open_checkpoint(ModelSource(SourceKind.GGUF, str(path)), path.parent / "cache")


def test_a_gguf_file_equals_the_model_that_it_was_made_of(tmp_path: Path) -> None:
    whole = save_tiny(tmp_path / "whole")
    write_gguf(tmp_path / "Tiny-1M.F32.gguf", whole)
    model = of_gguf(tmp_path / "Tiny-1M.F32.gguf")
    assert model.name == "Tiny-1M"
    assert largest_error(model, whole) < 1e-5
    assert Ends.load(model, torch.float32, CPU).has_chat_template


def test_a_quantized_gguf_file_equals_what_transformers_reads_from_it(tmp_path: Path) -> None:
    write_gguf(tmp_path / "tiny.gguf", save_tiny(tmp_path / "whole"), quantized=True)
    read = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="tiny.gguf", dtype=torch.float32)
    # Stored as float16, whose 11 bits hold a Q8_0 number to within 5e-4 of itself.
    assert largest_error(of_gguf(tmp_path / "tiny.gguf"), read.train(False)) < 5e-3


def test_a_gguf_file_is_converted_once_and_known_by_its_own_hash(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "tiny.gguf"
    write_gguf(path, save_tiny(tmp_path / "whole"))
    model = of_gguf(path)
    (sha256,) = hash_files([path], tmp_path)
    facts = model.facts()
    assert facts.files == {"tiny.gguf": sha256}
    assert at(model.folder).facts().fingerprint == facts.fingerprint
    monkeypatch.setattr(gguf, "_convert_into", lambda *_: pytest.fail("converted twice"))
    assert of_gguf(path).folder == model.folder
    assert not list(model.folder.parent.glob("*.part"))


def test_processes_that_start_together_convert_a_gguf_file_once(tmp_path: Path) -> None:
    path = tmp_path / "tiny.gguf"
    write_gguf(path, save_tiny(tmp_path / "whole"))
    program = (
        "import sys; from pathlib import Path; from corolla.model import gguf\n"
        "path = Path(sys.argv[1]); stages = []\n"
        "print('ready', flush=True); sys.stdin.readline()\n"
        "note = lambda stage, done, total: stages.append(done)\n"
        "print(gguf.convert(gguf.Source(path.name, '0' * 64), path, path.parent / 'cache', note), any(stages))\n"
    )
    (tmp_path / "cache").mkdir()
    left = tmp_path / "cache" / f"tiny-000000000000-{gguf.CONVERSION}.part"  # of one that was killed
    left.mkdir()
    (left / "rest").touch()
    command = [sys.executable, "-c", program, str(path)]
    racing = [
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(2)
    ]
    try:
        for process in racing:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
        for process in racing:
            assert process.stdin is not None
            process.stdin.write("go\n")
            process.stdin.flush()
        answers = [process.communicate(timeout=120)[0].split() for process in racing]
    finally:
        for process in racing:
            process.kill()
    assert [process.returncode for process in racing] == [0, 0]
    assert len({folder for folder, _ in answers}) == 1
    assert sorted(converted for _, converted in answers) == ["False", "True"]
    assert not list((tmp_path / "cache").glob("*.part"))
    assert not (Path(answers[0][0]) / "rest").exists()


def test_a_gguf_file_that_is_missing_cut_short_or_none_is_named(tmp_path: Path) -> None:
    path = tmp_path / "tiny.gguf"
    assert "tiny.gguf" in refused(Code.UNKNOWN_MODEL, of_gguf, path).message
    write_gguf(path, save_tiny(tmp_path / "whole"))
    whole = path.read_bytes()
    for content in (whole[:1000], whole[:-1000], b"not a GGUF file at all, but long enough to be read"):
        path.write_bytes(content)
        assert "tiny.gguf" in refused(Code.DAMAGED_WEIGHTS, of_gguf, path).message
    assert not list((tmp_path / "cache").glob("tiny-*"))


@pytest.mark.parametrize(
    ("strange", "code"),
    [("blk.0.attn_q.bias", Code.DAMAGED_WEIGHTS), ("rope_freqs.weight", Code.UNSUPPORTED_FAMILY)],
)
def test_a_gguf_file_that_would_lose_a_tensor_is_refused(tmp_path: Path, strange: str, code: Code) -> None:
    path = tmp_path / "tiny.gguf"
    write_gguf(path, save_tiny(tmp_path / "whole"), strange=strange)
    refused(code, of_gguf, path)


@pytest.mark.parametrize("moment", ["before", "midway"])
def test_a_disk_that_fills_up_while_converting_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    path = tmp_path / "tiny.gguf"
    write_gguf(path, save_tiny(tmp_path / "whole"))

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    if moment == "midway":
        monkeypatch.setattr(gguf, "save_file", full)
    else:
        monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=10))
    refused(Code.DISK_FULL, of_gguf, path)
    assert not list((tmp_path / "cache").glob("tiny-*"))


# the hub, played by a folder


class Hub:
    """`huggingface_hub` over a folder: what was asked for, and what it answers."""

    def __init__(self, remote: Path, cache: Path) -> None:
        self.remote = remote
        self.cache = cache
        self.fetched: list[str] = []
        self.problem: Exception | None = None

    def model_info(self, hub_id: str, revision: str | None, files_metadata: bool) -> Any:
        if self.problem is not None:
            raise self.problem
        hashes = hash_files(sorted(self.remote.glob("*.safetensors")), self.cache.parent)
        files = [
            SimpleNamespace(rfilename=path.name, size=path.stat().st_size, lfs=SimpleNamespace(sha256=sha256))
            for path, sha256 in zip(sorted(self.remote.glob("*.safetensors")), hashes, strict=True)
        ]
        return SimpleNamespace(sha="c0ffee", siblings=files, card_data={"license": "mit"})

    def snapshot_download(self, hub_id: str, **options: Any) -> str:
        if options.get("local_files_only") and not self.cache.exists():
            raise hub_errors.LocalEntryNotFoundError("not cached")
        self.cache.mkdir(exist_ok=True)
        for path in self.remote.glob("*.json"):
            (self.cache / path.name).write_bytes(path.read_bytes())
        return str(self.cache)

    def hf_hub_download(self, hub_id: str, name: str, revision: str) -> None:
        self.fetched.append(name)
        (self.cache / name).write_bytes((self.remote / name).read_bytes())


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    played = Hub(tmp_path / "remote", tmp_path / "c0ffee")
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: played)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", played.snapshot_download)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", played.hf_hub_download)
    return played


def of_hub(hub: Hub) -> Checkpoint:
    return open_checkpoint(ModelSource(SourceKind.HUB, "someone/Tiny"), hub.cache.parent / "own")


def test_a_hub_model_is_fetched_shard_by_shard_and_known_before_any_is(hub: Hub) -> None:
    whole = save_tiny(hub.remote)
    (hub.remote / "model.safetensors").unlink()
    whole.save_pretrained(hub.remote, max_shard_size="100KB")
    model = of_hub(hub)
    facts = model.facts()
    assert hub.fetched == []
    assert (facts.name, facts.hub_id, facts.revision, facts.licence) == (
        "Tiny",
        "someone/Tiny",
        "c0ffee",
        "mit",
    )
    assert facts.fingerprint == at(hub.remote).facts().fingerprint
    Span.load(model, 2, 3, torch.float32, CPU)
    some = set(hub.fetched)
    assert some == {file for name, file in model.tensors.items() if ".layers.2." in name}
    assert some < set(model.tensors.values())
    assert largest_error(model, whole) < 1e-5
    assert len(hub.fetched) == len(set(hub.fetched)) == len(set(model.tensors.values()))


def test_a_hub_model_in_one_file_is_fetched_whole(hub: Hub) -> None:
    whole = save_tiny(hub.remote)
    assert largest_error(of_hub(hub), whole) < 1e-5
    assert hub.fetched == ["model.safetensors"]


def test_without_a_connection_what_is_cached_must_do(hub: Hub) -> None:
    whole = save_tiny(hub.remote)
    online = of_hub(hub).facts()
    hub.problem = http.ConnectError("no route")
    model = of_hub(hub)
    assert model.facts().fingerprint == online.fingerprint
    assert model.facts().revision == "c0ffee"
    assert largest_error(model, whole) < 1e-5


def test_without_a_connection_and_a_cached_copy_the_hub_is_not_ready(hub: Hub) -> None:
    hub.problem = http.ConnectError("no route")
    assert "someone/Tiny" in refused(Code.NOT_READY, of_hub, hub).message


def answered(status: int) -> Any:
    return http.Response(status, request=http.Request("GET", "https://example.invalid"))


@pytest.mark.parametrize(
    ("problem", "code"),
    [
        (hub_errors.RepositoryNotFoundError("404", response=answered(404)), Code.UNKNOWN_MODEL),
        (hub_errors.RepositoryNotFoundError("401", response=answered(401)), Code.UNKNOWN_MODEL),
        (hub_errors.RevisionNotFoundError("404", response=answered(404)), Code.UNKNOWN_MODEL),
        (hub_errors.HFValidationError("what a name"), Code.UNKNOWN_MODEL),
        (hub_errors.GatedRepoError("403", response=answered(403)), Code.GATED_MODEL),
        (hub_errors.GatedRepoError("401", response=answered(401)), Code.GATED_MODEL),
        (hub_errors.HfHubHTTPError("403", response=answered(403)), Code.GATED_MODEL),
        (hub_errors.HfHubHTTPError("500", response=answered(500)), Code.NOT_READY),
        (OSError(errno.ENOSPC, "No space left on device"), Code.DISK_FULL),
    ],
)
def test_what_the_hub_refuses_is_told_with_a_remedy(hub: Hub, problem: Exception, code: Code) -> None:
    hub.problem = problem
    told = refused(code, of_hub, hub)
    assert "someone/Tiny" in told.message
    assert told.remedy


def test_a_hub_index_names_every_tensor(hub: Hub) -> None:
    save_tiny(hub.remote).save_pretrained(hub.remote, max_shard_size="100KB")
    index = json.loads((hub.remote / "model.safetensors.index.json").read_text())
    assert of_hub(hub).tensors == index["weight_map"]


# the owner's limit on disk


def test_a_hub_model_beyond_the_limit_is_not_fetched(hub: Hub) -> None:
    whole = save_tiny(hub.remote)
    (hub.remote / "model.safetensors").unlink()
    whole.save_pretrained(hub.remote, max_shard_size="100KB")
    source = ModelSource(SourceKind.HUB, "someone/Tiny")
    model = open_checkpoint(source, hub.cache.parent / "own", disk_bytes=1000)
    problem = refused(Code.DISK_FULL, lambda: Span.load(model, 2, 3, torch.float32, CPU))
    assert "1,000 may be used for weights" in problem.message
    assert "disk_bytes" in problem.remedy
    assert hub.fetched == []


def test_a_gguf_file_beyond_the_limit_is_not_converted(tmp_path: Path) -> None:
    path = tmp_path / "tiny.gguf"
    write_gguf(path, save_tiny(tmp_path / "whole"))
    source = ModelSource(SourceKind.GGUF, str(path))
    problem = refused(Code.DISK_FULL, lambda: open_checkpoint(source, tmp_path / "cache", disk_bytes=1000))
    assert "disk_bytes" in problem.remedy
    assert not list((tmp_path / "cache").glob("tiny-*"))

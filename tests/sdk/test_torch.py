"""`DistributedModelForCausalLM` against the whole model: its ends here, its blocks behind a socket.

The daemon is the one in miniature, but its blocks are the tiny model's own, run over each row's history.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from dataclasses import replace  # noqa: E402

from transformers import DynamicCache, LlamaForCausalLM  # noqa: E402

import corolla  # noqa: E402
from corolla.protocol.control import Call, OpenModelSession, Return, SessionOpened, SessionStep  # noqa: E402
from corolla.protocol.errors import Code, CorollaError  # noqa: E402
from corolla.protocol.messages import from_plain  # noqa: E402
from corolla.protocol.steps import NEW_ROW, Reply  # noqa: E402
from corolla.protocol.tensors import Encoding  # noqa: E402
from corolla.sdk.torch import DistributedModelForCausalLM  # noqa: E402

from ..model.tiny import NUM_BLOCKS, VOCAB_SIZE, save_tiny  # noqa: E402
from .fake import MODEL, Connection, FakeDaemon  # noqa: E402

HIDDEN = 64


class BlocksDaemon(FakeDaemon):
    """Its sessions run a whole model's layers over the history of each row."""

    def __init__(self, path: Path, whole: Any) -> None:
        self._whole = whole
        super().__init__(path)
        view = replace(MODEL, hidden_size=HIDDEN, num_blocks=NUM_BLOCKS)
        self.handlers["models"] = lambda connection, call: [view]

    def open_session(self, connection: Connection, call: Call) -> SessionOpened:
        asked = from_plain(OpenModelSession, call.arguments)
        opened = super().open_session(connection, call)
        return replace(opened, hidden_size=HIDDEN, encoding=Encoding.FLOAT32, end=asked.end)

    def step(self, connection: Connection, call: Call) -> Return:
        asked = from_plain(SessionStep, call.arguments)
        table = self.sessions[asked.handle]
        hidden = np.frombuffer(call.payload, "<f4").reshape(-1, HIDDEN)
        answers, new_table, at = [], [], 0
        for row in asked.rows:
            before = [] if row.parent == NEW_ROW else table[row.parent][: row.position]
            if len(before) != row.position:
                raise ValueError(f"a gap before position {row.position}")
            history = before + list(hidden[at : at + row.n])
            at += row.n
            new_table.append(history)
            if row.n:
                answers.append(self.blocks(np.array(history))[-row.n :])
        self.sessions[asked.handle] = new_table
        assert asked.reply is Reply.ALL
        return Return(call.id, None, np.concatenate(answers).astype("<f4").tobytes())

    def blocks(self, history: np.ndarray) -> np.ndarray:
        """All blocks, without the final norm, over one row."""
        decoder = self._whole.get_decoder()
        caught: list[Any] = []
        given = torch.from_numpy(history)[None]
        hooks = (
            _first_layer(decoder).register_forward_pre_hook(lambda module, args: (given, *args[1:])),
            _norm(decoder).register_forward_pre_hook(lambda module, args: caught.append(args[0])),
        )
        with torch.no_grad():
            decoder(torch.zeros(1, len(history), dtype=torch.long), use_cache=False)
        for hook in hooks:
            hook.remove()
        answer: np.ndarray = caught[0][0].numpy()
        return answer


def _first_layer(decoder: Any) -> Any:
    return decoder.h[0] if hasattr(decoder, "h") else decoder.layers[0]


def _norm(decoder: Any) -> Any:
    names = ("norm", "ln_f", "final_layer_norm", "final_layernorm")
    return next(getattr(decoder, name) for name in names if hasattr(decoder, name))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tiny")


@pytest.fixture(scope="module")
def whole(folder: Path) -> Any:
    return save_tiny(folder, "llama", seed=3)


@pytest.fixture
def fake(tmp_path: Path, whole: Any) -> Iterator[BlocksDaemon]:
    with BlocksDaemon(tmp_path / "control.sock", whole) as daemon:
        yield daemon


@pytest.fixture
def model(fake: BlocksDaemon, folder: Path) -> Iterator[Any]:
    with corolla.connect(fake.path) as daemon:
        yield DistributedModelForCausalLM.from_pretrained(
            "tiny", ends=folder, daemon=daemon, dtype=torch.float32
        )


def prompt(rows: int, n: int) -> Any:
    generator = torch.Generator().manual_seed(5)
    return torch.randint(3, VOCAB_SIZE, (rows, n), generator=generator)


def test_only_the_ends_are_loaded(model: Any, whole: Any) -> None:
    assert isinstance(model, DistributedModelForCausalLM)
    assert isinstance(model, LlamaForCausalLM)
    assert isinstance(model, type(whole))
    assert model.config.num_hidden_layers == NUM_BLOCKS
    assert sum(p.numel() for p in model.parameters()) < sum(p.numel() for p in whole.parameters())


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_beams": 3},
        {"num_beams": 2, "num_return_sequences": 2},
        {"do_sample": True, "temperature": 0.8, "top_p": 0.9},
        {"do_sample": True, "num_return_sequences": 3},
        {"prompt_lookup_num_tokens": 3},
        {"use_cache": False},
    ],
    ids=str,
)
def test_generate_equals_the_whole_model(model: Any, whole: Any, options: dict[str, Any]) -> None:
    def generated(by: Any) -> Any:
        torch.manual_seed(11)
        return by.generate(prompt(1, 7), max_new_tokens=12, pad_token_id=0, **options)

    assert torch.equal(generated(model), generated(whole))


@pytest.mark.parametrize("options", [{}, {"num_beams": 2}], ids=str)
def test_left_padded_rows_equal_the_whole_model(
    model: Any, whole: Any, fake: BlocksDaemon, options: dict[str, Any]
) -> None:
    ids, mask = prompt(3, 9), torch.ones(3, 9, dtype=torch.long)
    mask[0, :4] = 0
    mask[2, :1] = 0
    ids[mask == 0] = 0
    given = {"attention_mask": mask, "max_new_tokens": 8, "pad_token_id": 0, **options}
    assert torch.equal(model.generate(ids, **given), whole.generate(ids, **given))
    first = next(call for call in fake.calls if call.method == "session.step")
    lengths = {row[2] for row in first.arguments["rows"]}
    assert lengths == {5, 9, 8}  # no padding crossed the socket


def test_sessions_are_closed_after_generate(model: Any, fake: BlocksDaemon) -> None:
    model.generate(prompt(1, 4), max_new_tokens=3, pad_token_id=0)
    assert not fake.sessions
    (opened,) = fake.opened
    assert (opened.max_rows, opened.max_length) == (1, 7)


def test_forward_without_a_cache_equals_the_whole_model(model: Any, whole: Any, fake: BlocksDaemon) -> None:
    with torch.no_grad():
        ours = model(prompt(2, 6), use_cache=False)
        theirs = whole(prompt(2, 6), use_cache=False)
    assert torch.allclose(ours.logits, theirs.logits, atol=1e-4)
    assert not fake.sessions


OTHERS = [
    "qwen2", "qwen3", "mistral", "mixtral", "olmo2", "gemma2", "gemma3", "gpt_oss", "gpt_neox", "phi", "apertus",
    "arcee", "ernie4_5", "exaone4", "gemma", "glm", "glm4", "helium", "hunyuan", "olmo", "olmo3", "olmoe", "phi3",
    "qwen2_moe", "seed_oss", "smollm3", "starcoder2",
]  # fmt: skip
OLD_STYLE = ["bloom", "falcon", "falcon_alibi"]


@pytest.mark.parametrize("family", [*OTHERS, *OLD_STYLE])
def test_other_families_equal_the_whole_model(family: str, tmp_path: Path) -> None:
    whole: Any = save_tiny(tmp_path / "tiny", family)
    with BlocksDaemon(tmp_path / "control.sock", whole) as fake, corolla.connect(fake.path) as daemon:
        model = DistributedModelForCausalLM.from_pretrained(
            "tiny", ends=tmp_path / "tiny", daemon=daemon, dtype=torch.float32
        )
        with torch.no_grad():
            assert torch.allclose(model(prompt(2, 10)).logits, whole(prompt(2, 10)).logits, atol=1e-4)
        ours, theirs = (by.generate(prompt(1, 6), max_new_tokens=6, pad_token_id=0) for by in (model, whole))
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("family", OLD_STYLE)
def test_left_padded_rows_of_families_with_layers_of_the_old_style(family: str, tmp_path: Path) -> None:
    whole: Any = save_tiny(tmp_path / "tiny", family)
    ids, mask = prompt(3, 9), torch.ones(3, 9, dtype=torch.long)
    mask[0, :4] = 0
    mask[2, :1] = 0
    given = {"attention_mask": mask, "max_new_tokens": 5, "pad_token_id": 0, "do_sample": False}
    with BlocksDaemon(tmp_path / "control.sock", whole) as fake, corolla.connect(fake.path) as daemon:
        model = DistributedModelForCausalLM.from_pretrained(
            "tiny", ends=tmp_path / "tiny", daemon=daemon, dtype=torch.float32
        )
        assert torch.equal(model.generate(ids, **given), whole.generate(ids, **given))
        assert torch.equal(
            model.generate(ids[1:2], num_beams=3, max_new_tokens=5, pad_token_id=0),
            whole.generate(ids[1:2], num_beams=3, max_new_tokens=5, pad_token_id=0),
        )


def test_a_cache_goes_on_and_crops(model: Any, whole: Any) -> None:
    ids = prompt(1, 8)
    with torch.no_grad():
        cache = model.new_cache(max_length=16)
        model(ids[:, :6], past_key_values=cache)
        assert cache.get_seq_length() == 6
        cache.crop(-2)
        ours = model(ids[:, 4:], past_key_values=cache).logits
        theirs = whole(ids).logits[:, 4:]
    assert torch.allclose(ours, theirs, atol=1e-4)
    cache.close()


def test_a_cache_of_transformers_is_refused(model: Any) -> None:
    with pytest.raises(CorollaError, match="DynamicCache") as caught:
        model.generate(prompt(1, 4), past_key_values=DynamicCache(), max_new_tokens=2, pad_token_id=0)
    assert caught.value.code is Code.BAD_REQUEST


def test_positions_that_jump_are_refused(model: Any) -> None:
    with torch.no_grad(), pytest.raises(CorollaError, match="position_ids"):
        model(prompt(1, 4), position_ids=torch.tensor([[0, 1, 0, 1]]))


def test_a_gradient_through_a_cache_is_refused_not_lost(model: Any) -> None:
    out = model(prompt(1, 4), labels=prompt(1, 4))
    with pytest.raises(CorollaError, match="gradients"):
        out.loss.backward()


def test_ends_of_another_model_are_refused(fake: BlocksDaemon, tmp_path: Path) -> None:
    save_tiny(tmp_path / "other", "llama", num_hidden_layers=2)
    with corolla.connect(fake.path) as daemon, pytest.raises(CorollaError, match="2 blocks"):
        DistributedModelForCausalLM.from_pretrained("tiny", ends=tmp_path / "other", daemon=daemon)

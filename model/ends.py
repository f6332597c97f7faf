"""What stands before and after the blocks: embeddings; final norm and LM head; the tokenizer.

Owns the ends' weights. Where a model ties its head to its embeddings, the head's packed copy stands beside
the plain embedding table, because one kernel looks up rows and the other multiplies by all of them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from ..protocol.errors import Code, error
from .checkpoint import Checkpoint
from .device import quick_product
from .families import Skeleton
from .linear import packed, shrunk
from .quantization import Shelf
from .weights import fetch_parts, load_part


class Ends:
    """Embeddings, final norm and head of one model, on one device, and its tokenizer."""

    def __init__(
        self, parts: dict[str, nn.Module], skeleton: Skeleton, tokenizer: PreTrainedTokenizerBase | None
    ) -> None:
        """For `load`; parts: `embeddings`, `norm` and `head`, and `embeddings_norm` or not, with weights."""
        self._embeddings = parts["embeddings"]
        self._embeddings_norm = parts.get("embeddings_norm")
        self._norm = parts["norm"]
        self._head = parts["head"]
        self._product = quick_product(parts["head"])
        self._tokenizer = tokenizer
        self._softcap: float | None = getattr(skeleton.config, "final_logit_softcapping", None)
        self.hidden_size = skeleton.hidden_size
        self.vocab_size = int(skeleton.config.vocab_size)
        self.bytes = 0
        self.dtype = torch.float32
        self.device = torch.device("cpu")

    @classmethod
    def load(
        cls,
        checkpoint: Checkpoint,
        dtype: torch.dtype,
        device: torch.device,
        *,
        shelf: Shelf | None = None,
        memory_bytes: int = 0,
    ) -> Ends:
        """Load just the ends' tensors, and the tokenizer if the model has one.

        shelf: the head is quantized in its scheme, and kept there. memory_bytes: limit for the weights; 0 is
        none. Raises as `Span.load`.
        """
        skeleton = Skeleton(checkpoint.config)
        size = skeleton.ends_bytes(dtype, shelf.scheme if shelf else None)
        if memory_bytes and size > memory_bytes:
            raise error(
                Code.DOES_NOT_FIT,
                f"the ends take {size:,} bytes, {memory_bytes:,} are there",
                "free memory, or choose a smaller model or a smaller dtype",
            )
        prefixes = skeleton.end_prefixes
        parts = skeleton.take_ends()
        wanted = [part for part in parts if part != "head" or not skeleton.is_tied]
        fetch_parts(checkpoint, skeleton, [prefixes[part] for part in wanted])
        for part in wanted:
            kept = shelf if part == "head" else None
            parts[part] = load_part(checkpoint, skeleton, prefixes[part], parts[part], dtype, device, kept)
        if skeleton.is_tied:
            parts["head"].weight = parts["embeddings"].weight
            parts["head"] = packed(parts["head"]) if shelf is None else shrunk(parts["head"], shelf.scheme)
        ends = cls(parts, skeleton, checkpoint.tokenizer())
        ends.bytes = size
        ends.dtype = dtype
        ends.device = device
        return ends

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The model's tokenizer. Raises `UNREADABLE` if the model came without one."""
        if self._tokenizer is None:
            raise error(
                Code.UNREADABLE,
                "this model has no tokenizer files",
                "put tokenizer.json beside its weights, or use token ids and hidden states",
            )
        return self._tokenizer

    @property
    def has_chat_template(self) -> bool:
        """Whether `chat_tokens` can work."""
        return self._tokenizer is not None and bool(self._tokenizer.chat_template)

    def chat_tokens(self, messages: list[dict[str, str]]) -> list[int]:
        """Token ids of a chat (role and content of each turn), ready for the assistant's answer.

        Raises `BAD_REQUEST` if the model has no chat template or the template refuses the chat.
        """
        if not self.has_chat_template:
            raise error(
                Code.BAD_REQUEST, "this model has no chat template", "give the prompt as plain text instead"
            )
        try:
            text = self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        except Exception as problem:  # templates are programs; whatever they raise, the chat is at fault
            raise error(
                Code.BAD_REQUEST, f"the model's chat template refuses this chat: {problem}"
            ) from problem
        encoded: Any = self.tokenizer(str(text), add_special_tokens=False)
        return [int(token) for token in encoded["input_ids"]]

    def embed(self, ids: Tensor) -> Tensor:
        """(num_tokens,) int64 → (num_tokens, hidden_size). Raises `BAD_REQUEST` for an id out of range."""
        if ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < self.vocab_size:
            worst = int(ids.max()) if int(ids.min()) >= 0 else int(ids.min())
            raise error(Code.BAD_REQUEST, f"token id {worst}, the vocabulary has {self.vocab_size}")
        with torch.inference_mode():
            embedded: Tensor = self._embeddings(ids.to(self.device)[None])[0]
            if self._embeddings_norm is not None:
                embedded = self._embeddings_norm(embedded)
            return embedded

    def embed_prompt(self, prompt: Tensor) -> Tensor:
        """An adapter's virtual tokens (num, hidden_size), as the first block gets them. Raises `BAD_SHAPE`.

        They stand for embeddings, whose scale they have learned.
        """
        if prompt.shape[-1] != self.hidden_size:
            raise error(
                Code.BAD_SHAPE,
                f"virtual tokens of hidden_size {prompt.shape[-1]}, expected {self.hidden_size}",
                "the adapter is for another model",
            )
        with torch.inference_mode():
            embedded = prompt.to(self.device, self.dtype)[None]
            if self._embeddings_norm is not None:
                embedded = self._embeddings_norm(embedded)
            return embedded[0]

    def head(self, hidden: Tensor) -> Tensor:
        """Last blocks' output (num_rows, hidden_size) → logits (num_rows, vocab_size), float32."""
        if hidden.shape[-1] != self.hidden_size:
            raise error(Code.BAD_SHAPE, f"hidden_size {hidden.shape[-1]}, expected {self.hidden_size}")
        if not hidden.shape[0]:
            return hidden.new_zeros((0, self.vocab_size), dtype=torch.float32)
        with torch.inference_mode():
            logits: Tensor = self._product(self._norm(hidden[None])[0]).float()
            if self._softcap is not None:
                logits = torch.tanh(logits / self._softcap) * self._softcap
            return logits

"""Where a family's decoder keeps its layers, and how it calls them.

Owns what differs from family to family around the loop over layers; knows nothing of what stands there.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ..protocol.errors import Code, error


def layers_name(decoder: nn.Module) -> str:
    """What a family's decoder calls the list of its layers. Raises `UNSUPPORTED_FAMILY`."""
    for name in ("layers", "h"):
        if isinstance(getattr(decoder, name, None), nn.ModuleList):
            return name
    raise error(Code.UNSUPPORTED_FAMILY, f"{type(decoder).__name__} has neither `layers` nor `h`")


def attach(decoder: nn.Module, blocks: nn.Module) -> None:
    """Put `blocks`, which is called as most families' layers are, where the decoder's layers were."""
    name = layers_name(decoder)
    setattr(decoder, name, nn.ModuleList([blocks if name == "layers" else OldStyleLayer(blocks)]))


def layer_of(decoder: nn.Module) -> nn.Module:
    """What the decoder calls since `attach`."""
    layer: nn.Module = getattr(decoder, layers_name(decoder))[0]
    return layer


def attached(decoder: nn.Module) -> nn.Module:
    """What `attach` was given."""
    layer = layer_of(decoder)
    return layer.blocks if isinstance(layer, OldStyleLayer) else layer


class OldStyleLayer(nn.Module):
    """`blocks` as BLOOM and Falcon call a layer: the cache is `layer_past`, and the answer is a tuple.

    padding: of the pass to come, which others get as a keyword; these decoders keep keywords to themselves.
    """

    def __init__(self, blocks: nn.Module) -> None:
        super().__init__()
        self.blocks = blocks
        self.padding: Tensor | None = None

    def forward(
        self, hidden_states: Tensor, *_: Any, layer_past: Any = None, position_ids: Any = None, **__: Any
    ) -> tuple[Tensor, None]:
        """hidden_states: (rows, n, hidden_size); those after the blocks, and no weights."""
        states: Tensor = self.blocks(
            hidden_states, past_key_values=layer_past, position_ids=position_ids, padding=self.padding
        )
        return states, None

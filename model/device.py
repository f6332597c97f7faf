"""What each kind of device is served best by: the one place where that is chosen."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from typing import Final, NamedTuple

import torch
from torch import Tensor, nn

from .elementwise import Elementwise, fused
from .gathered import Gathering
from .gpu.probe import is_usable
from .graphs import CudaRecorder, Recorder
from .linear import FrozenLinear
from .paged import TableAttention

HAS_COMPILER: Final = find_spec("numba") is not None


class Ways(NamedTuple):
    """tabled: what attends over pages that tensors name, where the heads of a slot lie together; without it each
    head's slots do, and are read in place. is_compiled: a few tokens go by kernels of our own, see `compiled`.
    recorder: for passes that are played again, or None."""

    tabled: TableAttention | None = None
    is_compiled: bool = False
    recorder: Recorder | None = None


def ways_of(device: torch.device) -> Ways:
    """A CPU reads pages where they are. A GPU is slow to be asked, so it is asked seldom and never waited for."""
    if device.type == "cpu":
        return Ways(is_compiled=HAS_COMPILER)
    return Ways(_tabled(device), recorder=CudaRecorder())


def _tabled(device: torch.device) -> TableAttention:
    if not is_usable(device):
        return Gathering()
    from .gpu.tabled import BlockTables  # here, because triton may be missing
    from .gpu.trusted import Trusted

    num_processors = torch.cuda.get_device_properties(device).multi_processor_count
    return Trusted(BlockTables(num_processors))


def elementwise_of(device: torch.device) -> Elementwise:
    """What is between two products, as this device computes it best."""
    if device.type != "cuda":
        return Elementwise()
    # torch's compiler makes Triton's kernels too.
    return Elementwise(fused) if is_usable(device) else Elementwise()


def quick_product(layer: nn.Module) -> Callable[[Tensor], Tensor]:
    """`layer` itself, or what multiplies a few rows (num_rows, in_features) faster."""
    if not HAS_COMPILER or not isinstance(layer, FrozenLinear) or layer.strips is None:
        return layer
    from .compiled.decoder import Head

    return Head(layer).multiply

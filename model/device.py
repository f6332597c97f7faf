"""What each kind of device is served best by: the one place where that is chosen."""

from __future__ import annotations

from typing import NamedTuple

import torch

from .graphs import CudaRecorder, Recorder


class Ways(NamedTuple):
    """is_paged: pages are named by tensors, and the heads of a slot lie together; else each head's slots do, and are
    read in place. recorder: for passes that are played again, or None."""

    is_paged: bool
    recorder: Recorder | None = None


def ways_of(device: torch.device) -> Ways:
    """A CPU reads pages where they are. A GPU is slow to be asked, so it is asked seldom and never waited for."""
    if device.type == "cpu":
        return Ways(is_paged=False)
    return Ways(is_paged=True, recorder=CudaRecorder())

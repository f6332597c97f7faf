"""Tensors between a device and this machine's memory, without waiting where nobody has to.

From pinned memory a device copies by itself, in the order of its other work; from other memory the processor waits.
On a CPU nothing is copied.
"""

from __future__ import annotations

import torch
from torch import Tensor


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor of this machine's memory on the device; the copy is in order with all that is asked of it later."""
    if device.type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)  # torch keeps the pinned copy until it was read


def to_host(tensor: Tensor) -> Tensor:
    """A tensor in this machine's memory, once the device has computed it: one wait for all of it."""
    if tensor.device.type != "cuda":
        return tensor.cpu()
    landed = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    landed.copy_(tensor, non_blocking=True)
    torch.cuda.current_stream(tensor.device).synchronize()
    return landed

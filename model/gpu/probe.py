"""Whether kernels of our own can run on a device: found out by launching one that does next to nothing.

Triton builds what launches its kernels with the C compiler of the machine, and that may be missing, or too old, or
the device too old for Triton: only a launch can tell. Owns nothing but the answers.
"""

from __future__ import annotations

import logging
from functools import cache

import torch

logger = logging.getLogger(__name__)


@cache
def is_usable(device: torch.device) -> bool:
    """Whether Triton's kernels run there; tried once for each device, and why not stands in the log."""
    try:
        from .trial import doubled

        is_right = doubled(torch.ones(1, device=device)).item() == 2
        problem = None if is_right else "a first kernel computes wrongly"
    except ImportError:
        problem = "triton is missing, install it"
    except Exception as failure:  # a compiler's, a linker's or a driver's own, of any kind
        problem = f"{type(failure).__name__}: {failure}; kernels need a C compiler, such as gcc"
    if problem is not None:
        logger.warning("%s is served without kernels of our own, and slower: %s", device, problem)
    return problem is None

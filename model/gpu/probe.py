"""Whether kernels of our own can run on a device: found out by launching one that does next to nothing.

Triton builds what launches its kernels with the machine's C compiler and the headers of Python, which may be missing or
too old: only a launch can tell. Owns nothing but the answers.
"""

from __future__ import annotations

import logging
from functools import cache
from typing import Final

import torch

logger = logging.getLogger(__name__)

_LEAST_CAPABILITY: Final = (8, 0)  # of Triton, of bfloat16 in products, and of the memory that our tiles take
_REMEDY: Final = "a C compiler and Python's headers must be there (apt install gcc python3-dev)"


@cache
def is_usable(device: torch.device) -> bool:
    """Whether Triton's kernels run there; tried once for each device, and why not stands in the log."""
    problem = _problem(device)
    if problem:
        logger.warning("%s is served without kernels of our own, and slower: %s", device, problem)
    return not problem


def _problem(device: torch.device) -> str:
    """Why they do not, with the remedy; "" if they do."""
    if torch.version.hip is not None and device.type == "cuda":
        return "they are cut for NVIDIA's devices, and AMD's give a program less memory"
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < _LEAST_CAPABILITY:
        return f"they need compute capability {_LEAST_CAPABILITY[0]}.{_LEAST_CAPABILITY[1]}"
    try:
        from .trial import doubled

        is_right = doubled(torch.ones(1, device=device)).item() == 2
    except ImportError:
        return "triton is missing, install it"
    except Exception as failure:  # a compiler's, a linker's or a driver's own, of any kind
        return f"{type(failure).__name__}: {failure}; {_REMEDY}"
    return "" if is_right else "a first kernel computes wrongly"

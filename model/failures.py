"""Any failure of a worker as one of ours, so that it can be told across its socket."""

from __future__ import annotations

from typing import Final

import torch

from ..protocol.errors import Code, CorollaError, error

# What torch's allocator for CPUs and the C++ library say; both come as plain RuntimeErrors.
_NO_MEMORY: Final = ("can't allocate memory", "bad_alloc")


def explain(problem: Exception) -> CorollaError:
    """Any failure as one of ours: memory that ran out by name, a defect as `INTERNAL`."""
    if isinstance(problem, CorollaError):
        return problem
    text = (str(problem).splitlines() or [""])[0][:400]
    no_memory = isinstance(problem, (MemoryError, torch.OutOfMemoryError)) or any(
        words in text for words in _NO_MEMORY
    )
    if no_memory:
        return error(
            Code.OUT_OF_MEMORY,
            f"the device has no memory left: {text}",
            "serve fewer blocks or a smaller cache",
        )
    return error(Code.INTERNAL, f"{type(problem).__name__}: {text}", "this is a defect; please report it")

"""Any failure of a worker as one of ours, so that it can be told across its socket."""

from __future__ import annotations

import torch

from ..protocol.errors import Code, CorollaError, error


def explain(problem: Exception) -> CorollaError:
    """Any failure as one of ours: memory that ran out by name, a defect as `INTERNAL`."""
    if isinstance(problem, CorollaError):
        return problem
    text = (str(problem).splitlines() or [""])[0][:400]
    no_memory = isinstance(problem, (MemoryError, torch.OutOfMemoryError)) or "can't allocate memory" in text
    if no_memory:
        return error(
            Code.OUT_OF_MEMORY,
            f"the device has no memory left: {text}",
            "serve fewer blocks or a smaller cache",
        )
    return error(Code.INTERNAL, f"{type(problem).__name__}: {text}", "this is a defect; please report it")

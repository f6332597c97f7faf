"""How the functions of this folder are compiled, where that is kept, and what they compute with."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import numba
import numpy as np
from numpy.typing import NDArray

Numbers = NDArray[np.float32]
Words = NDArray[np.int64]
Number = Any  # a float32; Python has no such arithmetic
Function = TypeVar("Function", bound=Callable[..., Any])

_FOLDER = Path(__file__).parent


def _sources() -> str:
    """A digest of all that is compiled here: numba looks at a function's own file alone, not at those that it calls."""
    digest = hashlib.sha256()
    for path in (*sorted(_FOLDER.glob("*.py")), _FOLDER.parent / "strips.py"):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


_kept_in = Path(os.environ.get("NUMBA_CACHE_DIR") or _FOLDER / "__pycache__")
numba.config.CACHE_DIR = str(_kept_in / _sources())  # type: ignore[attr-defined]


def compiled(function: Function) -> Function:
    """Machine code that lets go of Python's lock; kept on disk, beside its source where that can be written."""
    made: Any = numba.njit(nogil=True, cache=True, error_model="numpy", fastmath={"contract"})(function)
    return made  # type: ignore[no-any-return]


def summing(function: Function) -> Function:
    """As `compiled`, with sums in any order, so that they are taken in vectors."""
    loose = {"contract", "reassoc", "nsz"}
    made: Any = numba.njit(nogil=True, cache=True, error_model="numpy", fastmath=loose)(function)
    return made  # type: ignore[no-any-return]

"""How the functions of this folder are compiled, and what they compute with."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np
from numba import njit
from numpy.typing import NDArray

Numbers = NDArray[np.float32]
Words = NDArray[np.int64]
Number = Any  # a float32; Python has no such arithmetic
Function = TypeVar("Function", bound=Callable[..., Any])


def compiled(function: Function) -> Function:
    """Machine code that lets go of Python's lock; kept on disk, beside its source where that can be written."""
    made: Any = njit(nogil=True, cache=True, error_model="numpy", fastmath={"contract"})(function)
    return made  # type: ignore[no-any-return]


def summing(function: Function) -> Function:
    """As `compiled`, with sums in any order, so that they are taken in vectors."""
    loose = {"contract", "reassoc", "nsz"}
    made: Any = njit(nogil=True, cache=True, error_model="numpy", fastmath=loose)(function)
    return made  # type: ignore[no-any-return]

"""How the weights of a linear layer lie in memory: in strips of outputs, in one of a few forms.

What `linear` and `quantization` keep, and the kernels of `compiled` read.
"""

from __future__ import annotations

from enum import IntEnum
from typing import Final, NamedTuple

from torch import Tensor

STRIP: Final = 64  # outputs that oneDNN and torch's int4 pack together on a CPU with AVX-512
STRIP_INPUTS: Final = 16  # a layer's inputs are a multiple of these
LINE_INPUTS: Final = 64  # and of these in int8
INT4_GROUP: Final = 32  # weights that share a step and a middle: 5 bits a weight; 64 are clearly worse


class Form(IntEnum):
    """Outputs come in strips of `STRIP`, one strip after the other.

    FLOAT32: in a strip input after input. BFLOAT16: in pairs of inputs, the two of an output together. INT8: output
    after output. INT4: input after input, in a byte two outputs half a strip apart.
    """

    FLOAT32 = 0
    BFLOAT16 = 1
    INT8 = 2
    INT4 = 3


class Strips(NamedTuple):
    """weights: their address. scales: as the form has them, or None; they belong to num_scaled outputs."""

    form: Form
    weights: int
    scales: Tensor | None = None
    num_scaled: int = 0

"""Any failure of a worker as one of ours, so that it can be told across its socket.

Source of the words of a lost device: CUDA Runtime API, `cudaError`; those after which "the process must be terminated
and relaunched", and those of a device that is not there.
"""

from __future__ import annotations

from typing import Final

import torch

from ..protocol.errors import Code, CorollaError, error

# What torch's allocator for CPUs, the C++ library, and CUDA outside torch's allocator say; all as RuntimeErrors.
_NO_MEMORY: Final = ("can't allocate memory", "bad_alloc", "CUDA error: out of memory")
# After these nothing more can be computed by this process, on that device at least.
_DEVICE_LOST: Final = (
    "unspecified launch failure", "illegal memory access", "device-side assert", "launch timed out",
    "hardware stack error", "illegal instruction", "misaligned address", "invalid program counter",
    "uncorrectable ECC error", "uncorrectable NVLink error", "context is destroyed", "unknown error",
    "busy or unavailable", "no CUDA-capable device", "No CUDA GPUs are available", "invalid device ordinal",
    "global/shared address space", "external device", "MPS client has been terminated", "STATUS_EXECUTION_FAILED",
)  # fmt: skip
_OF_A_GPU: Final = ("CUDA", "HIP", "cuDNN", "CUBLAS")


def explain(problem: Exception) -> CorollaError:
    """Any failure as one of ours: memory that ran out by name, a lost device too, a defect as `INTERNAL`."""
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
    if isinstance(problem, RuntimeError) and _is_loss(text):
        return error(
            Code.DEVICE_LOST,
            f"the device is lost: {text}",
            "see what its driver says (nvidia-smi, dmesg); the worker is started again by itself",
        )
    return error(Code.INTERNAL, f"{type(problem).__name__}: {text}", "this is a defect; please report it")


def _is_loss(text: str) -> bool:
    return any(words in text for words in _OF_A_GPU) and any(words in text for words in _DEVICE_LOST)

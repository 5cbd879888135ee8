"""What a device can do: the only file that asks."""

from __future__ import annotations

import functools
from typing import Any

import torch


def _interpreting() -> bool:
    """Whether Triton runs kernels in its interpreter (it decides that itself, when a kernel is decorated)."""
    from triton import knobs

    return bool(knobs.runtime.interpret)


INTERPRETING = _interpreting()
"""True where kernels run on the CPU, in Triton's interpreter: for tests only."""


@functools.cache
def _capability(index: int) -> tuple[int, int]:
    return torch.cuda.get_device_capability(index)


def runs_on(device: torch.device) -> bool:
    """Whether the Triton kernels run on this device: an NVIDIA GPU from sm_80 on, or a CPU under the interpreter."""
    if INTERPRETING:
        return device.type == "cpu"
    if device.type != "cuda" or torch.version.cuda is None:
        return False
    return _capability(torch.cuda.current_device() if device.index is None else device.index) >= (8, 0)


def native_level(device: torch.device) -> int:
    """What inline PTX kernels may use; the portable twins give the same bytes.

    0: none (interpreter). 1: sm_80. 2: sm_89, which converts to and from E4M3, and takes maxima of magnitudes.
    3: `has_fp4_conversion`.
    """
    if INTERPRETING:
        return 0
    index = torch.cuda.current_device() if device.index is None else device.index
    capability = _capability(index)
    return 3 if has_fp4_conversion(capability) else 2 if capability >= (8, 9) else 1


def has_fp4_conversion(capability: tuple[int, int]) -> bool:
    """Whether a GPU of this compute capability has cvt.rn.satfinite.e2m1x2.f32: the families of sm_100 and sm_120."""
    return capability[0] in (10, 12)


def has_fp4_matmul(device: torch.device) -> bool:
    """Whether torch's scaled matmul multiplies NVFP4 here: an NVIDIA GPU from sm_100 on, and torch from 2.10 on."""
    if device.type != "cuda" or torch.version.cuda is None or not hasattr(torch.nn.functional, "scaled_mm"):
        return False
    return _capability(torch.cuda.current_device() if device.index is None else device.index) >= (10, 0)


def has_large_shared_memory(device: torch.device) -> bool:
    """Whether a program may use 160 KiB of shared memory: data center GPUs from sm_80 on."""
    if INTERPRETING:
        return False
    properties: Any = torch.cuda.get_device_properties(device)
    return int(properties.shared_memory_per_block_optin) >= 160 << 10

"""Launching a kernel often.

Triton's own launch looks at every argument anew, at the kernel's globals and at the environment: 15 to 25 µs of Python,
longer than most of these kernels run. What it finds depends on a few things only, so the compiled kernel is kept under
them, and from the second launch on is called directly.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ._target import INTERPRETING

_COMPILED: dict[tuple[Any, ...], tuple[Any, tuple[Any, ...]]] = {}
_MOST = 4096  # entries: a key holds sizes and strides, and a program may meet ever new ones


def launch(
    kernel: Any,
    programs: int | tuple[int, ...],
    tensors: tuple[Tensor, ...],
    numbers: tuple[int, ...],
    words: tuple[Any, ...] = (),
    *,
    num_warps: int = 4,
    num_stages: int = 3,
    maxnreg: int | None = None,
    **constants: Any,
) -> None:
    """`kernel[programs](*tensors, *numbers, *words, **constants)` on the tensors' device and its current stream.

    The kernel's parameters come in this order, constants last. numbers may be specialised (1, multiples of 16) and are
    part of the key; words may not, see `jit_varying`. What has one byte an element reaches kernels as uint8.
    """
    if INTERPRETING:
        given = [t.view(torch.uint8) if t.dtype.itemsize == 1 else t for t in tensors]
        kernel[(programs,) if isinstance(programs, int) else programs](*given, *numbers, *words, **constants)
        return
    device = tensors[0].get_device()
    pointers = [t.data_ptr() for t in tensors]
    key = (
        id(kernel), device, num_warps, num_stages, maxnreg, numbers, *constants.values(),
        *[t.dtype for t in tensors], *[pointer % 16 for pointer in pointers],
    )  # fmt: skip
    grid = (programs, 1, 1) if isinstance(programs, int) else programs
    found = _COMPILED.get(key)
    if found is None or device != torch.cuda.current_device():
        _first(key, kernel, grid, tensors, (*numbers, *words), num_warps, num_stages, maxnreg, constants)
    else:
        compiled, last = found
        compiled[grid](*pointers, *numbers, *words, *last)


def _first(
    key: tuple[Any, ...],
    kernel: Any,
    grid: tuple[int, ...],
    tensors: tuple[Tensor, ...],
    numbers: tuple[Any, ...],
    num_warps: int,
    num_stages: int,
    maxnreg: int | None,
    constants: dict[str, Any],
) -> None:
    """Through Triton, which compiles what it has not compiled yet; and where another device is the current one."""
    given = [t.view(torch.uint8) if t.dtype.itemsize == 1 else t for t in tensors]
    with torch.cuda.device(tensors[0].device):
        compiled = kernel[grid](
            *given, *numbers, **constants, num_warps=num_warps, num_stages=num_stages, maxnreg=maxnreg,
            enable_fp_fusion=False,
        )  # fmt: skip
    if len(_COMPILED) >= _MOST:
        _COMPILED.clear()
    _COMPILED[key] = compiled, tuple(constants[name] for name in kernel.arg_names[len(given) + len(numbers) :])


def cdiv(a: int, b: int) -> int:
    """a / b rounded up, for integers; Triton's own takes microseconds on the host."""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """The smallest power of two from n ≥ 1 up."""
    return 1 << (n - 1).bit_length()

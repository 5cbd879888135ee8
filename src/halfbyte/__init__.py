"""halfbyte: one NVFP4 (and MXFP8) contract from training to serving.

Importing it needs torch alone; what reads checkpoints or runs models is imported when first asked for.
"""

from typing import TYPE_CHECKING, Any

from .errors import CheckpointError, FormatError, HalfbyteError, ShapeError, SyncError, UnsupportedError
from .formats import MXFP8, NVFP4
from .functional import (
    fake_quantize,
    fake_quantize_unscaled,
    quantize,
    quantize_many,
    quantize_transpose,
    swizzle,
    unswizzle,
)
from .linear import grouped_linear, linear
from .policy import Policy
from .tensor import QuantizedTensor
from .version import __version__

if TYPE_CHECKING:
    from .runtime import load

__all__ = [
    "MXFP8",
    "NVFP4",
    "CheckpointError",
    "FormatError",
    "HalfbyteError",
    "Policy",
    "QuantizedTensor",
    "ShapeError",
    "SyncError",
    "UnsupportedError",
    "__version__",
    "fake_quantize",
    "fake_quantize_unscaled",
    "grouped_linear",
    "linear",
    "load",
    "quantize",
    "quantize_many",
    "quantize_transpose",
    "swizzle",
    "unswizzle",
]


def __getattr__(name: str) -> Any:
    if name == "load":
        from .runtime import load

        return load
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__} - {"Any", "TYPE_CHECKING"})

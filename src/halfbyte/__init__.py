"""halfbyte: one NVFP4 (and MXFP8) contract from training to serving."""

from .errors import CheckpointError, FormatError, HalfbyteError, ShapeError, UnsupportedError
from .formats import MXFP8, NVFP4
from .tensor import QuantizedTensor, quantize

__version__ = "0.1.0"

__all__ = [
    "MXFP8",
    "NVFP4",
    "CheckpointError",
    "FormatError",
    "HalfbyteError",
    "QuantizedTensor",
    "ShapeError",
    "UnsupportedError",
    "quantize",
]

"""The CPU path: `nvfp4` and `mxfp8` with the functions of `halfbyte.numerics`, compiled by numba on first use.

vector.py (sixteen lanes as a type) → elements.py (every rounding) → nvfp4_code.py, nvfp4.py, mxfp8.py (operations);
beside them source.py (how a tensor's memory is read), philox.py, and compile.py (compiling, caching, threads).
"""

from . import mxfp8, nvfp4

__all__ = ["mxfp8", "nvfp4"]

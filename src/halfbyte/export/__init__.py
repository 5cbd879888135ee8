"""Live weights for serving engines: the bytes of a conversion, without the files.

`rules` and `megatron` know Megatron's names, `placement` and `shards` its parallelism; `exporter` quantizes, `pieces`
puts ranks' parts together, `delta` keeps to what changed, and `adapters` speak other projects' signatures.
"""

from .adapters import flatten, metadata, quantize_params, unflatten
from .delta import Delta, apply_delta, make_delta
from .exporter import Bucket, Exporter, headers
from .megatron import Model, global_name
from .pieces import Piece, merge
from .placement import Placement

__all__ = [
    "Bucket",
    "Delta",
    "Exporter",
    "Model",
    "Piece",
    "Placement",
    "apply_delta",
    "flatten",
    "global_name",
    "headers",
    "make_delta",
    "merge",
    "metadata",
    "quantize_params",
    "unflatten",
]

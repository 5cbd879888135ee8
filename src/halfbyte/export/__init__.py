"""Live weights for serving engines: the bytes of a conversion, without the files.

`rules` and `megatron` know Megatron's names, `placement` and `shards` its parallelism; `exporter` quantizes, `pieces`
puts ranks' parts together, `delta` keeps to what changed, and `adapters` speak other projects' signatures.
`transport` sends and `receiver` takes them, over a `link`.
"""

from .adapters import broadcast, flatten, metadata, quantize_params, unflatten
from .delta import Delta, apply_delta, make_delta
from .engine import Engine, Serving, update_engine
from .exporter import Bucket, Exporter, headers
from .link import Link, connect
from .megatron import Model, global_name
from .pieces import Piece, merge
from .placement import Placement
from .planned import FlatBucket, PreparedExport
from .receiver import Receiver
from .transport import Sender

__all__ = [
    "Bucket",
    "Delta",
    "Engine",
    "Exporter",
    "FlatBucket",
    "Link",
    "Model",
    "Piece",
    "Placement",
    "PreparedExport",
    "Receiver",
    "Sender",
    "Serving",
    "apply_delta",
    "broadcast",
    "connect",
    "flatten",
    "global_name",
    "headers",
    "make_delta",
    "merge",
    "metadata",
    "quantize_params",
    "unflatten",
    "update_engine",
]

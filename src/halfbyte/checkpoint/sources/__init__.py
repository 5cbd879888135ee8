"""Sources that are quantized already, read as the high-precision models that they decode to.

declared.py says what a config declares, encodings.py finds its weights among the tensors, decoded.py reads them.
"""

from .decoded import DecodedCheckpoint as DecodedCheckpoint
from .decoded import open_source as open_source

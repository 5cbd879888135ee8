"""E4M3 (float8_e4m3fn): block scales of NVFP4 and elements of MXFP8."""

import torch
from torch import Tensor

from ..formats import E4M3_MAX

NAN_BYTE = 0x7F


def encode(x: Tensor) -> Tensor:
    """Round float32 to float8_e4m3fn, nearest even, saturating at ±448; NaN → 0x7F; -0.0 is kept."""
    # The cast itself turns values beyond 448 into NaN; after the clamp it only rounds.
    rounded = x.clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)
    return torch.where(x.isnan(), NAN_BYTE, rounded.view(torch.uint8)).view(torch.float8_e4m3fn)

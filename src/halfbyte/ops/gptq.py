"""The step of GPTQ, run by whichever implementation is fastest where the weight is."""

from __future__ import annotations

from torch import Tensor

from ..numerics import gptq as reference
from .backends import pick


def round_block(
    weight: Tensor, factor: Tensor, decode_scale: Tensor, scale: Tensor | None = None, *, impl: str = "auto"
) -> tuple[Tensor, Tensor, Tensor]:
    """Round weight (N, 16) column by column; see `halfbyte.numerics.gptq.round_block`.

    All do the same operations in the same order, and give the same bytes.
    """
    match pick(impl, weight.device):
        case "cpu":
            from ..kernels.cpu import gptq

            return gptq.round_block(weight, factor, decode_scale, scale)
        case "triton":
            from ..kernels import gptq as triton_gptq

            return triton_gptq.round_block(weight, factor, decode_scale, scale)
        case _:
            return reference.round_block(weight, factor, decode_scale, scale)

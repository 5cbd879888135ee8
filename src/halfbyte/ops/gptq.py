"""The step of GPTQ, run by whichever implementation is fastest where the weight is."""

from __future__ import annotations

from torch import Tensor

from ..numerics import gptq as reference
from .backends import pick


def round_block(
    weight: Tensor, factor: Tensor, decode_scale: Tensor, scale: Tensor | None = None, *, impl: str = "auto"
) -> tuple[Tensor, Tensor, Tensor]:
    """Round weight (N, 16) column by column; see `halfbyte.numerics.gptq.round_block`.

    "cpu" and "reference" do the same operations in the same order; on a GPU the reference runs.
    """
    if pick(impl, weight.device) == "cpu":
        from ..kernels.cpu import gptq

        return gptq.round_block(weight, factor, decode_scale, scale)
    return reference.round_block(weight, factor, decode_scale, scale)

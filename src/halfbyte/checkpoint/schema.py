"""Names, dtypes and shapes of a quantized weight on disk, in both layouts.

All foreign tensor names live here. Source: the loaders of vLLM, SGLang, TensorRT-LLM, transformers and
compressed-tensors, as of 2026.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from .. import ops
from ..errors import CheckpointError
from ..formats import MXFP8, NVFP4, Format
from ..tensor import QuantizedTensor

Layout = Literal["modelopt", "compressed-tensors"]
LAYOUTS: tuple[Layout, ...] = ("modelopt", "compressed-tensors")
Entry = tuple[str, tuple[int, ...]]  # safetensors dtype and shape


@dataclass(frozen=True)
class WeightNames:
    """Parameter names of one quantized Linear; None where the format has no such tensor.

    Attributes:
        scalar_shape: shape of the tensor and input scales.
        divisors: whether those divide on decode (1 / S_dec), as compressed-tensors stores them.
    """

    elements: str
    block_scale: str
    tensor_scale: str | None = None
    input_scale: str | None = None
    scalar_shape: tuple[int, ...] = ()
    divisors: bool = False


_NVFP4: dict[Layout, WeightNames] = {
    "modelopt": WeightNames("weight", "weight_scale", "weight_scale_2", "input_scale"),
    "compressed-tensors": WeightNames(
        "weight_packed", "weight_scale", "weight_global_scale", "input_global_scale", (1,), divisors=True
    ),
}
_MXFP8 = WeightNames("weight", "weight_scale")


def weight_names(layout: Layout, fmt: Format) -> WeightNames:
    """Names of the tensors that make up one weight."""
    return _NVFP4[layout] if isinstance(fmt, NVFP4) else _MXFP8


SCALE_PARAMETERS = frozenset(
    {"weight_scale", "weight_scale_2", "weight_global_scale", "input_scale", "input_global_scale", "k_scale", "v_scale"}
)
"""Every parameter that only a quantized checkpoint has, in either layout."""

FOREIGN_PARAMETERS = SCALE_PARAMETERS | {
    "weight_packed",
    "weight_scale_inv",
    "weight_zero_point",
    "qweight",
    "qzeros",
    "scales",
    "weight_blocks",
    "gate_up_proj_blocks",
    "down_proj_blocks",
}
"""Parameters by which any quantized checkpoint is recognised, also those of other formats."""


STACKED_EXPERTS = frozenset(
    {
        *("afmoe", "deepseek_v2", "deepseek_v3", "deepseek_v32", "dots1", "ernie4_5_moe", "exaone_moe", "flex_olmo"),
        *("gemma4", "gemma4_text", "glm4_moe", "glm4_moe_lite", "glm4v_moe", "glm4v_moe_text", "glm_moe_dsa"),
        *("hunyuan_v1_moe", "kimi_linear", "lfm2_moe", "minimax", "minimax_m2", "mixtral", "olmoe", "phimoe"),
        *("qwen2_moe", "qwen3_5_moe", "qwen3_5_moe_text", "qwen3_moe", "qwen3_next", "solar_open"),
    }
)
"""Families whose stacked experts are `experts.gate_up_proj` [E, 2I, H], gate rows first, and `experts.down_proj`
[E, H, I]. Others (gpt_oss in high precision: transposed and interleaved; llama4, qwen3_vl_moe: transposed) are not
read."""

DECAYS = ("query_decay", "key_decay", "diagonal_decay")
"""Constants of MiniMax's linear attention, 4-D."""

TRANSPOSED = frozenset({"gpt2", "openai-gpt", "imagegpt", "decision_transformer"})
"""Families of transformers' Conv1D, whose weights are [K, N]: blocks along their last dimension would cross outputs."""


def weight_entries(
    layout: Layout, fmt: Format, module: str, shape: tuple[int, ...], activations: bool
) -> dict[str, Entry]:
    """Tensors to write for a weight [N, K]: name → (dtype, shape)."""
    names = weight_names(layout, fmt)
    rows, columns = shape
    if isinstance(fmt, MXFP8):
        return {
            f"{module}.{names.elements}": ("F8_E4M3", (rows, columns)),
            f"{module}.{names.block_scale}": ("U8", (rows, columns // 32)),
        }
    entries: dict[str, Entry] = {
        f"{module}.{names.elements}": ("U8", (rows, columns // 2)),
        f"{module}.{names.block_scale}": ("F8_E4M3", (rows, columns // 16)),
        f"{module}.{names.tensor_scale}": ("F32", names.scalar_shape),
    }
    if activations:
        entries[f"{module}.{names.input_scale}"] = ("F32", names.scalar_shape)
    return entries


def weight_tensors(
    layout: Layout,
    module: str,
    q: QuantizedTensor,
    input_scale: float | Tensor | None,
    encode_scale: Tensor | None = None,
) -> dict[str, Tensor]:
    """The tensors themselves, with the names, dtypes and shapes of `weight_entries`.

    input_scale: what multiplies, as a number; or float32 () as it is stored.
    encode_scale: S_enc of q.amax, float32 (), where the caller has it already.
    """
    names = weight_names(layout, q.format)
    tensors = {f"{module}.{names.elements}": q.packed, f"{module}.{names.block_scale}": q.block_scale}
    if isinstance(q.format, NVFP4):
        assert q.amax is not None
        assert q.tensor_scale is not None
        scale = q.tensor_scale
        if names.divisors:
            scale = ops.tensor_scales(q.amax, q.format)[0] if encode_scale is None else encode_scale
        tensors[f"{module}.{names.tensor_scale}"] = scale.reshape(names.scalar_shape)
        if isinstance(input_scale, float):
            value = 1.0 / input_scale if names.divisors else input_scale
            input_scale = torch.full(names.scalar_shape, value, dtype=torch.float32)
        if input_scale is not None:
            tensors[f"{module}.{names.input_scale}"] = input_scale.reshape(names.scalar_shape)
    return tensors


def quantized_tensor(layout: Layout, fmt: Format, module: str, tensors: dict[str, Tensor]) -> QuantizedTensor:
    """The inverse of `weight_tensors`; amax is not on disk and stays None."""
    names = weight_names(layout, fmt)
    parts = [names.elements, names.block_scale] + ([names.tensor_scale] if names.tensor_scale else [])
    missing = [f"{module}.{part}" for part in parts if f"{module}.{part}" not in tensors]
    if missing:
        raise CheckpointError(f"{missing[0]} is missing")
    elements, block_scale = (tensors[f"{module}.{part}"] for part in parts[:2])
    if isinstance(fmt, MXFP8):
        return QuantizedTensor(elements, block_scale, None, None, fmt)
    scale = tensors[f"{module}.{names.tensor_scale}"].reshape(())
    return QuantizedTensor(elements, block_scale, 1.0 / scale if names.divisors else scale, None, fmt)


def kv_scale_entries(layout: Layout, attention: str, leaves: frozenset[str]) -> dict[str, Entry]:
    """Names and shapes of an attention module's FP8 KV-cache scales (multipliers in both layouts).

    compressed-tensors always wants both. ModelOpt hangs them on k_proj and v_proj; where an attention has none of
    these (MLA), an engine takes 1.0.
    """
    if layout == "compressed-tensors":
        return {f"{attention}.{letter}_scale": ("F32", (1,)) for letter in "kv"}
    return {f"{attention}.{letter}_proj.{letter}_scale": ("F32", ()) for letter in "kv" if f"{letter}_proj" in leaves}

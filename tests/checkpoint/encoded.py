"""Models as others quantize them: random elements and scales in every layout that conversion decodes, and their values.

The values are computed here by another way than the code under test: from the bits of each element, looked up scale by
scale, multiplied in float64 and rounded once to float32.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from halfbyte import names

from . import models
from .models import HIDDEN, VOCAB, Draw, Model, Tensors

E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], dtype=torch.float64)


def e4m3_value(elements: Tensor) -> Tensor:
    """float64, by sign, exponent and mantissa."""
    byte = elements.view(torch.uint8).long()
    exponent, mantissa = byte >> 3 & 15, (byte & 7).double()
    magnitude = torch.where(exponent > 0, torch.exp2(exponent - 7.0) * (1 + mantissa / 8), mantissa / 512)
    return torch.where(byte >= 128, -magnitude, magnitude)


def e2m1_value(packed: Tensor) -> Tensor:
    codes = torch.stack((packed & 15, packed >> 4), -1).flatten(-2)
    return E2M1[codes.long()]


def expand(scale: Tensor, shape: tuple[int, int], block: tuple[int, int]) -> Tensor:
    """One scale for each element."""
    rows, columns = torch.arange(shape[0]) // block[0], torch.arange(shape[1]) // block[1]
    return scale.double().reshape(-(-shape[0] // block[0]), -1)[rows][:, columns]


@dataclass
class Encoded:
    """A quantized model, and what it decodes to.

    Attributes:
        model: as it lies on disk.
        decoded: name → float32, of what is encoded.
        plain: all others, under the names that they decode to.
    """

    model: Model
    decoded: Tensors
    plain: Tensors
    config: dict[str, Any] = field(default_factory=dict)

    @property
    def high_precision(self) -> Model:
        """What conversion should take it for; weights that it will not quantize are bfloat16."""
        layers = self.config["num_hidden_layers"]

        def is_kept(name: str) -> bool:
            parsed = names.parse(name, layers)
            return parsed.kind == "lm_head" or parsed.tower == "mtp"

        tensors = {n: t.bfloat16() if is_kept(n) else t for n, t in self.decoded.items()}
        return Model(tensors | self.plain, self.config)


class Bits:
    """Random elements and scales."""

    def __init__(self, seed: int = 7) -> None:
        self.rng = torch.Generator().manual_seed(seed)

    def e4m3(self, *shape: int) -> Tensor:
        """All bytes but the two NaN."""
        byte = torch.randint(0, 254, shape, generator=self.rng)
        return (byte + (byte >= 127).long()).to(torch.uint8).view(torch.float8_e4m3fn)

    def bytes(self, *shape: int) -> Tensor:
        return torch.randint(0, 256, shape, generator=self.rng, dtype=torch.uint8)

    def scale(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.exp2(torch.rand(shape, generator=self.rng) * 6 - 14).to(dtype)

    def exponent(self, *shape: int) -> Tensor:
        return torch.randint(110, 122, shape, generator=self.rng, dtype=torch.uint8)


def is_linear(name: str, tensor: Tensor) -> bool:
    return name.endswith("weight") and tensor.dim() == 2 and "embed" not in name and "gate.weight" not in name


def encode(
    model: Model,
    one: Callable[[str, tuple[int, int]], tuple[Tensors, Tensor]],
    quantization: dict[str, Any],
    skip: tuple[str, ...] = ("lm_head", "shared_head", "eh_proj"),
    also: Tensors | None = None,
) -> Encoded:
    """Each Linear by `one`: module and shape → its tensors by parameter, and its values."""
    stored: Tensors = {}
    decoded: Tensors = {}
    plain: Tensors = {}
    for name, tensor in model.tensors.items():
        if is_linear(name, tensor) and not any(part in name for part in skip):
            module = name.removesuffix(".weight")
            tensors, values = one(module, (tensor.shape[0], tensor.shape[1]))
            stored |= {f"{module}.{parameter}": t.clone() for parameter, t in tensors.items()}
            decoded[name] = values
        else:
            stored[name] = plain[name] = tensor
    config = model.config | {"quantization_config": quantization}
    return Encoded(Model(stored | (also or {}), config), decoded, plain, model.config)


def fp8(
    model: Model,
    quantization: dict[str, Any],
    block: tuple[int, int] | None,
    parameter: str = "weight_scale_inv",
    dtype: torch.dtype = torch.float32,
    shaped: Callable[[Tensor], Tensor] = lambda scale: scale,
    power_of_two: bool = False,
    beside: Tensors | None = None,
    **more: Any,
) -> Encoded:
    """block: None for one scale per tensor. shaped: how the grid of scales is stored."""
    bits = Bits()

    def one(module: str, shape: tuple[int, int]) -> tuple[Tensors, Tensor]:
        size = block or shape
        size = (size[0], size[1] or shape[1])
        elements = bits.e4m3(*shape)
        scale = bits.scale(-(-shape[0] // size[0]), -(-shape[1] // size[1]), dtype=dtype)
        if power_of_two:
            scale = torch.exp2(scale.float().log2().round()).to(dtype)
        values = (e4m3_value(elements) * expand(scale, shape, size)).float()
        return {"weight": elements, parameter: shaped(scale)} | (beside or {}), values

    return encode(model, one, quantization, **more)


def mx(
    model: Model, quantization: dict[str, Any], elements: str, parameter: str, dtype: torch.dtype = torch.uint8
) -> Encoded:
    """elements: "weight" for MXFP8, "weight_packed" for MXFP4."""
    bits = Bits()

    def one(module: str, shape: tuple[int, int]) -> tuple[Tensors, Tensor]:
        scale = bits.exponent(shape[0], shape[1] // 32)
        multiplier = expand(torch.exp2(scale.double() - 127), shape, (1, 32))
        if elements == "weight":
            data = bits.e4m3(*shape)
            values = e4m3_value(data) * multiplier
        else:
            data = bits.bytes(shape[0], shape[1] // 2)
            values = e2m1_value(data) * multiplier
        return {elements: data, parameter: scale.view(dtype)}, values.float()

    return encode(model, one, quantization)


def nvfp4(layout: str) -> Encoded:
    """As ModelOpt (weight-only) or compressed-tensors writes it; fused layers have one tensor scale."""
    bits = Bits()
    is_ct = layout == "compressed-tensors"
    global_scales: dict[str, Tensor] = {}

    def one(module: str, shape: tuple[int, int]) -> tuple[Tensors, Tensor]:
        packed = bits.bytes(shape[0], shape[1] // 2)
        scale = (bits.e4m3(shape[0], shape[1] // 16).view(torch.uint8) & 127).view(torch.float8_e4m3fn)
        encode_scale = global_scales.setdefault(names.parse(f"{module}.weight").fused or module, 1 / bits.scale(1))
        decode_scale = torch.ones(1) / encode_scale
        block = (e4m3_value(scale) * decode_scale.double()).float()
        values = (e2m1_value(packed) * expand(block, shape, (1, 16))).float()
        if is_ct:
            return {"weight_packed": packed, "weight_scale": scale, "weight_global_scale": encode_scale}, values
        return {"weight": packed, "weight_scale": scale, "weight_scale_2": decode_scale.reshape(())}, values

    ct = ct_config({"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16, "symmetric": True})
    modelopt = {"quant_method": "modelopt", "quant_algo": "W4A16_NVFP4", "ignore": ["lm_head"]}
    return encode(models.dense(1), one, ct if is_ct else modelopt)


def ct_config(weights: dict[str, Any], **more: Any) -> dict[str, Any]:
    group = {"targets": ["Linear"], "weights": {"symmetric": True, "dynamic": False} | weights}
    base = {"quant_method": "compressed-tensors", "quantization_status": "compressed", "ignore": ["lm_head"]}
    return base | {"config_groups": {"group_0": group}} | more


def deepseek(block: tuple[int, int] = (48, 40), **more: Any) -> Encoded:
    """With an MTP layer, whose weights a conversion leaves in high precision."""
    quantization = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic"}
    return fp8(models.mla(mtp_layers=1), quantization | {"weight_block_size": list(block)}, block, **more)


def modelopt_fp8(algorithm: str = "FP8", **more: Any) -> Encoded:
    """lm_head is FP8 too; static inputs and a KV cache have scales."""
    model = models.dense(1)
    path = "model.layers.0.self_attn"
    kv = {f"{path}.{letter}_proj.{letter}_scale": torch.tensor(0.5) for letter in "kv"}
    quantization = {
        "quant_method": "modelopt",
        "quant_algo": algorithm,
        "ignore": [],
        "kv_cache_scheme": {"num_bits": 8},
    }
    inputs = {"input_scale": torch.tensor(0.25)}
    arguments = {"block": None, "shaped": lambda scale: scale.reshape(()), "skip": (), "also": kv, "beside": inputs}
    return fp8(model, quantization, parameter="weight_scale", **(arguments | more))


def gpt_oss(layers: int = 1, experts: int = 2, width: int = 96) -> Encoded:
    """Experts stacked: rows of gate and up alternate, in blocks, scales and biases."""
    bits, draw = Bits(), Draw()
    stored: Tensors = {"model.embed_tokens.weight": draw(VOCAB, HIDDEN), "model.norm.weight": 1 + draw(HIDDEN)}
    stored["lm_head.weight"] = draw(VOCAB, HIDDEN)
    for i in range(layers):
        mlp = {"router.weight": draw(experts, HIDDEN), "router.bias": draw(experts)}
        attention = draw.attention(bias=True) | {"o_proj.bias": draw(HIDDEN), "sinks": draw(4)}
        stored |= models.under(f"model.layers.{i}", draw.layer(attention, mlp))
    plain, decoded = dict(stored), {}
    for i in range(layers):
        path = f"model.layers.{i}.mlp.experts"
        for part, rows, columns in (("gate_up_proj", 2 * width, HIDDEN), ("down_proj", HIDDEN, width)):
            blocks, scales = bits.bytes(experts, rows, columns // 32, 16), bits.exponent(experts, rows, columns // 32)
            bias = draw(experts, rows)
            names_ = (f"{path}.{part}_blocks", f"{path}.{part}_scales", f"{path}.{part}_bias")
            stored |= dict(zip(names_, (blocks, scales, bias), strict=True))
            for e in range(experts):
                multiplier = torch.exp2(scales[e].double() - 127).repeat_interleave(32, 1)
                values = (e2m1_value(blocks[e].flatten(1)) * multiplier).float()
                leaves = {"gate_proj": slice(0, None, 2), "up_proj": slice(1, None, 2)}
                for leaf, where in leaves.items() if part == "gate_up_proj" else [("down_proj", slice(None))]:
                    decoded[f"{path}.{e}.{leaf}.weight"] = values[where].contiguous()
                    plain[f"{path}.{e}.{leaf}.bias"] = bias[e][where].contiguous()
    config = {"model_type": "gpt_oss", "architectures": ["GptOssForCausalLM"], "num_hidden_layers": layers}
    config |= {"hidden_size": HIDDEN, "intermediate_size": width, "num_local_experts": experts, "vocab_size": VOCAB}
    quantization = {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}
    return Encoded(Model(stored, config | {"quantization_config": quantization}), decoded, plain, config)


_CHANNEL = {"num_bits": 8, "type": "float", "strategy": "channel"}
_DENSE = models.dense(1)
_MX_ARGS = {"type": "float", "strategy": "group", "group_size": 32, "scale_dtype": "torch.uint8"}
SOURCES: dict[str, Callable[[], Encoded]] = {
    "DeepSeek": deepseek,
    "DeepSeek, 128×128": lambda: deepseek((128, 128)),
    "DeepSeek, powers of two": lambda: deepseek((128, 32), power_of_two=True),
    "Qwen3 FP8": lambda: deepseek((32, 48), dtype=torch.bfloat16),
    "AutoFP8": lambda: fp8(
        _DENSE,
        {"quant_method": "fp8", "activation_scheme": "static"},
        None,
        "weight_scale",
        shaped=lambda scale: scale.reshape(1),
        beside={"input_scale": torch.ones(1)},
    ),
    "MXFP8 of SGLang": lambda: mx(
        _DENSE, {"quant_method": "mxfp8", "weight_block_size": [1, 32]}, "weight", "weight_scale_inv"
    ),
    "MXFP8 of transformers": lambda: mx(
        _DENSE,
        {"quant_method": "fp8", "weight_block_size": [1, 32]},
        "weight",
        "weight_scale_inv",
        torch.float8_e8m0fnu,
    ),
    "compressed-tensors by tensor": lambda: fp8(
        _DENSE,
        ct_config({"num_bits": 8, "type": "float", "strategy": "tensor"}),
        None,
        "weight_scale",
        shaped=lambda scale: scale.reshape(1),
        beside={"input_scale": torch.ones(1)},
    ),
    "compressed-tensors by channel": lambda: fp8(
        _DENSE, ct_config(_CHANNEL), (1, 0), "weight_scale", dtype=torch.bfloat16
    ),
    "compressed-tensors in blocks": lambda: fp8(
        _DENSE,
        ct_config({"num_bits": 8, "type": "float", "strategy": "block", "block_structure": [48, 40]}),
        (48, 40),
        "weight_scale",
    ),
    "compressed-tensors MXFP8": lambda: mx(_DENSE, ct_config({"num_bits": 8} | _MX_ARGS), "weight", "weight_scale"),
    "compressed-tensors MXFP4": lambda: mx(
        _DENSE, ct_config({"num_bits": 4} | _MX_ARGS), "weight_packed", "weight_scale"
    ),
    "ModelOpt FP8": modelopt_fp8,
    "ModelOpt FP8 by channel": lambda: modelopt_fp8(
        "FP8_PER_CHANNEL_PER_TOKEN", block=(1, 0), shaped=lambda scale: scale.flatten()
    ),
    "ModelOpt FP8 in blocks": lambda: modelopt_fp8(
        "FP8_PB_WO", block=(128, 128), shaped=lambda scale: scale[:, None, :, None], beside=None
    ),
    "ModelOpt MXFP8": lambda: mx(_DENSE, {"quant_method": "modelopt", "quant_algo": "MXFP8"}, "weight", "weight_scale"),
    "ModelOpt NVFP4": lambda: nvfp4("modelopt"),
    "compressed-tensors NVFP4": lambda: nvfp4("compressed-tensors"),
    "gpt-oss": gpt_oss,
}

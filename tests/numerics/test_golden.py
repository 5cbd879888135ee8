"""Every golden vector, bit by bit; see golden/README.md for where they come from."""

import re

import pytest
import torch

from halfbyte import MXFP8, NVFP4, quantize
from halfbyte.numerics import matmul, nvfp4

from ..check import close, equal, same_bits

DTYPES = ["float32", "bfloat16", "float16"]
SIX = ["448_mae", "448_mse", "256_mae", "256_mse", "448_mse_fp16err", "256_mae_fp16err"]
VECTORS = {  # config: how many quantizations of each dtype
    base + rule: count
    for base, count in {"tensor_1x16": 91, "tensor_16x16": 78, "row_1x16": 91}.items()
    for rule in ["", *(f"_4over6_{six}" for six in SIX)]
}
ALL = [(dtype, config, count) for dtype in DTYPES for config, count in VECTORS.items()]
ALL.append(("bfloat16", "tensor_1x16_rht", 36))


def format_of(config: str) -> NVFP4:
    match = re.fullmatch(r"(tensor|row)_(1|16)x16(_rht)?(?:_4over6_(\d+)_(mae|mse)(_fp16err)?)?", config)
    if match is None:
        raise ValueError(config)
    scaling, rows, rht, e4m3_max, error, fp16 = match.groups()
    block = (int(rows), 16)
    if e4m3_max is None:
        return NVFP4(block, scaling, hadamard=bool(rht))
    arithmetic = "fp16" if fp16 else "exact"
    return NVFP4(block, scaling, "four_over_six", bool(rht), "nearest", error, int(e4m3_max), arithmetic)


def test_no_vector_is_lost(golden) -> None:
    keys = {(d, key) for d in DTYPES for key in golden(f"nvfp4_{d}") if "/packed" in key}
    equal({(d, key.split("/")[0]) for d, key in keys}, {(d, config) for d, config, _ in ALL})
    equal(len(keys), 5496)
    equal(sum(count for *_, count in ALL), 5496)


@pytest.mark.parametrize(("dtype", "config", "count"), ALL)
def test_nvfp4(golden, dtype: str, config: str, count: int) -> None:
    vectors, fmt, seen = golden(f"nvfp4_{dtype}"), format_of(config), 0
    for key in vectors:
        if not key.startswith(f"{config}/") or "/packed" not in key:
            continue
        _, name, _ = key.split("/")
        x, t = vectors[f"input/{name}"], "_t" if key.endswith("_t") else ""
        q = quantize(x.mT if t else x, fmt, impl="reference")
        same_bits(q.packed, vectors[key], key)
        same_bits(q.block_scale.view(torch.uint8), vectors[f"{config}/{name}/block_scale{t}"], key)
        same_bits(q.amax.reshape(-1), vectors[f"{config}/{name}/amax{t}"], key)
        seen += 1
    equal(seen, count)


@pytest.mark.parametrize(("dtype", "count"), [("float32", 39), ("bfloat16", 39), ("float16", 39)])
def test_mxfp8(golden, dtype: str, count: int) -> None:
    vectors = golden("mxfp8")
    names = [key.removesuffix("/x") for key in vectors if key.startswith(f"{dtype}/") and key.endswith("/x")]
    equal(len(names), count)
    for name in names:
        q = quantize(vectors[f"{name}/x"], MXFP8(), impl="reference")
        same_bits(q.packed.view(torch.uint8), vectors[f"{name}/elements"].view(torch.uint8), name)
        same_bits(q.block_scale, vectors[f"{name}/block_scale"].view(torch.uint8), name)


PLAIN, ROW, SIX_MAE_256 = NVFP4(), NVFP4(scaling="row"), {"scale_rule": "four_over_six", "e4m3_max": 256}
GEMMS = {
    "tensor": (PLAIN, PLAIN),
    "tensor_w2d": (PLAIN, NVFP4(block=(16, 16))),
    "row": (ROW, PLAIN),
    "row_4over6_256": (NVFP4(scaling="row", **SIX_MAE_256), NVFP4(**SIX_MAE_256)),
    "row_4over6_weights_448_mse": (ROW, NVFP4(scale_rule="four_over_six", e4m3_max=448, error="mse")),
}


def test_no_gemm_is_lost(golden) -> None:
    keys = [key for key in golden("nvfp4_gemm") if key.endswith("/y")]
    equal(sorted(keys), sorted(f"{c}/{s}/y" for c in GEMMS for s in ("16x64x32", "32x256x16", "48x128x64")))


@pytest.mark.parametrize("shape", ["16x64x32", "32x256x16", "48x128x64"])
@pytest.mark.parametrize("config", GEMMS)
def test_gemm(golden, config: str, shape: str) -> None:
    """Float32 accumulation against ours in float64.

    K/16 block results are added up, each addition rounding by at most 2^-24 of Σ|x·w|. A block result is exact in Σ q·q
    (multiples of 1/4 below 1024) and in s·s (8 bits), and rounded in · s·s, in alpha and in · alpha: 3. Ours rounds
    once, and alpha made of amaxes may differ from S_dec·S_dec by 2.
    """
    vectors = golden("nvfp4_gemm")
    x, w = (nvfp4.quantize(vectors[f"{n}/{shape}"], fmt) for n, fmt in zip("xw", GEMMS[config], strict=True))
    magnitude = (nvfp4.dequantize(*q[:3]).double().abs() for q in (x, w))
    total = next(magnitude) @ next(magnitude).mT
    blocks = int(shape.split("x")[1]) // 16
    close(matmul.matmul(x, w), vectors[f"{config}/{shape}/y"], (blocks + 6) * 2.0**-24 * total)

"""The instruction that converts to E2M1, where a GPU has one: the bytes of the contract.

Without such a GPU its PTX is read, line by line, with the semantics that NVIDIA documents, on every bfloat16; and it is
assembled for the GPUs that have it.
"""

import re

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from halfbyte.formats import NVFP4
from halfbyte.kernels import _target, quantize
from halfbyte.kernels._ptx import e2m1_conversion_ptx
from halfbyte.numerics import e2m1

from ..check import equal, same_bits, true

ON_GPU = torch.cuda.is_available() and not _target.INTERPRETING
CONVERTS = ON_GPU and _target.has_fp4_conversion(torch.cuda.get_device_capability())


def converted(y: Tensor) -> Tensor:
    """cvt.rn.satfinite to E2M1 by PTX's documentation: nearest even, the sign kept, NaN → +6. int32 codes."""
    values = torch.tensor(e2m1.VALUES, dtype=torch.float64)
    distance = (y.double().abs().clamp(max=6.0)[:, None] - values).abs()
    nearest = distance == distance.amin(1, keepdim=True)  # two on a tie, of which one is even
    even_first = torch.tensor([0, 2, 4, 6, 1, 3, 5, 7])
    code = even_first[nearest[:, even_first].int().argmax(1)] | (y.signbit().long() << 3)
    return torch.where(y.isnan(), 7, code).int()


def run_ptx(text: str, operands: list[Tensor]) -> Tensor:
    """What register $0 (int64, 32 bits) holds after the program: operands are float32, $1 and so on."""
    registers = {f"${1 + i}": value for i, value in enumerate(operands)}
    for line in text.strip("{}\n").split("\n"):
        if line.startswith(".reg"):
            continue
        guard, op, rest = re.fullmatch(r"(?:@(\w+) )?(\S+) (.*);", line).groups()
        target, *names = re.findall(r"[\w$]+", rest)
        values = [registers[name] if name in registers else constant(name) for name in names]
        if op == "mul.rn.f32":
            result = values[0] * values[1]
        elif op == "add.rn.f32":
            result = values[0] + values[1]
        elif op == "fma.rn.f32":  # the product is exact in float64
            result = (values[0].double() * values[1].double() + values[2].double()).float()
        elif op == "setp.nan.f32":
            result = values[0].isnan() | values[1].isnan()
        elif op == "cvt.rn.satfinite.e2m1x2.f32":
            result = converted(values[0]).long() << 4 | converted(values[1]).long()
        elif op == "mov.b32" and len(values) == 4:
            result = sum(value << 8 * i for i, value in enumerate(values))
        elif op == "mov.b32":
            (result,) = values
        elif op == "and.b32":
            result = values[0] & values[1]
        else:
            raise AssertionError(f"an instruction that this test does not know: {line}")
        registers[target] = torch.where(registers[guard], result, registers[target]) if guard else result
    return registers["$0"]


def constant(text: str) -> Tensor:
    if text.startswith("0f"):
        return torch.tensor(int(text[2:], 16)).int().view(torch.float32)
    return torch.tensor(int(text, 16))


def test_the_documented_conversion_is_the_contracts_but_for_minus_zero_and_nan() -> None:
    patterns = torch.arange(65536, dtype=torch.int32).to(torch.int16).view(torch.bfloat16).float()
    differ = converted(patterns) != e2m1.encode(patterns).int()
    equal(differ, patterns.isnan() | ((patterns == 0) & patterns.signbit()))


@pytest.mark.parametrize("safe", [False, True])
def test_every_bfloat16_under_many_scales(safe: bool) -> None:
    patterns = torch.arange(65536, dtype=torch.int32).to(torch.int16).view(torch.bfloat16).float()
    nan = float("nan")
    scales = [1.0, 0.37, 6.0, 1e-3, 3e5, 2.0**-100, nan] + ([] if safe else [1e-38, 2.0**-140, 3.4e38])
    for scale in scales:
        x = patterns if scale != scale else torch.where(patterns.isnan(), 1.0, patterns)  # a NaN would be the scale's
        if safe:  # that no product of a non-zero element rounds to zero
            x = torch.where((x * scale).abs() < 2.0**-148, x * 0, x)
        lo, hi = x.view(4, -1), x.roll(12345).view(4, -1)
        e = torch.full_like(lo[0], scale)
        word = run_ptx(e2m1_conversion_ptx(safe), [*lo, *hi, e, e, e, e])
        for i in range(4):
            codes = torch.stack((e2m1.encode(lo[i] * scale), e2m1.encode(hi[i] * scale)), -1).flatten()
            same_bits((word >> 8 * i & 255).to(torch.uint8), e2m1.pack(codes), f"{scale}, byte {i}")


@pytest.mark.parametrize("safe", [False, True])
def test_near_every_tie(safe: bool) -> None:
    steps = torch.arange(-64, 64, dtype=torch.int32)
    ties = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 6.0])
    near = (ties.view(torch.int32)[:, None] + steps).view(torch.float32).flatten()
    lo = torch.cat((near, -near)).view(4, -1)
    e = torch.ones_like(lo[0])
    word = run_ptx(e2m1_conversion_ptx(safe), [*lo, *lo.flip(1), e, e, e, e])
    for i in range(4):
        codes = torch.stack((e2m1.encode(lo[i]), e2m1.encode(lo[i].flip(0))), -1).flatten()
        same_bits((word >> 8 * i & 255).to(torch.uint8), e2m1.pack(codes), f"byte {i}")


def compiled_ptx(capability: int, native: int) -> tuple[str, bytes]:
    """The kernel for dense bfloat16, compiled and assembled; needs no GPU."""
    kernel = quantize._quantize_1x16
    constants = {
        "BB": 128, "STEPS": 1, "EVEN": True, "SINGLE": True, "DENSE": True, "KIND": 0,
        "OUT": "packed", "F": NVFP4(), "WORDS": False, "NATIVE": native,
    }  # fmt: skip
    pointers = {"x_ptr": "*bf16", "out_ptr": "*u8", "scale_ptr": "*u8"}
    words = dict.fromkeys(("seed", "offset", "first_block"), "i64")
    kinds = {name: "*fp32" if name.endswith("_ptr") else "i32" for name in kernel.arg_names}
    signature = kinds | pointers | words | dict.fromkeys(constants, "constexpr")
    done = triton.compile(
        ASTSource(fn=kernel, signature=signature, constexprs=constants),
        target=GPUTarget("cuda", capability, 32),
        options={"num_warps": 2, "enable_fp_fusion": False},
    )
    return done.asm["ptx"], done.asm["cubin"]


@pytest.mark.skipif(_target.INTERPRETING, reason="the interpreter compiles nothing")
@pytest.mark.parametrize("capability", [80, 90, 100, 120])
def test_assembles_where_the_instruction_is_said_to_be(capability: int) -> None:
    converts = _target.has_fp4_conversion(divmod(capability, 10))
    ptx, cubin = compiled_ptx(capability, 3 if converts else 1)
    true(cubin, "nothing assembled")
    equal(ptx.count("e2m1x2.f32") > 0, converts)


def test_who_has_it() -> None:
    capabilities = [(8, 0), (8, 9), (9, 0), (10, 0), (10, 3), (12, 0), (12, 1)]
    equal([_target.has_fp4_conversion(c) for c in capabilities], [False, False, False, True, True, True, True])


@pytest.mark.gpu
@pytest.mark.skipif(not CONVERTS, reason="needs a GPU with an FP4 conversion, sm_100 or sm_120")
def test_the_portable_twin_gives_the_same_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    patterns = torch.arange(65536, dtype=torch.int32).to(torch.int16).view(torch.bfloat16).view(-1, 32).cuda()
    large = torch.randn(4096, 4096, device="cuda", generator=torch.Generator("cuda").manual_seed(0))
    for x in (patterns, torch.where(patterns.isfinite(), patterns, -0.0), large, large.bfloat16(), -large.half()):
        for fmt in (NVFP4(), NVFP4(block=(16, 16)), NVFP4(scaling="row"), NVFP4(scale_rule="four_over_six")):
            for amax in (None, torch.tensor(2.5, device="cuda"), torch.tensor(1e-30, device="cuda")):
                if amax is not None and fmt.scaling == "row":
                    continue
                native = quantize.quantize(x, fmt, amax=amax)
                with monkeypatch.context() as patch:
                    patch.setattr(_target, "native_level", lambda device: 2)
                    portable = quantize.quantize(x, fmt, amax=amax)
                for a, e in zip(native, portable, strict=True):
                    same_bits(a.reshape(-1).view(torch.uint8), e.reshape(-1).view(torch.uint8), f"{fmt} {amax}")

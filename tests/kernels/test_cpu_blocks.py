"""The CPU's decoder of others' formats against the contract, bit for bit: every byte, ragged edges, all scales."""

import pytest
import torch

from halfbyte.kernels.cpu import blocks as cpu
from halfbyte.kernels.cpu import compile as cpu_compile
from halfbyte.numerics import blocks
from halfbyte.ops.blocks import decode

from ..check import same_bits


def scales(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    rng = torch.Generator().manual_seed(seed)
    return torch.exp2(torch.rand(rows, columns, generator=rng) * 250 - 140)  # products overflow and become subnormal


@pytest.mark.parametrize("block", [(1, 32), (16, 16), (128, 128), (48, 40), (1, 160), (96, 160), (7, 3)], ids=str)
def test_e4m3(block: tuple[int, int]) -> None:
    byte = torch.randint(0, 256, (96, 160), generator=torch.Generator().manual_seed(1)).to(torch.uint8)
    byte[:2, :128] = torch.arange(256, dtype=torch.uint8).reshape(2, 128)  # the two NaN included
    elements = byte.view(torch.float8_e4m3fn)
    scale = scales(-(-96 // block[0]), -(-160 // block[1]))
    same_bits(cpu.decode(elements, scale, block), blocks.decode(elements, scale, block))
    same_bits(decode(elements, scale, block, impl="cpu"), decode(elements, scale, block, impl="reference"))
    same_bits(
        cpu.decode(elements.T, scale.T, block[::-1]), blocks.decode(elements.T.contiguous(), scale.T, block[::-1])
    )


@pytest.mark.parametrize("columns", [16, 32])
def test_e2m1(columns: int) -> None:
    packed = torch.arange(256, dtype=torch.uint8).repeat(6).reshape(24, 64)
    scale = scales(24, 128 // columns)
    same_bits(cpu.decode(packed, scale, (1, columns)), blocks.decode(packed, scale, (1, columns)))


def test_many_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_compile, "_SMALL", 1 << 8)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 7)
    byte = torch.randint(0, 127, (131, 70), generator=torch.Generator().manual_seed(2)).to(torch.uint8)
    elements, scale = byte.view(torch.float8_e4m3fn), scales(3, 2)
    same_bits(cpu.decode(elements, scale, (48, 48)), blocks.decode(elements, scale, (48, 48)))


def test_empty() -> None:
    for shape in ((0, 32), (4, 0)):
        found = cpu.decode(
            torch.empty(shape, dtype=torch.float8_e4m3fn), torch.empty(shape[0], shape[1] // 32), (1, 32)
        )
        same_bits(found, torch.empty(shape))

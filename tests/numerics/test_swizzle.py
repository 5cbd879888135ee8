import pytest
import torch

from halfbyte.numerics.swizzle import swizzle, swizzled_size, unswizzle

from ..check import equal, same_bits

SHAPES = [(128, 4), (1, 1), (130, 7), (256, 16), (0, 4), (3, 0)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("lead", [(), (3,), (2, 0)])
def test_every_scale_has_its_place(shape: tuple[int, int], lead: tuple[int, ...]) -> None:
    """By the formula of cuBLAS's documentation, scale by scale."""
    rows, columns = shape
    scale = torch.randint(1, 256, (*lead, rows, columns), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    wanted = torch.zeros((*lead, swizzled_size(rows, columns)), dtype=torch.uint8)
    for r in range(rows):
        for c in range(columns):
            tile = r // 128 * -(-columns // 4) + c // 4
            wanted[..., tile * 512 + r % 32 * 16 + r % 128 // 32 * 4 + c % 4] = scale[..., r, c]
    got = swizzle(scale)
    same_bits(got, wanted)
    same_bits(unswizzle(got, rows, columns), scale)


def test_torchao_agrees() -> None:
    to_blocked = pytest.importorskip("torchao.prototype.mx_formats.utils").to_blocked
    scale = torch.randint(0, 256, (200, 24), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    same_bits(swizzle(scale), to_blocked(scale).flatten())


def test_dtype_and_strides() -> None:
    scale = torch.rand(40, 130).to(torch.float8_e4m3fn)
    equal(swizzle(scale).dtype, torch.float8_e4m3fn)
    same_bits(swizzle(scale.mT), swizzle(scale.mT.contiguous()))

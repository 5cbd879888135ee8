import numpy as np
import pytest
import torch

from halfbyte.numerics import e2m1

from ..check import close, equal, same_bits
from . import oracle

MIDPOINTS = [0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0]


def all_bfloat16() -> torch.Tensor:
    return torch.arange(65536, dtype=torch.int32).to(torch.uint16).view(torch.bfloat16).float()


def near_midpoints() -> torch.Tensor:
    middle = np.array(MIDPOINTS, dtype=np.float32)
    ends = [np.nextafter(middle, np.float32(end)) for end in (-np.inf, np.inf)]
    values = torch.from_numpy(np.concatenate([middle, *ends]))
    return torch.cat((values, -values))


@pytest.mark.parametrize("values", [all_bfloat16(), near_midpoints()], ids=["all bfloat16", "midpoints"])
def test_encode_equals_the_oracle(values: torch.Tensor) -> None:
    equal(e2m1.encode(values), torch.tensor([oracle.e2m1(v) for v in values.tolist()], dtype=torch.uint8))


@pytest.mark.parametrize("values", [all_bfloat16(), near_midpoints()], ids=["all bfloat16", "midpoints"])
def test_the_integer_trick_equals_encode(values: torch.Tensor) -> None:
    """What the kernels do: the sums round at 2^23, where float32 has unit steps, and leave the code in the low bits."""
    a, big = values.abs(), 2.0**23
    smallest = torch.minimum(torch.minimum(2 * a + big, a + (2 + big)), a / 2 + (4 + big)).clamp(max=big + 7)
    code = torch.where(values.isnan(), 0, smallest.view(torch.int32) & 7).to(torch.uint8)
    equal(e2m1.with_sign(code, values), e2m1.encode(values))


@pytest.mark.parametrize(
    ("value", "code"),
    [
        (0.0, 0),
        (-0.0, 0),
        (0.25, 0),
        (-0.25, 8),
        (1e-45, 0),
        (-1e-45, 8),
        (0.75, 2),
        (1.25, 2),
        (1.75, 4),
        (2.5, 4),
        (3.5, 6),
        (-3.5, 14),
        (5.0, 6),
        (5.0000005, 7),
        (6.0, 7),
        (1e38, 7),
        (float("inf"), 7),
        (-float("inf"), 15),
        (float("nan"), 0),
        (-float("nan"), 0),
    ],
)
def test_encode_by_hand(value: float, code: int) -> None:
    equal(e2m1.encode(torch.tensor([value])).item(), code)


def test_decode_all_codes() -> None:
    magnitudes = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
    same_bits(
        e2m1.decode(torch.arange(16, dtype=torch.uint8)),
        torch.tensor(magnitudes + [-magnitude for magnitude in magnitudes]),
    )


def test_decoded_codes_encode_to_themselves() -> None:
    codes = torch.tensor([c for c in range(16) if c != 8], dtype=torch.uint8)  # 8 is -0.0, which encodes as 0
    equal(e2m1.encode(e2m1.decode(codes)), codes)


def test_pack_and_unpack_all_bytes() -> None:
    packed = torch.arange(256, dtype=torch.uint8).reshape(16, 16)
    codes = e2m1.unpack(packed)
    equal(codes[..., 0::2], packed % 16, "low nibbles are the even columns")
    equal(codes[..., 1::2], packed // 16, "high nibbles are the odd columns")
    equal(e2m1.pack(codes), packed)


def test_stochastic_rounding_over_every_possible_u(rng: torch.Generator) -> None:
    """The mean code over all 65,536 values of u is the position between the codes, up to half a step of u.

    u = (h + 0.5)/65536 makes P(up) the fraction rounded to a multiple of 2^-16: at most 2^-17 away. `position` and
    `position + u` are each rounded in float32, below 8: at most 2^-22 each, which can move one u across the boundary
    only if the fraction is that close to it.
    """
    u = (torch.arange(65536).float() + 0.5) / 65536
    a = torch.cat((torch.rand(100, generator=rng) * 6, torch.tensor([0.0, 0.25, 0.5, 1.75, 2.5, 4.0, 5.0, 6.0, 7.0])))
    codes = torch.stack([e2m1.encode_stochastic(v.expand_as(u), u) for v in a])
    v = a.double().clamp(max=6)
    position = torch.minimum(torch.minimum(2 * v, v + 2), v / 2 + 4)
    close(codes.double().mean(1), position, 2.0**-17 + 2.0**-21)
    equal(codes.amax(1).int() - codes.amin(1) <= 1, torch.ones(len(a), dtype=torch.bool), "only the two neighbours")


def test_stochastic_rounding_signs_nan_and_saturation() -> None:
    y = torch.tensor([float("nan"), float("inf"), -float("inf"), -0.0, -1e-30, -6.0, 100.0])
    for u in (0.5 / 65536, 65535.5 / 65536):
        codes = e2m1.encode_stochastic(y, torch.full_like(y, u))
        equal(codes, torch.tensor([0, 7, 15, 0, 8, 15, 7], dtype=torch.uint8))

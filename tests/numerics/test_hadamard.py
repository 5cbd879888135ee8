import pytest
import torch

from halfbyte.numerics import hadamard

from ..check import close, equal, same_bits
from . import oracle

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SIGNS = torch.tensor(oracle.SIGNS, dtype=torch.float64)


def explicit_matrix() -> torch.Tensor:
    """diag(signs) · H16 / 4 in float64, H16 built as Sylvester did."""
    h = torch.ones(1, 1, dtype=torch.float64)
    for _ in range(4):
        h = torch.cat((torch.cat((h, h), 1), torch.cat((h, -h), 1)))
    return SIGNS[:, None] * h / 4


@pytest.mark.parametrize("dtype", DTYPES)
def test_exact_on_small_integers(rng: torch.Generator, dtype: torch.dtype) -> None:
    x = torch.randint(-8, 9, (5, 3, 16), generator=rng).to(dtype)  # sums stay below 256, which even bfloat16 holds
    same_bits(
        hadamard.transform(x) + 0.0, (x.double() @ explicit_matrix()).to(dtype) + 0.0
    )  # + 0.0: zeros have no sign


@pytest.mark.parametrize("dtype", DTYPES)
def test_within_rounding_of_the_matrix(rng: torch.Generator, dtype: torch.dtype) -> None:
    x = torch.randn(64, 16, generator=rng).to(dtype)
    expected = x.double() @ explicit_matrix()
    # Four rounded additions on the way to each output, none of a sum larger than Σ|x|; · 0.25 is exact; one rounding
    # to the dtype, of half its eps relative.
    budget = 4 * 2.0**-24 * x.double().abs().sum(-1, keepdim=True) / 4 * (1 + 2.0**-20)
    budget = budget + torch.finfo(dtype).eps / 2 * (expected.abs() + budget)
    close(hadamard.transform(x), expected, budget)


@pytest.mark.parametrize("dtype", DTYPES)
def test_equals_the_oracle(rng: torch.Generator, dtype: torch.dtype) -> None:
    x = (torch.randn(64, 16, generator=rng) * torch.exp2(torch.randint(-9, 9, (64, 16), generator=rng))).to(dtype)
    expected = torch.tensor([oracle.hadamard(row, dtype) for row in x.float().numpy()]).to(dtype)
    same_bits(hadamard.transform(x), expected)


def test_orthonormal() -> None:
    matrix = hadamard.transform(torch.eye(16))
    equal(matrix @ matrix.mT, torch.eye(16))


def test_signs() -> None:
    """The first column of H16 is all ones, so element i alone shows its sign in output 0."""
    equal(hadamard.transform(torch.eye(16))[:, 0], SIGNS.float() / 4)


def test_each_sixteen_on_their_own(rng: torch.Generator) -> None:
    x = torch.randn(4, 48, generator=rng)
    parts = [hadamard.transform(part) for part in x.split(16, dim=-1)]
    same_bits(hadamard.transform(x), torch.cat(parts, dim=-1))


def test_strides_and_empty(rng: torch.Generator) -> None:
    x = torch.randn(32, 5, generator=rng)
    same_bits(hadamard.transform(x.mT), hadamard.transform(x.mT.contiguous()))
    equal(tuple(hadamard.transform(torch.empty(0, 32)).shape), (0, 32))

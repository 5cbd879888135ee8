"""Transposed data, alone, with the row-wise one, and through views, against the contract; run as its neighbours are."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from halfbyte.formats import NVFP4
from halfbyte.kernels import quantize, transposed
from halfbyte.numerics import nvfp4

from ..check import equal, true
from .test_triton_kernels import (  # noqa: F401
    DEVICE,
    DTYPES,
    INTERPRETING,
    check,
    poisoned_memory,
    pytestmark,
    random_words,
)


@pytest.mark.parametrize(
    "fmt",
    [NVFP4(), NVFP4(hadamard=True), NVFP4(scale_rule="four_over_six"), NVFP4(hadamard=True, rounding="stochastic")],
    ids=str,
)
def test_transposed_with_rowwise(fmt: NVFP4, make: Callable[..., Tensor]) -> None:
    for dtype in DTYPES if fmt == NVFP4() else (DTYPES[len(str(fmt)) % 3],):  # each is another kernel to compile
        for kind in ("randn", "nan", "finite"):
            if fmt.hadamard and kind != "randn":
                continue
            x = make(kind, dtype, (32, 48) if INTERPRETING else (112, 1040))
            on_device = x.to(DEVICE)
            columns, rows = transposed.quantize(on_device, fmt, rng=random_words(fmt), first_block=3, rowwise=NVFP4())
            check(columns, nvfp4.quantize(x.mT, fmt, rng=random_words(fmt), first_block=3), f"columns {kind} {dtype}")
            check(rows, nvfp4.quantize(x, NVFP4()), f"rows {kind} {dtype}")
            alone, nothing = transposed.quantize(on_device, fmt, rng=random_words(fmt))
            true(nothing is None, "no row-wise result was asked for")
            check(alone, nvfp4.quantize(x.mT, fmt, rng=random_words(fmt)), f"alone {kind} {dtype}")


@pytest.mark.parametrize(
    "fmt",
    [NVFP4(), NVFP4(hadamard=True), NVFP4(scale_rule="four_over_six"), NVFP4(rounding="stochastic")],
    ids=str,
)
def test_transposed_views(fmt: NVFP4, make: Callable[..., Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    """`quantize` reads the transpose of contiguous matrices as it lies, and of others by element, to the same bytes."""
    taken: list[tuple[int, ...]] = []
    into = transposed.quantize_into

    def noted(m: Any, *args: Any) -> None:
        taken.append((m.matrices, m.rows, m.columns))
        into(m, *args)

    monkeypatch.setattr(transposed, "quantize_into", noted)
    x = make("wide", DTYPES[len(fmt.scale_rule) % 3], (3, 32, 48) if INTERPRETING else (3, 112, 1040))
    given = torch.tensor([1.5, 40.0, 0.3])
    words = {"rng": random_words(fmt), "first_block": 3 if fmt.rounding == "stochastic" else 0}
    for view, per_matrix, amax in (
        (x[1].mT, False, None),
        (x[:1].mT, False, given[0]),
        (x.mT, True, None),
        (x.mT, True, given),
        (x.mT, True, given[1]),
    ):
        wanted = nvfp4.quantize(view, fmt, per_matrix=per_matrix, amax=amax, **words)
        on_device = None if amax is None else amax.to(DEVICE)
        moved = view.mT.to(DEVICE).mT
        got = quantize.quantize(moved, fmt, per_matrix=per_matrix, amax=on_device, **words)
        check(got, wanted, f"{tuple(view.shape)} {amax}")
        equal(taken.pop(), (view.shape[0] if view.dim() == 3 else 1, *view.shape[-2:]), "through the tiles")
    ragged = x[0, :, :40].contiguous().mT  # 40 rows: not in blocks of 16 below each other
    check(quantize.quantize(ragged.mT.to(DEVICE).mT, fmt, **words), nvfp4.quantize(ragged, fmt, **words), "ragged")
    equal(taken, [], "by element")


def test_transposed_stack(make: Callable[..., Tensor]) -> None:
    x = make("wide", torch.bfloat16, (3, 32, 48))
    columns, rows = transposed.quantize(x.to(DEVICE), NVFP4(), rowwise=NVFP4())
    check(columns, nvfp4.quantize(x.mT, NVFP4(), per_matrix=True), "columns")
    check(rows, nvfp4.quantize(x, NVFP4(), per_matrix=True), "rows")


@pytest.mark.parametrize(
    ("fmt", "rowwise"),
    [
        (NVFP4(), NVFP4()),
        (NVFP4(hadamard=True), NVFP4(e4m3_max=288)),
        (NVFP4(hadamard=True, rounding="stochastic"), NVFP4(hadamard=True)),
        (NVFP4(), NVFP4(scaling="row")),
        (NVFP4(scale_rule="four_over_six"), NVFP4(scale_rule="four_over_six")),
    ],
    ids=str,
)
def test_transposed_with_rowwise_under_given_amax(fmt: NVFP4, rowwise: NVFP4, make: Callable[..., Tensor]) -> None:
    for i, kind in enumerate(("wide", "nan", "tiny", "tie")):
        if fmt.hadamard and kind == "nan":
            continue
        x = make(kind, DTYPES[i % 3], (2, 80, 48) if INTERPRETING else (3, 208, 1040))
        for factor in ((1.0, 1e6)[i % 2],) if INTERPRETING else (1.0, 1e6):
            amax = torch.tensor([1.5, 40.0, 0.3])[: x.shape[0]] * factor
            row_amax = amax.flip(0) if rowwise.scaling == "tensor" else x.abs().amax(-1).float()
            columns, rows = transposed.quantize(
                x.to(DEVICE), fmt, amax=amax.to(DEVICE), rng=random_words(fmt), first_block=3,
                rowwise=rowwise, rowwise_amax=row_amax.to(DEVICE),
            )  # fmt: skip
            wanted = nvfp4.quantize(x.mT, fmt, amax=amax, per_matrix=True, rng=random_words(fmt), first_block=3)
            check(columns, wanted, f"columns {kind} {factor}")
            check(rows, nvfp4.quantize(x, rowwise, amax=row_amax, per_matrix=True), f"rows {kind} {factor}")
